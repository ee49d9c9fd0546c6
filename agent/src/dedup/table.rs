//! The lean tables both hosts are made of: a fingerprint per page, and an index
//! from fingerprint to a page that has it.
//!
//! Sizes are what this file is about. The array has 16 bytes a page. The index
//! keeps only a 32-bit page id and hashbrown's control byte per bucket, and finds
//! the fingerprint in the array. Its 512 shards get shares of the fingerprint
//! space that run over one octave, so they double one after another, never all at
//! once: the index as a whole stays near load 0.6 at every size, and a doubling
//! stops one 512th of it for a moment. `docs/dedup.md` has the arithmetic.
#![allow(unsafe_code)]

use super::fingerprint::{DIGEST_BLOCK, FingerprintKey};
use crate::types::{Fingerprint, Gfn, VmIndex};
use hashbrown::HashTable;
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock,
    atomic::{
        AtomicU8, AtomicU64,
        Ordering::{AcqRel, Relaxed, Release},
    },
};

/// Locks, also where another thread panicked inside: the tables only advise, and
/// every entry is checked again where it is used.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Zeroed atomics straight from the allocator. For large arrays these are fresh
/// mappings, so pages of the table nobody touches cost no memory.
pub(crate) fn zeroed<T: ZeroIsValid>(len: usize) -> Box<[T]> {
    let boxed = Box::<[T]>::new_zeroed_slice(len);
    // SAFETY: `ZeroIsValid` promises that all-zero bytes are a valid `T`.
    unsafe { boxed.assume_init() }
}

/// Types for which all-zero bytes are a valid value.
///
/// # Safety
/// Implement only for types where every bit pattern of zeroes is valid.
pub(crate) unsafe trait ZeroIsValid {}
// SAFETY: an atomic integer has the representation of its integer.
unsafe impl ZeroIsValid for AtomicU64 {}
// SAFETY: as above.
unsafe impl ZeroIsValid for AtomicU8 {}
// SAFETY: as above.
unsafe impl ZeroIsValid for std::sync::atomic::AtomicU32 {}
// SAFETY: as above.
unsafe impl ZeroIsValid for std::sync::atomic::AtomicU16 {}

/// The two halves of a fingerprint as integers. Fingerprints are keyed hashes, so
/// any of their bits serve as a hash.
pub(crate) fn halves(fp: &Fingerprint) -> (u64, u64) {
    let (lo, hi) = fp.0.split_at(8);
    (
        u64::from_le_bytes(lo.try_into().expect("8 bytes")),
        u64::from_le_bytes(hi.try_into().expect("8 bytes")),
    )
}

/// The fingerprint of every page of one VM, 16 bytes a page. Starts as all
/// [`Fingerprint::ZERO`], which is what a fresh RAM file holds.
///
/// Readers need no lock, but an entry is two words: a reader beside a writer may
/// see half of each. Writers of one entry are kept apart by their owner's stripe
/// locks; readers treat what they read as a hint, or hold the same lock.
pub struct FingerprintArray {
    words: Box<[AtomicU64]>,
    /// One of the states below for each block of the digest.
    blocks: Box<[AtomicU8]>,
    /// Tags of the blocks that are `TAGGED`.
    tags: Mutex<Vec<[u8; 16]>>,
}

/// Never written: all zero pages.
const FRESH: u8 = 0;
/// Written since its tag was computed.
const CHANGED: u8 = 1;
/// Its tag is right.
const TAGGED: u8 = 2;

impl FingerprintArray {
    /// An array for `pages` pages.
    pub fn new(pages: u32) -> Self {
        Self {
            words: zeroed(pages as usize * 2),
            blocks: zeroed((pages as usize).div_ceil(DIGEST_BLOCK)),
            tags: Mutex::default(),
        }
    }

    /// Pages covered.
    pub fn pages(&self) -> u32 {
        (self.words.len() / 2) as u32
    }

    /// The entry of `gfn`.
    ///
    /// # Panics
    /// If `gfn` lies outside; callers check what comes from outside.
    pub fn get(&self, gfn: Gfn) -> Fingerprint {
        let at = gfn.index() * 2;
        let mut fp = [0; 16];
        fp[..8].copy_from_slice(&self.words[at].load(Relaxed).to_le_bytes());
        fp[8..].copy_from_slice(&self.words[at + 1].load(Relaxed).to_le_bytes());
        Fingerprint(fp)
    }

    /// Writes the entry of `gfn`.
    ///
    /// # Panics
    /// If `gfn` lies outside.
    pub fn set(&self, gfn: Gfn, fp: Fingerprint) {
        let at = gfn.index() * 2;
        let (lo, hi) = halves(&fp);
        self.words[at].store(lo, Relaxed);
        self.words[at + 1].store(hi, Relaxed);
        // Behind the words: whoever sees this sees them.
        self.blocks[gfn.index() / DIGEST_BLOCK].store(CHANGED, Release);
    }

