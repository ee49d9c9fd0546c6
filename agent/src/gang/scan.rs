//! The scan thread of one VM: pre-copy rounds, then stop-and-copy.
//!
//! Reads as the story of a VM's pages: what to send comes from the RAM file's
//! data extents (round 1) or the dirty log (later rounds); [`Stager`] reads,
//! fingerprints and decides; the lanes carry. What the lanes lose and what the
//! target asks for in full goes into the next round.
//!
//! The thread never pauses or resumes the VM: the handover does, and tells the
//! thread by [`Command`]s; the thread tells the handover by [`Step`]s.

use super::flight::{Flight, PrecopyRules};
use super::message::Phase;
use super::rounds::{Convergence, HeldBack, Rest, Verdict};
use super::stage::{StageError, Stager};
use crate::types::{Class, Gfn, PAGE_SIZE, Round};
use crate::vmm::{PageSet, PageSource};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// While a VM waits for its turn, it is scanned this often: what it dirties
/// meanwhile is what its stop-and-copy has to carry.
const READY_PACE: Duration = Duration::from_millis(60);
/// Longest wait for a command of the handover at the barrier.
const BARRIER_LIMIT: Duration = Duration::from_secs(20);
/// Longest stop-and-copy before the thread gives up.
const STOP_COPY_LIMIT: Duration = Duration::from_secs(30);
/// How long the thread serves late requests of the target after its last page.
const SERVE_LIMIT: Duration = Duration::from_secs(60);
/// One look at the queues while waiting for them.
const TICK: Duration = Duration::from_millis(50);

/// What the handover tells the scan thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// It is this VM's turn: stop at the next barrier.
    Switch,
    /// The VM is paused: send what is left.
    Final,
    /// The target has everything; nothing more will be asked.
    Done,
}

/// What the scan thread tells the handover.
#[derive(Debug)]
pub enum Step {
    /// The rest fits the downtime limit (said once).
    Ready,
    /// At the barrier: pause the VM, then send [`Command::Final`].
    Barrier,
    /// Every page is placed or referenced at the target; the digest of the
    /// fingerprint array.
    Sent {
        /// Keyed digest over all pages.
        digest: [u8; 16],
    },
    /// The thread has ended without completing.
    Failed(ScanError),
}

/// Why a VM's pages could not be brought over. The VM itself is unharmed.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The dirty log broke.
    #[error("the dirty log of VM {vm} failed: {source}")]
    DirtyLog {
        /// The VM.
        vm: String,
        /// What failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A page could not be read or handed to the lanes.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// The lanes to the target ended.
    #[error("lanes of VM {vm} to {target}: {why}")]
    Lanes {
        /// The VM.
        vm: String,
        /// The target agent.
        target: String,
        /// What happened.
        why: String,
    },
    /// The guest writes faster than the policy lets migration send.
    #[error(
        "VM {vm} dirties {dirty_mib_s:.1} MiB/s and did not converge in {rounds} rounds, \
         {seconds} s: use a profile with a larger share, a longer --downtime-limit, or \
         `when_not_converging = \"force-switch\"` in the policy"
    )]
    NoConvergence {
        /// The VM.
        vm: String,
        /// MiB per second.
        dirty_mib_s: f64,
        /// Rounds tried.
        rounds: u32,
        /// Seconds of pre-copy.
        seconds: u64,
    },
    /// Somebody cancelled.
    #[error("VM {vm}: cancelled")]
    Cancelled {
        /// The VM.
        vm: String,
    },
    /// The handover said nothing in time, or the target kept asking.
    #[error("VM {vm}: {what} took longer than {limit_s} s")]
    TimedOut {
        /// The VM.
        vm: String,
        /// What took too long.
        what: &'static str,
        /// The limit in seconds.
        limit_s: u64,
    },
}

/// The scan thread's own things.
pub struct Scan<S> {
    flight: std::sync::Arc<Flight>,
    rules: PrecopyRules,
    source: S,
    stager: Stager,
    commands: Receiver<Command>,
    steps: tokio::sync::mpsc::UnboundedSender<Step>,
    held: HeldBack,
    /// Pages that must be sent by the next round: scanned, but not yet read.
    pending: PageSet,
    round: Round,
    started: Instant,
    last_scan: Instant,
}

impl<S: PageSource> Scan<S> {
    /// The dirty log of `source` has just been started with the VM quiesced.
    pub fn new(
        flight: std::sync::Arc<Flight>,
        rules: PrecopyRules,
        source: S,
        stager: Stager,
        commands: Receiver<Command>,
        steps: tokio::sync::mpsc::UnboundedSender<Step>,
    ) -> Self {
        let pages = flight.pages;
        Scan {
            flight,
            rules,
            source,
            stager,
            commands,
            steps,
            held: HeldBack::new(pages),
            pending: PageSet::new(pages),
            round: Round(0),
            started: Instant::now(),
            last_scan: Instant::now(),
        }
    }

