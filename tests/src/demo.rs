//! The main job, told while it happens: a gang moves between two racks.

use crate::agentcfg::AgentOptions;
use crate::bench::bound::{self, Bound};
use crate::bench::{route, vm_name};
use crate::drover::{Cluster, Migrated};
use crate::gang::{Gang, Move};
use crate::qemu::{Guest, Workload};
use crate::save::{self, Saved};
use crate::topology::{CoreCounters, Lab, Shape};
use anyhow::{Result, bail};
use drover::api::types::Outcome;
use drover::cli::render;

/// What runs in the VMs of a lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guests {
    /// Linux under TCG, restored from saves.
    Linux(Workload),
    /// The freestanding guest under KVM, booted by `drover vm run`.
    Kvm,
}

/// A lab as `lab up`, `lab run` and `lab demo` want it.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Racks and hosts.
    pub shape: Shape,
    /// Size of the gang.
    pub vms: u32,
    /// So many of them, from the first, have RAM of their own.
    pub private_ram: u32,
    /// What runs in it.
    pub guests: Guests,
    /// Further arguments of `drover migrate`.
    pub migrate_args: Vec<String>,
}

fn saves(setup: &Setup) -> Result<Option<Vec<Saved>>> {
    match setup.guests {
        Guests::Linux(workload) => save::linux(setup.vms, workload).map(Some),
        Guests::Kvm => Ok(None),
    }
}

/// Starts the VMs of `setup` on the source rack.
///
/// # Errors
/// When one does not come up.
pub fn start_vms(setup: &Setup, saves: Option<&[Saved]>, gang: &mut Gang) -> Result<()> {
    for i in 0..setup.vms as usize {
        let host = route(gang.lab, i).0.name.clone();
        let (name, private) = (vm_name(i), i < setup.private_ram as usize);
        match (saves, private) {
            (Some(saves), false) => gang.adopt(&name, &saves[i], &host)?,
            (Some(saves), true) => gang.adopt_private(&name, &saves[i], &host)?,
            (None, false) => gang.run(&name, &Guest::small_kvm(i as u32 + 1)?, &host)?,
            (None, true) => gang.run_private(&name, &Guest::small_kvm(i as u32 + 1)?, &host)?,
        }
        // It takes a few seconds each: whoever waits is to see that it goes on.
        eprintln!("lab: {} runs on {host}", vm_name(i));
    }
    Ok(())
}

/// Brings a lab up with agents and VMs, and leaves it standing.
///
/// # Errors
/// When something does not come up; all of it is taken down again.
pub fn up(setup: &Setup) -> Result<()> {
    let saves = saves(setup)?;
    let lab = Lab::up(setup.shape.clone())?;
    let cluster = Cluster::start(&lab, AgentOptions::default())?;
    let mut gang = Gang::new(&lab, &cluster);
    start_vms(setup, saves.as_deref(), &mut gang)?;
    println!("lab {} stands; `lab down` ends it. Its hosts:", lab.id());
    for host in &lab.hosts {
        let vms: Vec<&str> = gang
            .vms
            .iter()
            .filter(|v| v.host == host.name)
            .map(|v| v.name.as_str())
            .collect();
        let agent = cluster.agent(&host.name);
        println!(
            "  {:6} {:10} {:14} {}",
            host.name,
            host.addr,
            vms.join(" "),
            agent.files.socket.display()
        );
    }
    let plan = lab.run_dir().join("plan.toml");
    let moves: Vec<_> = gang
        .vms
        .iter()
        .enumerate()
        .map(|(i, v)| {
            (
                v.name.clone(),
                v.host.clone(),
                route(&lab, i).1.name.clone(),
            )
        })
        .collect();
    std::fs::write(&plan, crate::agentcfg::plan("gang", &moves))?;
    println!(
        "move the gang with:\n  drover --socket {} migrate {}",
        cluster.agents[0].files.socket.display(),
        plan.display()
    );
    // Nothing of it may end with this process.
    std::mem::forget(gang);
    std::mem::forget(cluster);
    lab.keep();
    Ok(())
}

