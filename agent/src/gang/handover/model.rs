//! The handover, explored: every interleaving of both agents, both VMMs, the
//! coordinator and a network that loses, repeats and reorders, with crashes of
//! either agent, deaths of either VMM and failing writes at every point.
//!
//! The agents here take every step by [`Source::on`] and [`Target::on`], the
//! functions the real ones run.
//!
//! "Once faults stop" is checked by brute force: from *every* state that can be
//! reached, the rest of the handover is played to its end without faults (and
//! without one host, for the cases of an operator's or a fence's word), and has
//! to end well.

use super::machine::*;
use crate::gang::journal::Step;
use stateright::{Checker, Model, Property};
use std::collections::BTreeSet;

/// What travels between the agents. A message stays in the network once sent:
/// it may be delivered never, late, again and out of order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    /// Target: it has everything.
    Loaded,
    /// Source: it is committed.
    Resume,
    /// Target's answer.
    Word(Word),
    /// Source: give it up.
    Abort,
    /// Target's answer.
    GivenUp,
    /// Target: whose is it?
    Ask,
    /// Source's answer.
    Says(Whose),
    /// Source: I know that it is yours, and have forgotten it.
    Released,
}

/// A rule that the model can be told to break, to see that it would notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// The target is told to resume before *committed* is on the disk.
    ResumeBeforeCommit,
    /// A restarted source lets the guest run whatever it has written.
    RestartedSourceRuns,
    /// The target lets the guest run before it has written that it does.
    RunBeforeRecord,
    /// The target forgets the VM before the source knows that it is there.
    ForgetEarly,
    /// The source ends its copy without the target's word.
    EndWithoutWord,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    /// `None`: the agent is down.
    source: Option<Source>,
    source_record: Option<Step>,
    source_vmm: Copy,
    target: Option<Target>,
    target_record: Option<Step>,
    target_vmm: Copy,
    network: BTreeSet<Message>,
    /// The guest has run at the target.
    ran_there: bool,
    /// The VMM that held the VM has been killed.
    killed: bool,
    /// Faults that may still happen.
    crashes: [u8; 2],
    kills: u8,
    bad_writes: u8,
    cancels: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Written {
    Well,
    Not,
    /// It is on the disk, but the agent is told that this is not sure.
    Unsure,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Pause,
    SendState,
    StateArrived,
    Cancel,
    CoordinatorGivesUp,
    SourceActs(Written),
    TargetActs(Written),
    Deliver(Message),
    SourceCrashes,
    SourceRestarts,
    TargetCrashes,
    TargetRestarts,
    SourceVmmDies,
    TargetVmmDies,
}

struct Handover(Broken);

impl World {
    fn new() -> World {
        World {
            source: Some(Source::Moving),
            source_record: Some(Step::Moving),
            source_vmm: Copy::Running,
            target: Some(Target::Waiting),
            target_record: Some(Step::Moving),
            target_vmm: Copy::Incoming,
            network: BTreeSet::new(),
            ran_there: false,
            killed: false,
            crashes: [2, 2],
            kills: 1,
            bad_writes: 1,
            cancels: 1,
        }
    }

    fn source_on(&mut self, event: SourceEvent) {
        if let Some(source) = &mut self.source {
            *source = source.on(event);
        }
    }

    fn target_on(&mut self, event: TargetEvent) {
        if let Some(target) = &mut self.target {
            *target = target.on(event);
        }
    }

    fn both_run(&self) -> bool {
        self.source_vmm == Copy::Running && self.target_vmm == Copy::Running
    }

    fn running(&self) -> usize {
        let vmms = [self.source_vmm, self.target_vmm];
        vmms.iter().filter(|vmm| **vmm == Copy::Running).count()
    }
}

impl Handover {
    fn source_acts(&self, w: &mut World, written: Written) -> Option<()> {
        match w.source?.act()? {
            SourceAct::Write(step) => {
                if self.0 == Broken::ResumeBeforeCommit && step == Step::Committed {
                    w.network.insert(Message::Resume);
                }
                if written != Written::Not {
                    w.source_record = Some(step);
                }
                w.source_on(match written {
                    Written::Well => SourceEvent::Written,
                    Written::Not => SourceEvent::NotWritten,
                    Written::Unsure => SourceEvent::Unsure,
                });
                if self.0 == Broken::EndWithoutWord && w.source == Some(Source::Committed) {
                    w.source = Some(Source::Ending);
                }
            }
            SourceAct::LetRun => {
                if w.source_vmm == Copy::Stopped {
                    w.source_vmm = Copy::Running;
                }
                w.source_on(SourceEvent::LetRun);
            }
            SourceAct::Resume => drop(w.network.insert(Message::Resume)),
            SourceAct::End => {
                w.source_vmm = Copy::None;
                w.source_on(SourceEvent::Ended);
            }
            SourceAct::Abort => drop(w.network.insert(Message::Abort)),
            SourceAct::Forget => {
                w.source_record = None;
                w.source_on(SourceEvent::Forgotten);
                if w.source == Some(Source::Over(RunsOn::Target)) {
                    w.network.insert(Message::Released);
                }
            }
        }
        Some(())
    }