    /// The thread's life. Dropping `self` at its end lifts the protection, so
    /// the guest runs as if nothing had been, whatever the outcome.
    pub fn run(mut self) {
        let outcome = self.precopy().and_then(|()| self.stop_and_copy());
        if let Err(error) = outcome {
            self.tell(Step::Failed(error));
        }
    }

    fn tell(&self, step: Step) {
        // The handover hangs up only when it no longer wants to know.
        let _gone = self.steps.send(step);
    }

    /// Before: guest RAM is protected, nothing is sent. After success: the
    /// rest fits (or the policy forces the switch), the handover has been told
    /// that the thread is at the barrier.
    fn precopy(&mut self) -> Result<(), ScanError> {
        self.find_data()?;
        let mut convergence = Convergence::new(self.rules.limits);
        let (mut ready, mut asked) = (false, false);
        loop {
            self.round.0 += 1;
            let round_began = Instant::now();
            let send = self.pending.take();
            self.flight.begin_round(self.round, send.len());
            self.send(&send, Class::Precopy)?;
            self.check()?;
            let dirty = self.scan()?;
            let rest = self.rest(&dirty);
            let mut verdict = convergence.judge(self.round.0, self.started.elapsed(), rest);
            if verdict == Verdict::NoConvergence && self.rules.force_switch {
                verdict = Verdict::Ready;
            }
            if ready && convergence.fits(rest) {
                verdict = Verdict::Ready;
            }
            let room = self.held_room();
            self.pending.extend(&self.held.select(dirty, room));
            if verdict == Verdict::Ready && !ready {
                ready = true;
                self.flight.set_phase(Phase::Ready);
                self.tell(Step::Ready);
            }
            if ready && !asked {
                asked = self.turn_has_come(round_began)?;
            }
            match verdict {
                Verdict::Ready if asked => {
                    self.flight.set_phase(Phase::StopCopy);
                    self.tell(Step::Barrier);
                    return Ok(());
                }
                // A VM that waits for its turn may become busy again; only one
                // that has to go now and cannot is given up.
                Verdict::NoConvergence if asked || !ready => return Err(self.not_converging()),
                _ => {}
            }
        }
    }

    /// Before: the VM runs, the thread is at the barrier. After success: the
    /// VM is paused and the target has every page of it.
    fn stop_and_copy(&mut self) -> Result<(), ScanError> {
        match self.commands.recv_timeout(BARRIER_LIMIT) {
            Ok(Command::Final) => {}
            Ok(_) | Err(_) => return Err(self.gone("pausing the VM", BARRIER_LIMIT)),
        }
        self.round.0 += 1;
        let dirty = self.scan()?;
        let mut send = self.pending.take();
        send.extend(&dirty);
        send.extend(&self.held.release());
        let mut recheck = PageSet::new(self.flight.pages);
        for run in self.source.recheck().map_err(|e| self.broken_log(e))? {
            recheck.insert(run);
        }
        recheck.subtract(&send);
        self.flight.begin_round(self.round, send.len());
        self.send(&send, Class::StopCopy)?;
        // DMA that was in flight when a scan protected its page again is in no
        // later scan. The pause has drained it, so a look at the content of
        // every page that a scan reported lately finds it.
        self.round.0 += 1;
        self.send(&recheck, Class::StopCopy)?;
        self.settle()?;
        let digest = self.stager.digest()?;
        self.tell(Step::Sent { digest });
        self.serve_late_needs()
    }

    /// Waits until every batch is placed, sending again what has to be.
    fn settle(&mut self) -> Result<(), ScanError> {
        let until = Instant::now() + STOP_COPY_LIMIT;
        loop {
            self.check()?;
            let again = self.again()?;
            if !again.is_empty() {
                // A page may be in a round only once.
                self.round.0 += 1;
                self.send(&again, Class::StopCopy)?;
            } else if self.flight.inbox.in_flight() == 0 && self.stager.outstanding()? == 0 {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(self.gone("placing the last pages", STOP_COPY_LIMIT));
            }
            self.flight.inbox.settle(TICK);
        }
    }

