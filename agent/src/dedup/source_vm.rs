//! One VM on its source host: what was last sent for each page, and what this
//! host knows of that content.

use super::{
    fingerprint::{FingerprintKey, UNSENT},
    table::{ContentIndex, FingerprintArray, PageRange, lock, zeroed},
};
use crate::types::{Fingerprint, Gfn, HolderId, Round, VmIndex};
use ahash::AHashMap;
use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering::Relaxed},
};

/// Where content is, as far as this host knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) holder: HolderId,
    pub(super) arrived: bool,
}

const ARRIVED: u16 = 1 << 15;

impl Known {
    /// In two bytes: 0 is nothing known, else holder + 1 and the flag. A holder
    /// that does not fit is not remembered.
    fn pack(self) -> u16 {
        match self.holder.0 < ARRIVED - 1 {
            true => (self.holder.0 + 1) | if self.arrived { ARRIVED } else { 0 },
            false => 0,
        }
    }

    fn unpack(word: u16) -> Option<Self> {
        let holder = HolderId((word & !ARRIVED).checked_sub(1)?);
        Some(Self {
            holder,
            arrived: word & ARRIVED != 0,
        })
    }
}

/// Why a page has to be captured again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// It was not sent, or not as content.
    Missed,
    /// Its content was sent in full and lost; the claim of it is this host's.
    Lost(Fingerprint),
    /// Its content cannot be had by reference.
    Needed(Fingerprint),
}

impl Again {
    /// The content that is to be sent in full without asking.
    pub(super) fn fp(self) -> Fingerprint {
        match self {
            Again::Missed => UNSENT,
            Again::Lost(fp) | Again::Needed(fp) => fp,
        }
    }
}

const STRIPES: usize = 64;
const STRIPE_SHIFT: u32 = 7;

/// Sent state of one VM; used through [`super::source::SourceDedup`].
pub(super) struct SourceVm {
    vm: VmIndex,
    holder: HolderId,
    key: Arc<FingerprintKey>,
    sent: Arc<FingerprintArray>,
    known: Box<[AtomicU16]>,
    range: PageRange,
    /// Who changes an entry holds its stripe: the scan thread as it sends, lane
    /// threads as they report.
    stripes: Box<[Mutex<()>]>,
    again: Mutex<AHashMap<Gfn, (Again, Handed)>>,
    again_len: AtomicUsize,
    /// The latest round, and how many of its plans are open.
    plans: Mutex<(Round, u32)>,
    closed: AtomicBool,
}

type Handed = bool;

impl std::fmt::Debug for SourceVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SourceVm({})", self.vm.0)
    }
}

impl SourceVm {
    pub(super) fn new(
        vm: VmIndex,
        holder: HolderId,
        key: Arc<FingerprintKey>,
        sent: Arc<FingerprintArray>,
        range: PageRange,
    ) -> Self {
        Self {
            vm,
            holder,
            key,
            known: zeroed(sent.pages() as usize),
            sent,
            range,
            stripes: (0..STRIPES).map(|_| Mutex::new(())).collect(),
            again: Mutex::default(),
            again_len: AtomicUsize::new(0),
            plans: Mutex::default(),
            closed: AtomicBool::new(false),
        }
    }

    pub(super) fn index(&self) -> VmIndex {
        self.vm
    }
    pub(super) fn holder(&self) -> HolderId {
        self.holder
    }
    pub(super) fn range(&self) -> PageRange {
        self.range
    }
    pub(super) fn pages(&self) -> u32 {
        self.sent.pages()
    }
    pub(super) fn sent(&self, gfn: Gfn) -> Fingerprint {
        self.sent.get(gfn)
    }
    pub(super) fn known(&self, gfn: Gfn) -> Option<Known> {
        Known::unpack(self.known[gfn.index()].load(Relaxed))
    }

