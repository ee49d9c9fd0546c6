//! What every end-to-end test stands on: a lab with agents that wait at each
//! switch, and the checks that hold after every migration.

use crate::agentcfg::AgentOptions;
use crate::check::{self, HoldWatcher};
use crate::drover::{Cluster, Migrated};
use crate::gang::{Gang, Move};
use crate::topology::{Lab, Shape};
use anyhow::{Context, Result, bail, ensure};
use drover::api::types::{Outcome, VmOutcome, VmPhase};
use std::cell::RefCell;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A lab with agents.
#[derive(Debug)]
pub struct Stage {
    /// The agents; before the lab, so that they end before it goes.
    pub cluster: Cluster,
    /// The lab.
    pub lab: Lab,
    /// Ids of migrations that were waited for: agents remember them.
    seen: RefCell<Vec<String>>,
}

impl Stage {
    /// Two racks of two hosts, and agents that wait at each VM's switch.
    ///
    /// # Errors
    /// When the lab or an agent does not come up.
    pub fn new(rate_mbit: u32) -> Result<Stage> {
        Stage::with(rate_mbit, AgentOptions::default())
    }

    /// As [`Stage::new`], with agents set up as given.
    ///
    /// # Errors
    /// As [`Stage::new`].
    pub fn with(rate_mbit: u32, options: AgentOptions) -> Result<Stage> {
        Stage::shaped(
            Shape {
                rate_mbit,
                ..Shape::default()
            },
            options,
        )
    }

    /// As [`Stage::with`], with a lab of this shape.
    ///
    /// # Errors
    /// As [`Stage::new`].
    pub fn shaped(shape: Shape, options: AgentOptions) -> Result<Stage> {
        // Said before the lab is laid out: the usual mistake.
        crate::drover::binary()?;
        let lab = Lab::up(shape)?;
        let hold_at_switch = Some(lab.run_dir().join("hold"));
        std::fs::create_dir_all(lab.run_dir().join("hold"))?;
        let cluster = Cluster::start(
            &lab,
            AgentOptions {
                hold_at_switch,
                moments: Some(lab.run_dir().join("moments")),
                ..options
            },
        )?;
        Ok(Stage {
            cluster,
            lab,
            seen: RefCell::default(),
        })
    }

    /// An empty gang.
    pub fn gang(&self) -> Gang<'_> {
        Gang::new(&self.lab, &self.cluster)
    }

    /// Where agents wait at the switch.
    pub fn hold_dir(&self) -> PathBuf {
        self.lab.run_dir().join("hold")
    }

    /// Where agents show the moments of handovers, and wait; see
    /// [`drover::gang::moments`].
    pub fn moments_dir(&self) -> PathBuf {
        self.lab.run_dir().join("moments")
    }

    /// Migrates, and demands of every VM that it arrived with its RAM byte
    /// for byte what it was at the switch, that it runs exactly once, finds
    /// its data right, and left nothing on its old host.
    ///
    /// # Errors
    /// With the first of these that does not hold.
    pub fn migrate(&self, gang: &mut Gang, moves: &[Move], args: &[&str]) -> Result<Migrated> {
        let migrated = self.migrate_some(gang, moves, args)?;
        ensure!(
            migrated.success && migrated.report.outcome == Outcome::Arrived,
            "not all arrived: {:#?}\n{}",
            migrated.report,
            migrated.stderr
        );
        for vm in &migrated.report.vms {
            ensure!(vm.verified, "{} was not verified: {vm:?}", vm.name);
        }
        Ok(migrated)
    }

    /// As [`Stage::migrate`], but VMs need not arrive: those that did not run
    /// on where they were.
    ///
    /// # Errors
    /// As [`Stage::migrate`].
    pub fn migrate_some(&self, gang: &mut Gang, moves: &[Move], args: &[&str]) -> Result<Migrated> {
        let watcher = HoldWatcher::start(&self.hold_dir())?;
        let (migrated, _) = gang.migrate("gang", moves, args)?;
        let found = watcher.finish()?;
        for vm in migrated
            .report
            .vms
            .iter()
            .filter(|v| v.outcome == VmOutcome::Arrived)
        {
            let differing = found
                .get(&vm.name)
                .with_context(|| format!("{} was not held at its switch", vm.name))?;
            ensure!(
                differing.is_empty(),
                "RAM of {} differs at the switch in {} pages, first {}",
                vm.name,
                differing.len(),
                differing[0]
            );
        }
        gang.check()?;
        Ok(migrated)
    }

    /// Waits until the VM `name` is in one of these phases of a migration that
    /// was not waited for before, and says in which; `None` if it ended first.
    ///
    /// # Errors
    /// When that takes longer than 60 s or the agent does not answer.
    pub fn wait_phase(
        &self,
        coordinator: &str,
        name: &str,
        phases: &[VmPhase],
    ) -> Result<Option<VmPhase>> {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let status = self.cluster.agent(coordinator).status()?;
            // The command that starts it takes a moment to reach the agent.
            let new = |id: &String| !self.seen.borrow().contains(id);
            let migration = status.migrations.iter().find(|m| new(&m.id));
            let vm = migration.and_then(|m| m.vms.iter().find(|v| v.name == name));
            let waited_for = || {
                let ids = migration.map(|m| m.id.clone());
                self.seen.borrow_mut().extend(ids);
            };
            match vm.map(|v| v.phase) {
                Some(phase) if phases.contains(&phase) => {
                    waited_for();
                    return Ok(Some(phase));
                }
                Some(phase) if phase.is_final() => {
                    waited_for();
                    return Ok(None);
                }
                _ if Instant::now() > until => bail!("{name} did not come to {phases:?}: {vm:?}"),
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Ends the agents and the lab, and demands that nothing is left.
    ///
    /// # Errors
    /// When an agent does not end or something stays.
    pub fn finish(self) -> Result<()> {
        let Stage { cluster, lab, .. } = self;
        cluster.stop()?;
        let id = lab.id().to_string();
        drop(lab);
        check::nothing_left(&id)
    }
}