    fn target_acts(&self, w: &mut World, written: Written) -> Option<()> {
        match w.target?.act()? {
            TargetAct::Write(step) => {
                if written != Written::Not {
                    w.target_record = Some(step);
                }
                w.target_on(match written {
                    Written::Well => TargetEvent::Written,
                    _ => TargetEvent::NotWritten,
                });
            }
            TargetAct::LetRun => match w.target_vmm {
                Copy::None => w.target_on(TargetEvent::Died),
                _ => {
                    w.target_vmm = Copy::Running;
                    w.ran_there = true;
                    w.target_on(TargetEvent::LetRun);
                    if self.0 == Broken::ForgetEarly {
                        w.target_record = None;
                    }
                }
            },
            TargetAct::Destroy => {
                w.target_vmm = Copy::None;
                w.target_on(TargetEvent::Destroyed);
            }
            TargetAct::Ask => drop(w.network.insert(Message::Ask)),
            TargetAct::Forget => {
                w.target_record = None;
                w.target_on(TargetEvent::Forgotten);
            }
        }
        Some(())
    }

    fn deliver(&self, w: &mut World, message: Message) -> Option<()> {
        match message {
            Message::Loaded => {
                w.source?;
                w.source_on(SourceEvent::Loaded);
            }
            Message::Word(word) => {
                w.source?;
                w.source_on(SourceEvent::Target(word));
            }
            Message::GivenUp => {
                w.source?;
                w.source_on(SourceEvent::GivenUp);
            }
            Message::Ask => {
                let here = w.source_vmm != Copy::None;
                let says = match w.source? {
                    Source::Over(_) => whose_unrecorded(here),
                    source => source.whose(true),
                };
                w.network.insert(Message::Says(says));
            }
            Message::Resume => {
                self.notice_death(w)?;
                if self.0 == Broken::RunBeforeRecord && w.target == Some(Target::Loaded) {
                    w.target = Some(Target::Starting { untold: true });
                }
                w.target_on(TargetEvent::Resume);
                if let Some(word) = w.target?.word() {
                    w.network.insert(Message::Word(word));
                }
            }
            Message::Abort => {
                self.notice_death(w)?;
                w.target_on(TargetEvent::Abort);
                if w.target == Some(Target::Over(RunsOn::Source)) {
                    w.network.insert(Message::GivenUp);
                }
            }
            Message::Says(whose) => {
                self.notice_death(w)?;
                w.target_on(TargetEvent::Says(whose));
            }
            Message::Released => {
                w.target?;
                w.target_on(TargetEvent::Released);
            }
        }
        Some(())
    }

    /// The target agent looks at its VMM before it takes a decision.
    fn notice_death(&self, w: &mut World) -> Option<()> {
        if w.target_vmm == Copy::None {
            w.target_on(TargetEvent::Died);
        }
        w.target.map(drop)
    }

    fn restart_source(&self, w: &mut World) {
        let restarted = match w.source_record {
            Some(_) if self.0 == Broken::RestartedSourceRuns => Source::Returning,
            Some(record) => Source::restarted(record),
            // Of a VM without a record only its VMM is left.
            None if w.source_vmm == Copy::None => Source::Over(RunsOn::Target),
            None => Source::Over(RunsOn::Source),
        };
        w.source = Some(restarted);
    }

    fn restart_target(&self, w: &mut World) {
        let restarted = match w.target_record {
            Some(record) => Target::restarted(record, w.target_vmm),
            None if w.target_vmm == Copy::None => Target::Over(RunsOn::Source),
            None => Target::Over(RunsOn::Target),
        };
        w.target = Some(restarted);
    }

