//! The lab that cells are run on, one after the other: two racks of three
//! hosts, an agent on each, and two VMs that go back and forth.
//!
//! ```text
//!   rack 1                              rack 2
//!   r1h1  vm1  ───────────────────────▶ r2h1
//!   r1h2  vm2  ───────────────────────▶ r2h2
//!   r1h3  coordinator                   r2h3
//! ```
//! The third host of the rack that the VMs leave drives the gang, so that its
//! death is not the death of a source. State and RAM directories are small
//! file systems of their own, and hosts compute TCP checksums themselves, so
//! that disks can be filled and corruption can be noticed.

use super::census::Census;
use super::fill;
use super::link;
use super::marks::Marks;
use crate::agentcfg::{self, AgentFiles, AgentOptions};
use crate::drover::{Agent, Cluster, Migration};
use crate::gang;
use crate::guest::kvm::{self, KvmWork};
use crate::qemu::{Guest, Places};
use crate::serial::Serial;
use crate::topology::{Host, Lab, Shape};
use anyhow::{Context, Result, bail, ensure};
use drover::api::types::{Outcome, StatusInfo};
use drover::gang::plant::Plant;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Mbit/s of the core link: a round of a small guest takes long enough to be
/// hit in.
const RATE_MBIT: u32 = 400;
/// Sizes of the agents' file systems.
const STATE_MIB: u32 = 16;
const RAM_MIB: u32 = 256;
/// The host that drives gangs, of either rack.
const COORDINATOR: u8 = 3;
/// How long a guest may take to boot.
const BOOT: Duration = Duration::from_secs(60);

/// A VM of the stand.
#[derive(Debug, Clone)]
pub struct StandVm {
    /// Its name.
    pub name: String,
    /// What runs in it.
    pub guest: Guest,
    /// Index of its host in either rack.
    pub host: u8,
    /// The rack it runs in, `None` once it was lost to a fault that kills it.
    pub rack: Option<u8>,
}

/// See the module.
#[derive(Debug)]
pub struct Stand {
    /// The agents; before the lab, so that they end before it goes.
    pub cluster: Cluster,
    /// The lab.
    pub lab: Lab,
    /// The VMs.
    pub vms: Vec<StandVm>,
    /// Where agents show moments.
    pub marks: Marks,
    /// Counts VMMs.
    pub census: Census,
    gangs: u32,
}

impl Stand {
    /// Lays out the lab and boots the VMs in rack 1.
    ///
    /// # Errors
    /// When something of it does not come up.
    pub fn new(plant: Option<Plant>) -> Result<Stand> {
        // Said before the lab is laid out: the usual mistake.
        match plant {
            Some(_) => crate::drover::planted_binary()?,
            None => crate::drover::binary()?,
        };
        let lab = Lab::up(Shape {
            rate_mbit: RATE_MBIT,
            hosts: COORDINATOR,
            ..Shape::default()
        })?;
        for host in &lab.hosts {
            fill::small_tmpfs(&agentcfg::state_dir(host), STATE_MIB)?;
            fill::small_tmpfs(&AgentFiles::of(host).ram_dir, RAM_MIB)?;
            link::checksum_in_software(&host.ns)?;
        }
        let (moments, hold) = (lab.run_dir().join("moments"), hold_dir(&lab));
        let marks = Marks::new(moments.clone());
        marks.clear()?;
        fs::create_dir_all(&hold)?;
        let options = AgentOptions {
            hold_at_switch: Some(hold),
            moments: Some(moments),
            plant,
            ..AgentOptions::default()
        };
        let cluster = Cluster::start(&lab, options)?;
        let mut stand = Stand {
            census: Census::new(&lab)?,
            cluster,
            vms: Vec::new(),
            marks,
            gangs: 0,
            lab,
        };
        for index in 1..COORDINATOR {
            let (name, guest) = (format!("vm{index}"), guest(u32::from(index))?);
            for host in &stand.lab.hosts {
                let definitions = AgentFiles::of(host).definitions;
                fs::write(
                    definitions.join(format!("{name}.toml")),
                    agentcfg::definition(&name, "lab", &guest, false),
                )?;
            }
            stand.vms.push(StandVm {
                name,
                guest,
                host: index,
                rack: None,
            });
        }
        stand.boot_missing(1)?;
        Ok(stand)
    }

    /// Where agents wait at the switch.
    pub fn hold_dir(&self) -> PathBuf {
        hold_dir(&self.lab)
    }

    /// The host with this index of a rack.
    pub fn host(&self, rack: u8, index: u8) -> &Host {
        self.lab.host(rack, index)
    }

    /// The agent there.
    pub fn agent(&self, rack: u8, index: u8) -> &Agent {
        self.cluster.agent(&self.host(rack, index).name)
    }

