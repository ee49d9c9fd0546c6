//! What has to hold after every cell, whatever was done in it.

use super::cell::{Cell, Fault, Victim};
use super::fill;
use super::inject::Roles;
use super::marks::{AtSwitch, Found};
use super::operator::Decision;
use super::run::When;
use super::stand::{Stand, StandVm};
use crate::agentcfg::{self, AgentFiles};
use crate::check;
use crate::drover::Ended;
use anyhow::{Context, Result, bail, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use drover::api::types::{GangPhase, GangReport, VmOutcome, VmReport};
use drover::gang::moments::{Moment, Party};
use std::fs;
use std::path::{Path, PathBuf};

/// What a digest that differs is called by the agents: their last line of
/// defence has held, but no fault of the matrix may bring them there.
const DIGESTS_DIFFER: [&str; 2] = ["differs from what was sent", "This is a bug of drover"];

/// Where a VM was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// It runs in this rack.
    Runs(u8),
    /// No process has it.
    Nowhere,
}

/// What a cell may do to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed {
    /// The fault killed a process that the VM may have run in.
    pub lost: bool,
    /// The VM need not arrive.
    pub stays: bool,
    /// The coordinator could not see what became of it.
    pub unseen: bool,
}

impl Allowed {
    /// What a cell allows of the VM called `vm`.
    pub fn of(cell: &Cell, when: When, roles: &Roles, vm: &str) -> Allowed {
        let focus = vm == roles.focus;
        let dies = matches!(cell.fault, Fault::Kill | Fault::Restart);
        let vmm = matches!(cell.victim, Victim::SourceVmm | Victim::TargetVmm);
        // The target's process is the VM itself from its `cont` on; that it may
        // run is decided with the word *committed*.
        let target_owns = matches!(when, When::After(_))
            || cell.moment.party() == Party::Target && cell.moment >= Moment::ResumeReceived
            || (Moment::Committed..=Moment::SourceEnded).contains(&cell.moment)
            || cell.moment == Moment::Closing;
        let lost = focus
            && (dies
                && match cell.victim {
                    Victim::SourceVmm => true,
                    Victim::TargetVmm => target_owns,
                    _ => false,
                }
                // A guest that finds no memory behind a page it had never
                // touched is killed by its kernel wherever it runs.
                || cell.fault == Fault::NoMemory && target_owns);
        let harmless = matches!(
            cell.fault,
            Fault::Loss | Fault::Corrupt | Fault::ClockForward
        );
        // Everything between the racks, or the gang's driver, concerns all VMs.
        let gang_wide = matches!(
            cell.victim,
            Victim::Coordinator | Victim::CoordinatorLink | Victim::CoreLink
        );
        let hit = match cell.victim {
            // Agents of the other VM's hosts: for the focus only its dedup.
            Victim::ClaimShard | Victim::HolderHost => !focus,
            _ => focus || gang_wide,
        };
        Allowed {
            lost,
            // Nothing is rolled back unless a VM was cancelled before.
            stays: !harmless && hit
                || focus && when == When::Moment && cell.moment == Moment::RolledBack,
            // Of a process that has died with a VM that was let run in it, or
            // may have been, nobody can say how far it came.
            unseen: (!vmm || dies && focus && target_owns && cell.victim == Victim::TargetVmm)
                && !matches!(
                    cell.fault,
                    Fault::DiskFull | Fault::NoMemory | Fault::ClockForward | Fault::ClockBack
                ),
        }
    }
}

/// A stand as it is now.
#[derive(Debug)]
pub struct Now {
    /// Where each VM is, if that is one place or, rightly, none.
    pub places: Option<Vec<Where>>,
    /// What keeps all from being as it should be.
    pub trouble: Option<String>,
}

/// Looks at everything that has to come to rest.
///
/// # Errors
/// When the lab itself cannot be looked at.
pub fn now(stand: &Stand, allowed: impl Fn(&str) -> Allowed) -> Result<Now> {
    let places = match places(stand, allowed)? {
        Ok(places) => places,
        Err(trouble) => {
            return Ok(Now {
                places: None,
                trouble: Some(trouble),
            });
        }
    };
    let mut left = Vec::new();
    for (vm, place) in stand.vms.iter().zip(&places) {
        left.extend(leftovers(stand, vm, *place)?);
    }
    let trouble = match left.is_empty() {
        true => still_busy(stand),
        false => Some(format!("left behind: {}", left.join(", "))),
    };
    Ok(Now {
        places: Some(places),
        trouble,
    })
}

