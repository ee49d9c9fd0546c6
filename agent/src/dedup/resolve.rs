//! The target host's side: places content, settles references, serves its rack.
//!
//! What holds for every page at every moment before [`TargetStore::seal`]: its
//! fingerprint entry names the content its memory has, or, while *pending*, the
//! content it waits for; its status has the round that content is of. An arrival
//! is used only if its round is newer, or equal while the page is still pending
//! (content in full for a page whose reference failed). That rule is the same for
//! pages, zero runs, references and late fetches, so it does not matter in which
//! order or how often they come.
//!
//! Until a VM is sealed only this store writes its memory, which starts as zero.
//!
//! Locks, in order: a stripe of the VM's pages; then a shard of the index, of the
//! side cache or of the wanted table, one at a time. There is no lock that all
//! pages take.

use super::{
    fingerprint::{FingerprintKey, UNSENT},
    place::{Checked, Source, check, newer},
    sidecache::SideCache,
    table::{ContentIndex, FingerprintArray},
    target_vm::TargetVm,
    wanted::{Added, Place, Wanted},
};
use crate::types::{Fingerprint, Gfn, HolderId, PAGE_SIZE, Page, Round, VmIndex};
use ahash::AHashMap;
use std::sync::{
    Arc, PoisonError, RwLock,
    atomic::{AtomicU64, Ordering::Relaxed},
};

pub use super::arrival::{
    AddVmError, Arrival, ArriveError, Completion, Fetched, Need, NotFetched, PageMemory,
    RefArrival, Served,
};

/// Bounds of a [`TargetStore`].
#[derive(Debug, Clone, Copy)]
pub struct TargetConfig {
    /// Bytes of the side cache.
    pub side_cache_bytes: usize,
    /// Pages and parked requests that may wait for content at once; about 100
    /// bytes each. Beyond, pages are asked for in full and requests answered *gone*.
    pub max_waiting: usize,
}

impl Default for TargetConfig {
    fn default() -> Self {
        Self {
            side_cache_bytes: 64 << 20,
            max_waiting: 1 << 18,
        }
    }
}

/// Host-wide counts of a [`TargetStore`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct StoreCounts {
    /// Pages served to other hosts.
    pub served: u64,
    /// Of those, from the side cache.
    pub served_from_side_cache: u64,
    /// Requests answered *gone*.
    pub gone: u64,
    /// Fetches that failed because the holder did not have the content.
    pub not_fetched_gone: u64,
    /// Fetches that were not answered in time.
    pub not_fetched_late: u64,
    /// Fetches that brought the wrong content.
    pub wrong: u64,
    /// Pages in the side cache at this moment.
    pub side_cache_pages: u64,
    /// Pages and requests waiting for content at this moment.
    pub waiting: u64,
}

#[derive(Default)]
struct Counters {
    served: AtomicU64,
    served_side: AtomicU64,
    gone: AtomicU64,
    fetch_gone: AtomicU64,
    fetch_late: AtomicU64,
    wrong: AtomicU64,
}

/// Told (watcher, fingerprint) when content a request was parked for is here; to
/// be quick, since it runs on the thread that placed the content.
pub type OnReady = Box<dyn Fn(u64, Fingerprint) + Send + Sync>;

/// All VMs of one gang that arrive on this host, and the content they bring.
pub struct TargetStore {
    me: HolderId,
    pub(super) vms: RwLock<AHashMap<VmIndex, Arc<TargetVm>>>,
    pub(super) index: ContentIndex,
    pub(super) side: SideCache,
    pub(super) wanted: Wanted,
    pub(super) on_ready: OnReady,
    counters: Counters,
}

impl TargetStore {
    /// An empty store of target host `me`.
    pub fn new(me: HolderId, config: TargetConfig, on_ready: OnReady) -> Self {
        Self {
            me,
            vms: RwLock::default(),
            index: ContentIndex::new(),
            side: SideCache::new(config.side_cache_bytes),
            wanted: Wanted::new(config.max_waiting),
            on_ready,
            counters: Counters::default(),
        }
    }

