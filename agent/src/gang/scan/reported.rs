//! Rounds of a VM whose VMM reports its pages in a migration stream of its own.
//!
//! The stream can only be had together with the guest's standstill: a VMM that
//! finds nothing more to report stops its guest. So it is begun when the VM's
//! turn has come. Before, RAM is read as it is: once for its content, and again
//! now and then while the VM waits, so that little is left. What has not changed
//! is told by its fingerprint and costs reading only. When the stream is begun
//! it reports every page once: from then on nothing is missed.

use super::{BARRIER_LIMIT, Carrier, Command, STOP_COPY_LIMIT, ScanError, Step, TICK};
use crate::gang::message::Phase;
use crate::gang::rounds::{Convergence, Verdict};
use crate::types::{Class, PAGE_SIZE, Round};
use crate::vmm::PageSet;
use crate::vmm::stream::{Pace, Progress, StreamPages};
use std::io;
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

/// While the VM waits for its turn, its RAM is read again after this many times
/// what reading it took: a tenth of a processor at most.
const REST: u32 = 10;
/// And not more often than this.
const SHORTEST_REST: Duration = Duration::from_millis(500);
/// How far the reader of the stream may be ahead, in pages: what the downtime
/// has room for, within these bounds.
const AHEAD: (u64, u64) = (512, 4096);

/// The scan thread's own things.
pub struct StreamScan {
    carrier: Carrier,
    source: StreamPages,
}

impl StreamScan {
    /// The stream has not been begun.
    pub fn new(carrier: Carrier, source: StreamPages) -> Self {
        StreamScan { carrier, source }
    }

    /// The thread's life.
    pub fn run(mut self) {
        let outcome = self
            .before_its_turn()
            .and_then(|()| self.follow())
            .and_then(|()| self.stop_and_copy());
        if let Err(error) = outcome {
            self.carrier.tell(Step::Failed(error));
        }
    }

    /// Before: nothing is sent. After success: the target has had every page
    /// once, the handover was told so, and it is the VM's turn.
    fn before_its_turn(&mut self) -> Result<(), ScanError> {
        let mut round = 1;
        let began = Instant::now();
        let data = self.data()?;
        self.carrier.found(&data);
        self.show(round, &data);
        self.send(&data, Class::Precopy)?;
        let mut took = began.elapsed();
        self.carrier.flight.set_phase(Phase::Ready);
        self.carrier.tell(Step::Ready);
        loop {
            let rest = (took * REST).max(SHORTEST_REST);
            if self.turn_has_come(Instant::now() + rest)? {
                return Ok(());
            }
            round += 1;
            let began = Instant::now();
            let data = self.data()?;
            self.show(round, &data);
            self.send(&data, Class::Precopy)?;
            took = began.elapsed();
        }
    }

