//! From guest RAM to the lanes: reads pages into a registered buffer,
//! fingerprints the copies, decides what each needs, and stages batches.
//!
//! Claims are pipelined: while shards answer for one batch, the next ones are
//! read. A batch waits in a short queue, with its buffer, until its answers
//! are there or their time is up; then a missing answer means *yours*.

use super::claims::{Claims, Ticket};
use super::flight::Flight;
use super::slots::ScanSlots;
use crate::dedup::fingerprint::FingerprintKey;
use crate::dedup::source::{Plan, SentBatch, SourceDedup, SourceError, Verdict};
use crate::lane::pool::PAGES_PER_BUF;
use crate::lane::{
    BatchId, BufferPool, Entries, LaneSet, PoolBuf, Reference, Refusal, StagedBatch, TakeError,
};
use crate::types::{Class, Fingerprint, GangId, Gfn, HolderId, PAGE_SIZE, Round};
use crate::vmm::PageSet;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Batches of one VM that may wait for their claims.
const WINDOW: usize = 6;
/// Longest wait for a buffer or for room in a lane's queue: a lane that moves
/// nothing for this long has told so by other means.
const QUEUE_LIMIT: Duration = Duration::from_secs(20);
/// Why pages could not be staged.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// Guest RAM could not be read.
    #[error("RAM of VM {vm} at {gfn} cannot be read; is its VMM still there?")]
    Unreadable {
        /// The VM.
        vm: String,
        /// The page.
        gfn: Gfn,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// No buffer became free.
    #[error("VM {vm}: no buffer for page data: {source}")]
    NoBuffer {
        /// The VM.
        vm: String,
        /// Why not.
        #[source]
        source: TakeError,
    },
    /// The lanes took no batch.
    #[error("VM {vm}: the lanes to {target} take no batch: {source}")]
    NoLane {
        /// The VM.
        vm: String,
        /// The target agent.
        target: String,
        /// Why not.
        #[source]
        source: Refusal,
    },
    /// The VM is not known to `dedup`.
    #[error("VM {vm} cannot be deduplicated: {source}")]
    Dedup {
        /// The VM.
        vm: String,
        /// Why not.
        #[source]
        source: SourceError,
    },
    /// Somebody cancelled.
    #[error("VM {vm}: cancelled")]
    Cancelled {
        /// The VM.
        vm: String,
    },
}

/// Copies a run of neighbouring pages out of guest RAM.
pub type ReadRun<'a> = &'a dyn Fn(Gfn, &mut [u8]) -> io::Result<()>;

/// What the stagers of one host share for one target rack.
pub struct StageShared {
    /// The gang.
    pub gang: GangId,
    /// Registered memory for page contents.
    pub pool: BufferPool,
    /// What this host knows of contents.
    pub dedup: Arc<SourceDedup>,
    /// The way to the claim shards.
    pub claims: Claims,
    /// Numbers for batches.
    pub next_batch: AtomicU64,
    /// How long claims may take before they count as *yours*.
    pub claim_limit: Duration,
    /// Where this host's first rounds start, as a share of guest RAM.
    pub start_at: f64,
    /// How many VMs of this host are scanned at the same time.
    pub slots: ScanSlots,
}

/// A batch that waits for its claims.
struct Staged {
    round: Round,
    class: Class,
    buf: PoolBuf,
    plan: Plan,
    tickets: Vec<Ticket>,
    deadline: Instant,
}

/// See the module. One for each VM in flight, owned by its scan thread.
pub struct Stager {
    shared: Arc<StageShared>,
    flight: Arc<Flight>,
    holder: HolderId,
    key: Arc<FingerprintKey>,
    /// The VM's dedup domain, for the lanes.
    domain: u64,
    lanes: Arc<LaneSet>,
    window: VecDeque<Staged>,
}

impl Stager {
    /// A stager for one VM, sending over `lanes` to its target host `holder`.
    pub fn new(
        shared: Arc<StageShared>,
        flight: Arc<Flight>,
        holder: HolderId,
        key: Arc<FingerprintKey>,
        lanes: Arc<LaneSet>,
    ) -> Self {
        Stager {
            shared,
            flight,
            holder,
            domain: key.domain_number(),
            key,
            lanes,
            window: VecDeque::new(),
        }
    }

    /// Pages that the lanes lost or that the target wants in full: to be sent
    /// by the next round.
    pub fn take_resends(&self) -> Result<Vec<Gfn>, StageError> {
        self.shared
            .dedup
            .take_resends(self.flight.vm)
            .map_err(|e| self.dedup(e))
    }

