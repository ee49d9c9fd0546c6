//! Who may run the VM: the rules of a handover as a pure function.
//!
//! A state says what is to be done now ([`Source::act`], [`Target::act`]); the
//! act's outcome, or a word of the other side, is an event that leads to the
//! next state (`on`). The agents' drivers execute the acts, and the model in
//! `model.rs` explores every interleaving of them with crashes and a network
//! that loses, repeats and reorders: both by these very functions.
//!
//! Every `Write` is durable before the next act begins. What a restarted agent
//! reads there decides, with the state of its VMM, where it goes on
//! ([`Source::restarted`], [`Target::restarted`]).
//!
//! `docs/handover.md` has the diagram and the reasons.

use crate::gang::journal::Step;
use serde::{Deserialize, Serialize};

/// What a VMM is found to be doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Copy {
    /// There is none, or it has ended.
    None,
    /// It waits for device state.
    Incoming,
    /// It has everything, its guest stands still.
    Stopped,
    /// Its guest runs.
    Running,
}

/// What is to be done at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceAct {
    /// Make this durable: [`SourceEvent::Written`] or `NotWritten`.
    Write(Step),
    /// Let the guest go on as it was before: `LetRun` once it does, or if
    /// there is no VMM any more.
    LetRun,
    /// Ask the target to run the VM: `Target`.
    Resume,
    /// End the copy here: `Ended`.
    End,
    /// Tell the target to give the VM up: `GivenUp` when it has.
    Abort,
    /// Remove the record: `Forgotten`.
    Forget,
}

/// What has happened, at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceEvent {
    /// The target has all pages and all device state, and says so.
    Loaded,
    /// The handover cannot go on: an error, a deadline, a cancel.
    Failed,
    /// The record is durable.
    Written,
    /// It is not: the record is what it was before.
    NotWritten,
    /// It may be or not.
    Unsure,
    /// The guest runs (or stands, if it stood before).
    LetRun,
    /// The target's word on the VM.
    Target(Word),
    /// The copy here is gone.
    Ended,
    /// The target has nothing of the VM (any more).
    GivenUp,
    /// The record is gone.
    Forgotten,
    /// An operator, or a fence, has decided where the VM runs.
    Resolved(RunsOn),
}

/// The target's word on a VM whose source has committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Word {
    /// It is here: its guest was let run.
    Here,
    /// It never ran here and never will.
    NeverWill,
    /// It was let run here, and its VMM has ended.
    Died,
}

/// A decision from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RunsOn {
    /// On its source host.
    Source,
    /// On its target host.
    Target,
}

/// The source agent's part in one VM's handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The VM is ours. Pages move; towards the end the guest stands still.
    Moving,
    /// The target has everything; the commitment is being written.
    Committing,
    /// **The point of no return has been passed**: the VM is the target's.
    Committed,
    /// The target has it: the copy here is being ended.
    Ending,
    /// The target will never run it: that the VM is ours again is being
    /// written.
    TakingBack,
    /// The VM is ours: its guest is being let run.
    Returning,
    /// It runs: that nothing is left to do for it is being written.
    Noting,
    /// It runs, and the target is being told to give up.
    Returned,
    /// The record is being removed.
    Closing(RunsOn),
    /// Nothing of the handover is left here.
    Over(RunsOn),
}

impl Source {
    /// Where a restarted agent goes on.
    pub fn restarted(record: Step) -> Source {
        match record {
            // Nobody else may run it.
            Step::Moving => Source::Returning,
            Step::Committed => Source::Committed,
            Step::Returned => Source::Returned,
        }
    }

    /// What is to be done now; in [`Source::Moving`], what the pipeline of
    /// pages and device state does anyway.
    pub fn act(self) -> Option<SourceAct> {
        match self {
            Source::Moving | Source::Over(_) => None,
            Source::Committing => Some(SourceAct::Write(Step::Committed)),
            Source::Committed => Some(SourceAct::Resume),
            Source::Ending => Some(SourceAct::End),
            Source::TakingBack => Some(SourceAct::Write(Step::Moving)),
            Source::Returning => Some(SourceAct::LetRun),
            Source::Noting => Some(SourceAct::Write(Step::Returned)),
            Source::Returned => Some(SourceAct::Abort),
            Source::Closing(_) => Some(SourceAct::Forget),
        }
    }

