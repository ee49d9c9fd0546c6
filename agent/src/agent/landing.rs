//! The target's driver of a handover's decision: executes what
//! [`machine`](crate::gang::handover::machine) says for a VM that arrives
//! here, also after a restart of the agent.
//!
//! From the moment that all of a VM's device state is here, only the word of
//! its source decides, whatever becomes of the gang and its coordinator. Such
//! VMs are looked after by [`Agent::mind_landings`] until they are settled.

use super::Agent;
use super::arrival::{Arrival, Held};
use super::registry::Vm;
use crate::gang::handover::care::DOUBT_AFTER;
use crate::gang::handover::chain;
use crate::gang::handover::fence::prove_down;
use crate::gang::handover::machine::{RunsOn, Target, TargetAct, TargetEvent, Whose, Word};
use crate::gang::journal::{Record, Side, Step};
use crate::gang::message::{GangRequest, GangResponse};
use crate::gang::moments::Moment;
use crate::types::GangId;
use crate::vmm::kinds::resume_arrived;
use crate::vmm::launch::{Vmm, end_leftovers, remove_files};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A source that has said nothing for this long is asked.
const ASK_AFTER: Duration = Duration::from_secs(1);
/// How long it may take to answer.
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// Pause before somebody looks after the same landing again.
const MIND_PAUSE: Duration = Duration::from_millis(200);
/// How often a landing that should be over is looked at.
const SETTLE_POLL: Duration = Duration::from_millis(20);
/// A fence that failed is tried again after this.
const FENCE_AGAIN: Duration = Duration::from_secs(60);

impl Agent {
    /// The VM of that gang that is landing here.
    pub(super) fn landing(&self, gang: GangId, vm: &str) -> Option<Rc<Arrival>> {
        let landings = self.landings.borrow();
        landings
            .iter()
            .find(|a| a.gang == gang && a.name == vm)
            .cloned()
    }

    /// Something has happened to a VM that lands here: does what follows from
    /// it, and says what that came to.
    pub(super) async fn land(&self, arrival: &Rc<Arrival>, event: TargetEvent) -> Target {
        let ends = matches!(event, TargetEvent::Abort | TargetEvent::GiveUp);
        let _ends = ends.then(|| arrival.end_waits());
        let _step = arrival.step.lock().await;
        self.land_locked(arrival, event).await
    }

    /// [`Agent::land`], for a caller that holds the VM's step.
    pub(super) async fn land_locked(&self, arrival: &Rc<Arrival>, event: TargetEvent) -> Target {
        if arrival.has_died() {
            arrival.enter(arrival.state().on(TargetEvent::Died));
        }
        arrival.enter(arrival.state().on(event));
        loop {
            let state = arrival.state();
            let event = match state.act() {
                None | Some(TargetAct::Ask) => break,
                Some(act) => self.perform(arrival, act).await,
            };
            let Some(event) = event else { break };
            arrival.enter(arrival.state().on(event));
            if arrival.state() == state {
                break;
            }
        }
        let state = arrival.state();
        if let Target::Over(_) = state {
            self.landings
                .borrow_mut()
                .retain(|a| !Rc::ptr_eq(a, arrival));
            self.settled(&arrival.care);
        }
        state
    }

    async fn perform(&self, arrival: &Rc<Arrival>, act: TargetAct) -> Option<TargetEvent> {
        match act {
            TargetAct::Write(step) => {
                let event = self.write_landing(arrival, step).await;
                self.moments
                    .reach(Moment::TargetCommitted, &arrival.name)
                    .await;
                Some(event)
            }
            TargetAct::LetRun => Some(self.let_run(arrival).await),
            TargetAct::Destroy => self.destroy(arrival).await,
            TargetAct::Forget => match self.journal.forget(&arrival.name, arrival.gang) {
                Ok(()) => Some(TargetEvent::Forgotten),
                Err(error) => {
                    tracing::warn!(%error, "journal entry stays");
                    None
                }
            },
            TargetAct::Ask => None,
        }
    }