    fn step(&self, w: &mut World, action: Action) -> Option<()> {
        match action {
            Action::Pause => w.source_vmm = Copy::Stopped,
            Action::SendState => w.target_vmm = Copy::Stopped,
            Action::StateArrived => {
                w.target_on(TargetEvent::Arrived);
                w.network.insert(Message::Loaded);
            }
            Action::Cancel => {
                w.cancels -= 1;
                w.source_on(SourceEvent::Failed);
            }
            Action::CoordinatorGivesUp => {
                w.target_on(TargetEvent::GiveUp);
            }
            Action::SourceActs(written) => {
                w.bad_writes -= u8::from(written != Written::Well);
                self.source_acts(w, written)?;
            }
            Action::TargetActs(written) => {
                w.bad_writes -= u8::from(written != Written::Well);
                self.target_acts(w, written)?;
                // Both its copies: one was killed, the other cannot be taken over.
                w.killed |= w.target == Some(Target::Discarding) && w.source_vmm == Copy::None;
            }
            Action::Deliver(message) => self.deliver(w, message)?,
            Action::SourceCrashes => {
                w.crashes[0] -= 1;
                w.source = None;
            }
            Action::SourceRestarts => self.restart_source(w),
            Action::TargetCrashes => {
                w.crashes[1] -= 1;
                w.target = None;
            }
            Action::TargetRestarts => self.restart_target(w),
            Action::SourceVmmDies => {
                w.kills -= 1;
                // The VM dies with it, unless it is the target's already.
                let handed_over = w.source_record == Some(Step::Committed)
                    && w.source != Some(Source::TakingBack)
                    && w.target != Some(Target::Discarding)
                    && matches!(w.target_vmm, Copy::Stopped | Copy::Running);
                w.killed |= !handed_over;
                w.source_vmm = Copy::None;
            }
            Action::TargetVmmDies => {
                w.kills -= 1;
                w.killed |= w.ran_there || w.source_vmm == Copy::None;
                w.target_vmm = Copy::None;
            }
        }
        Some(())
    }

    /// Plays the handover on without faults; `source`, `target`: whether that
    /// host takes part. Returns how it ends.
    fn played_on(&self, from: &World, source: bool, target: bool) -> World {
        let mut w = from.clone();
        // What was under way may be lost; what is asked again arrives.
        w.network.clear();
        if !source {
            w.source = None;
            w.source_vmm = Copy::None;
        } else if w.source.is_none() {
            self.restart_source(&mut w);
        }
        if !target {
            w.target = None;
            w.target_vmm = Copy::None;
        } else if w.target.is_none() {
            self.restart_target(&mut w);
        }
        // The handover that was under way runs into its deadline.
        w.source_on(SourceEvent::Failed);
        for _ in 0..16 {
            self.notice_death(&mut w);
            for _ in 0..8 {
                self.source_acts(&mut w, Written::Well);
                self.target_acts(&mut w, Written::Well);
            }
            if target && w.target == Some(Target::Waiting) {
                // Nothing is heard of it for too long.
                w.target_on(TargetEvent::GiveUp);
            }
            for message in std::mem::take(&mut w.network) {
                self.deliver(&mut w, message);
            }
            for message in std::mem::take(&mut w.network) {
                self.deliver(&mut w, message);
            }
        }
        w
    }

    /// Both hosts live: it ends by itself.
    fn ends_well(&self, from: &World) -> bool {
        let mut end = self.played_on(from, true, true);
        if end.source == Some(Source::Committed) && end.target == Some(Target::Lost) {
            // Nobody can know whether it ran: that is the operator's to say.
            end.target_on(TargetEvent::Resolved(RunsOn::Source));
            end.source_on(SourceEvent::Resolved(RunsOn::Source));
            end = self.played_on(&end, true, true);
        }
        let records = end.source_record.is_some() || end.target_record.is_some();
        let halves = [end.source_vmm, end.target_vmm]
            .iter()
            .any(|vmm| matches!(vmm, Copy::Incoming | Copy::Stopped));
        let lost = from.killed && end.running() == 0;
        !records && !halves && (lost || end.running() == 1)
    }

    /// One host is gone for good, and a fence or an operator has said so: the
    /// other runs the VM if it has it.
    fn ends_well_alone(&self, from: &World) -> bool {
        let mut at_source = self.played_on(from, true, false);
        at_source.source_on(SourceEvent::Resolved(RunsOn::Source));
        at_source.source_on(SourceEvent::GivenUp);
        let at_source = self.played_on(&at_source, true, false);
        let had = from.source_vmm != Copy::None && from.source != Some(Source::Ending);
        let source_well = !had || at_source.source_vmm == Copy::Running;

        let mut at_target = self.played_on(from, false, true);
        at_target.target_on(TargetEvent::Resolved(RunsOn::Target));
        let at_target = self.played_on(&at_target, false, true);
        let given_up = matches!(
            from.target,
            Some(Target::Discarding | Target::Waiting | Target::Closing(_) | Target::Over(_))
        );
        let had = matches!(from.target_vmm, Copy::Stopped | Copy::Running)
            && from.target_record.is_some()
            && !given_up;
        source_well && (!had || at_target.target_vmm == Copy::Running)
    }
}