    /// The next state. What does not concern a state (an answer that comes
    /// twice, a cancel that comes too late) leaves it as it is.
    #[must_use]
    pub fn on(self, event: SourceEvent) -> Source {
        use SourceEvent as E;
        match (self, event) {
            (Source::Moving, E::Loaded) => Source::Committing,
            (Source::Moving, E::Failed) => Source::Returning,

            (Source::Committing, E::Written) => Source::Committed,
            (Source::Committing, E::NotWritten) => Source::Returning,
            // It may be on the disk all the same: first that is put right.
            (Source::Committing, E::Unsure) => Source::TakingBack,

            (Source::Committed, E::Target(Word::Here)) => Source::Ending,
            (Source::Committed, E::Target(Word::NeverWill)) => Source::TakingBack,
            (Source::Committed, E::Resolved(RunsOn::Target)) => Source::Ending,
            (Source::Committed, E::Resolved(RunsOn::Source)) => Source::TakingBack,

            (Source::Ending, E::Ended) => Source::Closing(RunsOn::Target),

            (Source::TakingBack, E::Written) => Source::Returning,
            (Source::Returning, E::LetRun) => Source::Noting,
            (Source::Noting, E::Written) => Source::Returned,
            (Source::Returned, E::GivenUp) => Source::Closing(RunsOn::Source),

            (Source::Closing(runs_on), E::Forgotten) => Source::Over(runs_on),
            _ => self,
        }
    }

    /// What to answer a target that asks whose the VM is; `run`: whether its
    /// guest ran before the switch.
    pub fn whose(self, run: bool) -> Whose {
        match self {
            Source::Moving | Source::Committing | Source::TakingBack => Whose::Undecided,
            Source::Returning | Source::Noting | Source::Returned => Whose::Mine,
            Source::Closing(RunsOn::Source) | Source::Over(RunsOn::Source) => Whose::Mine,
            _ => Whose::Yours { run },
        }
    }

    /// Whether the VM is the target's, and only the target's.
    pub fn is_committed(self) -> bool {
        matches!(
            self,
            Source::Committed
                | Source::Ending
                | Source::Closing(RunsOn::Target)
                | Source::Over(RunsOn::Target)
        )
    }
}

/// What a source says when a target asks whose a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Whose {
    /// The source's: give it up.
    Mine,
    /// Not decided yet: wait.
    Undecided,
    /// The target's, to be let run or to stand as the flag says.
    Yours {
        /// Whether its guest is to run.
        run: bool,
    },
    /// The source has nothing of this handover, nor the VM.
    Unknown,
}

/// What a source answers that has nothing of a handover (any more); `here`:
/// whether it has the VM.
pub fn whose_unrecorded(here: bool) -> Whose {
    match here {
        true => Whose::Mine,
        false => Whose::Unknown,
    }
}

/// What is to be done at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TargetAct {
    /// Make this durable: [`TargetEvent::Written`] or `NotWritten`.
    Write(Step),
    /// Let the guest run, or leave it stopped if it is to stand: `LetRun`,
    /// `NotLetRun`, or `Died` if the VMM has ended.
    LetRun,
    /// End the VMM and remove its files: `Destroyed`.
    Destroy,
    /// Ask the source whose the VM is: `Says`.
    Ask,
    /// Remove the record: `Forgotten`.
    Forget,
}

/// What has happened, at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TargetEvent {
    /// The VMM has all device state. Only now is the source told *loaded*.
    Arrived,
    /// The coordinator, or this agent itself, does not want it any more.
    GiveUp,
    /// The source does not want it any more.
    Abort,
    /// The source has committed.
    Resume,
    /// The source's answer.
    Says(Whose),
    /// The record is durable.
    Written,
    /// It is not, or that is not known.
    NotWritten,
    /// The guest was let run.
    LetRun,
    /// It could not be, but its VMM lives.
    NotLetRun,
    /// The VMM has ended.
    Died,
    /// VMM and files are gone.
    Destroyed,
    /// The record is gone.
    Forgotten,
    /// The source knows that the VM is here.
    Released,
    /// An operator, or a fence, has decided where the VM runs.
    Resolved(RunsOn),
}

