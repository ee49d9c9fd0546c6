//! How the target store writes pages and finds content; see [`super::resolve`].

use super::{
    fingerprint::{FingerprintKey, UNSENT},
    resolve::{ArriveError, Need, TargetStore},
    target_vm::{MAX_ROUND, TargetVm},
};
use crate::types::{Fingerprint, Gfn, PAGE_SIZE, Page, Round};
use std::sync::{Arc, PoisonError, atomic::Ordering::Relaxed};

/// Where content was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    GuestRam,
    SideCache,
}

/// Checks what a message says before anything is indexed by it.
pub(super) fn check(vm: &TargetVm, gfn: Gfn, count: u32, round: Round) -> Result<(), ArriveError> {
    if round.0 == 0 || round > MAX_ROUND {
        return Err(ArriveError::BadRound { vm: vm.vm, round });
    }
    match gfn.0.checked_add(count) {
        Some(end) if end <= vm.pages() => Ok(()),
        _ => Err(ArriveError::OutOfRange {
            vm: vm.vm,
            gfn,
            count,
            pages: vm.pages(),
        }),
    }
}

/// Whether an arrival of `round` may change the page. Under the stripe's lock.
pub(super) fn newer(vm: &TargetVm, gfn: Gfn, round: Round) -> bool {
    let status = vm.status(gfn);
    !vm.is_sealed() && (round > status.round() || round == status.round() && status.pending())
}

impl TargetStore {
    /// Gives a page its content. Under the stripe's lock, after `newer` or for a
    /// pending page.
    pub(super) fn put(
        &self,
        vm: &TargetVm,
        gfn: Gfn,
        round: Round,
        fp: Fingerprint,
        page: &Page,
        in_full: bool,
    ) {
        let status = vm.status(gfn);
        if !status.pending() && vm.fps.get(gfn) == fp {
            vm.set_placed(gfn, round, fp, in_full || status.in_full());
        } else {
            self.leave(vm, gfn);
            vm.memory.write(gfn, page);
            vm.set_placed(gfn, round, fp, in_full);
        }
        self.index.list(&fp, vm.range.id(gfn));
    }

    /// The page's content is about to go. If this page is how the host finds it,
    /// and other hosts may have been told that it is here, it goes to the side
    /// cache. Under the stripe's lock.
    pub(super) fn leave(&self, vm: &TargetVm, gfn: Gfn) {
        let status = vm.status(gfn);
        let old = vm.fps.get(gfn);
        if status.pending() || old == Fingerprint::ZERO {
            return;
        }
        let listed = self.index.unlist(&old, vm.range.id(gfn));
        if listed && status.in_full() {
            let mut content = [0; PAGE_SIZE];
            vm.memory.read(gfn, &mut content);
            self.side.keep(old, &content, &vm.key);
        }
    }

    /// Fills a page that waits for `fp` in `round`, if it still does. False if the
    /// content is not `fp` by this VM's own key (a reference across domains).
    pub(super) fn settle(
        &self,
        vm: &TargetVm,
        gfn: Gfn,
        round: Round,
        fp: &Fingerprint,
        content: Checked<'_>,
        fetched: bool,
    ) -> bool {
        if !Arc::ptr_eq(&vm.key, content.key) && vm.key.fingerprint(content.page) != *fp {
            return false;
        }
        let _stripe = vm.stripe(gfn);
        let status = vm.status(gfn);
        let waits = status.pending() && status.round() == round && vm.fps.get(gfn) == *fp;
        if !waits || vm.is_sealed() {
            return true;
        }
        self.put(vm, gfn, round, *fp, content.page, false);
        let counter = match fetched {
            true => &vm.counters.reference_fetched,
            false => &vm.counters.reference_here,
        };
        counter.fetch_add(1, Relaxed);
        true
    }

    pub(super) fn zero_run(&self, vm: &TargetVm, gfn: Gfn, count: u32, round: Round) {
        let end = gfn.0 + count;
        let mut at = gfn.0;
        while at < end {
            let stop = TargetVm::stripe_end(Gfn(at)).min(end);
            self.zero_in_stripe(vm, at..stop, round);
            at = stop;
        }
    }