    /// Pages that still have to be sent again.
    pub fn outstanding(&self) -> Result<usize, StageError> {
        self.shared
            .dedup
            .outstanding(self.flight.vm)
            .map_err(|e| self.dedup(e))
    }

    /// Digest of the fingerprints last sent, page by page.
    pub fn digest(&self) -> Result<[u8; 16], StageError> {
        self.shared
            .dedup
            .digest(self.flight.vm)
            .map_err(|e| self.dedup(e))
    }

    /// Mean bytes that a page's content took on the wire so far.
    pub fn bytes_per_page(&self) -> f64 {
        let (pages, bytes) = self
            .lanes
            .stats()
            .iter()
            .fold((0, 0), |(pages, bytes), lane| {
                (pages + lane.pages, bytes + lane.wire_bytes)
            });
        if pages < 64 {
            PAGE_SIZE as f64
        } else {
            bytes as f64 / pages as f64
        }
    }

    /// An error that names this VM.
    pub fn unreadable(&self, gfn: Gfn, source: io::Error) -> StageError {
        StageError::Unreadable {
            vm: self.flight.name.clone(),
            gfn,
            source,
        }
    }

    fn dedup(&self, source: SourceError) -> StageError {
        StageError::Dedup {
            vm: self.flight.name.clone(),
            source,
        }
    }

    /// Sends every page of `set` that the target does not have yet. Returns
    /// when all are handed to the lanes (not when they have arrived). On an
    /// error, what was claimed and not sent is released.
    ///
    /// Hosts start at different offsets, so that they become the senders of
    /// different parts of what their VMs share. VMs of one host start together:
    /// what is alike but not equal is then near enough for zstd's window.
    pub fn send(
        &mut self,
        read: ReadRun<'_>,
        set: &PageSet,
        round: Round,
        class: Class,
    ) -> Result<(), StageError> {
        let sent = self.send_all(read, set, round, class);
        for staged in self.window.drain(..) {
            let notes = self.shared.dedup.abandon(staged.plan);
            self.shared.claims.tell(notes, self.holder);
        }
        sent
    }

    fn send_all(
        &mut self,
        read: ReadRun<'_>,
        set: &PageSet,
        round: Round,
        class: Class,
    ) -> Result<(), StageError> {
        let start = if round.0 == 1 {
            self.first_gfn()
        } else {
            Gfn(0)
        };
        let mut gfns = set.iter_from(start).peekable();
        while gfns.peek().is_some() {
            if self.flight.is_cancelled() {
                return Err(StageError::Cancelled {
                    vm: self.flight.name.clone(),
                });
            }
            let chunk: Vec<Gfn> = gfns.by_ref().take(PAGES_PER_BUF).collect();
            let slots = self.shared.slots.clone();
            let staged = {
                // A guest that stands still does not wait for those that run.
                let _slot = (class == Class::Precopy).then(|| slots.take());
                self.read(read, &chunk, round, class)?
            };
            self.window.push_back(staged);
            self.flight
                .update(|s| s.left_pages = s.left_pages.saturating_sub(chunk.len() as u64));
            while self.window.front().is_some_and(Staged::is_answered) || self.window.len() > WINDOW
            {
                self.finish_oldest()?;
            }
        }
        while !self.window.is_empty() {
            self.finish_oldest()?;
        }
        Ok(())
    }

    fn first_gfn(&self) -> Gfn {
        Gfn((f64::from(self.flight.pages) * self.shared.start_at) as u32)
    }

    /// Copies pages, fingerprints the copies, decides, asks the shards.
    fn read(
        &mut self,
        read: ReadRun<'_>,
        gfns: &[Gfn],
        round: Round,
        class: Class,
    ) -> Result<Staged, StageError> {
        let mut buf = self
            .shared
            .pool
            .take_unless(QUEUE_LIMIT, self.flight.cancel_flag())
            .map_err(|source| self.no_buffer(source))?;
        let mut slot = 0;
        for run in gfns.chunk_by(|a, b| a.0 + 1 == b.0) {
            let bytes = slot * PAGE_SIZE..(slot + run.len()) * PAGE_SIZE;
            read(run[0], &mut buf.pages_mut()[bytes]).map_err(|e| self.unreadable(run[0], e))?;
            slot += run.len();
        }
        let captured: Vec<_> = gfns
            .iter()
            .enumerate()
            .map(|(slot, &gfn)| (gfn, self.key.fingerprint(buf.page(slot))))
            .collect();
        let dedup = &self.shared.dedup;
        let plan = dedup
            .plan(self.flight.vm, class, round, &captured)
            .map_err(|e| self.dedup(e))?;
        let tickets = plan
            .claims()
            .iter()
            .map(|claims| {
                self.shared
                    .claims
                    .claim(claims.shard, &claims.fps, self.holder)
            })
            .collect();
        let deadline = Instant::now() + self.shared.claim_limit;
        Ok(Staged {
            round,
            class,
            buf,
            plan,
            tickets,
            deadline,
        })
    }

