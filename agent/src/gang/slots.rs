//! Bounds how many VMs of a host are read and fingerprinted at the same time,
//! so that migration leaves cores to the guests.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct Counts {
    slots: usize,
    taken: usize,
}

/// A counting semaphore whose size the policy can change. Clones share it.
#[derive(Debug, Clone)]
pub struct ScanSlots(Arc<(Mutex<Counts>, Condvar)>);

/// The right to read pages; given back when dropped. Held for one batch, some
/// hundred microseconds.
#[derive(Debug)]
pub struct Slot<'a>(&'a ScanSlots);

impl ScanSlots {
    /// `slots` (at least 1) at the same time.
    pub fn new(slots: usize) -> Self {
        let counts = Counts {
            slots: slots.max(1),
            taken: 0,
        };
        ScanSlots(Arc::new((Mutex::new(counts), Condvar::new())))
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows a changed policy; slots in use stay in use.
    pub fn resize(&self, slots: usize) {
        self.lock().slots = slots.max(1);
        self.0.1.notify_all();
    }

    /// Waits for a slot. Never for long: whoever has one reads one batch.
    pub fn take(&self) -> Slot<'_> {
        let mut counts = self.lock();
        while counts.taken >= counts.slots {
            counts = self
                .0
                .1
                .wait(counts)
                .unwrap_or_else(PoisonError::into_inner);
        }
        counts.taken += 1;
        Slot(self)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.0.lock().taken -= 1;
        self.0.0.1.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn never_more_than_slots_at_once_and_everyone_gets_a_turn() {
        let slots = ScanSlots::new(2);
        let (inside, most, turns) = (
            AtomicUsize::new(0),
            AtomicUsize::new(0),
            AtomicUsize::new(0),
        );
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let _slot = slots.take();
                        most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        turns.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(turns.load(Ordering::SeqCst), 1600);
        assert!(most.load(Ordering::SeqCst) <= 2);
        slots.resize(0);
        drop(slots.take());
    }
}