    /// The target may still find a reference that nobody can serve.
    fn serve_late_needs(&mut self) -> Result<(), ScanError> {
        let until = Instant::now() + SERVE_LIMIT;
        while Instant::now() < until {
            match self.commands.recv_timeout(Duration::from_millis(1)) {
                Ok(Command::Done) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            }
            self.check()?;
            let again = self.again()?;
            if !again.is_empty() {
                // A page may be in a round only once.
                self.round.0 += 1;
                self.send(&again, Class::StopCopy)?;
            }
        }
        Err(self.gone("handing the VM over", SERVE_LIMIT))
    }

    /// Round 1: what the RAM file holds. Holes were never touched: the target's
    /// fresh file has the same holes, and nobody reads or sends anything.
    fn find_data(&mut self) -> Result<(), ScanError> {
        let pending = &mut self.pending;
        let found = self.source.first_round(&mut |run| pending.insert(run));
        found.map_err(|e| self.broken_log(e))?;
        let total = u64::from(self.flight.pages);
        self.flight.count(|pages| {
            pages.total = total;
            pages.zero = total - self.pending.len();
        });
        Ok(())
    }

    fn send(&mut self, set: &PageSet, class: Class) -> Result<(), ScanError> {
        let source = &self.source;
        let read = |gfn, out: &mut [u8]| source.read_run(gfn, out);
        Ok(self.stager.send(&read, set, self.round, class)?)
    }

    fn broken_log(&self, error: S::Error) -> ScanError {
        ScanError::DirtyLog {
            vm: self.flight.name.clone(),
            source: error.into(),
        }
    }

    /// What the guest wrote since the last scan, protected again, and what the
    /// lanes want again.
    fn scan(&mut self) -> Result<PageSet, ScanError> {
        let mut dirty = PageSet::new(self.flight.pages);
        let scanned = self.source.next_round(&mut |run| dirty.insert(run));
        scanned.map_err(|e| self.broken_log(e))?;
        let since = self.last_scan.elapsed().as_secs_f64().max(1e-3);
        self.last_scan = Instant::now();
        self.flight.scanned(dirty.len() as f64 / since);
        dirty.extend(&self.again()?);
        Ok(dirty)
    }

    /// What the lanes lost and what the target wants in full.
    fn again(&mut self) -> Result<PageSet, ScanError> {
        let mut again = PageSet::new(self.flight.pages);
        self.flight.inbox.take_again();
        for gfn in self.stager.take_resends()? {
            again.insert(gfn..Gfn(gfn.0 + 1));
        }
        Ok(again)
    }

    fn rest(&self, dirty: &PageSet) -> Rest {
        let mut rest = self.held.held().clone();
        rest.extend(dirty);
        rest.extend(&self.pending);
        Rest {
            pages: rest.len(),
            bytes_per_page: self.stager.bytes_per_page(),
            bytes_per_s: (self.rules.stop_copy_rate)().max(1.0),
        }
    }

    /// Pages that may be held back: half of what the downtime has room for.
    fn held_room(&self) -> u64 {
        let budget = self.rules.limits.downtime_limit.as_secs_f64() / 4.0;
        let bytes = budget * (self.rules.stop_copy_rate)();
        (bytes / self.stager.bytes_per_page().max(1.0)) as u64
    }

    /// Whether the handover has called for the switch; waits out the pace of
    /// a ready VM's rounds.
    fn turn_has_come(&mut self, round_began: Instant) -> Result<bool, ScanError> {
        let wait = READY_PACE.saturating_sub(round_began.elapsed());
        match self
            .commands
            .recv_timeout(wait.max(Duration::from_millis(1)))
        {
            Ok(Command::Switch) => Ok(true),
            Err(RecvTimeoutError::Timeout) => Ok(false),
            Ok(_) | Err(RecvTimeoutError::Disconnected) => Err(ScanError::Cancelled {
                vm: self.flight.name.clone(),
            }),
        }
    }

    fn check(&self) -> Result<(), ScanError> {
        if self.flight.is_cancelled() {
            return Err(ScanError::Cancelled {
                vm: self.flight.name.clone(),
            });
        }
        match self.flight.inbox.failure() {
            Some(why) => Err(ScanError::Lanes {
                vm: self.flight.name.clone(),
                target: self.flight.target.clone(),
                why,
            }),
            None => Ok(()),
        }
    }

    fn not_converging(&self) -> ScanError {
        ScanError::NoConvergence {
            vm: self.flight.name.clone(),
            dirty_mib_s: self.flight.snapshot().dirty_pages_per_s * PAGE_SIZE as f64
                / f64::from(1 << 20),
            rounds: self.round.0,
            seconds: self.started.elapsed().as_secs(),
        }
    }

    fn gone(&self, what: &'static str, limit: Duration) -> ScanError {
        ScanError::TimedOut {
            vm: self.flight.name.clone(),
            what,
            limit_s: limit.as_secs(),
        }
    }
}
