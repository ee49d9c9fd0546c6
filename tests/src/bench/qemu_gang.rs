//! The baselines: QEMU's own migration, all VMs of the gang at once, over TCP
//! between the hosts.

use super::{Moved, Rep, Variant, compares_ram, measured, route, vm_name};
use crate::check;
use crate::qemu::{Places, Vmm};
use crate::save::Saved;
use crate::serial::Serial;
use crate::tenant::Kind;
use crate::topology::Lab;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

/// The longest a baseline may take.
const PATIENCE: Duration = Duration::from_secs(300);

struct Pair {
    source: Vmm,
    target: Vmm,
    to: Ipv4Addr,
    port: u16,
}

/// One VM's times.
struct Times {
    stop_resume_ms: f64,
    reported_ms: f64,
    equal: Option<bool>,
}

/// Restores the gang, migrates it, and checks that the guests live on. With a
/// tenant, all RAM is compared before the targets run.
///
/// # Errors
/// When a VM fails, or its guest finds wrong data.
pub fn run(lab: &Lab, saves: &[Saved], variant: Variant, kind: Option<Kind>) -> Result<Rep> {
    let compare = compares_ram(kind);
    let mut pairs = Vec::new();
    for (i, saved) in saves.iter().enumerate() {
        pairs.push(pair(lab, saved, i, variant, compare)?);
    }
    for pair in &mut pairs {
        pair.source.qmp.execute("cont", json!({}))?;
    }
    for pair in &pairs {
        Serial::new(&pair.source.at.serial).ticks_on(3, Duration::from_secs(20))?;
    }
    let rep = measured(lab, kind, || {
        let times: Vec<Result<Times>> = std::thread::scope(|s| {
            let moves: Vec<_> = pairs
                .iter_mut()
                .map(|p| s.spawn(|| p.migrate(compare)))
                .collect();
            moves
                .into_iter()
                .map(|m| m.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
                .collect()
        });
        let times = times.into_iter().collect::<Result<Vec<_>>>()?;
        let equal: Option<Vec<bool>> = times.iter().map(|t| t.equal).collect();
        Ok(Moved {
            stop_resume_ms: times.iter().map(|t| t.stop_resume_ms).collect(),
            reported_ms: times.iter().map(|t| t.reported_ms).collect(),
            ram_equal: equal.map(|e| e.into_iter().all(|e| e)),
        })
    })?;
    for pair in &pairs {
        pair.target.tell_guest("verify")?;
    }
    for pair in &pairs {
        let serial = Serial::new(&pair.target.at.serial);
        let verified = serial.wait("VERIFIED", Duration::from_secs(30), |t| {
            t.contains("VERIFIED")
        });
        verified.with_context(|| format!("guest of {} after its migration", pair.target.name))?;
        serial.ticks_on(2, Duration::from_secs(10))?;
    }
    Ok(rep)
}

fn pair(lab: &Lab, saved: &Saved, index: usize, variant: Variant, compare: bool) -> Result<Pair> {
    let (from, to) = route(lab, index);
    let name = vm_name(index);
    let source_at = Places::of(&name, &from.run_dir, &from.shm_dir);
    let target_at = Places::of(&name, &to.run_dir, &to.shm_dir);
    for file in [&source_at.serial, &target_at.serial] {
        // Serial files are appended to; this run must not see the last one's.
        let _ = std::fs::remove_file(file);
    }
    let mut source = saved.restore(Some(&from.ns), &name, &source_at)?;
    let hold: &[&str] = if compare {
        &["-S", "-incoming", "defer"]
    } else {
        &["-incoming", "defer"]
    };
    let mut target = Vmm::start(Some(&to.ns), &name, &saved.guest, &target_at, hold)?;
    for vmm in [&mut source, &mut target] {
        let wanted = match variant {
            Variant::QemuMultifdZstd => Some("multifd"),
            Variant::QemuXbzrle => Some("xbzrle"),
            _ => None,
        };
        vmm.qmp.capabilities(&[("events", true)])?;
        if let Some(capability) = wanted {
            vmm.qmp.capabilities(&[(capability, true)])?;
        }
        vmm.qmp
            .execute("migrate-set-parameters", parameters(variant))?;
    }
    let port = 4000 + index as u16;
    let uri = format!("tcp:{}:{port}", to.addr);
    target
        .qmp
        .execute("migrate-incoming", json!({"uri": uri}))?;
    Ok(Pair {
        source,
        target,
        to: to.addr,
        port,
    })
}

/// Without a bandwidth limit; all else at QEMU's defaults.
fn parameters(variant: Variant) -> Value {
    let mut set = json!({"max-bandwidth": 1u64 << 40});
    match variant {
        Variant::QemuMultifdZstd => {
            set["multifd-channels"] = json!(2);
            set["multifd-compression"] = json!("zstd");
            set["multifd-zstd-level"] = json!(1);
        }
        Variant::QemuXbzrle => set["xbzrle-cache-size"] = json!(64u64 << 20),
        _ => (),
    }
    set
}

impl Pair {
    fn migrate(&mut self, compare: bool) -> Result<Times> {
        let Pair { source, target, .. } = self;
        let uri = format!("tcp:{}:{}", self.to, self.port);
        source.qmp.execute("migrate", json!({"uri": uri}))?;
        source
            .qmp
            .migration_completed(PATIENCE)
            .with_context(|| format!("source of {}", source.name))?;
        let arrived = target
            .qmp
            .migration_completed(PATIENCE)
            .with_context(|| format!("target of {}", target.name))?;
        let mut equal = None;
        let resumed = if compare {
            let differing =
                check::differing_pages(Path::new(&source.at.ram), Path::new(&target.at.ram))?;
            equal = Some(differing.is_empty());
            target.qmp.execute("cont", json!({}))?;
            arrived.at_us
        } else {
            // QEMU starts the guest just before it says `completed`.
            let resumed = target.qmp.last_at("RESUME");
            resumed.context("the target completed without starting its guest")?
        };
        let stopped = source
            .qmp
            .last_at("STOP")
            .context("the source never stopped its guest")?;
        Ok(Times {
            stop_resume_ms: resumed.saturating_sub(stopped) as f64 / 1000.0,
            reported_ms: reported_downtime(source)?,
            equal,
        })
    }
}

/// `query-migrate` may still show zero right at `completed`: ask again.
fn reported_downtime(source: &mut Vmm) -> Result<f64> {
    for _ in 0..20 {
        let info = source.qmp.execute("query-migrate", json!({}))?;
        match info["downtime"].as_f64() {
            Some(ms) if ms > 0.0 => return Ok(ms),
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    Ok(0.0)
}
