//! The source's driver of a handover's decision: executes what
//! [`machine`](super::machine) says, for a handover that has just come to its
//! decision and for one that a restarted agent finds in its journal.
//!
//! It ends only when nothing of the handover is left here. What the other side
//! has to say is asked for as long as it takes; meanwhile the VM's state is
//! told by [`Care`].

use super::care::{Care, DOUBT_AFTER};
use super::chain;
use super::fence::prove_down;
use super::machine::{RunsOn, Source, SourceAct, SourceEvent, Word};
use crate::config::FencingConfig;
use crate::gang::coordinator::Caller;
use crate::gang::journal::{Journal, Record, Step};
use crate::gang::message::{GangRequest, GangResponse};
use crate::gang::moments::{Moment, Moments};
use crate::vmm::definition::VmPaths;
use crate::vmm::kinds::roll_back;
use crate::vmm::launch::{Vmm, end_leftovers, remove_files};
use crate::vmm::process::ProcessError;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long an answer to one request may take.
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// Pauses between attempts: short at first, since a guest stands still.
const RETRY: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(500)];
/// Attempts that follow each other quickly.
const QUICK: u32 = 20;
/// A fence that failed is tried again after this.
const FENCE_AGAIN: Duration = Duration::from_secs(60);

/// Who wants to hear how it goes.
pub trait Watcher {
    /// A state has been entered; `why` it came to the decision.
    fn entered(&self, state: Source, why: &str);
    /// The VM is here again, and its VMM has ended.
    fn lost(&self);
    /// The target's word is missing.
    fn in_doubt(&self, why: &str);
    /// Writing *committed* took this long on this side (source) or that.
    fn journaled(&self, here: Option<Duration>, there: Option<Duration>);
}

/// See the module.
pub struct Leaving<C> {
    /// Reaches the target agent.
    pub caller: Rc<C>,
    /// Where decisions are written.
    pub journal: Journal,
    /// Tests stop it at these.
    pub moments: Moments,
    /// What the journal says.
    pub record: Record,
    /// The VMM; `None` if it has ended.
    pub vmm: Option<Vmm>,
    /// The VM's files, if an agent made them.
    pub files: Option<VmPaths>,
    /// Can prove that the target's host is down.
    pub fence: Option<FencingConfig>,
    /// What operators see and decide.
    pub care: Rc<Care>,
    /// Who wants to hear of it.
    pub watcher: Rc<dyn Watcher>,
    /// Why it came to this.
    pub why: String,
}

/// What of an attempt is remembered until the next.
struct Attempts {
    begun: Instant,
    count: u32,
    fenced: Option<Instant>,
}

impl<C: Caller> Leaving<C> {
    /// Drives the handover from `state` to its end.
    pub async fn run(mut self, mut state: Source) -> RunsOn {
        loop {
            self.care.enter(words(state));
            self.care.source_is(state, self.record.run);
            self.watcher.entered(state, &self.why);
            let mut attempts = Attempts {
                begun: Instant::now(),
                count: 0,
                fenced: None,
            };
            let next = loop {
                let Some(act) = state.act() else {
                    return match state {
                        Source::Over(runs_on) => runs_on,
                        _ => RunsOn::Source,
                    };
                };
                let event = self.perform(act, &mut attempts).await;
                let next = event.map_or(state, |event| state.on(event));
                if next != state {
                    break next;
                }
                attempts.count += 1;
                let pause = RETRY[usize::from(attempts.count > QUICK)];
                tokio::time::sleep(pause).await;
            };
            self.between(state, next).await;
            state = next;
        }
    }

    /// Makes durable that the VM is ours, and whether its guest, found
    /// stopped, is to be let run.
    pub async fn moving(&mut self, run: bool) -> Result<(), String> {
        self.record.run = run;
        match self.write(Step::Moving).await {
            SourceEvent::Written => Ok(()),
            _ => Err(self.why.clone()),
        }
    }

    async fn reach(&self, moment: Moment) {
        self.moments.reach(moment, &self.record.vm).await;
    }