    /// Adds a VM of `pages` pages, all of them zero.
    pub fn add_vm(
        &self,
        vm: VmIndex,
        pages: u32,
        memory: Box<dyn PageMemory>,
        key: Arc<FingerprintKey>,
    ) -> Result<Arc<TargetVm>, AddVmError> {
        let mut vms = self.vms.write().unwrap_or_else(PoisonError::into_inner);
        if vms.contains_key(&vm) {
            return Err(AddVmError::Twice { vm });
        }
        let fps = Arc::new(FingerprintArray::new(pages));
        let range = self
            .index
            .add_vm(vm, fps.clone())
            .map_err(|source| AddVmError::Index { vm, source })?;
        let added = Arc::new(TargetVm::new(vm, memory, key, fps, range));
        vms.insert(vm, added.clone());
        Ok(added)
    }

    /// The VM, to pass to the `arrive_*` calls: taken once per batch.
    pub fn vm(&self, vm: VmIndex) -> Result<Arc<TargetVm>, ArriveError> {
        let vms = self.vms.read().unwrap_or_else(PoisonError::into_inner);
        vms.get(&vm).cloned().ok_or(ArriveError::NoVm { vm })
    }

    /// Takes a VM out: it failed, or the gang is done. Its content is no longer
    /// served and its memory no longer touched.
    pub fn remove_vm(&self, vm: VmIndex) {
        let removed = {
            let mut vms = self.vms.write().unwrap_or_else(PoisonError::into_inner);
            vms.remove(&vm)
        };
        if let Some(vm) = removed {
            vm.seal();
            self.index.remove_vm(vm.range);
        }
    }

    /// A page in full.
    pub fn arrive_page(
        &self,
        vm: &TargetVm,
        gfn: Gfn,
        round: Round,
        page: &Page,
    ) -> Result<Arrival, ArriveError> {
        check(vm, gfn, 1, round)?;
        let fp = vm.key.fingerprint(page);
        if fp == Fingerprint::ZERO {
            self.zero_run(vm, gfn, 1, round);
            return Ok(Arrival::Placed);
        }
        let arrival = {
            let _stripe = vm.stripe(gfn);
            if newer(vm, gfn, round) {
                self.put(vm, gfn, round, fp, page, true);
                vm.counters.full.fetch_add(1, Relaxed);
                Arrival::Placed
            } else {
                vm.counters.stale.fetch_add(1, Relaxed);
                Arrival::Stale
            }
        };
        // Also content that came too late for its own page is what others wait for.
        self.content_is_here(&fp, Checked { page, key: &vm.key }, false);
        Ok(arrival)
    }

    /// A run of zero pages.
    pub fn arrive_zero(
        &self,
        vm: &TargetVm,
        gfn: Gfn,
        count: u32,
        round: Round,
    ) -> Result<(), ArriveError> {
        check(vm, gfn, count, round)?;
        self.zero_run(vm, gfn, count, round);
        Ok(())
    }

    /// A reference: the page's content is named `fp` and target host `holder` has
    /// it or is being sent it.
    pub fn arrive_ref(
        &self,
        vm: &TargetVm,
        gfn: Gfn,
        round: Round,
        fp: Fingerprint,
        holder: HolderId,
    ) -> Result<RefArrival, ArriveError> {
        check(vm, gfn, 1, round)?;
        if fp == Fingerprint::ZERO {
            self.zero_run(vm, gfn, 1, round);
            return Ok(RefArrival::Placed);
        }
        {
            let _stripe = vm.stripe(gfn);
            if !newer(vm, gfn, round) {
                vm.counters.stale.fetch_add(1, Relaxed);
                return Ok(RefArrival::Stale);
            }
            let status = vm.status(gfn);
            if !status.pending() && vm.fps.get(gfn) == fp {
                vm.set_placed(gfn, round, fp, status.in_full());
                vm.counters.same.fetch_add(1, Relaxed);
                return Ok(RefArrival::Placed);
            }
            self.leave(vm, gfn);
            vm.set_pending(gfn, round, fp);
        }
        if fp == UNSENT {
            return Ok(RefArrival::Need);
        }
        let mut page = [0; PAGE_SIZE];
        if let Some((_, key)) = self.find(&fp, &mut page) {
            let content = Checked {
                page: &page,
                key: &key,
            };
            return Ok(match self.settle(vm, gfn, round, &fp, content, false) {
                true => RefArrival::Placed,
                false => RefArrival::Need,
            });
        }
        let place = Place {
            vm: vm.vm,
            gfn,
            round,
        };
        let from = (holder != self.me).then_some(holder);
        let added = self.wanted.add(fp, place, from);
        // It may have arrived between looking for it and waiting for it.
        if added != Added::Full
            && let Some((_, key)) = self.find(&fp, &mut page)
        {
            let content = Checked {
                page: &page,
                key: &key,
            };
            self.content_is_here(&fp, content, false);
            return Ok(RefArrival::Placed);
        }
        Ok(match added {
            Added::Fetch => RefArrival::Fetch,
            Added::Await => RefArrival::Await,
            Added::Joined => RefArrival::Joined,
            Added::Full => RefArrival::Need,
        })
    }

