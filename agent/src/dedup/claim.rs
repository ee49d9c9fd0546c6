//! Claims: who sends which content to the target rack.
//!
//! Each agent of the source rack answers for a part of the fingerprint space, its
//! *shard* ([`ShardMap`]). The first claim of a fingerprint is answered *yours*,
//! every later one *held by target host h*. Answers are advice: a wrong *held*
//! makes a reference that the target cannot resolve and asks for in full; a wrong
//! *yours* sends a page twice. So entries need not hold whole fingerprints.
//!
//! An entry is 8 bytes: a 48-bit tag of the fingerprint, whether the content has
//! arrived, and the holder. Entries are kept in 1024 sub-tables (chosen by 10
//! further bits), each an array **sorted by tag with gaps**: the tag, scaled to the
//! array's length, is where an entry would like to be; those that collide follow
//! in order. Lookups stop at the first larger tag, and since the order is that of
//! the tags alone, growing is one merge pass that needs no fingerprints. Arrays
//! grow by a quarter when 85 % full, so the load stays above 0.68: at worst
//! 8 / 0.68 = 11.8 bytes an entry. Two contents whose 58 known bits agree are
//! taken for one: in a shard of 2^30 entries that happens about twice, and each
//! time costs a *wrong reference*, which the content check on the target turns
//! into one page in full.

use super::{fingerprint::UNSENT, table::halves};
use crate::types::{Fingerprint, HolderId};
use std::{
    hint::black_box,
    sync::{Mutex, PoisonError},
};

/// Answer to one claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum ClaimAnswer {
    /// Send the content: nobody else was told to.
    Yours,
    /// Send a reference: target host `holder` has the content or is being sent it.
    Held {
        /// The target host that has it, or will.
        holder: HolderId,
        /// Whether the content is known to have arrived there.
        arrived: bool,
    },
}

/// How a shard is set up.
#[derive(Debug, Clone, Copy)]
pub struct ClaimConfig {
    /// Entries recorded at most; beyond, claims are answered *yours* without
    /// being recorded. 12 bytes each.
    pub max_entries: usize,
    /// Bits of the fingerprint kept as tag, 1 to 48. Fewer only to provoke
    /// collisions in tests.
    pub tag_bits: u32,
}

impl Default for ClaimConfig {
    fn default() -> Self {
        Self {
            max_entries: 1 << 28,
            tag_bits: TAG_BITS,
        }
    }
}

/// The claims of one part of the fingerprint space, for one gang and target rack.
///
/// All operations are idempotent, take `&self`, and hold the shard's lock for one
/// batch (a few hundred fingerprints, some tens of microseconds). The shard knows
/// target hosts, not claimants: a host that claims again what it claimed before
/// gets *held by* its own target. What of its claims it really sent, the claimant
/// has to know itself; [`super::source::SourceDedup`] does.
pub struct ClaimShard {
    inner: Mutex<Inner>,
}

struct Inner {
    config: ClaimConfig,
    subs: Vec<SubTable>,
    entries: usize,
    /// Holders that are gone, one bit each; their entries count as absent.
    forgotten: Box<[u64]>,
}

const TAG_BITS: u32 = 48;
const SUB_BITS: u32 = 10;
const ARRIVED: u64 = 1 << 15;
const HOLDER_MASK: u64 = ARRIVED - 1;
/// Room behind the last preferred place, for entries pushed beyond it.
const SLACK: usize = 16;

/// Holders a shard can record; claims for higher ids are answered *yours*.
pub const MAX_HOLDERS: u16 = (HOLDER_MASK - 1) as u16;

impl Default for ClaimShard {
    fn default() -> Self {
        Self::new(ClaimConfig::default())
    }
}