    /// Digest of the whole array; equals [`FingerprintKey::digest`] of its entries.
    /// Blocks not written since the last call are not read again, and blocks never
    /// written not at all: called once before a VM is paused, it is quick after. An
    /// array is digested with one key only, that of its VM's domain.
    pub fn digest(&self, key: &FingerprintKey) -> [u8; 16] {
        let mut tags = lock(&self.tags);
        tags.resize(self.blocks.len(), [0; 16]);
        let mut bytes = vec![0; DIGEST_BLOCK * 16];
        let fresh = key.block_tag(&bytes);
        let words = self.words.chunks(DIGEST_BLOCK * 2);
        for ((block, tag), words) in self.blocks.iter().zip(tags.iter_mut()).zip(words) {
            let full = words.len() == DIGEST_BLOCK * 2;
            // Before the words are read: a write from here on marks it again.
            match block.swap(TAGGED, AcqRel) {
                TAGGED => {}
                FRESH if full => *tag = fresh,
                _ => {
                    let bytes = &mut bytes[..words.len() * 8];
                    for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
                        *to = word.load(Relaxed).to_le_bytes();
                    }
                    *tag = key.block_tag(bytes);
                }
            }
        }
        key.root_tag(tags.iter().copied(), self.pages().into())
    }

    /// All entries in order.
    pub fn iter(&self) -> impl Iterator<Item = Fingerprint> {
        (0..self.pages()).map(|gfn| self.get(Gfn(gfn)))
    }

    /// Bytes of address space held; what was never written takes no memory.
    pub fn memory_bytes(&self) -> usize {
        self.words.len() * 8 + self.blocks.len() * 17
    }
}

/// One page of one VM as a number, unique on this host: the index holds these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(u32);

/// The page ids given to one VM's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRange {
    base: u32,
    pages: u32,
}

impl PageRange {
    /// The id of one of the VM's pages.
    ///
    /// # Panics
    /// If `gfn` lies outside the VM.
    pub fn id(self, gfn: Gfn) -> PageId {
        assert!(gfn.0 < self.pages, "{gfn} outside {} pages", self.pages);
        PageId(self.base + gfn.0)
    }
}

/// Why a VM cannot be indexed.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// 32-bit page ids reach 16 TiB of guest RAM on one host.
    #[error(
        "no room for {pages} more pages: one host's index covers 16 TiB of guest RAM; \
         move fewer VMs of this host at once"
    )]
    Full {
        /// Pages asked for.
        pages: u32,
    },
}

struct Region {
    range: PageRange,
    vm: VmIndex,
    fps: Arc<FingerprintArray>,
}

/// Where this host has which content: fingerprint → page, over all VMs added.
///
/// Rules for its users, who write the arrays: a page is listed only after its
/// array entry was written, and unlisted before that entry changes. Then a listed
/// page's entry always equals the fingerprint it is listed under.
pub struct ContentIndex {
    regions: RwLock<Arc<[Region]>>,
    shards: Box<[Mutex<Shard>]>,
    /// Which shard a 13-bit part of the fingerprint belongs to.
    shard_of: Box<[u16]>,
}

struct Shard {
    /// The same list in every shard, so that a lookup takes one lock.
    regions: Arc<[Region]>,
    ids: HashTable<PageId>,
}

impl Shard {
    fn region(&self, id: PageId) -> Option<&Region> {
        let at = self.regions.partition_point(|r| r.range.base <= id.0);
        let region = self.regions.get(at.checked_sub(1)?)?;
        (id.0 - region.range.base < region.range.pages).then_some(region)
    }

    fn fp(&self, id: PageId) -> Option<Fingerprint> {
        let region = self.region(id)?;
        Some(region.fps.get(Gfn(id.0 - region.range.base)))
    }

    fn find(&self, fp: &Fingerprint) -> Option<PageId> {
        let (_, hash) = halves(fp);
        self.ids
            .find(hash, |id| self.fp(*id).as_ref() == Some(fp))
            .copied()
    }
}

const SHARDS: usize = 512;
const SLOTS: usize = 8192;

impl Default for ContentIndex {
    fn default() -> Self {
        Self::new()
    }
}

impl ContentIndex {
    /// An empty index.
    pub fn new() -> Self {
        let regions: Arc<[Region]> = Arc::new([]);
        let shard = || {
            Mutex::new(Shard {
                regions: regions.clone(),
                ids: HashTable::new(),
            })
        };
        // Shard i gets a share proportional to 2^(i/SHARDS): one octave in all.
        let shard_of = (0..SLOTS)
            .map(|slot| {
                let x = (slot as f64 + 0.5) / SLOTS as f64;
                (((1.0 + x).log2() * SHARDS as f64) as usize).min(SHARDS - 1) as u16
            })
            .collect();
        Self {
            shards: (0..SHARDS).map(|_| shard()).collect(),
            shard_of,
            regions: RwLock::new(regions),
        }
    }