    /// `holder` answered a fetch with this page.
    pub fn fetched(&self, fp: Fingerprint, holder: HolderId, page: &Page) -> Fetched {
        let Some(key) = self.key_of_waiters(&fp) else {
            return Fetched::Unwanted;
        };
        if key.fingerprint(page) != fp {
            self.counters.wrong.fetch_add(1, Relaxed);
            let needs = self.give_up(fp);
            return Fetched::Wrong { holder, needs };
        }
        match self.content_is_here(&fp, Checked { page, key: &key }, true) {
            0 => Fetched::Unwanted,
            placed => Fetched::Placed(placed),
        }
    }

    /// The content cannot be had from its holder: the pages to ask the source for.
    pub fn not_fetched(&self, fp: Fingerprint, why: NotFetched) -> Vec<Need> {
        match why {
            NotFetched::Gone => &self.counters.fetch_gone,
            NotFetched::Late => &self.counters.fetch_late,
        }
        .fetch_add(1, Relaxed);
        self.give_up(fp)
    }

    /// Copies content to `out` for another host, if this host has it.
    pub fn serve(&self, fp: &Fingerprint, out: &mut Page) -> Served {
        match self.find(fp, out) {
            Some((source, _)) => {
                self.counters.served.fetch_add(1, Relaxed);
                if source == Source::SideCache {
                    self.counters.served_side.fetch_add(1, Relaxed);
                }
                Served::Page
            }
            None if self.may_come(fp) => Served::NotYet,
            None => {
                self.counters.gone.fetch_add(1, Relaxed);
                Served::Gone
            }
        }
    }

    /// As [`serve`](Self::serve), and if the answer is *not yet*, `watcher` is told
    /// once the content is here; the caller keeps a deadline and then calls
    /// [`unwatch`](Self::unwatch).
    pub fn serve_or_watch(&self, fp: &Fingerprint, out: &mut Page, watcher: u64) -> Served {
        match self.serve(fp, out) {
            Served::NotYet => {}
            answer => return answer,
        }
        if !self.wanted.watch(*fp, watcher) {
            self.counters.gone.fetch_add(1, Relaxed);
            return Served::Gone;
        }
        let again = self.serve(fp, out);
        if again != Served::NotYet {
            self.wanted.unwatch(fp, watcher);
        }
        again
    }

    /// The watcher has waited long enough.
    pub fn unwatch(&self, fp: &Fingerprint, watcher: u64) {
        self.wanted.unwatch(fp, watcher);
    }

    /// Where a VM stands: to be asked when all its batches are in.
    pub fn complete(&self, vm: &TargetVm) -> Completion {
        Completion {
            pending: vm.counters.pending.load(Relaxed),
            digest: vm.digest(),
        }
    }

    /// From now on nothing writes the VM's memory: its guest is about to run.
    /// What arrives later is dropped. Its pages are still served, each as long as
    /// its content is what it was.
    pub fn seal(&self, vm: &TargetVm) {
        vm.seal();
    }

    /// Host-wide counts.
    pub fn counts(&self) -> StoreCounts {
        let c = &self.counters;
        StoreCounts {
            served: c.served.load(Relaxed),
            served_from_side_cache: c.served_side.load(Relaxed),
            gone: c.gone.load(Relaxed),
            not_fetched_gone: c.fetch_gone.load(Relaxed),
            not_fetched_late: c.fetch_late.load(Relaxed),
            wrong: c.wrong.load(Relaxed),
            side_cache_pages: self.side.pages() as u64,
            waiting: self.wanted.len() as u64,
        }
    }

    /// Bytes held: arrays, index, side cache and waiting lists.
    pub fn memory_bytes(&self) -> usize {
        let vms = self.vms.read().unwrap_or_else(PoisonError::into_inner);
        let arrays: usize = vms.values().map(|vm| vm.memory_bytes()).sum();
        arrays + self.index.memory_bytes() + self.side.memory_bytes() + self.wanted.memory_bytes()
    }
}

#[cfg(test)]
impl TargetStore {
    pub(crate) fn assert_consistent(&self) {
        self.index.assert_consistent();
    }
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