    /// Waits for the turn, sending meanwhile what the lanes lost and what the
    /// target asks for.
    fn turn_has_come(&mut self, until: Instant) -> Result<bool, ScanError> {
        loop {
            self.carrier.check()?;
            self.source.check()?;
            let again = self.carrier.again()?;
            if !again.is_empty() {
                self.send(&again, Class::Precopy)?;
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.carrier.commands.recv_timeout(left.min(TICK)) {
                Ok(Command::Switch) => return Ok(true),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Ok(false),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(_) | Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.carrier.cancelled());
                }
            }
        }
    }

    /// Before: the stream has been begun. After success: what it still has to
    /// report fits the downtime, or the VMM has stopped the guest by itself,
    /// and the handover was told that the thread is at the barrier.
    fn follow(&mut self) -> Result<(), ScanError> {
        let mut convergence = Convergence::new(self.carrier.rules.limits);
        let alone = self.source.stops_alone();
        let begun = Instant::now();
        let (mut judged, mut pass_began) = (0, begun);
        let (mut before, mut dirty) = (self.changed(), 0);
        loop {
            let progress = self.carry_on(Class::Precopy, TICK)?;
            if progress.still {
                break;
            }
            let late = begun.elapsed() >= self.carrier.rules.limits.max_precopy;
            if progress.passes == judged && !late {
                continue;
            }
            if progress.passes > judged {
                let took = pass_began.elapsed().as_secs_f64().max(1e-3);
                // The first pass is of all pages.
                if judged > 0 {
                    self.carrier
                        .flight
                        .scanned(progress.last_pass as f64 / took);
                }
                (judged, pass_began) = (progress.passes, Instant::now());
                // What the guest wrote during this pass, it will write during
                // the next; after the first that is a little too much.
                dirty = self.changed() - before;
                before += dirty;
            }
            let rest = self.carrier.rest(dirty + progress.waiting);
            match convergence.judge(judged, begun.elapsed(), rest) {
                // Nobody here can have its guest stopped: its VMM does, or goes on.
                Verdict::Ready if alone => {}
                Verdict::NoConvergence if alone && self.carrier.rules.force_switch => {}
                Verdict::Ready => break,
                Verdict::NoConvergence if self.carrier.rules.force_switch => break,
                Verdict::NoConvergence => return Err(self.carrier.not_converging(judged)),
                Verdict::Another => {}
            }
        }
        self.carrier.flight.set_phase(Phase::StopCopy);
        self.carrier.tell(Step::Barrier);
        Ok(())
    }

    /// Before: the handover has the guest stopped, and the stream goes on until
    /// it is. After success: the target has every page of the VM.
    fn stop_and_copy(&mut self) -> Result<(), ScanError> {
        let until = Instant::now() + BARRIER_LIMIT;
        loop {
            match self.carrier.commands.try_recv() {
                Ok(Command::Final) => break,
                Ok(_) | Err(TryRecvError::Disconnected) => return Err(self.carrier.cancelled()),
                Err(TryRecvError::Empty) if Instant::now() > until => {
                    return Err(self.carrier.gone("stopping the VM", BARRIER_LIMIT));
                }
                Err(TryRecvError::Empty) => {}
            }
            self.carry_on(Class::StopCopy, Duration::from_millis(1))?;
        }
        let until = Instant::now() + STOP_COPY_LIMIT;
        while !self.carry_on(Class::StopCopy, TICK)?.complete {
            if Instant::now() > until {
                return Err(self
                    .carrier
                    .gone("the last section of QEMU's stream", STOP_COPY_LIMIT));
            }
        }
        let mut recheck = PageSet::new(self.source.pages());
        for run in self.source.recheck() {
            recheck.insert(run);
        }
        self.send(&recheck, Class::StopCopy)?;
        let source = &self.source;
        self.carrier
            .finish(&|gfn, out: &mut [u8]| source.read_run(gfn, out))
    }

    /// Takes what was reported and sends it. What it says of the stream held
    /// before: if that was complete, so is what was sent.
    fn carry_on(&mut self, class: Class, wait: Duration) -> Result<Progress, ScanError> {
        self.carrier.check()?;
        let ahead = self.carrier.held_room().clamp(AHEAD.0, AHEAD.1);
        let rest = self.carrier.rest(0);
        self.source.set_pace(Pace {
            bytes_per_s: rest.bytes_per_s / rest.bytes_per_page.max(1.0) * PAGE_SIZE as f64,
            downtime: self.carrier.rules.limits.downtime_limit,
        });
        let taken = self.source.take(wait, ahead)?;
        let mut pages = taken.pages;
        pages.extend(&self.carrier.again()?);
        if !pages.is_empty() {
            self.show(taken.progress.passes + 1, &pages);
            self.send(&pages, class)?;
        }
        self.source.staged();
        Ok(taken.progress)
    }

    /// Pages that were sent so far, in full or as references: they had changed.
    fn changed(&self) -> u64 {
        let pages = self.carrier.flight.snapshot().pages;
        pages.sent + pages.reference
    }

    /// Pages that may hold something.
    fn data(&self) -> Result<PageSet, ScanError> {
        let unreadable = |source: io::Error| {
            let stager = &self.carrier.stager;
            ScanError::Stage(stager.unreadable(crate::types::Gfn(0), source))
        };
        let mut data = PageSet::new(self.source.pages());
        for run in self.source.data_runs().map_err(unreadable)? {
            data.insert(run);
        }
        Ok(data)
    }

    fn show(&self, round: u32, pages: &PageSet) {
        self.carrier.flight.begin_round(Round(round), pages.len());
    }

    fn send(&mut self, set: &PageSet, class: Class) -> Result<(), ScanError> {
        let source = &self.source;
        let read = |gfn, out: &mut [u8]| source.read_run(gfn, out);
        self.carrier.send(&read, set, class)
    }
}