    /// Applies the answers to the oldest batch of the window and submits it.
    fn finish_oldest(&mut self) -> Result<(), StageError> {
        let Some(mut staged) = self.window.pop_front() else {
            return Ok(());
        };
        let dedup = &self.shared.dedup;
        for (n, ticket) in staged.tickets.drain(..).enumerate() {
            let answered = match ticket.wait(staged.deadline) {
                Some(answers) => dedup
                    .answer(&mut staged.plan, n, &answers)
                    .inspect_err(|error| tracing::warn!(%error, "claims count as ours"))
                    .is_ok(),
                None => false,
            };
            if !answered {
                dedup.no_answer(&mut staged.plan, n);
            }
        }
        let wait = staged.deadline.saturating_duration_since(Instant::now());
        let sent = dedup.settle(staged.plan, wait);
        self.submit(staged.round, staged.class, staged.buf, sent)
    }

    fn submit(
        &mut self,
        round: Round,
        class: Class,
        mut buf: PoolBuf,
        mut sent: SentBatch,
    ) -> Result<(), StageError> {
        self.shared
            .claims
            .tell(std::mem::take(&mut sent.notes), self.holder);
        let mut entries = Entries::default();
        let (mut unchanged, mut zero) = (0, 0);
        for (slot, page) in sent.pages.iter().enumerate() {
            match page.verdict {
                // Zero where the target's fresh memory is zero anyway; told once.
                Verdict::Unchanged if page.fp == Fingerprint::ZERO && round.0 == 1 => zero += 1,
                Verdict::Unchanged => unchanged += 1,
                Verdict::Zero => assert!(entries.push_zero(page.gfn), "128 runs fit a batch"),
                Verdict::Reference { holder } => entries.refs.push(Reference {
                    gfn: page.gfn,
                    holder,
                    fingerprint: page.fp,
                }),
                Verdict::Send => {
                    pack(&mut buf, slot, entries.pages.len());
                    entries.pages.push(page.gfn);
                }
            }
        }
        self.flight.count(|pages| {
            pages.zero += zero;
            pages.zero += entries
                .zeros
                .iter()
                .map(|z| u64::from(z.count))
                .sum::<u64>();
            pages.sent += entries.pages.len() as u64;
            pages.reference += entries.refs.len() as u64;
            pages.unchanged += unchanged;
        });
        if entries.is_empty() {
            return Ok(());
        }
        let batch = BatchId(self.shared.next_batch.fetch_add(1, Ordering::Relaxed));
        self.flight.inbox.departs(batch, sent);
        let content = (!entries.pages.is_empty()).then_some(buf);
        let staged = StagedBatch {
            gang: self.shared.gang,
            vm: self.flight.vm,
            batch,
            round,
            class,
            domain: self.domain,
            entries,
            content,
        };
        self.lanes
            .submit(staged, QUEUE_LIMIT)
            .map_err(|error| StageError::NoLane {
                vm: self.flight.name.clone(),
                target: self.flight.target.clone(),
                source: error.why,
            })
    }

    fn no_buffer(&self, source: TakeError) -> StageError {
        match source {
            TakeError::Cancelled => StageError::Cancelled {
                vm: self.flight.name.clone(),
            },
            source => StageError::NoBuffer {
                vm: self.flight.name.clone(),
                source,
            },
        }
    }
}

impl Staged {
    fn is_answered(&self) -> bool {
        self.tickets.iter().all(Ticket::is_answered)
    }
}

/// Moves a page's content to the front of the batch: what is sent is packed.
fn pack(buf: &mut PoolBuf, from: usize, to: usize) {
    if from != to {
        let at = from * PAGE_SIZE;
        buf.pages_mut()
            .copy_within(at..at + PAGE_SIZE, to * PAGE_SIZE);
    }
}