/// Where the VMs are, or which is not where one should be.
fn places(stand: &Stand, allowed: impl Fn(&str) -> Allowed) -> Result<Result<Vec<Where>, String>> {
    let vmms = stand.census.vmms()?;
    let mut places = Vec::new();
    for vm in &stand.vms {
        let of_vm: Vec<_> = vmms.iter().filter(|found| found.vm == vm.name).collect();
        let described = || {
            let at = of_vm.iter().map(|found| {
                let status = found.status().unwrap_or_else(|| "silent".into());
                format!("{} {status} (process {})", found.host, found.pid)
            });
            at.collect::<Vec<_>>().join(", ")
        };
        places.push(match of_vm[..] {
            [only] if only.status().is_some_and(|status| status == "running") => {
                let rack = (1..=2).find(|rack| stand.host(*rack, vm.host).name == only.host);
                match rack {
                    Some(rack) => Where::Runs(rack),
                    None => return Ok(Err(format!("{} is on {}", vm.name, only.host))),
                }
            }
            [] if allowed(&vm.name).lost => Where::Nowhere,
            [] => return Ok(Err(format!("{} is lost: no process has it", vm.name))),
            _ => return Ok(Err(format!("{}: {}", vm.name, described()))),
        });
    }
    Ok(Ok(places))
}

/// Files of a VM where it is not, and files that only a handover needs.
fn leftovers(stand: &Stand, vm: &StandVm, place: Where) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for host in &stand.lab.hosts {
        let files = AgentFiles::of(host);
        let here = match place {
            Where::Runs(rack) => (host.rack, host.index) == (rack, vm.host),
            // A dead VM's files are kept for whoever asks why it died.
            Where::Nowhere => host.index == vm.host,
        };
        if !here {
            let found = check::files_of(&[&files.run_dir, &files.ram_dir], &vm.name)?;
            left.extend(found.iter().map(|path| path.display().to_string()));
        }
        // Sockets that device state goes through, on either side.
        for socket in [
            files.run_dir.join(format!("{}.out.sock", vm.name)),
            files.run_dir.join(&vm.name).join("state.sock"),
        ] {
            if socket.exists() && place != Where::Nowhere {
                left.push(socket.display().to_string());
            }
        }
        let records = entries(&agentcfg::state_dir(host))?;
        let of_vm = |path: &&PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&format!("{}.", vm.name)) && !fill::is_filler(path)
        };
        let records = records.iter().filter(of_vm);
        left.extend(records.map(|path| format!("journal entry {}", path.display())));
    }
    Ok(left)
}

/// All files below a folder.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            match path.is_dir() {
                true => folders.push(path),
                false => found.push(path),
            }
        }
    }
    Ok(found)
}

/// Which agent does not answer, or is not done with a gang.
fn still_busy(stand: &Stand) -> Option<String> {
    let statuses = match stand.statuses() {
        Ok(statuses) => statuses,
        Err(error) => return Some(format!("an agent does not answer: {error:#}")),
    };
    for status in statuses {
        if let Some(gang) = status
            .migrations
            .iter()
            .find(|gang| gang.phase != GangPhase::Done)
        {
            return Some(format!(
                "{} is not done with {}: {:?}",
                status.agent, gang.gang, gang.phase
            ));
        }
        if let Some(open) = status.handovers.iter().find(|open| !open.settled) {
            return Some(format!(
                "{} is not done with a handover: {open:?}",
                status.agent
            ));
        }
    }
    None
}

/// What is left on the hosts that no VM explains: processes, eBPF programs.
///
/// # Errors
/// With what was found.
pub fn nothing_else(stand: &Stand) -> Result<()> {
    let strangers = stand.census.strangers()?;
    ensure!(
        strangers.is_empty(),
        "left behind: {}",
        strangers.join(", ")
    );
    for host in &stand.lab.hosts {
        for hook in [TcAttachType::Ingress, TcAttachType::Egress] {
            let (_, programs) = host
                .ns
                .inside(|| Ok(SchedClassifier::query_tcx("eth0", hook)?))
                .with_context(|| format!("eBPF programs of {}", host.name))?;
            // The meter of the one agent that runs there.
            ensure!(
                programs.len() == 1,
                "{} has {} eBPF programs at {hook:?}, not one",
                host.name,
                programs.len()
            );
        }
    }
    Ok(())
}