    async fn between(&mut self, from: Source, to: Source) {
        match (from, to) {
            (Source::Committing, Source::Committed) => self.reach(Moment::Committed).await,
            (Source::Committed, Source::Ending) => {
                self.care.no_doubt();
                self.reach(Moment::Resumed).await;
            }
            (Source::Committed, Source::TakingBack) => {
                self.care.no_doubt();
                self.why = format!("{} could not run it: it stays here", self.record.peer);
                self.care.because(&self.why);
            }
            (Source::Committing, Source::Returning | Source::TakingBack) => {
                self.care.because(&self.why);
            }
            (Source::Returning, _) => {
                self.reach(Moment::RolledBack).await;
                self.look_again();
            }
            _ => {}
        }
    }

    /// A VM that is here again, and whose VMM has ended, is neither moved nor
    /// merely cancelled: whoever asked for that must hear of it.
    fn look_again(&mut self) {
        let vmm = self.vmm.as_ref();
        if vmm.is_some_and(|vmm| !vmm.process.is_ending()) {
            return;
        }
        self.why = format!(
            "VM {} stayed on its host, and its VMM there has ended: start it again ({})",
            self.record.vm, self.why
        );
        tracing::error!(vm = %self.record.vm, why = %self.why, "VM is lost");
        self.care.because(&self.why);
        self.watcher.lost();
    }

    async fn perform(&mut self, act: SourceAct, attempts: &mut Attempts) -> Option<SourceEvent> {
        match act {
            SourceAct::Write(step) => Some(self.write(step).await),
            SourceAct::LetRun => self.let_run().await,
            SourceAct::Resume => self.resume(attempts).await,
            SourceAct::End => self.end().await,
            SourceAct::Abort => self.abort().await,
            SourceAct::Forget => self.forget().await,
        }
    }

    async fn write(&mut self, step: Step) -> SourceEvent {
        if step == Step::Committed {
            self.reach(Moment::Committing).await;
        }
        self.record.step = step;
        let (journal, record) = (self.journal.clone(), self.record.clone());
        let begun = Instant::now();
        let written = tokio::task::spawn_blocking(move || journal.write(&record)).await;
        let took = begun.elapsed();
        match written {
            Ok(Ok(())) => {
                if step == Step::Committed {
                    self.watcher.journaled(Some(took), None);
                }
                SourceEvent::Written
            }
            Ok(Err(error)) => {
                tracing::error!(vm = %self.record.vm, %error, "journal not written");
                self.why = error.to_string();
                match error.may_be_written() {
                    true => SourceEvent::Unsure,
                    false => SourceEvent::NotWritten,
                }
            }
            Err(panic) => {
                tracing::error!(vm = %self.record.vm, %panic, "journal not written");
                SourceEvent::Unsure
            }
        }
    }

    async fn let_run(&self) -> Option<SourceEvent> {
        let (vm, run) = (&self.record.vm, self.record.run);
        let Some(vmm) = self.vmm.as_ref().filter(|vmm| vmm.process.is_alive()) else {
            tracing::error!(%vm, "the VMM has ended while its VM was here: there is nothing to run");
            return Some(SourceEvent::LetRun);
        };
        match roll_back(vmm, run).await {
            Ok(()) => {
                tracing::warn!(%vm, why = %self.why, "VM stays here and runs on");
                Some(SourceEvent::LetRun)
            }
            Err(error) => {
                let why = format!(
                    "it is to run here, and cannot be let run: {}",
                    chain(&error)
                );
                tracing::error!(%vm, %why, "trying again");
                self.care.because(&why);
                None
            }
        }
    }

    async fn resume(&mut self, attempts: &mut Attempts) -> Option<SourceEvent> {
        let request = GangRequest::Resume {
            gang: self.record.gang,
            vm: self.record.vm.clone(),
            run: self.record.run,
        };
        let asking = self.caller.call(&self.record.peer, request, ASK_LIMIT);
        let asking = async { tokio::join!(asking, self.reach(Moment::ResumeSent)).0 };
        let answer = tokio::select! {
            answer = asking => answer,
            runs_on = self.care.decided() => return Some(SourceEvent::Resolved(runs_on)),
        };
        let peer = &self.record.peer;
        let why = match answer {
            Ok(GangResponse::Landed {
                word: Word::Died, ..
            }) => {
                // Whether its guest has run there nobody can know for sure.
                let why = format!("{peer} had begun to run it, and its VMM there has ended");
                self.doubted(&why);
                return None;
            }
            Ok(GangResponse::Landed { word, journal_us }) => {
                self.watcher
                    .journaled(None, Some(Duration::from_micros(journal_us)));
                return Some(SourceEvent::Target(word));
            }
            Ok(GangResponse::Failed(why)) => format!("{peer}: {why}"),
            Ok(_) => format!("{peer} answered something else than asked"),
            Err(why) => why,
        };
        if attempts.count == 0 {
            tracing::warn!(vm = %self.record.vm, %why, "target has not confirmed; asking again");
        }
        if attempts.begun.elapsed() < DOUBT_AFTER {
            return None;
        }
        self.doubted(&format!(
            "it was handed over to {peer}, which does not confirm that it runs ({why})"
        ));
        self.fence(attempts).await
    }