    fn shard(&self, fp: &Fingerprint) -> MutexGuard<'_, Shard> {
        let (lo, _) = halves(fp);
        let slot = (lo >> 51) as usize;
        lock(&self.shards[self.shard_of[slot] as usize])
    }

    /// Makes the pages of a VM known, none of them listed yet.
    pub fn add_vm(&self, vm: VmIndex, fps: Arc<FingerprintArray>) -> Result<PageRange, IndexError> {
        let pages = fps.pages();
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let taken = regions.iter().map(|region| region.range);
        let (at, base) = free_range(taken, pages).ok_or(IndexError::Full { pages })?;
        let range = PageRange { base, pages };
        let mut list: Vec<Region> = regions.iter().map(Region::share).collect();
        list.insert(at, Region { range, vm, fps });
        *regions = list.into();
        for shard in &self.shards {
            lock(shard).regions = regions.clone();
        }
        Ok(range)
    }

    /// Forgets a VM and all its listed pages. Its owner has stopped changing them.
    pub fn remove_vm(&self, range: PageRange) {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let rest: Vec<Region> = regions
            .iter()
            .filter(|r| r.range != range)
            .map(Region::share)
            .collect();
        *regions = rest.into();
        for shard in &self.shards {
            let mut shard = lock(shard);
            let Shard {
                regions: known,
                ids,
            } = &mut *shard;
            ids.retain(|id| id.0.wrapping_sub(range.base) >= range.pages);
            // Rehashing reads the arrays of the pages that stay.
            let known_then = std::mem::replace(known, regions.clone());
            if ids.len() * 4 < ids.capacity() {
                ids.shrink_to_fit(|id| hash_of(&known_then, *id));
            }
        }
    }

    /// Calls `f` with the page listed under `fp`, holding the lock that keeps the
    /// page listed. `f` must be short and take no other lock.
    pub fn lookup<R>(&self, fp: &Fingerprint, f: impl FnOnce(VmIndex, Gfn) -> R) -> Option<R> {
        let shard = self.shard(fp);
        let id = shard.find(fp)?;
        let region = shard.region(id)?;
        Some(f(region.vm, Gfn(id.0 - region.range.base)))
    }

    /// Lists a page whose array entry is `fp`. False if another page is listed
    /// under `fp` already (one is enough), or the page's VM is not known.
    pub fn list(&self, fp: &Fingerprint, id: PageId) -> bool {
        let mut shard = self.shard(fp);
        if shard.region(id).is_none() || shard.find(fp).is_some() {
            return false;
        }
        let (_, hash) = halves(fp);
        let Shard { regions, ids } = &mut *shard;
        ids.insert_unique(hash, id, |id| hash_of(regions, *id));
        true
    }

    /// Takes a page out of the list. True if it was the one listed under `fp`.
    pub fn unlist(&self, fp: &Fingerprint, id: PageId) -> bool {
        let mut shard = self.shard(fp);
        let (_, hash) = halves(fp);
        match shard.ids.find_entry(hash, |known| *known == id) {
            Ok(entry) => {
                entry.remove();
                true
            }
            Err(_) => false,
        }
    }

    /// Pages listed.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|s| lock(s).ids.len()).sum()
    }

    /// Whether no page is listed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held, the VMs' arrays not counted.
    pub fn memory_bytes(&self) -> usize {
        let tables: usize = self
            .shards
            .iter()
            .map(|s| lock(s).ids.allocation_size())
            .sum();
        tables + SHARDS * size_of::<Mutex<Shard>>() + SLOTS * 2
    }
}

#[cfg(test)]
impl ContentIndex {
    /// Checks the rules of listing: each listed page is found under what its array
    /// entry says, in the shard that belongs to.
    pub(crate) fn assert_consistent(&self) {
        for (at, shard) in self.shards.iter().enumerate() {
            let shard = lock(shard);
            for id in &shard.ids {
                let fp = shard.fp(*id).expect("listed pages belong to a VM");
                let slot = (halves(&fp).0 >> 51) as usize;
                assert_eq!(
                    usize::from(self.shard_of[slot]),
                    at,
                    "{id:?} in a wrong shard"
                );
                assert_eq!(shard.find(&fp), Some(*id), "{id:?} is not found");
            }
        }
    }
}

/// The first gap of `pages` ids between ranges in order: its place among them and
/// its first id.
fn free_range(taken: impl Iterator<Item = PageRange>, pages: u32) -> Option<(usize, u32)> {
    let mut base = 0u32;
    let mut at = 0;
    for range in taken {
        if range.base - base >= pages {
            break;
        }
        base = range.base.checked_add(range.pages)?;
        at += 1;
    }
    base.checked_add(pages).map(|_| (at, base))
}

impl Region {
    fn share(&self) -> Self {
        Self {
            range: self.range,
            vm: self.vm,
            fps: self.fps.clone(),
        }
    }
}

fn hash_of(regions: &[Region], id: PageId) -> u64 {
    let at = regions.partition_point(|r| r.range.base <= id.0);
    // Listed pages belong to a known region: `list` checks, `remove_vm` sweeps.
    at.checked_sub(1)
        .and_then(|at| regions.get(at))
        .filter(|r| id.0 - r.range.base < r.range.pages)
        .map_or(0, |r| halves(&r.fps.get(Gfn(id.0 - r.range.base))).1)
}

#[cfg(test)]
#[path = "table_tests.rs"]
pub(crate) mod tests;
