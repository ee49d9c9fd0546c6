//! What one VM's scan thread hears from the lanes: which of its batches are
//! still on their way, and whether anything has to be sent again.
//!
//! One pump thread a lane set writes; the scan thread reads between batches.
//! Which pages have to be sent again, and how, is `dedup`'s knowledge
//! ([`SourceDedup::take_resends`](crate::dedup::source::SourceDedup::take_resends));
//! this is only the bell.

use crate::dedup::source::SentBatch;
use crate::lane::BatchId;
use ahash::AHashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
struct State {
    in_flight: AHashMap<BatchId, SentBatch>,
    again: bool,
    failed: Option<String>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a batch just before it is submitted.
    pub fn departs(&self, batch: BatchId, sent: SentBatch) {
        self.lock().in_flight.insert(batch, sent);
    }

    /// Whether a batch is on its way: then this returns what was in it, and
    /// the caller says what became of it by [`arrived`](Self::arrived) or
    /// [`again`](Self::again).
    pub fn look_up(&self, batch: BatchId) -> Option<SentBatch> {
        self.lock().in_flight.get(&batch).cloned()
    }

    /// A batch was placed.
    pub fn arrived(&self, batch: BatchId) {
        let mut state = self.lock();
        state.in_flight.remove(&batch);
        if state.in_flight.is_empty() {
            self.changed.notify_all();
        }
    }

    /// A batch was lost (`Some`), or the target asked for pages (`None`): there
    /// is something to send again. `dedup` has been told before.
    pub fn again(&self, batch: Option<BatchId>) {
        let mut state = self.lock();
        if let Some(batch) = batch {
            state.in_flight.remove(&batch);
        }
        state.again = true;
        self.changed.notify_all();
    }

    /// The lanes to the target have ended for good.
    pub fn fail(&self, why: &str) {
        self.lock().failed.get_or_insert_with(|| why.to_owned());
        self.changed.notify_all();
    }

    /// Why the lanes ended, if they did.
    pub fn failure(&self) -> Option<String> {
        self.lock().failed.clone()
    }

    /// Whether the bell has rung since the last call.
    pub fn take_again(&self) -> bool {
        std::mem::take(&mut self.lock().again)
    }

    /// Batches sent and not yet placed.
    pub fn in_flight(&self) -> usize {
        self.lock().in_flight.len()
    }

    /// Waits until nothing is in flight, something has to be sent again, or
    /// the lanes failed; for at most `limit`.
    pub fn settle(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut state = self.lock();
        while !state.in_flight.is_empty() && !state.again && state.failed.is_none() {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return;
            };
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Wakes whoever waits, for a command that came by another way.
    pub fn wake(&self) {
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{HolderId, Round, VmIndex};

    fn sent() -> SentBatch {
        SentBatch {
            vm: VmIndex(0),
            round: Round(1),
            holder: HolderId(0),
            pages: Vec::new(),
            notes: Vec::new(),
        }
    }

    #[test]
    fn a_batch_is_known_until_its_fate_is() {
        let inbox = Inbox::default();
        inbox.departs(BatchId(1), sent());
        inbox.departs(BatchId(2), sent());
        assert!(inbox.look_up(BatchId(1)).is_some());
        inbox.arrived(BatchId(1));
        assert!(
            inbox.look_up(BatchId(1)).is_none(),
            "an acknowledgement counts once"
        );
        assert!(!inbox.take_again());
        inbox.again(Some(BatchId(2)));
        assert_eq!(inbox.in_flight(), 0);
        assert!(inbox.take_again() && !inbox.take_again());
    }

    #[test]
    fn a_failed_peer_ends_the_wait() {
        let inbox = Inbox::default();
        inbox.departs(BatchId(1), sent());
        let began = Instant::now();
        inbox.fail("b1 at 10.2.0.1:7400 is gone");
        inbox.settle(Duration::from_secs(60));
        assert!(began.elapsed() < Duration::from_secs(30));
        assert!(inbox.failure().unwrap().contains("b1"));
    }
}
