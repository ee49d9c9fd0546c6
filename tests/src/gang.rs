//! A gang of VMs in the care of agents: started, migrated, checked.

use crate::agentcfg::{self, AgentFiles, Memory};
use crate::check;
use crate::drover::{Cluster, Migrated, Migration};
use crate::kvmm::{Inside, Kvmm, Setup};
use crate::qemu::{self, Guest, Places, Vmm};
use crate::registry;
use crate::save::Saved;
use crate::serial::Serial;
use crate::stopwatch::{self, StopWatch};
use crate::topology::{Host, Lab};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

const TICKS: Duration = Duration::from_secs(20);
const VERIFY: Duration = Duration::from_secs(60);
/// How long to wait before a guest is asked again: one that interprets its
/// checks in a shell under TCG takes seconds, the freestanding one
/// milliseconds.
const ASK_AGAIN: Duration = Duration::from_secs(8);
const ASK_KVM_AGAIN: Duration = Duration::from_millis(700);

/// A VM of the gang.
#[derive(Debug)]
pub struct RunningVm {
    /// Its name.
    pub name: String,
    /// What runs in it.
    pub guest: Guest,
    /// The host it runs on.
    pub host: String,
    /// Its files there; `qmp` is the lab's own monitor.
    pub at: Places,
    /// Whether it is in `kvmm` (kind `kvm-log`), of which the lab has no monitor.
    pub linked: bool,
    /// Set while it runs in a VMM that the lab started and an agent adopted.
    vmm: Option<Own>,
}

/// A VMM that the lab has started.
#[derive(Debug)]
enum Own {
    Qemu(Box<Vmm>),
    Kvmm(Box<Kvmm>),
}

impl Own {
    fn ended(&mut self) -> Result<()> {
        match self {
            Own::Qemu(vmm) => vmm.ended(Duration::from_secs(5)),
            Own::Kvmm(vmm) => vmm.ended(),
        }
    }
}

/// VMs on a lab's hosts with agents.
#[derive(Debug)]
pub struct Gang<'a> {
    /// The lab.
    pub lab: &'a Lab,
    /// Its agents.
    pub cluster: &'a Cluster,
    /// The VMs.
    pub vms: Vec<RunningVm>,
}

/// From where to where: index of the VM in [`Gang::vms`], name of the target.
pub type Move<'m> = (usize, &'m str);

