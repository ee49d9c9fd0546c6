//! Faults, brought about and undone.

use super::cell::{DOWN_FOR, Fault, Random, Victim};
use super::clock::ClockJump;
use super::fill::Full;
use super::link::{self, Bad, Down, Link, Way};
use super::stand::Stand;
use crate::agentcfg::{self, AgentFiles};
use crate::registry;
use anyhow::{Context, Result, bail};
use drover_ebpf::fault;
use std::time::{Duration, Instant};

/// For how long a VMM may be two processes while it is being started.
const ONE_PROCESS: Duration = Duration::from_secs(5);

/// Who has which role in a cell, by index of the host in its rack.
#[derive(Debug, Clone)]
pub struct Roles {
    /// The VM whose handover is looked at.
    pub focus: String,
    /// Index of its host in either rack.
    pub host: u8,
    /// Index of the other VM's host.
    pub other: u8,
    /// The rack that the gang leaves.
    pub from: u8,
    /// The rack that it comes to.
    pub to: u8,
}

impl Roles {
    /// With the VM at `focus` looked at, in a gang that leaves `from`.
    pub fn new(stand: &Stand, focus: usize, from: u8) -> Roles {
        let vm = &stand.vms[focus];
        Roles {
            focus: vm.name.clone(),
            host: vm.host,
            other: 3 - vm.host,
            from,
            to: 3 - from,
        }
    }

    /// Rack and index of a victim's host; `None` for the core link.
    fn host_of(&self, victim: Victim) -> Option<(u8, u8)> {
        Some(match victim {
            Victim::SourceAgent | Victim::SourceVmm | Victim::SourceLink => (self.from, self.host),
            Victim::TargetAgent | Victim::TargetVmm | Victim::TargetLink => (self.to, self.host),
            Victim::Coordinator | Victim::CoordinatorLink => (self.from, Stand::COORDINATOR),
            Victim::ClaimShard => (self.from, self.other),
            Victim::HolderHost => (self.to, self.other),
            Victim::CoreLink => return None,
        })
    }

    /// The link that a victim is.
    fn link(&self, victim: Victim) -> Link {
        match self.host_of(victim) {
            Some((rack, host)) => Link::Uplink { rack, host },
            None => Link::Core(self.from),
        }
    }
}

