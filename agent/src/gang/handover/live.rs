//! What becomes of a VM's progress, of its scan thread and of its place among
//! the agent's VMs while its handover is decided.

use super::leaving::Watcher;
use super::machine::{RunsOn, Source};
use crate::gang::flight::Flight;
use crate::gang::message::{Phase, StopTimes};
use crate::gang::scan::Command;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// Hears of the decision on a VM whose pages this run of the agent has moved:
/// tells its progress, and ends its scan thread.
pub struct Live {
    flight: Arc<Flight>,
    commands: Sender<Command>,
    /// Since when the guest stands still.
    stopped: Cell<Option<Instant>>,
    /// When the part of the stop began that is under way.
    lap: Cell<Option<Instant>>,
    cancelled: Cell<bool>,
    settled: Box<dyn Fn(bool)>,
}

impl Live {
    /// `settled` is called once it is clear, with whether the VM has arrived:
    /// when it runs here and may be moved again, or when nothing of it is
    /// left here.
    pub fn new(
        flight: Arc<Flight>,
        commands: Sender<Command>,
        settled: Box<dyn Fn(bool)>,
    ) -> Rc<Self> {
        Rc::new(Live {
            flight,
            commands,
            stopped: Cell::default(),
            lap: Cell::default(),
            cancelled: Cell::default(),
            settled,
        })
    }

    /// The guest stands still, since `begun`.
    pub(super) fn stopped_since(&self, begun: Instant) {
        self.stopped.set(Some(begun));
        self.lap.set(Some(begun));
    }

    /// A part of the stop is over; `part` is where its time belongs.
    pub(super) fn lap(&self, part: impl FnOnce(&mut StopTimes) -> &mut f64) {
        let now = Instant::now();
        if let Some(begun) = self.lap.replace(Some(now)) {
            let ms = now.duration_since(begun).as_secs_f64() * 1e3;
            self.flight.update(|vm| *part(&mut vm.stop) = ms);
        }
    }
}

impl Watcher for Live {
    fn entered(&self, state: Source, why: &str) {
        match state {
            // The scan thread ends, which lifts the protection.
            Source::Returning | Source::TakingBack => {
                let cancelled = self.flight.is_cancelled();
                self.cancelled
                    .set(self.cancelled.get() || cancelled && state == Source::Returning);
                if state == Source::Returning {
                    self.flight.cancel();
                }
            }
            Source::Noting => self.flight.update(|vm| {
                let cancelled = self.cancelled.get();
                vm.phase = if cancelled {
                    Phase::Cancelled
                } else {
                    Phase::Failed
                };
                vm.error = (!cancelled).then(|| why.to_owned());
            }),
            Source::Returned => (self.settled)(false),
            Source::Committed => self.lap(|stop| &mut stop.commit_ms),
            Source::Ending => {
                self.lap(|stop| &mut stop.resume_ms);
                let downtime = self
                    .stopped
                    .get()
                    .map(|at| at.elapsed().as_secs_f64() * 1e3);
                self.flight.update(|vm| vm.downtime_ms = downtime);
                let _thread_gone = self.commands.send(Command::Done);
            }
            Source::Closing(RunsOn::Target) => {
                self.flight.update(|vm| {
                    vm.phase = Phase::Arrived;
                    vm.error = None;
                });
                (self.settled)(true);
            }
            _ => {}
        }
    }

    fn in_doubt(&self, why: &str) {
        self.flight.update(|vm| {
            vm.phase = Phase::InDoubt;
            vm.error = Some(why.to_owned());
        });
    }

    fn journaled(&self, here: Option<Duration>, there: Option<Duration>) {
        let took = here.into_iter().chain(there).sum::<Duration>();
        let ms = took.as_secs_f64() * 1e3;
        self.flight
            .update(|vm| vm.journal_ms = Some(vm.journal_ms.unwrap_or(0.0) + ms));
    }
}