/// The target agent's part in one VM's handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// Half-made: both sides, and the coordinator, may give it up.
    Waiting,
    /// It has everything, and the source may know: only the source's word
    /// decides.
    Loaded,
    /// The source has committed: that is being written.
    Committing,
    /// Written: the guest is being let run. `untold`: this very run of the
    /// agent knows that it has never been told to.
    Starting {
        /// See there.
        untold: bool,
    },
    /// The VM is here; the source may not know yet.
    Here,
    /// It was let run, and its VMM has ended before the source knew.
    Lost,
    /// It is being given up.
    Discarding,
    /// The record is being removed; whether the VM is here.
    Closing(RunsOn),
    /// Nothing of the handover is left here.
    Over(RunsOn),
}

impl Target {
    /// Where a restarted agent goes on.
    pub fn restarted(record: Step, vmm: Copy) -> Target {
        match (record, vmm) {
            (Step::Committed, Copy::Stopped | Copy::Running) => Target::Starting { untold: false },
            (Step::Committed, Copy::None | Copy::Incoming) => Target::Lost,
            (Step::Moving, Copy::Stopped | Copy::Running) => Target::Loaded,
            (Step::Moving, Copy::None | Copy::Incoming) => Target::Discarding,
            // No target writes this.
            (Step::Returned, _) => Target::Discarding,
        }
    }

    /// What is to be done now. The source is asked only when it has been
    /// silent for a while.
    pub fn act(self) -> Option<TargetAct> {
        match self {
            Target::Waiting | Target::Over(_) => None,
            Target::Loaded | Target::Here | Target::Lost => Some(TargetAct::Ask),
            Target::Committing => Some(TargetAct::Write(Step::Committed)),
            Target::Starting { .. } => Some(TargetAct::LetRun),
            Target::Discarding => Some(TargetAct::Destroy),
            Target::Closing(_) => Some(TargetAct::Forget),
        }
    }

    /// The next state. What does not concern a state leaves it as it is.
    #[must_use]
    pub fn on(self, event: TargetEvent) -> Target {
        use TargetEvent as E;
        match (self, event) {
            (Target::Waiting, E::Arrived) => Target::Loaded,
            (Target::Waiting, E::GiveUp | E::Abort | E::Died) => Target::Discarding,
            // What the source handed over is not this VMM any more.
            (Target::Waiting, E::Resume) => Target::Discarding,

            (Target::Loaded, E::Abort | E::Says(Whose::Mine) | E::Died) => Target::Discarding,
            (Target::Loaded, E::Resume | E::Says(Whose::Yours { .. })) => Target::Committing,
            (Target::Loaded, E::Resolved(RunsOn::Target)) => Target::Committing,
            (Target::Loaded, E::Resolved(RunsOn::Source)) => Target::Discarding,

            (Target::Committing, E::Written) => Target::Starting { untold: true },
            (Target::Committing, E::Died) => Target::Discarding,
            // Where nothing can be written no VM can be taken over; the
            // source takes it back.
            (Target::Committing, E::NotWritten) => Target::Discarding,

            (Target::Starting { .. }, E::LetRun) => Target::Here,
            (Target::Starting { .. }, E::NotLetRun) => Target::Starting { untold: false },
            (Target::Starting { untold: true }, E::Died) => Target::Discarding,
            (Target::Starting { untold: false }, E::Died) => Target::Lost,
            (Target::Here, E::Died) => Target::Lost,

            (Target::Here, E::Released | E::Says(Whose::Mine | Whose::Unknown)) => {
                Target::Closing(RunsOn::Target)
            }

            (Target::Lost, E::Resolved(RunsOn::Source)) => Target::Discarding,
            (Target::Lost, E::Resolved(RunsOn::Target)) => Target::Closing(RunsOn::Target),
            (Target::Lost, E::Abort | E::Says(Whose::Mine)) => Target::Discarding,
            (Target::Lost, E::Released | E::Says(Whose::Unknown)) => {
                Target::Closing(RunsOn::Target)
            }

            (Target::Discarding, E::Destroyed) => Target::Closing(RunsOn::Source),
            (Target::Closing(runs_on), E::Forgotten) => Target::Over(runs_on),
            _ => self,
        }
    }

    /// What to answer a source that has committed, if that is settled.
    pub fn word(self) -> Option<Word> {
        match self {
            Target::Here => Some(Word::Here),
            Target::Closing(RunsOn::Target) | Target::Over(RunsOn::Target) => Some(Word::Here),
            // Its VMM is gone, whatever becomes of the record.
            Target::Closing(RunsOn::Source) | Target::Over(RunsOn::Source) => Some(Word::NeverWill),
            Target::Lost => Some(Word::Died),
            _ => None,
        }
    }
}