    /// Starts an agent again whose process has ended.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_agent(&mut self, name: &str) -> Result<()> {
        let host = self.lab.hosts.iter().find(|h| h.name == name);
        let host = host.with_context(|| format!("no host {name}"))?;
        self.cluster.agent_mut(name).start_again(host)
    }

    /// The rack that all VMs are in.
    ///
    /// # Errors
    /// When they are not together.
    pub fn side(&self) -> Result<u8> {
        let racks: Vec<Option<u8>> = self.vms.iter().map(|vm| vm.rack).collect();
        match racks[..] {
            [Some(one), Some(two)] if one == two => Ok(one),
            _ => bail!("the VMs are in racks {racks:?}, not together"),
        }
    }

    /// A VM's files in the rack where it is, or was last.
    pub fn places(&self, vm: &StandVm, rack: u8) -> Places {
        AgentFiles::of(self.host(rack, vm.host)).places(&vm.name)
    }

    /// The agent that drives the gangs that leave `rack`.
    pub fn coordinator(&self, rack: u8) -> &Agent {
        self.agent(rack, COORDINATOR)
    }

    /// The host of [`Stand::coordinator`], by its index.
    pub const COORDINATOR: u8 = COORDINATOR;

    /// Starts to move VMs (all that are there) out of `rack`. Returns the
    /// gang's name as well.
    ///
    /// # Errors
    /// When the command cannot be started.
    pub fn start_gang(&mut self, rack: u8) -> Result<(Migration, String)> {
        self.gangs += 1;
        let gang = format!("gang{}", self.gangs);
        let name = |rack, index| self.host(rack, index).name.clone();
        let leaving = self.vms.iter().filter(|vm| vm.rack == Some(rack));
        let moves: Vec<(String, String, String)> = leaving
            .map(|vm| {
                (
                    vm.name.clone(),
                    name(rack, vm.host),
                    name(3 - rack, vm.host),
                )
            })
            .collect();
        let coordinator = name(rack, COORDINATOR);
        let started =
            self.cluster
                .start_migration_at(&coordinator, &self.lab, &gang, &moves, &[])?;
        Ok((started, gang))
    }

    /// Boots those VMs that are nowhere, in `rack`.
    fn boot_missing(&mut self, rack: u8) -> Result<()> {
        for index in 0..self.vms.len() {
            let vm = &self.vms[index];
            if vm.rack.is_some() {
                continue;
            }
            // What is left of it where it died is cleared away.
            for rack in 1..=2 {
                let agent = self.agent(rack, vm.host);
                let _not_there = agent.try_run(&["vm", "stop", &vm.name])?;
            }
            let at = self.places(vm, rack);
            let _old = fs::remove_file(&at.serial);
            self.agent(rack, vm.host).run(&["vm", "run", &vm.name])?;
            Serial::new(&at.serial).wait("tick", BOOT, |text| text.contains("TICK "))?;
            self.vms[index].rack = Some(rack);
        }
        Ok(())
    }

    /// Makes the stand what it was: VMs that were lost run again, and all are
    /// in one rack. Nothing that a gang left may be in the way of that.
    ///
    /// # Errors
    /// When a VM cannot be booted or moved: something was left behind.
    pub fn repair(&mut self) -> Result<()> {
        let lost_in = self.vms.iter().find_map(|vm| vm.rack).unwrap_or(1);
        self.boot_missing(lost_in)?;
        let Err(_) = self.side() else { return Ok(()) };
        let behind = self.vms[0].rack.context("booted above")?;
        self.marks.clear()?;
        let watcher = super::marks::Switches::watch(&self.hold_dir())?;
        let (gang, _) = self.start_gang(behind)?;
        let moved = gang.wait()?;
        watcher.finish()?;
        ensure!(
            moved.report.outcome == Outcome::Arrived,
            "no plain migration after it: {:#?}",
            moved.report
        );
        for vm in self.vms.iter_mut().filter(|vm| vm.rack == Some(behind)) {
            vm.rack = Some(3 - behind);
        }
        Ok(())
    }

    /// Has every guest that runs check all of its data, all at the same time.
    /// One result for each that does.
    pub fn verify_all(&self) -> Vec<Result<()>> {
        std::thread::scope(|scope| {
            let running = self.vms.iter().filter(|vm| vm.rack.is_some());
            let checks: Vec<_> = running
                .map(|vm| scope.spawn(move || self.verify(vm)))
                .collect();
            let join = |check: std::thread::ScopedJoinHandle<'_, Result<()>>| {
                check
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            checks.into_iter().map(join).collect()
        })
    }

    fn verify(&self, vm: &StandVm) -> Result<()> {
        let rack = vm
            .rack
            .with_context(|| format!("{} runs nowhere", vm.name))?;
        let host = &self.host(rack, vm.host).name;
        gang::verify(&vm.name, host, &self.places(vm, rack), &vm.guest)
    }

    /// What every agent says of itself.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn statuses(&self) -> Result<Vec<StatusInfo>> {
        self.cluster.agents.iter().map(Agent::status).collect()
    }

    /// Keeps the agents' logs and what the guests said, for whoever looks for
    /// the reason of a failure.
    ///
    /// # Errors
    /// When they cannot be copied.
    pub fn keep_logs(&self, to: &Path) -> Result<()> {
        fs::create_dir_all(to)?;
        for (host, vm) in self
            .lab
            .hosts
            .iter()
            .flat_map(|h| self.vms.iter().map(move |v| (h, v)))
        {
            let serial = AgentFiles::of(host).places(&vm.name).serial;
            if Path::new(&serial).exists() {
                fs::copy(serial, to.join(format!("{}.{}.serial", host.name, vm.name)))?;
            }
        }
        for agent in &self.cluster.agents {
            fs::copy(&agent.files.log, to.join(format!("{}.log", agent.name)))?;
        }
        Ok(())
    }

    /// Ends the agents and the lab, and demands that nothing is left.
    ///
    /// # Errors
    /// When an agent does not end or something stays.
    pub fn finish(self) -> Result<()> {
        let Stand { cluster, lab, .. } = self;
        cluster.stop()?;
        let id = lab.id().to_string();
        drop(lab);
        crate::check::nothing_left(&id)
    }
}

/// A guest that is moved, checked and compared quickly: hundreds of times.
fn guest(seed: u32) -> Result<Guest> {
    Ok(Guest::Kvm {
        elf: kvm::ensure()?,
        ram_mib: 16,
        work: KvmWork {
            seed,
            common_mib: 1,
            own_mib: 1,
            ws_mib: 2,
            rate_kb: 2000,
        },
    })
}

fn hold_dir(lab: &Lab) -> PathBuf {
    lab.run_dir().join("hold")
}

/// How long something took, in whole milliseconds.
pub fn ms_since(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}
