//! The scan thread of one VM: pre-copy rounds, then stop-and-copy.
//!
//! Reads as the story of a VM's pages: what to send comes from the kind of VM,
//! by a dirty log that is asked ([`Scan`]) or by a stream in which its VMM
//! reports ([`StreamScan`]); [`Stager`] reads, fingerprints and decides; the
//! lanes carry. What the lanes lose and what the target asks for in full goes
//! into the next round. What both have in common is the [`Carrier`].
//!
//! The thread never pauses or resumes the VM: the handover does, and tells the
//! thread by [`Command`]s; the thread tells the handover by [`Step`]s.

mod polled;
mod reported;

pub use polled::Scan;
pub use reported::StreamScan;

use super::flight::{Flight, PrecopyRules};
use super::rounds::Rest;
use super::stage::{ReadRun, StageError, Stager};
use crate::types::{Class, Gfn, PAGE_SIZE, Round};
use crate::vmm::PageSet;
use crate::vmm::stream::FeedError;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

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
    /// The VMM's migration stream broke off.
    #[error(transparent)]
    Stream(#[from] FeedError),
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

/// What carries the pages of one VM, wherever they come from.
pub struct Carrier {
    /// What the scan thread shares.
    pub flight: Arc<Flight>,
    /// What bounds pre-copy.
    pub rules: PrecopyRules,
    /// Reads, decides and hands to the lanes.
    pub stager: Stager,
    /// From the handover.
    pub commands: Receiver<Command>,
    /// To the handover.
    pub steps: UnboundedSender<Step>,
    round: Round,
    started: Instant,
}

impl Carrier {
    /// Nothing has been sent yet.
    pub fn new(
        flight: Arc<Flight>,
        rules: PrecopyRules,
        stager: Stager,
        commands: Receiver<Command>,
        steps: UnboundedSender<Step>,
    ) -> Self {
        Carrier {
            flight,
            rules,
            stager,
            commands,
            steps,
            round: Round(0),
            started: Instant::now(),
        }
    }

    fn tell(&self, step: Step) {
        // The handover hangs up only when it no longer wants to know.
        let _gone = self.steps.send(step);
    }

    /// Sends `set` as a round of its own: a page may be in a round only once.
    fn send(&mut self, read: ReadRun<'_>, set: &PageSet, class: Class) -> Result<(), ScanError> {
        self.round.0 += 1;
        Ok(self.stager.send(read, set, self.round, class)?)
    }

    /// Waits until every batch is placed, sending again what has to be.
    fn settle(&mut self, read: ReadRun<'_>) -> Result<(), ScanError> {
        let until = Instant::now() + STOP_COPY_LIMIT;
        loop {
            self.check()?;
            let again = self.again()?;
            if !again.is_empty() {
                self.send(read, &again, Class::StopCopy)?;
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
    fn serve_late_needs(&mut self, read: ReadRun<'_>) -> Result<(), ScanError> {
        let until = Instant::now() + SERVE_LIMIT;
        while Instant::now() < until {
            match self.commands.recv_timeout(Duration::from_millis(1)) {
                Ok(Command::Done) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            }
            self.check()?;
            let again = self.again()?;
            if !again.is_empty() {
                self.send(read, &again, Class::StopCopy)?;
            }
        }
        Err(self.gone("handing the VM over", SERVE_LIMIT))
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

    /// The first round is to send these pages: the others were never touched,
    /// nor were they at the target, and nobody reads or sends anything.
    fn found(&self, pages: &PageSet) {
        let total = u64::from(self.flight.pages);
        self.flight.count(|count| {
            count.total = total;
            count.zero = total - pages.len();
        });
    }

    /// What would have to be sent if the VM were paused now.
    fn rest(&self, pages: u64) -> Rest {
        Rest {
            pages,
            bytes_per_page: self.stager.bytes_per_page(),
            bytes_per_s: (self.rules.stop_copy_rate)().max(1.0),
        }
    }

    /// Sends the digest of what was sent, then serves what the target still
    /// asks for until the VM is handed over.
    fn finish(&mut self, read: ReadRun<'_>) -> Result<(), ScanError> {
        self.settle(read)?;
        let digest = self.stager.digest()?;
        self.tell(Step::Sent { digest });
        self.serve_late_needs(read)
    }

    /// Pages that may be held back: half of what the downtime has room for.
    fn held_room(&self) -> u64 {
        let budget = self.rules.limits.downtime_limit.as_secs_f64() / 4.0;
        let bytes = budget * (self.rules.stop_copy_rate)();
        (bytes / self.stager.bytes_per_page().max(1.0)) as u64
    }

    fn check(&self) -> Result<(), ScanError> {
        if self.flight.is_cancelled() {
            return Err(self.cancelled());
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

    fn not_converging(&self, rounds: u32) -> ScanError {
        ScanError::NoConvergence {
            vm: self.flight.name.clone(),
            dirty_mib_s: self.flight.snapshot().dirty_pages_per_s * PAGE_SIZE as f64
                / f64::from(1 << 20),
            rounds,
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

    fn cancelled(&self) -> ScanError {
        ScanError::Cancelled {
            vm: self.flight.name.clone(),
        }
    }
}