    fn doubted(&self, why: &str) {
        if self.care.doubt(why) {
            tracing::error!(vm = %self.record.vm, %why, "VM is in doubt");
            self.watcher.in_doubt(why);
        }
    }

    /// A proof that the target's host is down lets the copy here run.
    async fn fence(&self, attempts: &mut Attempts) -> Option<SourceEvent> {
        let fence = self.fence.as_ref()?;
        if attempts.fenced.is_some_and(|at| at.elapsed() < FENCE_AGAIN) {
            return None;
        }
        attempts.fenced = Some(Instant::now());
        let (host, vm) = (&self.record.peer, &self.record.vm);
        match prove_down(fence, host, vm).await {
            Ok(()) => {
                tracing::warn!(%vm, %host, "host is fenced: the VM runs here again");
                Some(SourceEvent::Resolved(RunsOn::Source))
            }
            Err(why) => {
                tracing::error!(%vm, %why, "VM stays in doubt");
                None
            }
        }
    }

    async fn end(&self) -> Option<SourceEvent> {
        self.reach(Moment::EndingSource).await;
        if let Some(vmm) = &self.vmm
            && let Err(error) = vmm.end().await
        {
            tracing::error!(vm = %self.record.vm, %error,
                "the VM runs at its target, but its stopped copy could not be ended here");
            return None;
        }
        if let Some(files) = self.files.clone() {
            // What a restarted agent cannot reach any more ends all the same.
            let unreached = self.vmm.is_none();
            let removed = tokio::task::spawn_blocking(move || {
                if unreached {
                    end_leftovers(&files)?;
                }
                remove_files(&files);
                Ok::<_, ProcessError>(())
            });
            match removed.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::error!(vm = %self.record.vm, %error,
                        "the VM runs at its target, but its copy could not be ended here");
                    return None;
                }
                Err(panic) => {
                    tracing::error!(vm = %self.record.vm, %panic, "files of the VM may be left");
                }
            }
        }
        self.reach(Moment::SourceEnded).await;
        Some(SourceEvent::Ended)
    }

    async fn abort(&self) -> Option<SourceEvent> {
        let abort = GangRequest::Abort {
            gang: self.record.gang,
            vm: self.record.vm.clone(),
            why: self.why.clone(),
        };
        match self.caller.call(&self.record.peer, abort, ASK_LIMIT).await {
            Ok(GangResponse::Done) => Some(SourceEvent::GivenUp),
            Ok(GangResponse::Failed(why)) => {
                self.care.because(&why);
                None
            }
            Ok(_) | Err(_) => None,
        }
    }

    async fn forget(&self) -> Option<SourceEvent> {
        let (gang, vm) = (self.record.gang, self.record.vm.clone());
        if let Err(error) = self.journal.forget(&vm, gang) {
            tracing::warn!(%error, "journal entry stays");
            return None;
        }
        if self.record.step == Step::Committed {
            // It asks by itself if this is lost.
            let settled = GangRequest::Settled { gang, vm };
            let _lost = self
                .caller
                .call(&self.record.peer, settled, ASK_LIMIT)
                .await;
        }
        Some(SourceEvent::Forgotten)
    }
}

/// A state in an operator's words.
fn words(state: Source) -> &'static str {
    match state {
        Source::Moving => "moving",
        Source::Committing => "being committed",
        Source::Committed => "committed: stands still here, the target is asked to run it",
        Source::Ending => "runs at the target; its copy here is being ended",
        Source::TakingBack | Source::Returning => "is being let run here again",
        Source::Noting => "runs here",
        Source::Returned => "runs here; the target is being told to give it up",
        Source::Closing(RunsOn::Source) | Source::Over(RunsOn::Source) => "stayed here",
        Source::Closing(RunsOn::Target) | Source::Over(RunsOn::Target) => "went to the target",
    }
}
