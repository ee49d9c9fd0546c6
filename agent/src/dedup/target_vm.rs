//! One VM on its target host: which content, of which round, each page has.

use super::{
    fingerprint::FingerprintKey,
    resolve::PageMemory,
    table::{FingerprintArray, PageRange, lock, zeroed},
};
use crate::types::{Fingerprint, Gfn, Page, Round, VmIndex};
use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
};

/// Status word of a page: the round in the low 30 bits and two flags.
const PENDING: u32 = 1 << 31;
/// The content came as a page in full: other hosts may be told it is here.
const IN_FULL: u32 = 1 << 30;
const ROUND: u32 = IN_FULL - 1;

/// Highest round a target accepts.
pub const MAX_ROUND: Round = Round(ROUND);

const STRIPES: usize = 256;
/// Pages next to each other under one lock: a batch takes few of them.
const STRIPE_SHIFT: u32 = 6;

/// What has become of a VM's pages, each page counted once per arrival.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct TargetCounts {
    /// Pages that came in full and were written.
    pub full: u64,
    /// Zero pages made zero (those that were zero already are under `same`).
    pub zero: u64,
    /// References settled with content of this host.
    pub reference_here: u64,
    /// References settled with content fetched from other hosts.
    pub reference_fetched: u64,
    /// Arrivals of content the page had already.
    pub same: u64,
    /// Arrivals dropped since a newer round was there, or the VM was sealed.
    pub stale: u64,
    /// References given up: the page was asked of the source in full.
    pub needed: u64,
    /// References waiting at this moment.
    pub pending: u64,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) full: AtomicU64,
    pub(super) zero: AtomicU64,
    pub(super) reference_here: AtomicU64,
    pub(super) reference_fetched: AtomicU64,
    pub(super) same: AtomicU64,
    pub(super) stale: AtomicU64,
    pub(super) needed: AtomicU64,
    pub(super) pending: AtomicU64,
}

/// A VM whose RAM is being filled, see [`super::resolve::TargetStore::vm`].
pub struct TargetVm {
    pub(super) vm: VmIndex,
    pub(super) memory: Box<dyn PageMemory>,
    pub(super) key: Arc<FingerprintKey>,
    pub(super) fps: Arc<FingerprintArray>,
    pub(super) range: PageRange,
    pub(super) counters: Counters,
    status: Box<[AtomicU32]>,
    stripes: Box<[Mutex<()>]>,
    sealed: AtomicBool,
}

/// A page's status, read under its stripe's lock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Status(u32);

impl Status {
    pub(super) fn round(self) -> Round {
        Round(self.0 & ROUND)
    }
    pub(super) fn pending(self) -> bool {
        self.0 & PENDING != 0
    }
    pub(super) fn in_full(self) -> bool {
        self.0 & IN_FULL != 0
    }
}

impl TargetVm {
    pub(super) fn new(
        vm: VmIndex,
        memory: Box<dyn PageMemory>,
        key: Arc<FingerprintKey>,
        fps: Arc<FingerprintArray>,
        range: PageRange,
    ) -> Self {
        Self {
            vm,
            memory,
            key,
            range,
            counters: Counters::default(),
            status: zeroed(fps.pages() as usize),
            fps,
            stripes: (0..STRIPES).map(|_| Mutex::new(())).collect(),
            sealed: AtomicBool::new(false),
        }
    }

    /// The VM's index in the plan.
    pub fn index(&self) -> VmIndex {
        self.vm
    }

    /// Pages of guest RAM.
    pub fn pages(&self) -> u32 {
        self.fps.pages()
    }

    /// What has arrived so far.
    pub fn counts(&self) -> TargetCounts {
        let c = &self.counters;
        TargetCounts {
            full: c.full.load(Relaxed),
            zero: c.zero.load(Relaxed),
            reference_here: c.reference_here.load(Relaxed),
            reference_fetched: c.reference_fetched.load(Relaxed),
            same: c.same.load(Relaxed),
            stale: c.stale.load(Relaxed),
            needed: c.needed.load(Relaxed),
            pending: c.pending.load(Relaxed),
        }
    }

    /// Bytes held for this VM, its share of the index not counted.
    pub fn memory_bytes(&self) -> usize {
        self.fps.memory_bytes() + self.status.len() * 4 + STRIPES * size_of::<Mutex<()>>()
    }

    /// Pages that wait for referenced content, the first `max` of them.
    pub fn pending_pages(&self, max: usize) -> Vec<Gfn> {
        if self.counters.pending.load(Relaxed) == 0 {
            return Vec::new();
        }
        (0..self.pages())
            .map(Gfn)
            .filter(|gfn| self.status(*gfn).pending())
            .take(max)
            .collect()
    }

    pub(super) fn stripe(&self, gfn: Gfn) -> MutexGuard<'_, ()> {
        lock(&self.stripes[(gfn.0 >> STRIPE_SHIFT) as usize % STRIPES])
    }

    /// First page behind `gfn` that is under another lock.
    pub(super) fn stripe_end(gfn: Gfn) -> u32 {
        ((gfn.0 >> STRIPE_SHIFT) + 1) << STRIPE_SHIFT
    }

    pub(super) fn status(&self, gfn: Gfn) -> Status {
        Status(self.status[gfn.index()].load(Relaxed))
    }

    fn set_status(&self, gfn: Gfn, word: u32) {
        let old = self.status[gfn.index()].swap(word, Relaxed);
        match (old & PENDING != 0, word & PENDING != 0) {
            (false, true) => self.counters.pending.fetch_add(1, Relaxed),
            (true, false) => self.counters.pending.fetch_sub(1, Relaxed),
            _ => 0,
        };
    }

    /// The page has its content. Under the stripe's lock.
    pub(super) fn set_placed(&self, gfn: Gfn, round: Round, fp: Fingerprint, in_full: bool) {
        self.fps.set(gfn, fp);
        self.set_status(gfn, round.0 | if in_full { IN_FULL } else { 0 });
    }

    /// The page waits for the content named `fp`. Under the stripe's lock.
    pub(super) fn set_pending(&self, gfn: Gfn, round: Round, fp: Fingerprint) {
        self.fps.set(gfn, fp);
        self.set_status(gfn, round.0 | PENDING);
    }

    /// Whether the guest may run: nothing is written any more.
    pub fn is_sealed(&self) -> bool {
        self.sealed.load(Relaxed)
    }

    pub(super) fn seal(&self) {
        self.sealed.store(true, Relaxed);
        // Whoever writes holds a stripe's lock and looked at the flag under it:
        // after having held each lock once, nobody writes.
        for stripe in &self.stripes {
            drop(lock(stripe));
        }
    }

    pub(super) fn digest(&self) -> [u8; 16] {
        self.fps.digest(&self.key)
    }

    pub(super) fn read_checked(&self, gfn: Gfn, fp: &Fingerprint, out: &mut Page) -> bool {
        self.memory.read(gfn, out);
        self.key.fingerprint(out) == *fp
    }
}