    /// Makes a step of a landing VM durable.
    pub(super) async fn write_landing(&self, arrival: &Arrival, step: Step) -> TargetEvent {
        let record = Record {
            gang: arrival.gang,
            vm: arrival.name.clone(),
            side: Side::Target,
            step,
            peer: arrival.from.clone(),
            run: arrival.run.get(),
        };
        let journal = self.journal.clone();
        let begun = Instant::now();
        let written = tokio::task::spawn_blocking(move || journal.write(&record)).await;
        arrival.journal_took.set(begun.elapsed());
        match written {
            Ok(Ok(())) => TargetEvent::Written,
            Ok(Err(error)) => {
                tracing::error!(vm = %arrival.name, %error, "VM cannot be taken over");
                arrival.care.because(&error.to_string());
                TargetEvent::NotWritten
            }
            Err(panic) => {
                tracing::error!(vm = %arrival.name, %panic, "VM cannot be taken over");
                TargetEvent::NotWritten
            }
        }
    }

    async fn let_run(&self, arrival: &Rc<Arrival>) -> TargetEvent {
        // Of one that has ended before it could be told to run, it is known
        // that it never ran.
        if arrival.has_died() {
            return TargetEvent::Died;
        }
        let vmm = match self.vmm_of(arrival).await {
            Ok(vmm) => vmm,
            Err(_) if arrival.has_died() => return TargetEvent::Died,
            Err(why) => {
                tracing::error!(vm = %arrival.name, %why, "VM cannot be let run");
                return TargetEvent::NotLetRun;
            }
        };
        let run = arrival.run.get();
        if let Err(error) = resume_arrived(&vmm, run).await {
            let why = chain(&error);
            tracing::error!(vm = %arrival.name, %why, "VM cannot be let run");
            arrival.care.because(&why);
            // A VMM that was ended in order says so before it stops listening.
            if vmm.ended_unresumed() {
                return TargetEvent::Died;
            }
            return match vmm.process.is_alive() {
                true => TargetEvent::NotLetRun,
                // The command may have reached it before it ended.
                false => {
                    arrival.enter(arrival.state().on(TargetEvent::NotLetRun));
                    TargetEvent::Died
                }
            };
        }
        self.moments
            .reach(Moment::TargetRunning, &arrival.name)
            .await;
        self.take_charge(arrival, vmm);
        tracing::info!(vm = %arrival.name, from = %arrival.from, run,
            journal_us = arrival.journal_took.get().as_micros() as u64, "VM has arrived");
        TargetEvent::LetRun
    }

    /// The VM is one of this host's.
    pub(super) fn take_charge(&self, arrival: &Arrival, vmm: Vmm) {
        let files = arrival.files.clone();
        self.vms
            .insert(Vm::new(arrival.definition.clone(), Some(files), vmm));
        let _gone = std::fs::remove_file(&arrival.socket);
    }

    /// The VMM, taken hold of again if a restarted agent could not at once.
    async fn vmm_of(&self, arrival: &Rc<Arrival>) -> Result<Vmm, String> {
        arrival.keep();
        if let Some(vmm) = arrival.kept() {
            return Ok(vmm);
        }
        let found = Vmm::find(&arrival.definition, &arrival.control()).await;
        let vmm = found.map_err(|e| chain(&e))?;
        arrival.hold(Held::Kept(vmm.clone()));
        Ok(vmm)
    }

    async fn destroy(&self, arrival: &Rc<Arrival>) -> Option<TargetEvent> {
        arrival.forget_pages();
        match arrival.take_held() {
            Held::Managed(vm) => {
                // Its manager removes it, or lets it run.
                vm.close();
                let (_, why) = arrival.care.told();
                tracing::warn!(vm = %arrival.name, %why, "its manager's VMM is let go");
                return Some(TargetEvent::Destroyed);
            }
            Held::Waiting(vm) => vm.abort().await,
            Held::Kept(vmm) => {
                if let Err(error) = vmm.end().await {
                    tracing::error!(vm = %arrival.name, error = %chain(&error),
                        "half-made VM cannot be ended");
                    arrival.hold(Held::Kept(vmm));
                    return None;
                }
            }
            Held::Nothing => {}
        }
        // Also what a crash left without a monitor, or without anything else.
        let (files, name) = (arrival.files.clone(), arrival.name.clone());
        let removed = tokio::task::spawn_blocking(move || {
            end_leftovers(&files)?;
            remove_files(&files);
            Ok::<_, crate::vmm::process::ProcessError>(())
        });
        match removed.await {
            Ok(Ok(())) => {
                let (_, why) = arrival.care.told();
                tracing::warn!(vm = %name, %why, "half-made VM removed");
                Some(TargetEvent::Destroyed)
            }
            Ok(Err(error)) => {
                tracing::error!(vm = %name, %error, "half-made VM cannot be ended");
                None
            }
            Err(panic) => {
                tracing::error!(vm = %name, %panic, "half-made VM cannot be ended");
                None
            }
        }
    }