/// Whether what the operator was told is what is.
///
/// # Errors
/// With the first thing that is not true, or that must not have happened.
pub fn told_truly(
    ended: &Ended,
    vms: &[StandVm],
    found: &[Where],
    cell: &Cell,
    when: When,
    roles: &Roles,
) -> Result<()> {
    let Some(report) = &ended.report else {
        // Only the death of the agent that would have told is a reason.
        let mute = matches!(cell.victim, Victim::Coordinator)
            && matches!(cell.fault, Fault::Kill | Fault::Stop | Fault::Restart);
        ensure!(mute, "the operator was told nothing: {}", ended.said);
        ensure!(
            !ended.success && !ended.said.trim().is_empty(),
            "the command ended well without a report"
        );
        return Ok(());
    };
    for (vm, place) in vms.iter().zip(found) {
        let allowed = Allowed::of(cell, when, roles, &vm.name);
        let told = report.vms.iter().find(|told| told.name == vm.name);
        let told = told.with_context(|| format!("nothing was told of {}", vm.name))?;
        of_vm(told, *place, allowed, roles)
            .with_context(|| format!("told of {}: {}", vm.name, in_words(told)))?;
    }
    ensure!(
        ended.success == all_arrived(report),
        "the exit status says success: {}, the report {:?}",
        ended.success,
        report.outcome
    );
    Ok(())
}

fn all_arrived(report: &GangReport) -> bool {
    report.vms.iter().all(|vm| vm.outcome == VmOutcome::Arrived)
}

fn in_words(told: &VmReport) -> String {
    let why = told.error.as_deref().unwrap_or("no reason");
    format!("{:?} ({why})", told.outcome)
}

fn of_vm(told: &VmReport, place: Where, allowed: Allowed, roles: &Roles) -> Result<()> {
    let why = told.error.as_deref().unwrap_or_default();
    ensure!(
        !DIGESTS_DIFFER.iter().any(|text| why.contains(text)),
        "pages at the target were wrong, and only the last comparison noticed"
    );
    if unseen(told) {
        ensure!(allowed.unseen, "nothing kept its state from being known");
        return Ok(());
    }
    match (told.outcome, place) {
        (VmOutcome::Arrived, Where::Runs(rack)) => {
            ensure!(rack == roles.to, "it runs in rack {rack}");
            ensure!(told.verified, "it was not verified");
        }
        (VmOutcome::Arrived, Where::Nowhere) => ensure!(allowed.lost, "it is lost"),
        (_, Where::Runs(rack)) => {
            ensure!(rack == roles.from, "it runs in rack {rack}");
            ensure!(
                !why.is_empty() || told.outcome == VmOutcome::Cancelled,
                "no reason was given"
            );
            ensure!(allowed.stays, "nothing in this cell keeps it from arriving");
        }
        (_, Where::Nowhere) => ensure!(allowed.lost && !why.is_empty(), "it is lost"),
    }
    Ok(())
}

/// Whether the report says that it does not know where the VM is: in doubt, or
/// out of the coordinator's sight.
fn unseen(told: &VmReport) -> bool {
    let why = told.error.as_deref().unwrap_or_default();
    told.outcome == VmOutcome::InDoubt || why.contains("decides alone")
}

/// Whether the report said so of every VM that the operator had to decide on.
/// A command that was cut off from its agent has told nothing of any.
///
/// # Errors
/// With the VM whose doubt came unannounced.
pub fn doubt_was_told(report: Option<&GangReport>, decided: &[Decision]) -> Result<()> {
    let Some(report) = report else { return Ok(()) };
    for Decision { vm, .. } in decided {
        let told = report.vms.iter().find(|told| told.name == *vm);
        ensure!(
            told.is_some_and(unseen),
            "{vm} was in doubt until the operator decided, and the report says {told:?}"
        );
    }
    Ok(())
}

/// Whether RAM was the same on both sides whenever a VM came to its switch.
///
/// # Errors
/// With the VM whose RAM was not.
pub fn ram_was_equal(found: &Found) -> Result<()> {
    for (vm, at_switch) in found {
        if let AtSwitch::Differs(pages) = at_switch {
            bail!(
                "RAM of {vm} differs at the switch in {} pages, first {}",
                pages.len(),
                pages[0]
            );
        }
    }
    Ok(())
}

/// Whether the RAM of every VM that arrived was looked at: none slips through.
///
/// # Errors
/// With the VM whose RAM was not.
pub fn held_at_switch(found: &Found, report: Option<&GangReport>) -> Result<()> {
    let told = report.iter().flat_map(|report| &report.vms);
    for vm in told.filter(|vm| vm.outcome == VmOutcome::Arrived) {
        ensure!(
            found.contains_key(&vm.name),
            "{} arrived without having been held at its switch",
            vm.name
        );
    }
    Ok(())
}