impl ClaimShard {
    /// An empty shard.
    pub fn new(config: ClaimConfig) -> Self {
        let config = ClaimConfig {
            tag_bits: config.tag_bits.clamp(1, TAG_BITS),
            ..config
        };
        Self {
            inner: Mutex::new(Inner {
                config,
                subs: (0..1 << SUB_BITS).map(|_| SubTable::default()).collect(),
                entries: 0,
                forgotten: vec![0; usize::from(MAX_HOLDERS) / 64 + 1].into(),
            }),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims each fingerprint for a page bound for target host `me`; one answer
    /// each, in order. The zero page needs no claim and is answered *yours*.
    pub fn claim(&self, fps: &[Fingerprint], me: HolderId) -> Vec<ClaimAnswer> {
        let mut inner = self.lock();
        inner.warm(fps);
        fps.iter().map(|fp| inner.claim(fp, me)).collect()
    }

    /// The content of each fingerprint has arrived at `holder`. Ignored where
    /// another holder is recorded.
    pub fn confirm(&self, fps: &[Fingerprint], holder: HolderId) {
        let mut inner = self.lock();
        inner.warm(fps);
        for fp in fps {
            inner.update(fp, |entry| {
                (entry_holder(entry) == holder).then_some(entry | ARRIVED)
            });
        }
    }

    /// `holder` is being sent the content now, since the holder recorded so far
    /// turned out not to have it. Recorded also where there was no entry.
    pub fn reassign(&self, fps: &[Fingerprint], holder: HolderId) {
        let mut inner = self.lock();
        for fp in fps {
            let known = inner.update(fp, |entry| {
                if entry_holder(entry) == holder {
                    return Some(entry & !ARRIVED);
                }
                pack(entry >> 16, holder)
            });
            if !known {
                inner.claim(fp, holder);
            }
        }
    }

    /// The claims were given up before the content was sent: the next claimant is
    /// to send it. Ignored where another holder is recorded or the content arrived.
    pub fn release(&self, fps: &[Fingerprint], holder: HolderId) {
        let mut inner = self.lock();
        for fp in fps {
            inner.remove_if(fp, |entry| {
                entry_holder(entry) == holder && entry & ARRIVED == 0
            });
        }
    }

    /// Target host `holder` is gone: its entries count as absent from now on and
    /// are taken over by the next claimants. Takes no time, whatever the size.
    pub fn forget_holder(&self, holder: HolderId) {
        let mut inner = self.lock();
        if let Some(word) = inner.forgotten.get_mut(usize::from(holder.0) / 64) {
            *word |= 1 << (holder.0 % 64);
        }
    }

    /// Entries recorded.
    pub fn len(&self) -> usize {
        self.lock().entries
    }

    /// Whether nothing was claimed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held.
    pub fn memory_bytes(&self) -> usize {
        let inner = self.lock();
        let tables: usize = inner.subs.iter().map(|s| s.slots.len() * 8).sum();
        tables + inner.subs.len() * size_of::<SubTable>() + inner.forgotten.len() * 8
    }
}

fn entry_holder(entry: u64) -> HolderId {
    HolderId((entry & HOLDER_MASK) as u16 - 1)
}

/// An entry, or `None` if the holder's id does not fit. Never 0, which is a gap.
fn pack(tag: u64, holder: HolderId) -> Option<u64> {
    (holder.0 < MAX_HOLDERS).then(|| tag << 16 | (u64::from(holder.0) + 1))
}

impl Inner {
    fn place(&self, fp: &Fingerprint) -> (usize, u64) {
        let (lo, hi) = halves(fp);
        let sub = (lo >> 20) as usize & ((1 << SUB_BITS) - 1);
        let tag = hi >> (64 - TAG_BITS) >> (TAG_BITS - self.config.tag_bits);
        (sub, tag << (TAG_BITS - self.config.tag_bits))
    }

    /// Touches the places of a batch before they are needed, so that the cache
    /// misses of a batch overlap instead of following one another.
    fn warm(&self, fps: &[Fingerprint]) {
        let mut sum = 0;
        for fp in fps {
            let (sub, tag) = self.place(fp);
            let sub = &self.subs[sub];
            if !sub.slots.is_empty() {
                sum ^= sub.slots[sub.home(tag)];
            }
        }
        black_box(sum);
    }

    fn is_forgotten(&self, holder: HolderId) -> bool {
        self.forgotten
            .get(usize::from(holder.0) / 64)
            .is_some_and(|word| word >> (holder.0 % 64) & 1 == 1)
    }

    fn claim(&mut self, fp: &Fingerprint, me: HolderId) -> ClaimAnswer {
        let (sub, tag) = self.place(fp);
        if *fp == Fingerprint::ZERO || *fp == UNSENT {
            return ClaimAnswer::Yours;
        }
        let mine = pack(tag, me).filter(|_| !self.is_forgotten(me));
        match (self.subs[sub].find(tag), mine) {
            (Ok(at), _) if !self.is_forgotten(entry_holder(self.subs[sub].slots[at])) => {
                let entry = self.subs[sub].slots[at];
                return ClaimAnswer::Held {
                    holder: entry_holder(entry),
                    arrived: entry & ARRIVED != 0,
                };
            }
            (Ok(at), Some(mine)) => self.subs[sub].slots[at] = mine,
            (Err(at), Some(mine)) if self.entries < self.config.max_entries => {
                self.subs[sub].insert(at, mine);
                self.entries += 1;
            }
            _ => {}
        }
        ClaimAnswer::Yours
    }

    /// Replaces the entry of `fp` by what `f` makes of it; false without an entry.
    fn update(&mut self, fp: &Fingerprint, f: impl FnOnce(u64) -> Option<u64>) -> bool {
        let (sub, tag) = self.place(fp);
        let sub = &mut self.subs[sub];
        let Ok(at) = sub.find(tag) else {
            return false;
        };
        if let Some(new) = f(sub.slots[at]) {
            sub.slots[at] = new;
        }
        true
    }

    fn remove_if(&mut self, fp: &Fingerprint, f: impl FnOnce(u64) -> bool) {
        let (sub, tag) = self.place(fp);
        let sub = &mut self.subs[sub];
        if let Ok(at) = sub.find(tag)
            && f(sub.slots[at])
        {
            sub.remove(at);
            self.entries -= 1;
        }
    }
}

/// Sorted linear probing: entries in the order of their tags, 0 for a gap, each at
/// or behind its home.
#[derive(Default)]
struct SubTable {
    slots: Box<[u64]>,
    /// Places a tag can be at home; `slots` has `SLACK` more.
    homes: u64,
    entries: usize,
}

impl SubTable {
    fn home(&self, tag: u64) -> usize {
        ((u128::from(tag) * u128::from(self.homes)) >> TAG_BITS) as usize
    }

    /// Where the tag is, or where it would go.
    fn find(&self, tag: u64) -> Result<usize, usize> {
        let mut at = self.home(tag);
        while let Some(&entry) = self.slots.get(at) {
            if entry == 0 || entry >> 16 > tag {
                return Err(at);
            }
            if entry >> 16 == tag {
                return Ok(at);
            }
            at += 1;
        }
        Err(at)
    }

    /// Puts an entry that `find` did not find where it said.
    fn insert(&mut self, at: usize, entry: u64) {
        self.entries += 1;
        // Whole and cheap arithmetic: entries / homes > 0.85.
        if self.entries as u64 * 20 > self.homes * 17 || !self.shift_in(at, entry) {
            self.grow(entry);
        }
    }

    /// Moves what is in the way up by one, to the next gap. False if there is none.
    fn shift_in(&mut self, at: usize, entry: u64) -> bool {
        let Some(gap) = self.slots[at..].iter().position(|slot| *slot == 0) else {
            return false;
        };
        self.slots.copy_within(at..at + gap, at + 1);
        self.slots[at] = entry;
        true
    }

    /// Merges all entries and a new one into an array a quarter larger.
    fn grow(&mut self, new: u64) {
        let mut entries: Vec<u64> = Vec::with_capacity(self.entries);
        entries.extend(self.slots.iter().filter(|slot| **slot != 0));
        let at = entries.partition_point(|entry| *entry < new);
        entries.insert(at, new);
        loop {
            self.homes = (self.homes * 5 / 4).max(self.homes + 8);
            if self.lay_out(&entries) {
                return;
            }
        }
    }

    /// Lays sorted entries out anew; false if the last ones found no room.
    fn lay_out(&mut self, entries: &[u64]) -> bool {
        let mut slots = vec![0; self.homes as usize + SLACK].into_boxed_slice();
        let mut next = 0;
        for &entry in entries {
            let at = self.home(entry >> 16).max(next);
            let Some(slot) = slots.get_mut(at) else {
                return false;
            };
            *slot = entry;
            next = at + 1;
        }
        self.slots = slots;
        true
    }

    /// Removes the entry at a place and moves those behind it that were pushed
    /// from their homes down by one.
    fn remove(&mut self, at: usize) {
        let mut end = at + 1;
        while let Some(&entry) = self.slots.get(end) {
            if entry == 0 || self.home(entry >> 16) == end {
                break;
            }
            end += 1;
        }
        self.slots.copy_within(at + 1..end, at);
        self.slots[end - 1] = 0;
        self.entries -= 1;
    }
}

const SHARD_SLOTS: usize = 1 << 14;

fn shard_slot(fp: &Fingerprint) -> usize {
    halves(fp).0 as usize & (SHARD_SLOTS - 1)
}

/// The member that answers for `fp`: rendezvous hashing, so when a member leaves
/// only its part of the space moves. `members` are stable host ids; the result is
/// an index into them. [`ShardMap`] gives the same answer faster.
///
/// # Panics
/// If there are no members.
pub fn shard_of(fp: &Fingerprint, members: &[u64]) -> usize {
    rendezvous(shard_slot(fp), members)
}

fn rendezvous(slot: usize, members: &[u64]) -> usize {
    let weight = |member: &u64| {
        // The finaliser of MurmurHash3 over slot and member.
        let mut x = *member ^ (slot as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for factor in [0xff51_afd7_ed55_8ccd, 0xc4ce_b9fe_1a85_ec53] {
            x = (x ^ (x >> 33)).wrapping_mul(factor);
        }
        x ^ (x >> 33)
    };
    let best = (0..members.len()).max_by_key(|i| (weight(&members[*i]), members[*i]));
    best.expect("a claim table has at least one member")
}

/// Which member answers for which fingerprint: 16 384 parts of the fingerprint
/// space, each given to a member by rendezvous hashing once. A lookup is one load.
#[derive(Debug, Clone)]
pub struct ShardMap {
    owners: Box<[u16]>,
    members: usize,
}

impl ShardMap {
    /// The map over these members (stable host ids, the same on all agents; their
    /// order only decides the indices).
    ///
    /// # Panics
    /// If there are no members or more than 65 536.
    pub fn new(members: &[u64]) -> Self {
        assert!(members.len() <= 1 << 16, "{} members", members.len());
        Self {
            owners: (0..SHARD_SLOTS)
                .map(|slot| rendezvous(slot, members) as u16)
                .collect(),
            members: members.len(),
        }
    }

    /// Index of the member that answers for `fp`.
    pub fn shard_of(&self, fp: &Fingerprint) -> usize {
        self.owners[shard_slot(fp)].into()
    }

    /// Members in the map.
    pub fn members(&self) -> usize {
        self.members
    }
}

#[cfg(test)]
#[path = "claim_tests.rs"]
mod tests;
