//! One VM that moves back and forth between two hosts, while a test holds the
//! move at a moment ([`drover::gang::moments`]) and does something to the
//! agents: what tests of recovery have in common.

use crate::agentcfg::{AgentFiles, Memory};
use crate::check::{self, DifferingPage, HoldWatcher};
use crate::drover::{Agent, Ended, Migration};
use crate::gang::{Gang, RunningVm};
use crate::qemu::Guest;
use crate::qmp::Qmp;
use crate::stage::Stage;
use anyhow::{Context, Result, bail, ensure};
use drover::api::types::{GangPhase, GangProgress, HandoverInfo, VmInfo};
use drover::gang::moments::{Moment, Party};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The VM.
pub const VM: &str = "vm1";
/// The hosts that it is moved between.
pub const ENDS: [&str; 2] = ["r1h1", "r2h1"];
/// One beside them: a coordinator that is neither source nor target.
pub const BESIDE: &str = "r1h2";
/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);
/// Long enough for the coordinator's word to get to a source.
const DELIVERY: Duration = Duration::from_millis(300);

/// Asks again and again.
///
/// # Errors
/// When the answer does not come in time, with the last error if there was one.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + LIMIT;
    loop {
        match ask() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) if Instant::now() < end => std::thread::sleep(POLL),
            Ok(None) => bail!("{what}: not within {LIMIT:?}"),
            Err(error) if Instant::now() < end => {
                drop(error);
                std::thread::sleep(POLL);
            }
            Err(error) => return Err(error.context(what.to_owned())),
        }
    }
}

/// A stage with one VM; agents come and go, so the VM is kept apart from them.
#[derive(Debug)]
pub struct Play {
    /// The stage.
    pub stage: Stage,
    /// The VM.
    pub vm: Option<RunningVm>,
}

/// A migration that is held at a moment.
#[derive(Debug)]
pub struct Held {
    hold: PathBuf,
    watcher: HoldWatcher,
    /// The migration.
    pub migration: Migration,
}

impl Held {
    /// Lets it go on.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn release(&self) -> Result<()> {
        fs::remove_file(&self.hold).with_context(|| self.hold.display().to_string())
    }

    /// Waits for its end. Both sides' RAM must have been equal if the VM came
    /// to its switch.
    ///
    /// # Errors
    /// When it was not, or the command cannot be waited for.
    pub fn end(self) -> Result<Ended> {
        let ended = self.migration.end()?;
        equal(self.watcher)?;
        Ok(ended)
    }

    /// Ends the command, whatever becomes of the migration, and keeps on
    /// watching.
    pub fn abandon(self) -> HoldWatcher {
        drop(self.migration);
        self.watcher
    }
}

/// Demands that RAM was equal whenever a VM came to its switch; says whether
/// one did.
///
/// # Errors
/// With the pages that differed.
pub fn equal(watcher: HoldWatcher) -> Result<bool> {
    let found: Option<Vec<DifferingPage>> = watcher.finish()?.remove(VM);
    let differing = found.as_deref().unwrap_or_default();
    ensure!(
        differing.is_empty(),
        "RAM differs at the switch: {differing:?}"
    );
    Ok(found.is_some())
}

impl Play {
    /// With the VM running at the first of [`ENDS`].
    ///
    /// # Errors
    /// When the stage or the VM does not come up.
    pub fn new() -> Result<Play> {
        Self::with(|gang| gang.run(VM, &Guest::small_kvm(1)?, ENDS[0]))
    }

    /// As [`Play::new`]; the VM's RAM is its VMM's own.
    ///
    /// # Errors
    /// As [`Play::new`].
    pub fn private() -> Result<Play> {
        Self::with(|gang| gang.run_private(VM, &Guest::small_kvm(1)?, ENDS[0]))
    }

    /// As [`Play::new`]; in `kvmm`, as a VM of kind `kvm-log`, with less to check.
    ///
    /// # Errors
    /// As [`Play::new`].
    pub fn linked(memory: Memory) -> Result<Play> {
        Self::with(|gang| gang.run_linked(VM, &Guest::least_kvm(1)?, ENDS[0], memory))
    }

    fn with(start: impl FnOnce(&mut Gang) -> Result<()>) -> Result<Play> {
        let stage = Stage::new(400)?;
        let mut gang = stage.gang();
        start(&mut gang)?;
        let vm = gang.vms.pop();
        drop(gang);
        Ok(Play { stage, vm })
    }

    /// Does something with the VM as a gang.
    ///
    /// # Errors
    /// What `f` returns.
    pub fn gang<T>(&mut self, f: impl FnOnce(&mut Gang) -> Result<T>) -> Result<T> {
        let mut gang = self.stage.gang();
        gang.vms.extend(self.vm.take());
        let done = f(&mut gang);
        self.vm = gang.vms.pop();
        done
    }

    /// The host that the VM is on.
    pub fn host(&self) -> &str {
        self.vm.as_ref().map_or("nowhere", |vm| &vm.host)
    }

