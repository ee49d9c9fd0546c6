//! What a restarted agent finds: VMs, gangs and half-made targets of its
//! earlier run. Every handover in the journal is taken up where its record and
//! its VMM say it is, and finished or rolled back.

use super::arrival::{Arrival, Held};
use super::registry::VmsFound;
use super::{Agent, AgentCaller};
use crate::gang::handover::care::Care;
use crate::gang::handover::chain;
use crate::gang::handover::leaving::{Leaving, Watcher};
use crate::gang::handover::machine::{Copy, RunsOn, Source, Target, TargetEvent};
use crate::gang::journal::{Record, Side, Step};
use crate::vmm::definition::{Definition, Family, VmPaths};
use crate::vmm::launch::{Vmm, end_leftovers, has_leftover, remove_files};
use crate::vmm::qmp::RunState;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// Settled handovers that `drover status` still tells of.
const KEPT: usize = 64;

impl Agent {
    /// Finds the VMs of an earlier run and goes on with its handovers.
    pub(super) async fn recover(self: &Rc<Self>) {
        let (records, bad) = match self.journal.left() {
            Ok(left) => left,
            Err(error) => (Vec::new(), vec![error]),
        };
        for error in bad {
            tracing::error!(%error, "a record of a handover cannot be read: look at the VM by hand");
        }
        let on_their_way: BTreeSet<String> = records
            .iter()
            .filter(|r| r.side == Side::Target)
            .map(|r| r.vm.clone())
            .collect();
        self.vms
            .find_again(&self.config, VmsFound { on_their_way })
            .await;
        let leaves: BTreeSet<&str> = records
            .iter()
            .filter(|r| r.side == Side::Source && r.step != Step::Returned)
            .map(|r| r.vm.as_str())
            .collect();
        for record in records.iter().filter(|r| r.side == Side::Target) {
            self.recover_landing(record, leaves.contains(record.vm.as_str()))
                .await;
        }
        for record in records.into_iter().filter(|r| r.side == Side::Source) {
            self.recover_leaving(record);
        }
    }

    /// `leaves`: the VM is on its way to the next host already.
    async fn recover_landing(self: &Rc<Self>, record: &Record, leaves: bool) {
        let name = &record.vm;
        let files = VmPaths::new(&self.config.run_dir, &self.config.ram_dir, name);
        let definition = Definition::load(&files.definition());
        let family = definition.as_ref().map_or(Family::Qemu, |d| d.family);
        let control = files.control(family);
        let (held, found) = match &definition {
            Ok(definition) => find_vmm(definition, &files, &control).await,
            // It is written before a VMM is started.
            Err(_) => unreached(&files, &control),
        };
        let why = format!(
            "found by a restarted agent: its journal says {}, its VMM {}",
            words(record.step),
            match found {
                Copy::None => "has ended",
                Copy::Incoming => "waits for device state",
                Copy::Stopped => "stands still with all its state",
                Copy::Running => "runs",
            }
        );
        tracing::warn!(vm = %name, from = %record.peer, %why, "landing taken up again");
        let state = Target::restarted(record.step, found);
        let care = Care::new(record.gang, name, Side::Target, &record.peer, &why);
        let definition = match definition {
            Ok(definition) => definition,
            Err(_) if matches!(state, Target::Discarding) => {
                return self.remove_beginning(record, files, care).await;
            }
            Err(error) => {
                let why = format!("{why}; {}", chain(&error));
                tracing::error!(vm = %name, %why, "landing cannot be taken up");
                care.doubt(&why);
                return self.cares.borrow_mut().push(Rc::new(care));
            }
        };
        let arrival = Rc::new(Arrival::new(
            &record.peer,
            definition,
            files,
            held,
            state,
            care,
        ));
        arrival.run.set(record.run);
        self.landings.borrow_mut().push(arrival.clone());
        self.cares.borrow_mut().push(arrival.care.clone());
        if leaves && matches!(state, Target::Starting { .. }) {
            // It was let run, or it could not be leaving.
            if let Some(vmm) = arrival.kept() {
                self.take_charge(&arrival, vmm);
            }
            arrival.enter(Target::Here);
            return;
        }
        // What follows from the state alone; a source is asked in a moment.
        self.land(&arrival, TargetEvent::GiveUp).await;
    }