    /// The source has committed: the VM is this host's. Idempotent, and good
    /// for VMs that an earlier run of the agent took in.
    pub(super) async fn resume(
        &self,
        from: &str,
        gang: GangId,
        vm: &str,
        run: bool,
    ) -> Result<GangResponse, String> {
        let Some(arrival) = self.landing(gang, vm) else {
            let word = match self.vms.get(vm) {
                Some(_) => Word::Here,
                None => Word::NeverWill,
            };
            return Ok(GangResponse::Landed {
                word,
                journal_us: 0,
            });
        };
        arrival.only_from(from)?;
        self.moments.reach(Moment::ResumeReceived, vm).await;
        let state = {
            let _step = arrival.step.lock().await;
            arrival.heard();
            arrival.run.set(run);
            arrival.care.because("its source has committed");
            self.land_locked(&arrival, TargetEvent::Resume).await
        };
        match state.word() {
            Some(word) => Ok(GangResponse::Landed {
                word,
                journal_us: arrival.journal_took.get().as_micros() as u64,
            }),
            None => {
                let (state, why) = arrival.care.told();
                Err(format!("VM {vm} {state}: {why}"))
            }
        }
    }

    /// Its source, or the coordinator, does not want the VM here any more.
    pub(super) async fn abort(
        &self,
        gang: GangId,
        vm: &str,
        event: TargetEvent,
        why: &str,
    ) -> Result<(), String> {
        let Some(arrival) = self.landing(gang, vm) else {
            return Ok(());
        };
        let ends = arrival.end_waits();
        let state = {
            let _step = arrival.step.lock().await;
            if event == TargetEvent::Abort {
                arrival.heard();
                arrival.care.because(why);
            } else if arrival.state() == Target::Waiting {
                arrival.care.because(why);
            }
            self.land_locked(&arrival, event).await
        };
        drop(ends);
        match state {
            Target::Closing(RunsOn::Source) | Target::Over(RunsOn::Source) => Ok(()),
            Target::Loaded => Err(format!(
                "VM {vm} has all its state at {}: only {}'s word decides on it",
                self.name(),
                arrival.from
            )),
            _ => Err(format!("VM {vm} is at {} for good", self.name())),
        }
    }

    /// The source knows that the VM is here, and has forgotten it.
    pub(super) async fn release(&self, from: &str, gang: GangId, vm: &str) -> Result<(), String> {
        if let Some(arrival) = self.landing(gang, vm) {
            arrival.only_from(from)?;
            if arrival.managed().is_some() {
                self.manager_has(&arrival);
            }
            self.land(&arrival, TargetEvent::Released).await;
        }
        Ok(())
    }

    /// Waits a moment for the source of a VM that has just arrived here to
    /// know it: only then may the VM go on to the next host.
    pub(super) async fn settle_landing(&self, vm: &str) -> Result<(), String> {
        let until = Instant::now() + ASK_LIMIT;
        loop {
            let landings = self.landings.borrow().clone();
            let Some(arrival) = landings.iter().find(|a| a.name == vm) else {
                return Ok(());
            };
            if Instant::now() > until {
                return Err(format!(
                    "VM {vm} has come here from {}, which has not confirmed it yet: its agent \
                     must be reached before the VM can be moved on, started or ended here",
                    arrival.from
                ));
            }
            if arrival.state() == Target::Here {
                self.ask_source(arrival).await;
            }
            tokio::time::sleep(SETTLE_POLL).await;
        }
    }

