//! A bounded store for content that was about to be overwritten on a target host
//! while other hosts may still refer to it.
//!
//! Second-chance FIFO: content that was served since it came in gets one more
//! round before it goes. What is evicted is remembered by name for a while, so
//! that a host asking for it is told *gone* at once instead of waiting for a page
//! that will not come.

use super::{
    fingerprint::FingerprintKey,
    table::{halves, lock},
};
use crate::types::{Fingerprint, PAGE_SIZE, Page};
use ahash::{AHashMap, AHashSet};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

const SHARDS: usize = 16;
/// Names of evicted content kept per shard.
const GONE_PER_SHARD: usize = 4096;
/// What a cached page takes beside its content: slot, map entry, allocator.
const OVERHEAD: usize = 96;

/// The side cache. Thread safe. What it gives out was checked.
pub struct SideCache {
    shards: Box<[Mutex<Shard>]>,
}

#[derive(Default)]
struct Shard {
    pages: AHashMap<Fingerprint, Cached>,
    /// Names in order of arrival; the map holds exactly these.
    order: VecDeque<Fingerprint>,
    max_pages: usize,
    gone: AHashSet<Fingerprint>,
    gone_order: VecDeque<Fingerprint>,
}

struct Cached {
    page: Box<Page>,
    key: Arc<FingerprintKey>,
    used: bool,
}

impl SideCache {
    /// A cache of at most `max_bytes`, names included. With less than a page's
    /// worth per shard it keeps nothing but names.
    pub fn new(max_bytes: usize) -> Self {
        let max_pages = max_bytes / (PAGE_SIZE + OVERHEAD) / SHARDS;
        let shard = || {
            Mutex::new(Shard {
                max_pages,
                ..Shard::default()
            })
        };
        Self {
            shards: (0..SHARDS).map(|_| shard()).collect(),
        }
    }

    fn shard(&self, fp: &Fingerprint) -> &Mutex<Shard> {
        &self.shards[(halves(fp).0 >> 40) as usize % SHARDS]
    }

    /// Keeps a copy of `page` under `fp`, its fingerprint by `key`, evicting what
    /// is oldest and unused.
    pub fn keep(&self, fp: Fingerprint, page: &Page, key: &Arc<FingerprintKey>) {
        let mut shard = lock(self.shard(&fp));
        if shard.pages.contains_key(&fp) {
            return;
        }
        if shard.max_pages == 0 {
            shard.note_gone(fp);
            return;
        }
        // A full cache gives the evicted page's memory to the new one.
        let mut room = None;
        while shard.pages.len() >= shard.max_pages {
            room = shard.evict().or(room);
        }
        let mut copy = room.unwrap_or_else(|| Box::new([0; PAGE_SIZE]));
        copy.copy_from_slice(page);
        shard.gone.remove(&fp);
        shard.order.push_back(fp);
        let cached = Cached {
            page: copy,
            key: key.clone(),
            used: false,
        };
        shard.pages.insert(fp, cached);
    }

    /// Copies the content kept under `fp` to `out`, if there is some and the copy's
    /// fingerprint is `fp`. Returns the key it was checked with.
    pub fn read(&self, fp: &Fingerprint, out: &mut Page) -> Option<Arc<FingerprintKey>> {
        let key = {
            let mut shard = lock(self.shard(fp));
            let cached = shard.pages.get_mut(fp)?;
            cached.used = true;
            out.copy_from_slice(&cached.page[..]);
            cached.key.clone()
        };
        (key.fingerprint(out) == *fp).then_some(key)
    }

    /// Whether content of this name was here, or passed by, and is no more.
    pub fn is_gone(&self, fp: &Fingerprint) -> bool {
        lock(self.shard(fp)).gone.contains(fp)
    }

    /// The content named `fp` is nowhere on this host any more.
    pub fn note_gone(&self, fp: Fingerprint) {
        lock(self.shard(&fp)).note_gone(fp);
    }

    /// Pages kept.
    pub fn pages(&self) -> usize {
        self.shards.iter().map(|s| lock(s).pages.len()).sum()
    }