    fn zero_in_stripe(&self, vm: &TargetVm, gfns: std::ops::Range<u32>, round: Round) {
        let _stripe = vm.stripe(Gfn(gfns.start));
        let mut run = gfns.start..gfns.start;
        let flush = |run: &std::ops::Range<u32>| {
            if !run.is_empty() {
                vm.memory.zero(Gfn(run.start), run.end - run.start);
            }
            for gfn in run.clone() {
                vm.set_placed(Gfn(gfn), round, Fingerprint::ZERO, false);
            }
            vm.counters.zero.fetch_add(run.len() as u64, Relaxed);
        };
        for at in gfns {
            let gfn = Gfn(at);
            if !newer(vm, gfn, round) {
                vm.counters.stale.fetch_add(1, Relaxed);
                continue;
            }
            if !vm.status(gfn).pending() && vm.fps.get(gfn) == Fingerprint::ZERO {
                vm.set_placed(gfn, round, Fingerprint::ZERO, false);
                vm.counters.same.fetch_add(1, Relaxed);
                continue;
            }
            self.leave(vm, gfn);
            if run.end != at {
                flush(&run);
                run = at..at;
            }
            run.end = at + 1;
        }
        flush(&run);
    }

    /// Copies content named `fp` out, from guest RAM or the side cache, and checks
    /// the copy: a guest that runs, or a lane that overwrites the page at this
    /// moment, makes it something else.
    pub(super) fn find(
        &self,
        fp: &Fingerprint,
        out: &mut Page,
    ) -> Option<(Source, Arc<FingerprintKey>)> {
        if *fp == UNSENT {
            return None;
        }
        if let Some((vm, gfn)) = self.index.lookup(fp, |vm, gfn| (vm, gfn))
            && let Ok(vm) = self.vm(vm)
        {
            if vm.read_checked(gfn, fp, out) {
                return Some((Source::GuestRam, vm.key.clone()));
            }
            // The guest changed it: let another page of the same content be listed.
            if vm.is_sealed() {
                self.index.unlist(fp, vm.range.id(gfn));
            }
        }
        let key = self.side.read(fp, out)?;
        Some((Source::SideCache, key))
    }

    /// Content is here: fills all pages that wait for it and tells the watchers.
    /// Returns how many pages waited.
    pub(super) fn content_is_here(
        &self,
        fp: &Fingerprint,
        content: Checked<'_>,
        fetched: bool,
    ) -> u32 {
        let Some(want) = self.wanted.take(fp) else {
            return 0;
        };
        for place in &want.places {
            if let Ok(vm) = self.vm(place.vm) {
                self.settle(&vm, place.gfn, place.round, fp, content, fetched);
            }
        }
        if !want.watchers.is_empty() {
            // Content that was too old for its page and wanted by none of ours.
            if self.index.lookup(fp, |_, _| ()).is_none() {
                self.side.keep(*fp, content.page, content.key);
            }
            for watcher in want.watchers {
                (self.on_ready)(watcher, *fp);
            }
        }
        want.places.len() as u32
    }

    /// The pages that wait for `fp` will not get it by reference.
    pub(super) fn give_up(&self, fp: Fingerprint) -> Vec<Need> {
        let places = self.wanted.take_places(&fp);
        let mut needs = Vec::with_capacity(places.len());
        for place in places {
            let Ok(vm) = self.vm(place.vm) else {
                continue;
            };
            let _stripe = vm.stripe(place.gfn);
            let status = vm.status(place.gfn);
            if status.pending() && status.round() == place.round && vm.fps.get(place.gfn) == fp {
                vm.counters.needed.fetch_add(1, Relaxed);
                needs.push(Need {
                    vm: place.vm,
                    gfn: place.gfn,
                    fp,
                });
            }
        }
        needs
    }

    /// The key by which content that comes for waiting pages is checked.
    pub(super) fn key_of_waiters(&self, fp: &Fingerprint) -> Option<Arc<FingerprintKey>> {
        let place = self.wanted.first_place(fp)?;
        self.vm(place.vm).ok().map(|vm| vm.key.clone())
    }

    /// Whether content this host does not have may still come.
    pub(super) fn may_come(&self, fp: &Fingerprint) -> bool {
        if *fp == UNSENT {
            return false;
        }
        if self.wanted.is_wanted(fp) {
            return true;
        }
        let vms = self.vms.read().unwrap_or_else(PoisonError::into_inner);
        vms.values().any(|vm| !vm.is_sealed()) && !self.side.is_gone(fp)
    }
}

/// A page whose fingerprint was checked, and the key that was used.
#[derive(Clone, Copy)]
pub(super) struct Checked<'a> {
    pub(super) page: &'a Page,
    pub(super) key: &'a Arc<FingerprintKey>,
}