/// Brings a lab up, migrates its gang, checks everything, and takes it down.
/// With `tell`, it explains what happens.
///
/// # Errors
/// When a VM does not arrive or anything is wrong afterwards.
pub fn run(setup: &Setup, tell: bool) -> Result<()> {
    let say = |text: &str| {
        if tell {
            println!("{text}");
        }
    };
    let (saves, bound) = match saves(setup)? {
        Some(saves) => {
            let bound = bound::of(&saves)?;
            (Some(saves), Some(bound))
        }
        None => (None, None),
    };
    let lab = Lab::up(setup.shape.clone())?;
    say(&topology(&lab));
    say("One agent runs on every host; each has the same cluster secret and knows the others.");
    let mut cluster = Cluster::start(&lab, AgentOptions::default())?;
    cluster.progress = tell;
    let mut gang = Gang::new(&lab, &cluster);
    start_vms(setup, saves.as_deref(), &mut gang)?;
    let ram: u64 = gang.vms.iter().map(|v| v.guest.ram_bytes()).sum();
    say(&format!(
        "{} VMs run in rack 1, {} MB of RAM together, and tick:",
        gang.vms.len(),
        ram / 1_000_000
    ));
    for vm in &gang.vms {
        say(&format!(
            "  {} on {}: {}",
            vm.name,
            vm.host,
            last_line(&vm.serial().text()?)
        ));
    }
    if let Some(bound) = &bound {
        say(&format!(
            "Of that, {} MB are not zero, {} MB are distinct pages, {} MB when compressed.",
            bound.nonzero_bytes / 1_000_000,
            bound.distinct_bytes / 1_000_000,
            bound.zstd1_bytes / 1_000_000
        ));
    }
    say("\nNow all of them move to rack 2, with one command: drover migrate plan.toml\n");
    let moves: Vec<Move> = (0..gang.vms.len())
        .map(|i| (i, route(&lab, i).1.name.as_str()))
        .collect();
    let before = lab.core()?;
    let args: Vec<&str> = setup.migrate_args.iter().map(String::as_str).collect();
    let (migrated, stops) = gang.migrate("demo", &moves, &args)?;
    let core = lab.core()?.since(&before);
    if migrated.report.outcome != Outcome::Arrived || !migrated.success {
        bail!(
            "the gang did not arrive: {:#?}\n{}",
            migrated.report,
            migrated.stderr
        );
    }
    say(
        "\nEvery guest checks all of its data on its new host, and nothing of it is left on the old one.",
    );
    gang.check()?;
    for vm in &gang.vms {
        say(&format!(
            "  {} on {}: {}",
            vm.name,
            vm.host,
            last_line(&vm.serial().text()?)
        ));
    }
    println!("{}", report(&migrated, &stops, &core, ram, bound.as_ref()));
    drop(gang);
    cluster.stop()?;
    let id = lab.id().to_string();
    drop(lab);
    crate::check::nothing_left(&id)?;
    say("The lab is taken down; no process, namespace or file of it is left.");
    Ok(())
}

fn last_line(text: &str) -> &str {
    text.lines().last().unwrap_or("(nothing yet)")
}

fn topology(lab: &Lab) -> String {
    let rack = |r: u8| {
        let hosts = lab
            .hosts
            .iter()
            .filter(|h| h.rack == r)
            .map(|h| format!("{} {}", h.name, h.addr));
        hosts.collect::<Vec<_>>().join(", ")
    };
    let racks: Vec<String> = (1..=lab.shape.racks)
        .map(|r| format!("  rack {r}: {}", rack(r)))
        .collect();
    format!(
        "This is lab {}: network namespaces for hosts, bridges for the racks' switches.\n{}\n\
         The core link between the racks carries {} Mbit/s each way; inside a rack nothing is limited.",
        lab.id(),
        racks.join("\n"),
        lab.shape.rate_mbit
    )
}

/// The outcome in a few lines: bytes over the core link against RAM.
fn report(
    migrated: &Migrated,
    stops: &[f64],
    core: &CoreCounters,
    ram: u64,
    bound: Option<&Bound>,
) -> String {
    let mut out = format!(
        "\n{:8} {:14} {:>9} {:>8} {:>8} {:>8} {:>9} {:>7}\n",
        "VM", "from → to", "stopped", "rounds", "sent", "refs", "unchanged", "resent"
    );
    for (vm, stop) in migrated.report.vms.iter().zip(stops) {
        out += &format!(
            "{:8} {:14} {:>6.0} ms {:>8} {:>8} {:>8} {:>9} {:>7}\n",
            vm.name,
            format!("{} → {}", vm.from, vm.to),
            stop,
            vm.rounds,
            vm.pages.sent,
            vm.pages.reference,
            vm.pages.unchanged,
            vm.pages.resent
        );
    }
    out += "\n";
    out += &render::stops(&migrated.report);
    let stops = migrated.report.vms.iter().filter_map(|vm| vm.stop);
    if let Some(most) = stops.map(|stop| stop.handover_ms()).reduce(f64::max) {
        out += &format!("handover, commit and resume together: at most {most:.1} ms of a stop\n");
    }
    let mb = |bytes: u64| bytes as f64 / 1e6;
    out += &format!(
        "\n{:.1} s; {:.0} MB over the core link for {:.0} MB of RAM: {:.0} %",
        migrated.report.total_ms as f64 / 1000.0,
        mb(core.total()),
        mb(ram),
        mb(core.total()) / mb(ram) * 100.0
    );
    if let Some(bound) = bound {
        out += &format!(
            " ({:.0} MB would be each distinct page once, uncompressed)",
            mb(bound.distinct_bytes)
        );
    }
    out + "\n"
}