    /// Goes on with every VM whose landing waits for a word. Called every few
    /// hundred milliseconds.
    pub(super) fn mind_landings(self: &Rc<Self>) {
        for arrival in self.landings.borrow().iter() {
            let waits = match arrival.state() {
                Target::Waiting | Target::Committing | Target::Over(_) => false,
                Target::Loaded | Target::Here | Target::Lost => arrival.silent_for() > ASK_AFTER,
                // What failed before: ending a VMM, removing a record.
                Target::Starting { .. } | Target::Discarding | Target::Closing(_) => true,
            };
            if waits && !arrival.minded.replace(true) {
                let (agent, arrival) = (self.clone(), arrival.clone());
                tokio::task::spawn_local(async move {
                    agent.mind(&arrival).await;
                    tokio::time::sleep(MIND_PAUSE).await;
                    arrival.minded.set(false);
                });
            }
        }
    }

    async fn mind(&self, arrival: &Rc<Arrival>) {
        match arrival.state() {
            Target::Loaded | Target::Here | Target::Lost => self.ask_source(arrival).await,
            _ => {
                if let Ok(_step) = arrival.step.try_lock() {
                    self.land_locked(arrival, TargetEvent::GiveUp).await;
                }
            }
        }
    }

    async fn ask_source(&self, arrival: &Rc<Arrival>) {
        let request = GangRequest::WhoseIs {
            gang: arrival.gang,
            vm: arrival.name.clone(),
        };
        let source = &arrival.from;
        let why = match self.ask(source, request, ASK_LIMIT).await {
            Ok(GangResponse::Whose(whose)) => {
                arrival.heard();
                if let Whose::Yours { run } = whose {
                    arrival.run.set(run);
                }
                let unknown = whose == Whose::Unknown && arrival.state() == Target::Loaded;
                if unknown {
                    let why =
                        format!("{source} has neither the VM nor a record of handing it over");
                    return self.doubt(arrival, &why);
                }
                arrival.care.no_doubt();
                arrival.care.because(match whose {
                    Whose::Mine => "its source says that it stays there",
                    Whose::Undecided => "its source has not decided yet",
                    Whose::Yours { .. } => "its source has committed",
                    Whose::Unknown => "its source has forgotten it",
                });
                if self.land(arrival, TargetEvent::Says(whose)).await == Target::Lost {
                    let why = "it had begun to run here, and its VMM has ended before its \
                               source knew";
                    self.doubt(arrival, why);
                }
                return;
            }
            Ok(GangResponse::Failed(why)) => format!("{source}: {why}"),
            Ok(_) => format!("{source} answered something else than asked"),
            Err(why) => why,
        };
        if arrival.state() != Target::Loaded || arrival.silent_for() < DOUBT_AFTER {
            return;
        }
        self.doubt(
            arrival,
            &format!("{source} may have handed it over, and cannot be asked ({why})"),
        );
        let Some(fence) = self.config.fencing.as_ref() else {
            return;
        };
        if arrival
            .fenced
            .get()
            .is_some_and(|at| at.elapsed() < FENCE_AGAIN)
        {
            return;
        }
        arrival.fenced.set(Some(Instant::now()));
        match prove_down(fence, source, &arrival.name).await {
            Ok(()) => {
                tracing::warn!(vm = %arrival.name, host = %source,
                    "host is fenced: the VM runs here");
                self.decide_landing(arrival, RunsOn::Target).await;
            }
            Err(why) => tracing::error!(vm = %arrival.name, %why, "VM stays in doubt"),
        }
    }

    /// An operator, or a fence, has decided.
    pub(super) async fn decide_landing(&self, arrival: &Rc<Arrival>, runs_on: RunsOn) -> Target {
        arrival.care.decide(runs_on);
        arrival.care.no_doubt();
        if runs_on == RunsOn::Target && arrival.state() == Target::Loaded {
            // Its source has not said whether it ran: most do.
            arrival.run.set(true);
        }
        self.land(arrival, TargetEvent::Resolved(runs_on)).await
    }

    fn doubt(&self, arrival: &Arrival, why: &str) {
        if arrival.care.doubt(why) {
            tracing::error!(vm = %arrival.name, %why, "VM is in doubt; see `drover status`");
        }
    }
}