    fn stripe(&self, gfn: Gfn) -> MutexGuard<'_, ()> {
        lock(&self.stripes[(gfn.0 >> STRIPE_SHIFT) as usize % STRIPES])
    }

    /// A batch of `round` is planned. Refused, with what stands in the way, while
    /// batches of another round are open, or after a later round.
    pub(super) fn open_plan(&self, round: Round) -> Result<(), (Round, u32)> {
        let mut plans = lock(&self.plans);
        let (current, open) = &mut *plans;
        if round < *current || round > *current && *open > 0 {
            return Err(*plans);
        }
        *current = round;
        *open += 1;
        Ok(())
    }

    pub(super) fn close_plan(&self) {
        lock(&self.plans).1 -= 1;
    }

    /// Nothing is noted any more.
    pub(super) fn close(&self) {
        self.closed.store(true, Relaxed);
        for stripe in &self.stripes {
            drop(lock(stripe));
        }
    }

    fn set(&self, index: &ContentIndex, gfn: Gfn, fp: Fingerprint, known: Option<Known>) {
        let id = self.range.id(gfn);
        let old = self.sent.get(gfn);
        if self.known[gfn.index()].load(Relaxed) != 0 {
            index.unlist(&old, id);
        }
        let word = known.map_or(0, Known::pack);
        self.sent.set(gfn, fp);
        self.known[gfn.index()].store(word, Relaxed);
        if word != 0 {
            index.list(&fp, id);
        }
    }

    /// The page goes to a lane with this content.
    pub(super) fn note_sent(
        &self,
        index: &ContentIndex,
        gfn: Gfn,
        fp: Fingerprint,
        known: Option<Known>,
    ) {
        let _stripe = self.stripe(gfn);
        if !self.closed.load(Relaxed) {
            self.set(index, gfn, fp, known);
        }
    }

    /// The content sent for the page has arrived, if that is still what it has.
    pub(super) fn note_arrived(&self, gfn: Gfn, fp: &Fingerprint) {
        let _stripe = self.stripe(gfn);
        let known = self.known(gfn);
        if self.sent.get(gfn) == *fp
            && let Some(known) = known
            && known.holder == self.holder
        {
            let word = Known {
                arrived: true,
                ..known
            };
            self.known[gfn.index()].store(word.pack(), Relaxed);
        }
    }

    /// The content sent for the page did not arrive or cannot be had there. If no
    /// later content was sent, the page counts as never sent.
    pub(super) fn note_lost(&self, index: &ContentIndex, gfn: Gfn, fp: &Fingerprint, again: Again) {
        {
            let _stripe = self.stripe(gfn);
            if self.closed.load(Relaxed) || self.sent.get(gfn) != *fp {
                return;
            }
            self.set(index, gfn, UNSENT, None);
        }
        self.add_again(gfn, again);
    }

    /// The target has nothing certain for the page.
    pub(super) fn forget(&self, index: &ContentIndex, gfn: Gfn) {
        let _stripe = self.stripe(gfn);
        if !self.closed.load(Relaxed) {
            self.set(index, gfn, UNSENT, None);
        }
    }

    pub(super) fn add_again(&self, gfn: Gfn, again: Again) {
        let mut list = lock(&self.again);
        list.insert(gfn, (again, false));
        self.again_len.store(list.len(), Relaxed);
    }

    /// The page is being captured: it is no longer outstanding.
    pub(super) fn take_again(&self, gfn: Gfn) -> Option<Again> {
        if self.outstanding() == 0 {
            return None;
        }
        let mut list = lock(&self.again);
        let (again, _) = list.remove(&gfn)?;
        self.again_len.store(list.len(), Relaxed);
        Some(again)
    }

    pub(super) fn take_resends(&self) -> Vec<Gfn> {
        let mut gfns: Vec<Gfn> = lock(&self.again)
            .iter_mut()
            .filter_map(|(gfn, (_, handed))| (!std::mem::replace(handed, true)).then_some(*gfn))
            .collect();
        gfns.sort_unstable();
        gfns
    }

    pub(super) fn outstanding(&self) -> usize {
        self.again_len.load(Relaxed)
    }

    pub(super) fn digest(&self) -> [u8; 16] {
        self.sent.digest(&self.key)
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let again = lock(&self.again).capacity() * size_of::<(Gfn, (Again, Handed))>();
        self.sent.memory_bytes() + self.known.len() * 2 + STRIPES * size_of::<Mutex<()>>() + again
    }
}