impl<'a> Gang<'a> {
    /// An empty gang.
    pub fn new(lab: &'a Lab, cluster: &'a Cluster) -> Gang<'a> {
        Gang {
            lab,
            cluster,
            vms: Vec::new(),
        }
    }

    fn host(&self, name: &str) -> Result<&'a Host> {
        self.lab
            .hosts
            .iter()
            .find(|h| h.name == name)
            .with_context(|| format!("the lab has no host {name}"))
    }

    /// Puts a VM's definition on all hosts' agents.
    fn define(&self, name: &str, text: &str) -> Result<()> {
        for host in &self.lab.hosts {
            let file = AgentFiles::of(host)
                .definitions
                .join(format!("{name}.toml"));
            fs::write(file, text)?;
        }
        Ok(())
    }

    /// Restores a saved guest on `host` and lets the agent there adopt it.
    ///
    /// # Errors
    /// When the guest does not tick or the agent refuses it.
    pub fn adopt(&mut self, name: &str, saved: &Saved, host: &str) -> Result<()> {
        self.adopt_in("lab", name, saved, host)
    }

    /// As [`Gang::adopt`], in this dedup domain.
    ///
    /// # Errors
    /// As [`Gang::adopt`].
    pub fn adopt_in(&mut self, domain: &str, name: &str, saved: &Saved, host: &str) -> Result<()> {
        self.adopt_as(domain, name, saved, host, false)
    }

    /// As [`Gang::adopt`]; its RAM is the VMM's own.
    ///
    /// # Errors
    /// As [`Gang::adopt`].
    pub fn adopt_private(&mut self, name: &str, saved: &Saved, host: &str) -> Result<()> {
        self.adopt_as("lab", name, saved, host, true)
    }

    fn adopt_as(
        &mut self,
        domain: &str,
        name: &str,
        saved: &Saved,
        host: &str,
        private: bool,
    ) -> Result<()> {
        self.define(
            name,
            &agentcfg::definition(name, domain, &saved.guest, private),
        )?;
        let on = self.host(host)?;
        // Apart from the agent's folders: there it makes its own when a VM arrives.
        let (run, shm) = (on.run_dir.join("lab"), on.shm_dir.join("lab"));
        fs::create_dir_all(&run)?;
        fs::create_dir_all(&shm)?;
        let mut at = Places::of(name, &run, &shm);
        if private {
            at.private = true;
            at.ram = saved.ram().display().to_string();
        }
        let _ = fs::remove_file(&at.serial);
        let monitor = run.join(format!("{name}.agent.qmp")).display().to_string();
        let socket = |path: &str| format!("unix:{path},server=on,wait=off");
        let watch = Path::new(&at.qmp)
            .with_extension(stopwatch::WATCH)
            .display()
            .to_string();
        let more = ["-qmp", &socket(&monitor), "-qmp", &socket(&watch)];
        let mut vmm = saved.restore_with(Some(&on.ns), name, &at, &more)?;
        vmm.qmp.execute("cont", json!({}))?;
        Serial::new(&at.serial).ticks_on(2, TICKS)?;
        self.cluster
            .agent(host)
            .run(&["vm", "adopt", name, "--qmp", &monitor])?;
        if private {
            // The save stays when the VM leaves.
            at.ram.clear();
        }
        let guest = saved.guest.clone();
        self.vms.push(RunningVm {
            name: name.into(),
            guest,
            host: host.into(),
            at,
            linked: false,
            vmm: Some(Own::Qemu(Box::new(vmm))),
        });
        Ok(())
    }

    /// Boots a guest by `drover vm run` on `host`.
    ///
    /// # Errors
    /// When the agent cannot start it or it does not tick.
    pub fn run(&mut self, name: &str, guest: &Guest, host: &str) -> Result<()> {
        let text = agentcfg::definition(name, "lab", guest, false);
        self.run_as(name, guest, host, &text, false)
    }

    /// As [`Gang::run`]; its RAM is the VMM's own.
    ///
    /// # Errors
    /// As [`Gang::run`].
    pub fn run_private(&mut self, name: &str, guest: &Guest, host: &str) -> Result<()> {
        let text = agentcfg::definition(name, "lab", guest, true);
        self.run_as(name, guest, host, &text, false)
    }

    /// As [`Gang::run`]; in `kvmm`, as a VM of kind `kvm-log`.
    ///
    /// # Errors
    /// As [`Gang::run`].
    pub fn run_linked(
        &mut self,
        name: &str,
        guest: &Guest,
        host: &str,
        memory: Memory,
    ) -> Result<()> {
        let text = agentcfg::linked_definition(name, "lab", guest, memory)?;
        self.run_as(name, guest, host, &text, true)
    }

    /// Starts `kvmm` on `host`, and lets the agent there adopt it.
    ///
    /// # Errors
    /// When it does not start or the agent refuses it.
    pub fn adopt_linked(&mut self, name: &str, guest: &Guest, host: &str) -> Result<()> {
        let text = agentcfg::linked_definition(name, "lab", guest, Memory::Own)?;
        self.define(name, &text)?;
        let Guest::Kvm { ram_mib, work, .. } = *guest else {
            bail!("kvmm cannot run {guest:?}");
        };
        let setup = Setup {
            ram_mib,
            ring: None,
            inside: Inside::Checker(work),
        };
        let vmm = Kvmm::start_in(Some(&self.host(host)?.ns), name, &setup)?;
        let path = |path: &Path| path.display().to_string();
        let link = path(&vmm.link);
        self.cluster
            .agent(host)
            .run(&["vm", "adopt", name, "--link", &link])?;
        let at = Places {
            // Ours, and not for the agent to remove.
            ram: String::new(),
            private: false,
            serial: path(vmm.serial.path()),
            control: path(&vmm.commands),
            qmp: link,
        };
        self.vms.push(RunningVm {
            name: name.into(),
            guest: guest.clone(),
            host: host.into(),
            at,
            linked: true,
            vmm: Some(Own::Kvmm(Box::new(vmm))),
        });
        Ok(())
    }

    fn run_as(
        &mut self,
        name: &str,
        guest: &Guest,
        host: &str,
        definition: &str,
        linked: bool,
    ) -> Result<()> {
        self.define(name, definition)?;
        let agent = self.cluster.agent(host);
        agent.run(&["vm", "run", name])?;
        let at = agent.files.places(name);
        Serial::new(&at.serial).wait("tick", Duration::from_secs(60), |t| t.contains("TICK "))?;
        self.vms.push(RunningVm {
            name: name.into(),
            guest: guest.clone(),
            host: host.into(),
            at,
            linked,
            vmm: None,
        });
        Ok(())
    }

    fn plan(&self, moves: &[Move]) -> Vec<(String, String, String)> {
        let entry = |(i, to): &Move| {
            (
                self.vms[*i].name.clone(),
                self.vms[*i].host.clone(),
                to.to_string(),
            )
        };
        moves.iter().map(entry).collect()
    }

    /// Starts a migration without waiting for it.
    ///
    /// # Errors
    /// As [`Cluster::start_migration`].
    pub fn start_migration(&self, gang: &str, moves: &[Move], args: &[&str]) -> Result<Migration> {
        self.cluster
            .start_migration(self.lab, gang, &self.plan(moves), args)
    }

    /// Migrates, with the stops of those in QEMU timed. VMs that arrived are on their new hosts
    /// afterwards, the others where they were; see [`Gang::check`].
    ///
    /// # Errors
    /// When the command gives no report or a stop was not seen.
    pub fn migrate(
        &mut self,
        gang: &str,
        moves: &[Move],
        args: &[&str],
    ) -> Result<(Migrated, Vec<f64>)> {
        let watches = moves
            .iter()
            .map(|(i, to)| self.watch(*i, to))
            .collect::<Result<Vec<_>>>()?;
        let migrated = self.start_migration(gang, moves, args)?.wait()?;
        let mut stops = Vec::new();
        for (watch, (i, _)) in watches.into_iter().zip(moves) {
            if let Some(watch) = watch
                && self.arrived(&migrated, *i)
            {
                let name = &self.vms[*i].name;
                stops.push(
                    watch
                        .finish()
                        .with_context(|| format!("timing the stop of {name}"))?,
                );
            }
        }
        self.settle(&migrated, moves)?;
        Ok((migrated, stops))
    }

    fn watch(&self, index: usize, to: &str) -> Result<Option<StopWatch>> {
        let vm = &self.vms[index];
        if vm.linked {
            return Ok(None);
        }
        let target = self.cluster.agent(to).files.places(&vm.name);
        let watch = StopWatch::start(
            Path::new(&vm.at.qmp),
            vm.vmm.is_some(),
            Path::new(&target.qmp),
        )?;
        Ok(Some(watch))
    }

    fn arrived(&self, migrated: &Migrated, index: usize) -> bool {
        let vm = migrated
            .report
            .vms
            .iter()
            .find(|v| v.name == self.vms[index].name);
        vm.is_some_and(|v| v.outcome == drover::api::types::VmOutcome::Arrived)
    }

    /// Takes note of where the VMs are after a migration.
    ///
    /// # Errors
    /// When a VMM that the lab started still runs though its VM has left.
    pub fn settle(&mut self, migrated: &Migrated, moves: &[Move]) -> Result<()> {
        for (i, to) in moves {
            if !self.arrived(migrated, *i) {
                continue;
            }
            let at = self.cluster.agent(to).files.places(&self.vms[*i].name);
            let vm = &mut self.vms[*i];
            let source_ram = std::mem::replace(&mut vm.at, at).ram;
            vm.host = to.to_string();
            if let Some(mut vmm) = vm.vmm.take() {
                vmm.ended()
                    .with_context(|| format!("source of {}", vm.name))?;
            }
            let until = Instant::now() + Duration::from_secs(5);
            while Path::new(&source_ram).exists() {
                if Instant::now() > until {
                    bail!("{} arrived, but {source_ram} is still there", vm.name);
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// Checks that every VM lives where it should: exactly one VMM runs it, on
    /// its host; its guest ticks, and finds all of its data right.
    ///
    /// # Errors
    /// With the first thing that is wrong.
    pub fn check(&self) -> Result<()> {
        for vm in &self.vms {
            let pid = check::exactly_one_vmm(self.lab, &vm.name)?;
            if !registry::processes(&self.host(&vm.host)?.ns)?.contains(&pid) {
                bail!("{} runs, but not on {}", vm.name, vm.host);
            }
            vm.verify()?;
        }
        self.no_halves()
    }

    /// Fails when a host keeps files of a VM that does not run there.
    fn no_halves(&self) -> Result<()> {
        for host in &self.lab.hosts {
            let files = AgentFiles::of(host);
            for vm in self.vms.iter().filter(|vm| vm.host != host.name) {
                let left = check::files_of(&[&files.run_dir, &files.ram_dir], &vm.name)?;
                if !left.is_empty() {
                    bail!(
                        "{} is not on {}, but left {left:?} there",
                        vm.name,
                        host.name
                    );
                }
            }
        }
        Ok(())
    }
}

impl RunningVm {
    /// What the guest says.
    pub fn serial(&self) -> Serial {
        Serial::new(&self.at.serial)
    }

    /// Sends the guest a command.
    ///
    /// # Errors
    /// When its control port is gone.
    pub fn tell(&self, line: &str) -> Result<()> {
        qemu::tell_guest(Path::new(&self.at.control), line)
    }

    /// Lets the guest check all of its data, then tick on.
    ///
    /// # Errors
    /// When it finds wrong data or does not answer.
    pub fn verify(&self) -> Result<()> {
        verify(&self.name, &self.host, &self.at, &self.guest)
    }
}

/// Lets the guest of the VM `name` check all of its data, then tick on.
///
/// # Errors
/// When it finds wrong data or does not answer.
pub fn verify(name: &str, host: &str, at: &Places, guest: &Guest) -> Result<()> {
    let serial = Serial::new(&at.serial);
    let context = || format!("VM {name} on {host}");
    let before = serial.verified().with_context(context)?;
    let newer = |text: &str| {
        let all = text.lines().filter_map(|l| l.strip_prefix("VERIFIED "));
        all.filter_map(|l| l.split(' ').next()?.parse::<u64>().ok())
            .any(|n| n > before)
    };
    // A VMM that does not get the CPU for a while drops what it has not
    // read of its control port when a connection closes: this one stays open,
    // but an earlier one may have left half a line.
    let again = match guest {
        Guest::Kvm { .. } => ASK_KVM_AGAIN,
        Guest::Linux { .. } => ASK_AGAIN,
    };
    let until = Instant::now() + VERIFY;
    loop {
        let _open = qemu::say_to_guest(Path::new(&at.control), "verify").with_context(context)?;
        let left = until.saturating_duration_since(Instant::now());
        match serial.wait("VERIFIED", left.min(again), newer) {
            Ok(_) => break,
            Err(error) if Instant::now() >= until => return Err(error).with_context(context),
            Err(_) => drop(serial.text().with_context(context)?),
        }
    }
    serial.ticks_on(2, TICKS).with_context(context)
}