    /// Bytes held at most at this moment: pages, tables and names.
    pub fn memory_bytes(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| {
                let shard = lock(shard);
                shard.pages.len() * (PAGE_SIZE + OVERHEAD) + shard.gone_order.capacity() * 64
            })
            .sum()
    }
}

impl Shard {
    /// Takes out the oldest page not used since its last chance.
    fn evict(&mut self) -> Option<Box<Page>> {
        loop {
            let fp = self.order.pop_front()?;
            match self.pages.get_mut(&fp) {
                Some(cached) if cached.used => {
                    cached.used = false;
                    self.order.push_back(fp);
                }
                _ => {
                    let cached = self.pages.remove(&fp)?;
                    self.note_gone(fp);
                    return Some(cached.page);
                }
            }
        }
    }

    fn note_gone(&mut self, fp: Fingerprint) {
        if !self.gone.insert(fp) {
            return;
        }
        self.gone_order.push_back(fp);
        // Names of content that came back stay in the order until they get here.
        if self.gone_order.len() > GONE_PER_SHARD
            && let Some(oldest) = self.gone_order.pop_front()
        {
            self.gone.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ClusterSecret;

    fn key() -> Arc<FingerprintKey> {
        let secret = ClusterSecret::from_bytes([3; 32]);
        Arc::new(FingerprintKey::derive(&secret, "test"))
    }

    fn page(i: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        page[..8].copy_from_slice(&(i + 1).to_le_bytes());
        page
    }

    #[test]
    fn stays_within_its_bytes_and_keeps_what_is_used() {
        let key = key();
        let room = 8 * SHARDS;
        let cache = SideCache::new(room * (PAGE_SIZE + OVERHEAD));
        let name = |i| key.fingerprint(&page(i));
        let mut out = [0; PAGE_SIZE];
        for i in 0..1000 {
            cache.keep(name(i), &page(i), &key);
            assert!(
                cache.read(&name(0), &mut out).is_some(),
                "used page, after {i}"
            );
            assert_eq!(out, page(0));
        }
        assert!(cache.pages() <= room && cache.pages() > room / 2);
        assert!(
            cache.memory_bytes() < room * (PAGE_SIZE + OVERHEAD) + SHARDS * GONE_PER_SHARD * 64
        );
        assert!(cache.read(&name(1), &mut out).is_none());
        assert!(cache.is_gone(&name(1)) && !cache.is_gone(&name(999)));
        cache.keep(name(1), &page(1), &key);
        assert!(!cache.is_gone(&name(1)) && cache.read(&name(1), &mut out).is_some());
        assert_eq!(out, page(1));
    }

    #[test]
    fn content_that_does_not_match_its_name_is_not_given_out() {
        let key = key();
        let cache = SideCache::new(1 << 20);
        cache.keep(key.fingerprint(&page(1)), &page(2), &key);
        let mut out = [0; PAGE_SIZE];
        assert!(cache.read(&key.fingerprint(&page(1)), &mut out).is_none());
    }

    #[test]
    fn a_cache_of_no_bytes_only_remembers_a_bounded_number_of_names() {
        let key = key();
        let cache = SideCache::new(0);
        let fp = key.fingerprint(&page(1));
        cache.keep(fp, &page(1), &key);
        assert!(cache.read(&fp, &mut [0; PAGE_SIZE]).is_none());
        assert!(cache.is_gone(&fp));
        for i in 0..2 * SHARDS as u64 * GONE_PER_SHARD as u64 {
            let mut name = [1; 16];
            name[..8].copy_from_slice(&(i << 40).to_le_bytes());
            name[8..].copy_from_slice(&i.to_le_bytes());
            cache.note_gone(Fingerprint(name));
        }
        for shard in &cache.shards {
            let shard = lock(shard);
            assert_eq!(shard.gone.len(), GONE_PER_SHARD);
            assert_eq!(shard.gone_order.len(), GONE_PER_SHARD);
        }
    }
}