/// What a fault needs to be undone. Dropping it undoes faults of links, disks
/// and clocks; stopped processes go on.
#[derive(Debug)]
enum Undo {
    /// Nothing can be.
    Nothing,
    /// The agent has to be started again.
    Agent(String),
    /// By dropping it.
    Drop(#[expect(dead_code, reason = "kept to be dropped")] Box<dyn std::fmt::Debug>),
}

/// A process that stands still until this is dropped.
#[derive(Debug)]
struct Stopped(std::os::fd::OwnedFd);

impl Drop for Stopped {
    fn drop(&mut self) {
        registry::send_signal(&self.0, libc::SIGCONT);
    }
}

/// A fault that is in force.
#[derive(Debug)]
pub struct Active {
    /// When it began.
    pub since: Instant,
    /// When it ends by itself; `None`: with the gang.
    pub until: Option<Instant>,
    undo: Undo,
}

impl Active {
    /// Ends the fault.
    ///
    /// # Errors
    /// When an agent does not start again.
    pub fn end(self, stand: &mut Stand) -> Result<()> {
        match self.undo {
            Undo::Agent(name) => stand.start_agent(&name),
            Undo::Nothing | Undo::Drop(_) => Ok(()),
        }
    }
}

/// Brings a fault about; `None` if the victim is not there (any more).
///
/// # Errors
/// When the fault cannot be had on this machine.
pub fn inject(
    stand: &mut Stand,
    roles: &Roles,
    victim: Victim,
    fault: Fault,
    random: &mut Random,
) -> Result<Option<Active>> {
    let seconds = |s| Some(Duration::from_secs(s));
    let (lasts, undo) = match fault {
        Fault::Kill | Fault::Stop | Fault::Restart => match process(stand, roles, victim, fault)? {
            Some(done) => done,
            None => return Ok(None),
        },
        Fault::Cut => (seconds(8), down(stand, roles, victim)?),
        Fault::LongCut => (seconds(40), down(stand, roles, victim)?),
        Fault::Down3s => (seconds(3), down(stand, roles, victim)?),
        Fault::OneWayOut => (seconds(8), deaf(stand, roles, victim, Way::Out)?),
        Fault::OneWayIn => (seconds(8), deaf(stand, roles, victim, Way::In)?),
        Fault::Loss | Fault::Corrupt => {
            let (drop_ppm, corrupt_ppm) = match fault {
                Fault::Loss => (100_000, 0),
                _ => (0, 10_000),
            };
            let fault = fault::Fault {
                seed: random.number(),
                drop_ppm,
                corrupt_ppm,
            };
            (
                None,
                Undo::Drop(Box::new(Bad::both_ways(&stand.lab, fault)?)),
            )
        }
        Fault::Reset => {
            let (rack, host) = roles.host_of(victim).context("a host to reset")?;
            link::reset(&stand.host(rack, host).ns)?;
            (seconds(0), Undo::Nothing)
        }
        Fault::DiskFull => {
            let (rack, host) = roles.host_of(victim).context("a host to fill")?;
            let dir = agentcfg::state_dir(stand.host(rack, host));
            (None, Undo::Drop(Box::new(Full::new(&dir, 0)?)))
        }
        Fault::NoMemory => {
            let (rack, host) = roles.host_of(victim).context("a host to fill")?;
            let dir = AgentFiles::of(stand.host(rack, host)).ram_dir;
            (None, Undo::Drop(Box::new(Full::new(&dir, 0)?)))
        }
        Fault::ClockForward | Fault::ClockBack => {
            let (rack, host) = roles.host_of(victim).context("a host with a clock")?;
            let jump = if fault == Fault::ClockForward {
                3600
            } else {
                -3600
            };
            let pid = stand.agent(rack, host).pid();
            (None, Undo::Drop(Box::new(ClockJump::new(pid, jump)?)))
        }
    };
    let since = Instant::now();
    Ok(Some(Active {
        since,
        until: lasts.map(|lasts| since + lasts),
        undo,
    }))
}

fn down(stand: &Stand, roles: &Roles, victim: Victim) -> Result<Undo> {
    let down = Down::new(&stand.lab, roles.link(victim))?;
    Ok(Undo::Drop(Box::new(down)))
}

fn deaf(stand: &Stand, roles: &Roles, victim: Victim, way: Way) -> Result<Undo> {
    let bad = Bad::deaf(&stand.lab, roles.link(victim), way)?;
    Ok(Undo::Drop(Box::new(bad)))
}

/// What happens to a process.
fn process(
    stand: &mut Stand,
    roles: &Roles,
    victim: Victim,
    fault: Fault,
) -> Result<Option<(Option<Duration>, Undo)>> {
    let (rack, index) = roles.host_of(victim).context("links are no processes")?;
    let host = stand.host(rack, index).name.clone();
    let is_vmm = matches!(victim, Victim::SourceVmm | Victim::TargetVmm);
    let pid = match is_vmm {
        true => vmm(stand, &roles.focus, &host)?,
        false => Some(stand.cluster.agent(&host).pid()),
    };
    let Some(Ok(pidfd)) = pid.map(registry::pidfd) else {
        return Ok(None);
    };
    Ok(Some(match (fault, is_vmm) {
        (Fault::Stop, _) => {
            registry::send_signal(&pidfd, libc::SIGSTOP);
            (
                Some(Duration::from_secs(5)),
                Undo::Drop(Box::new(Stopped(pidfd))),
            )
        }
        (Fault::Restart, true) => {
            registry::send_signal(&pidfd, libc::SIGTERM);
            (Some(Duration::ZERO), Undo::Nothing)
        }
        (_, true) => {
            registry::kill(&pidfd);
            (Some(Duration::ZERO), Undo::Nothing)
        }
        (fault, false) => {
            stand.cluster.agent_mut(&host).kill();
            let away = if fault == Fault::Kill { DOWN_FOR } else { 0 };
            (Some(Duration::from_secs(away)), Undo::Agent(host))
        }
    }))
}

/// The process that a VM is in, or waits in, on a host.
fn vmm(stand: &Stand, vm: &str, host: &str) -> Result<Option<i32>> {
    let until = Instant::now() + ONE_PROCESS;
    loop {
        let vmms = stand.census.vmms()?;
        let there: Vec<i32> = vmms
            .iter()
            .filter(|found| found.vm == vm && found.host == host)
            .map(|found| found.pid)
            .collect();
        match there[..] {
            [] => return Ok(None),
            [pid] => return Ok(Some(pid)),
            // One that is just being started puts itself into the background.
            _ if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            _ => bail!("processes {there:?} all have {vm} on {host}"),
        }
    }
}