    /// The other one of [`ENDS`].
    pub fn other(&self) -> &'static str {
        if self.host() == ENDS[0] {
            ENDS[1]
        } else {
            ENDS[0]
        }
    }

    /// The agent of a host.
    pub fn agent(&self, host: &str) -> &Agent {
        self.stage.cluster.agent(host)
    }

    /// Starts to move the VM to the other host.
    ///
    /// # Errors
    /// When the command cannot be started.
    pub fn migrate_at(&self, coordinator: &str) -> Result<Migration> {
        let moves = [(VM.into(), self.host().into(), self.other().into())];
        let lab = &self.stage.lab;
        let cluster = &self.stage.cluster;
        cluster.start_migration_at(coordinator, lab, "gang", &moves, &[])
    }

    /// Starts to move the VM to the other host, and holds that at a moment.
    ///
    /// # Errors
    /// When it does not come there.
    pub fn held_at(&self, moment: Moment, coordinator: &str) -> Result<Held> {
        let dir = self.stage.moments_dir();
        let file = |what: &str| match moment.party() {
            Party::Gang => dir.join(format!("{}.{what}", moment.name())),
            _ => dir.join(format!("{}.{VM}.{what}", moment.name())),
        };
        let watcher = HoldWatcher::start(&self.stage.hold_dir())?;
        fs::create_dir_all(&dir)?;
        let (reached, hold) = (file("reached"), file("hold"));
        let _earlier = fs::remove_file(&reached);
        fs::write(&hold, b"")?;
        let migration = self.migrate_at(coordinator)?;
        until(&format!("{VM} at {}", moment.name()), || {
            Ok(reached.exists().then_some(()))
        })?;
        Ok(Held {
            hold,
            watcher,
            migration,
        })
    }

    /// Kills an agent, as a crash would.
    pub fn kill(&mut self, agent: &str) {
        self.stage.cluster.agent_mut(agent).kill();
    }

    /// Starts one again.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_again(&mut self, agent: &str) -> Result<()> {
        let hosts = &self.stage.lab.hosts;
        let on = hosts.iter().find(|host| host.name == agent);
        let on = on.with_context(|| format!("no host {agent}"))?.clone();
        self.stage.cluster.agent_mut(agent).start_again(&on)
    }

    /// What an agent says of handovers.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn handovers(&self, agent: &str) -> Result<Vec<HandoverInfo>> {
        Ok(self.agent(agent).status()?.handovers)
    }

    /// Waits until an agent tells of a handover of this kind.
    ///
    /// # Errors
    /// When it does not.
    pub fn handover(
        &self,
        agent: &str,
        what: &str,
        is: impl Fn(&HandoverInfo) -> bool,
    ) -> Result<HandoverInfo> {
        until(what, || {
            Ok(self.handovers(agent)?.into_iter().find(|h| is(h)))
        })
    }

    /// What an agent says of the VM.
    ///
    /// # Errors
    /// When it does not have it.
    pub fn listed(&self, agent: &str) -> Result<VmInfo> {
        let list = self.agent(agent).run(&["vm", "list", "--json"])?;
        let vms: Vec<VmInfo> = serde_json::from_slice(&list.stdout)?;
        let vm = vms.into_iter().find(|vm| vm.name == VM);
        vm.with_context(|| format!("{agent} has no {VM}"))
    }

    /// How far the newest gang is that an agent drives.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn progress(&self, agent: &str) -> Result<Option<GangProgress>> {
        Ok(self.agent(agent).status()?.migrations.into_iter().next())
    }

    /// Waits until an agent says that the newest gang it drives is being
    /// cancelled, and a moment more: for its word to get to the source, which
    /// does not show it.
    ///
    /// # Errors
    /// When it does not say so.
    pub fn cancelling(&self, coordinator: &str) -> Result<()> {
        until("the gang to be cancelled", || {
            let progress = self.progress(coordinator)?.context("no gang")?;
            Ok((progress.phase == GangPhase::Cancelling).then_some(()))
        })?;
        std::thread::sleep(DELIVERY);
        Ok(())
    }

    /// Waits until nothing is unsettled on any agent.
    ///
    /// # Errors
    /// When something stays so.
    pub fn settled(&self) -> Result<()> {
        for agent in ENDS {
            until(&format!("{agent} to be done with every handover"), || {
                let open = self.handovers(agent)?.into_iter().find(|h| !h.settled);
                match open {
                    None => Ok(Some(())),
                    Some(open) => bail!("{open:?}"),
                }
            })?;
        }
        Ok(())
    }

    /// Demands that the VM runs on `host`, and nowhere else, with its data
    /// right, and that nothing of a handover is left.
    ///
    /// # Errors
    /// With what is not so.
    pub fn runs_on(&mut self, host: &str) -> Result<()> {
        self.settled()?;
        let at = self.agent(host).files.places(VM);
        if let Some(vm) = &mut self.vm {
            (vm.host, vm.at) = (host.to_owned(), at);
        }
        self.gang(|gang| gang.check())?;
        let vm = self.vm.as_ref().context("the VM")?;
        let state = match vm.linked {
            false => Qmp::connect(Path::new(&vm.at.qmp))?
                .execute("query-status", serde_json::json!({}))?["status"]
                .to_string(),
            // Its one link is the agent's.
            true => self.listed(host)?.status,
        };
        ensure!(state.contains("running"), "{VM} on {host} is {state}");
        for host in &self.stage.lab.hosts {
            let journal = host.run_dir.join("state/handover");
            let left: Vec<_> = fs::read_dir(journal)?.flatten().map(|e| e.path()).collect();
            ensure!(left.is_empty(), "{} left {left:?}", host.name);
            let files = AgentFiles::of(host);
            let left = check::files_of(&[&files.run_dir], &format!("{VM}.out"))?;
            ensure!(left.is_empty(), "{} left {left:?}", host.name);
        }
        Ok(())
    }
}
