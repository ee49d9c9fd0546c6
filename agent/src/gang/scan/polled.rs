//! Rounds of a VM whose dirty log is asked: what to send comes from what RAM
//! holds (round 1) or the log (later rounds).

use super::{BARRIER_LIMIT, Carrier, Command, ScanError, Step};
use crate::gang::message::Phase;
use crate::gang::rounds::{Convergence, HeldBack, Rest, Verdict};
use crate::types::{Class, Round};
use crate::vmm::{PageSet, PageSource};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

/// While a VM waits for its turn, it is scanned this often: what it dirties
/// meanwhile is what its stop-and-copy has to carry.
const READY_PACE: Duration = Duration::from_millis(60);

/// The scan thread's own things.
pub struct Scan<S> {
    carrier: Carrier,
    source: S,
    held: HeldBack,
    /// Pages that must be sent by the next round: scanned, but not yet read.
    pending: PageSet,
    last_scan: Instant,
}

impl<S: PageSource> Scan<S> {
    /// The dirty log of `source` has just been started with the VM quiesced.
    pub fn new(carrier: Carrier, source: S) -> Self {
        let pages = carrier.flight.pages;
        Scan {
            carrier,
            source,
            held: HeldBack::new(pages),
            pending: PageSet::new(pages),
            last_scan: Instant::now(),
        }
    }

    /// The thread's life. Dropping `self` at its end lifts the protection, so
    /// the guest runs as if nothing had been, whatever the outcome.
    pub fn run(mut self) {
        let outcome = self.precopy().and_then(|()| self.stop_and_copy());
        if let Err(error) = outcome {
            self.carrier.tell(Step::Failed(error));
        }
    }

    /// Before: guest RAM is protected, nothing is sent. After success: the
    /// rest fits (or the policy forces the switch), the handover has been told
    /// that the thread is at the barrier.
    fn precopy(&mut self) -> Result<(), ScanError> {
        self.find_data()?;
        let mut convergence = Convergence::new(self.carrier.rules.limits);
        let (mut ready, mut asked) = (false, false);
        loop {
            let round_began = Instant::now();
            let send = self.pending.take();
            let round = self.begin_round(&send);
            self.send(&send, Class::Precopy)?;
            self.carrier.check()?;
            let dirty = self.scan()?;
            let rest = self.rest(&dirty);
            let mut verdict = convergence.judge(round.0, self.carrier.started.elapsed(), rest);
            if verdict == Verdict::NoConvergence && self.carrier.rules.force_switch {
                verdict = Verdict::Ready;
            }
            if ready && convergence.fits(rest) {
                verdict = Verdict::Ready;
            }
            let room = self.carrier.held_room();
            self.pending.extend(&self.held.select(dirty, room));
            if verdict == Verdict::Ready && !ready {
                ready = true;
                self.carrier.flight.set_phase(Phase::Ready);
                self.carrier.tell(Step::Ready);
            }
            if ready && !asked {
                asked = self.turn_has_come(round_began)?;
            }
            match verdict {
                Verdict::Ready if asked => {
                    self.carrier.flight.set_phase(Phase::StopCopy);
                    self.carrier.tell(Step::Barrier);
                    return Ok(());
                }
                // A VM that waits for its turn may become busy again; only one
                // that has to go now and cannot is given up.
                Verdict::NoConvergence if asked || !ready => {
                    return Err(self.carrier.not_converging(round.0));
                }
                _ => {}
            }
        }
    }

    /// Before: the VM runs, the thread is at the barrier. After success: the
    /// VM is paused and the target has every page of it.
    fn stop_and_copy(&mut self) -> Result<(), ScanError> {
        match self.carrier.commands.recv_timeout(BARRIER_LIMIT) {
            Ok(Command::Final) => {}
            Ok(_) | Err(_) => return Err(self.carrier.gone("pausing the VM", BARRIER_LIMIT)),
        }
        let dirty = self.scan()?;
        let mut send = self.pending.take();
        send.extend(&dirty);
        send.extend(&self.held.release());
        let mut recheck = PageSet::new(self.carrier.flight.pages);
        for run in self.source.recheck().map_err(|e| self.broken_log(e))? {
            recheck.insert(run);
        }
        recheck.subtract(&send);
        self.begin_round(&send);
        self.send(&send, Class::StopCopy)?;
        // DMA that was in flight when a scan protected its page again is in no
        // later scan. The pause has drained it, so a look at the content of
        // every page that a scan reported lately finds it.
        self.send(&recheck, Class::StopCopy)?;
        let source = &self.source;
        self.carrier
            .finish(&|gfn, out: &mut [u8]| source.read_run(gfn, out))
    }

    /// Round 1: what the RAM file holds. Holes were never touched: the target's
    /// fresh file has the same holes, and nobody reads or sends anything.
    fn find_data(&mut self) -> Result<(), ScanError> {
        let pending = &mut self.pending;
        let found = self.source.first_round(&mut |run| pending.insert(run));
        found.map_err(|e| self.broken_log(e))?;
        self.carrier.found(&self.pending);
        Ok(())
    }

    fn begin_round(&self, send: &PageSet) -> Round {
        let round = Round(self.carrier.round.0 + 1);
        self.carrier.flight.begin_round(round, send.len());
        round
    }

    fn send(&mut self, set: &PageSet, class: Class) -> Result<(), ScanError> {
        let source = &self.source;
        let read = |gfn, out: &mut [u8]| source.read_run(gfn, out);
        self.carrier.send(&read, set, class)
    }

    fn broken_log(&self, error: S::Error) -> ScanError {
        ScanError::DirtyLog {
            vm: self.carrier.flight.name.clone(),
            source: error.into(),
        }
    }

    /// What the guest wrote since the last scan, protected again, and what the
    /// lanes want again.
    fn scan(&mut self) -> Result<PageSet, ScanError> {
        let mut dirty = PageSet::new(self.carrier.flight.pages);
        let scanned = self.source.next_round(&mut |run| dirty.insert(run));
        scanned.map_err(|e| self.broken_log(e))?;
        let since = self.last_scan.elapsed().as_secs_f64().max(1e-3);
        self.last_scan = Instant::now();
        self.carrier.flight.scanned(dirty.len() as f64 / since);
        dirty.extend(&self.carrier.again()?);
        Ok(dirty)
    }

    fn rest(&self, dirty: &PageSet) -> Rest {
        let mut rest = self.held.held().clone();
        rest.extend(dirty);
        rest.extend(&self.pending);
        self.carrier.rest(rest.len())
    }

    /// Whether the handover has called for the switch; waits out the pace of
    /// a ready VM's rounds.
    fn turn_has_come(&mut self, round_began: Instant) -> Result<bool, ScanError> {
        let wait = READY_PACE.saturating_sub(round_began.elapsed());
        match self
            .carrier
            .commands
            .recv_timeout(wait.max(Duration::from_millis(1)))
        {
            Ok(Command::Switch) => Ok(true),
            Err(RecvTimeoutError::Timeout) => Ok(false),
            Ok(_) | Err(RecvTimeoutError::Disconnected) => Err(self.carrier.cancelled()),
        }
    }
}
