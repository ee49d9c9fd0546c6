//! Guests booted once and kept, so that every variant and every test starts
//! from the same RAM, at once.

use crate::guest::kvm::KvmWork;
use crate::netns::Netns;
use crate::qemu::{self, Guest, Places, QEMU, Vmm, Workload};
use crate::registry::LabId;
use crate::serial::Serial;
use crate::{cache, guest};
use anyhow::{Context, Result};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const BOOT: Duration = Duration::from_secs(90);

/// A guest as it was saved: RAM, device state, and what it is.
#[derive(Debug, Clone)]
pub struct Saved {
    /// What runs in it.
    pub guest: Guest,
    /// The folder with files `ram` and `device`.
    pub dir: PathBuf,
}

impl Saved {
    /// The saved RAM.
    pub fn ram(&self) -> PathBuf {
        self.dir.join("ram")
    }

    /// Starts a VM from the save in `ns`; it stands still until [`Vmm`] is
    /// told `cont`. Nothing of the restore stays set in it.
    ///
    /// # Errors
    /// When there is no space for the RAM or QEMU refuses the state.
    pub fn restore(&self, ns: Option<&Netns>, name: &str, at: &Places) -> Result<Vmm> {
        self.restore_with(ns, name, at, &[])
    }

    /// As [`Saved::restore`], with further arguments for QEMU.
    ///
    /// # Errors
    /// As [`Saved::restore`].
    pub fn restore_with(
        &self,
        ns: Option<&Netns>,
        name: &str,
        at: &Places,
        more: &[&str],
    ) -> Result<Vmm> {
        if !at.private {
            qemu::copy_sparse(&self.ram(), Path::new(&at.ram))?;
        }
        let mut vmm = Vmm::start(
            ns,
            name,
            &self.guest,
            at,
            &[&["-S", "-incoming", "defer"], more].concat(),
        )?;
        let shared = "x-ignore-shared";
        vmm.qmp.capabilities(&[(shared, true), ("events", true)])?;
        let uri = format!("exec:cat '{}'", self.dir.join("device").display());
        vmm.qmp.execute("migrate-incoming", json!({"uri": uri}))?;
        vmm.qmp
            .migration_completed(Duration::from_secs(20))
            .with_context(|| format!("restoring VM {name}"))?;
        vmm.qmp.capabilities(&[(shared, false)])?;
        Ok(vmm)
    }
}

/// Linux guests with seeds 1 to `count` at this work, saved once they are at
/// it. Those that are missing are booted now, one after the other.
///
/// # Errors
/// When one does not boot.
pub fn linux(count: u32, workload: Workload) -> Result<Vec<Saved>> {
    let files = guest::linux_files()?;
    (1..=count)
        .map(|seed| {
            saved(Guest::Linux {
                files: files.clone(),
                seed,
                workload,
            })
        })
        .collect()
}

/// Small KVM guests with seeds 1 to `count`.
///
/// # Errors
/// When one does not boot: without `/dev/kvm`, for one.
pub fn kvm(count: u32) -> Result<Vec<Saved>> {
    (1..=count)
        .map(|seed| saved(Guest::small_kvm(seed)?))
        .collect()
}

/// A KVM guest of 32 MiB with this work.
///
/// # Errors
/// As [`kvm`].
pub fn kvm_with(work: KvmWork) -> Result<Saved> {
    saved(Guest::Kvm {
        elf: guest::kvm::ensure()?,
        ram_mib: 32,
        work,
    })
}

fn saved(guest: Guest) -> Result<Saved> {
    let nowhere = Places {
        ram: String::new(),
        private: false,
        serial: String::new(),
        control: String::new(),
        qmp: String::new(),
    };
    let mut inputs = vec![
        guest.args(&nowhere).join(" "),
        cache::stamp(Path::new(QEMU))?,
    ];
    match &guest {
        Guest::Linux { files, .. } => {
            for file in [
                &files.kernel,
                &files.initrd,
                &files.common,
                &files.stamped[0],
                &files.stamped[1],
            ] {
                inputs.push(cache::stamp(file)?);
            }
        }
        Guest::Kvm { elf, .. } => inputs.push(cache::stamp(elf)?),
    }
    let inputs: Vec<&[u8]> = inputs.iter().map(String::as_bytes).collect();
    let name = match &guest {
        Guest::Linux { seed, workload, .. } => format!(
            "saved-linux-{}-{seed}",
            workload.command().replace(' ', "-")
        ),
        Guest::Kvm { work, .. } => format!("saved-kvm-{}", work.cmdline().replace(' ', "-")),
    };
    let dir = cache::built(&name, &inputs, |dir| boot_and_save(&guest, dir))?;
    Ok(Saved { guest, dir })
}

/// Boots a guest, waits until it is at work, and saves it.
fn boot_and_save(guest: &Guest, dir: &Path) -> Result<()> {
    let lab = LabId::create()?;
    let at = Places::of("boot", &lab.run_dir(), &lab.shm_dir());
    // In a namespace of its own, where it is found if this process is killed.
    let ns = Netns::create(&lab.netns_name("boot"))?;
    let vmm = Vmm::start(Some(&ns), "boot", guest, &at, &[])?;
    let serial = Serial::new(&at.serial);
    serial
        .wait("READY", BOOT, |t| t.contains("READY"))
        .context("booting a guest to save")?;
    // A second of ticks: whatever the kernel does last in booting is done.
    serial.ticks_on(6, Duration::from_secs(20))?;
    vmm.save(dir)?;
    Ok(fs::copy(&at.serial, dir.join("serial")).map(drop)?)
}