impl Model for Handover {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new()]
    }

    fn actions(&self, w: &World, actions: &mut Vec<Action>) {
        if w.source == Some(Source::Moving) {
            match w.source_vmm {
                Copy::Running => actions.push(Action::Pause),
                Copy::Stopped
                    if w.target == Some(Target::Waiting) && w.target_vmm == Copy::Incoming =>
                {
                    actions.push(Action::SendState);
                }
                _ => {}
            }
            if w.cancels > 0 {
                actions.push(Action::Cancel);
            }
        }
        if w.target == Some(Target::Waiting) && w.target_vmm == Copy::Stopped {
            actions.push(Action::StateArrived);
        }
        if w.target.is_some() {
            actions.push(Action::CoordinatorGivesUp);
        }
        let ways: &[Written] = match w.bad_writes {
            0 => &[Written::Well],
            _ => &[Written::Well, Written::Not, Written::Unsure],
        };
        if let Some(act) = w.source.and_then(Source::act) {
            let writes = matches!(act, SourceAct::Write(_));
            let ways = if writes { ways } else { &ways[..1] };
            actions.extend(ways.iter().map(|way| Action::SourceActs(*way)));
        }
        if let Some(act) = w.target.and_then(Target::act) {
            let writes = matches!(act, TargetAct::Write(_));
            let ways = if writes { ways } else { &ways[..1] };
            actions.extend(ways.iter().map(|way| Action::TargetActs(*way)));
        }
        actions.extend(w.network.iter().map(|message| Action::Deliver(*message)));
        match w.source {
            Some(_) if w.crashes[0] > 0 => actions.push(Action::SourceCrashes),
            None => actions.push(Action::SourceRestarts),
            _ => {}
        }
        match w.target {
            Some(_) if w.crashes[1] > 0 => actions.push(Action::TargetCrashes),
            None => actions.push(Action::TargetRestarts),
            _ => {}
        }
        if w.kills > 0 && w.source_vmm != Copy::None {
            actions.push(Action::SourceVmmDies);
        }
        if w.kills > 0 && w.target_vmm != Copy::None {
            actions.push(Action::TargetVmmDies);
        }
    }

    fn next_state(&self, w: &World, action: Action) -> Option<World> {
        let mut next = w.clone();
        self.step(&mut next, action)?;
        (next != *w).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two running", |_, w: &World| !w.both_run()),
            Property::always(
                "never back to a copy that was left behind",
                |_, w: &World| !(w.ran_there && w.source_vmm == Copy::Running),
            ),
            Property::always(
                "ends well once faults stop",
                |model: &Handover, w: &World| model.ends_well(w),
            ),
            Property::always(
                "ends well on the host that is left",
                |model: &Handover, w: &World| model.ends_well_alone(w),
            ),
            Property::sometimes("a VM arrives", |_, w: &World| {
                w.target == Some(Target::Over(RunsOn::Target))
                    && w.source == Some(Source::Over(RunsOn::Target))
            }),
            Property::sometimes("a VM is taken back after the commitment", |_, w: &World| {
                w.source == Some(Source::TakingBack)
                    && w.network.contains(&Message::Word(Word::NeverWill))
            }),
        ]
    }
}

fn explore(broken: Broken) -> impl Checker<Handover> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    Handover(broken)
        .checker()
        .threads(threads)
        .spawn_bfs()
        .join()
}

#[test]
fn no_interleaving_runs_a_vm_twice_or_nowhere() {
    let checker = explore(Broken::Nothing);
    println!(
        "{} states of the handover, {} of them different",
        checker.state_count(),
        checker.unique_state_count()
    );
    checker.assert_properties();
}

#[test]
fn the_model_notices_every_rule_that_is_broken() {
    for (broken, noticed_by) in [
        (Broken::ResumeBeforeCommit, "never two running"),
        (Broken::RestartedSourceRuns, "never two running"),
        (
            Broken::RunBeforeRecord,
            "never back to a copy that was left behind",
        ),
        (
            Broken::ForgetEarly,
            "never back to a copy that was left behind",
        ),
        (Broken::EndWithoutWord, "ends well once faults stop"),
    ] {
        let found = explore(broken).discoveries();
        println!("{broken:?}: {:?}", found.keys());
        assert!(
            found.contains_key(noticed_by),
            "{broken:?} was not noticed as `{noticed_by}` but by {:?}",
            found.keys()
        );
    }
}