    /// A target of which there is not even a definition.
    async fn remove_beginning(&self, record: &Record, files: VmPaths, care: Care) {
        let removed = tokio::task::spawn_blocking(move || {
            end_leftovers(&files).map(|()| remove_files(&files))
        });
        match removed.await {
            Ok(Ok(())) => {
                if let Err(error) = self.journal.forget(&record.vm, record.gang) {
                    tracing::warn!(%error, "journal entry stays");
                }
                care.enter("was given up");
                self.keep_settled(Rc::new(care));
            }
            Ok(Err(error)) => tracing::error!(vm = %record.vm, %error, "half-made VM not removed"),
            Err(panic) => tracing::error!(vm = %record.vm, %panic, "half-made VM not removed"),
        }
    }

    fn recover_leaving(self: &Rc<Self>, record: Record) {
        let _seldom_there = std::fs::remove_file(self.state_socket(&record.vm));
        let vm = self.vms.get(&record.vm);
        let state = Source::restarted(record.step);
        let why = format!(
            "found by a restarted agent: its journal says {}, its VMM {}",
            words(record.step),
            match vm {
                Some(_) => "lives",
                None => "has ended",
            }
        );
        tracing::warn!(vm = %record.vm, to = %record.peer, %why, "handover taken up again");
        if state != Source::Returned {
            self.vms
                .update(&record.vm, |vm| vm.leaving = Some(record.gang));
        }
        let care = Rc::new(Care::new(
            record.gang,
            &record.vm,
            Side::Source,
            &record.peer,
            &why,
        ));
        self.cares.borrow_mut().push(care.clone());
        let watcher = Rc::new(Found {
            agent: self.clone(),
            vm: record.vm.clone(),
        });
        care.source_is(state, record.run);
        // Of a VM whose VMM has ended, or cannot be reached, the files are there
        // all the same if an agent has made them.
        let files = match &vm {
            Some(vm) => vm.files.clone(),
            None => {
                let config = &self.config;
                let files = VmPaths::new(&config.run_dir, &config.ram_dir, &record.vm);
                files.definition().exists().then_some(files)
            }
        };
        let leaving = Leaving {
            caller: Rc::new(AgentCaller(self.clone())),
            journal: self.journal.clone(),
            moments: self.moments.clone(),
            vmm: vm.map(|vm| vm.vmm),
            files,
            fence: self.config.fencing.clone(),
            care: care.clone(),
            watcher,
            why: "its agent was restarted".to_owned(),
            record,
        };
        let agent = self.clone();
        tokio::task::spawn_local(async move {
            leaving.run(state).await;
            agent.settled(&care);
        });
    }

    /// A handover is over here.
    pub(super) fn settled(&self, care: &Rc<Care>) {
        self.cares.borrow_mut().retain(|c| !Rc::ptr_eq(c, care));
        if care.is_notable() {
            self.keep_settled(care.clone());
        }
    }

    fn keep_settled(&self, care: Rc<Care>) {
        let mut settled = self.settled.borrow_mut();
        let surplus = (settled.len() + 1).saturating_sub(KEPT);
        settled.drain(..surplus);
        settled.push(care);
    }
}

/// The VMM of a landing VM, and what it does.
async fn find_vmm(definition: &Definition, files: &VmPaths, control: &Path) -> (Held, Copy) {
    let Ok(vmm) = Vmm::find(definition, control).await else {
        return unreached(files, control);
    };
    let copy = match vmm.status().await {
        Ok(RunState::Inmigrate) => Copy::Incoming,
        Ok(RunState::Running) => Copy::Running,
        _ => Copy::Stopped,
    };
    (Held::Kept(vmm), copy)
}

/// What there is of a VMM that does not answer.
fn unreached(files: &VmPaths, control: &Path) -> (Held, Copy) {
    let copy = match has_leftover(files) {
        // A monitor comes before anything that could be lost.
        true if !control.exists() => Copy::Incoming,
        // One that hangs may have all of its state: nothing that follows from
        // Stopped harms one that has not.
        true => Copy::Stopped,
        false => Copy::None,
    };
    (Held::Nothing, copy)
}

fn words(step: Step) -> &'static str {
    match step {
        Step::Moving => "moving",
        Step::Committed => "committed",
        Step::Returned => "returned",
    }
}

/// Hears of a handover that a restarted agent has taken up.
struct Found {
    agent: Rc<Agent>,
    vm: String,
}

impl Watcher for Found {
    fn entered(&self, state: Source, _why: &str) {
        match state {
            Source::Returned => self.agent.vms.update(&self.vm, |vm| vm.leaving = None),
            Source::Closing(RunsOn::Target) => drop(self.agent.vms.remove(&self.vm)),
            _ => {}
        }
    }

    fn lost(&self) {}

    fn in_doubt(&self, _why: &str) {}

    fn journaled(&self, _here: Option<Duration>, _there: Option<Duration>) {}
}
