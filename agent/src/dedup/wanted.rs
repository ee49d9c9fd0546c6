//! What pages of this target host, and requests of others, are waiting for.

use super::table::{halves, lock};
use crate::types::{Fingerprint, Gfn, HolderId, Round, VmIndex};
use ahash::AHashMap;
use std::sync::{
    Mutex,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

/// A page that waits for content: it is filled only if it still waits for the
/// same content in the same round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) vm: VmIndex,
    pub(crate) gfn: Gfn,
    pub(crate) round: Round,
}

/// Everyone waiting for one content.
#[derive(Debug, Default)]
pub(crate) struct Want {
    pub(crate) places: Vec<Place>,
    pub(crate) watchers: Vec<u64>,
    /// The host the content was asked of; none while it is due to arrive here.
    from: Option<HolderId>,
}

impl Want {
    fn len(&self) -> usize {
        self.places.len() + self.watchers.len()
    }
}

/// What to do after a page was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Added {
    /// Nobody has asked for the content yet: fetch it.
    Fetch,
    /// The content is to arrive on this host by itself: set a deadline.
    Await,
    /// Somebody waits for it already.
    Joined,
    /// Too much is waited for; nothing was added.
    Full,
}

const SHARDS: usize = 64;

/// Bounded table of who waits for what.
pub(crate) struct Wanted {
    shards: Box<[Mutex<AHashMap<Fingerprint, Want>>]>,
    /// Places and watchers in all shards. It is raised before its owner looks the
    /// content up in the index and read after content was listed there; both under
    /// the same lock of the index, so one of the two sees the other.
    count: AtomicUsize,
    max: usize,
}

impl Wanted {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            count: AtomicUsize::new(0),
            max,
        }
    }

    fn shard(&self, fp: &Fingerprint) -> &Mutex<AHashMap<Fingerprint, Want>> {
        &self.shards[(halves(fp).0 >> 34) as usize % SHARDS]
    }

    fn reserve(&self) -> bool {
        if self.count.fetch_add(1, Relaxed) < self.max {
            return true;
        }
        self.count.fetch_sub(1, Relaxed);
        false
    }

    /// A page waits for `fp`, which is to be had from `holder` (none: it is on
    /// its way to this host).
    pub(crate) fn add(&self, fp: Fingerprint, place: Place, holder: Option<HolderId>) -> Added {
        if !self.reserve() {
            return Added::Full;
        }
        let mut shard = lock(self.shard(&fp));
        let (want, first) = match shard.entry(fp) {
            std::collections::hash_map::Entry::Occupied(known) => {
                let fresh = known.get().places.is_empty();
                (known.into_mut(), fresh)
            }
            std::collections::hash_map::Entry::Vacant(free) => (free.insert(Want::default()), true),
        };
        want.places.push(place);
        match (want.from, holder) {
            (None, Some(_)) => {
                want.from = holder;
                Added::Fetch
            }
            (None, None) if first => Added::Await,
            _ => Added::Joined,
        }
    }

    /// Registers a watcher; false if too much is waited for.
    pub(crate) fn watch(&self, fp: Fingerprint, watcher: u64) -> bool {
        if !self.reserve() {
            return false;
        }
        lock(self.shard(&fp))
            .entry(fp)
            .or_default()
            .watchers
            .push(watcher);
        true
    }

    pub(crate) fn unwatch(&self, fp: &Fingerprint, watcher: u64) {
        let mut shard = lock(self.shard(fp));
        let Some(want) = shard.get_mut(fp) else {
            return;
        };
        let before = want.watchers.len();
        want.watchers.retain(|w| *w != watcher);
        self.count.fetch_sub(before - want.watchers.len(), Relaxed);
        if want.len() == 0 {
            shard.remove(fp);
        }
    }

    /// Whether a page of this host waits for `fp`.
    pub(crate) fn is_wanted(&self, fp: &Fingerprint) -> bool {
        self.count.load(Relaxed) > 0
            && lock(self.shard(fp))
                .get(fp)
                .is_some_and(|want| !want.places.is_empty())
    }

    /// One of the pages that wait for `fp`.
    pub(crate) fn first_place(&self, fp: &Fingerprint) -> Option<Place> {
        lock(self.shard(fp)).get(fp)?.places.first().copied()
    }

    /// The content is here: everyone who waited for it.
    pub(crate) fn take(&self, fp: &Fingerprint) -> Option<Want> {
        if self.count.load(Relaxed) == 0 {
            return None;
        }
        let want = lock(self.shard(fp)).remove(fp)?;
        self.count.fetch_sub(want.len(), Relaxed);
        Some(want)
    }

    /// The content is not to be had: the pages that waited. Watchers stay, their
    /// owners keep deadlines.
    pub(crate) fn take_places(&self, fp: &Fingerprint) -> Vec<Place> {
        let mut shard = lock(self.shard(fp));
        let Some(want) = shard.get_mut(fp) else {
            return Vec::new();
        };
        want.from = None;
        let places = std::mem::take(&mut want.places);
        if want.len() == 0 {
            shard.remove(fp);
        }
        self.count.fetch_sub(places.len(), Relaxed);
        places
    }

    /// Places and watchers waiting.
    pub(crate) fn len(&self) -> usize {
        self.count.load(Relaxed)
    }

    /// Bytes held, about.
    pub(crate) fn memory_bytes(&self) -> usize {
        let entry = size_of::<(Fingerprint, Want)>() + size_of::<Place>();
        self.shards
            .iter()
            .map(|s| lock(s).capacity() * entry)
            .sum::<usize>()
            + SHARDS * 64
    }
}
