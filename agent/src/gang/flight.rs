//! One VM on its way, as its source host sees it: what the scan thread, the
//! pump of the lanes and the control thread share.

use super::inbox::Inbox;
use super::message::{PageCounts, Phase, VmState};
use super::rounds::RoundLimits;
use crate::types::{Round, VmIndex};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What rules the pre-copy of one VM.
pub struct PrecopyRules {
    /// Downtime limit and the bounds of pre-copy.
    pub limits: RoundLimits,
    /// Switch over when the bounds are used up, whatever the downtime; else
    /// the VM stays where it is.
    pub force_switch: bool,
    /// Bytes per second that stop-and-copy may expect now.
    pub stop_copy_rate: Box<dyn Fn() -> f64 + Send>,
}

/// See the module.
pub struct Flight {
    /// Place in the gang's plan.
    pub vm: VmIndex,
    /// The VM's name.
    pub name: String,
    /// Agent it goes to.
    pub target: String,
    /// Pages of guest RAM.
    pub pages: u32,
    /// What the lanes have to say.
    pub inbox: Inbox,
    cancelled: AtomicBool,
    state: Mutex<VmState>,
}

impl Flight {
    /// A VM about to start pre-copy.
    pub fn new(vm: VmIndex, name: &str, target: &str, pages: u32) -> Arc<Self> {
        Arc::new(Flight {
            vm,
            name: name.to_owned(),
            target: target.to_owned(),
            pages,
            inbox: Inbox::default(),
            cancelled: AtomicBool::new(false),
            state: Mutex::new(VmState::new(vm)),
        })
    }

    fn lock(&self) -> MutexGuard<'_, VmState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of what is known now.
    pub fn snapshot(&self) -> VmState {
        self.lock().clone()
    }

    /// Lets `f` change what is known.
    pub fn update(&self, f: impl FnOnce(&mut VmState)) {
        f(&mut self.lock());
    }

    /// Enters a phase.
    pub fn set_phase(&self, phase: Phase) {
        self.lock().phase = phase;
    }

    /// A round of `pages` pages begins.
    pub fn begin_round(&self, round: Round, pages: u64) {
        let mut state = self.lock();
        state.round = round.0;
        state.left_pages = pages;
        if state.phase == Phase::Preparing {
            state.phase = Phase::Precopy;
        }
    }

    /// The last scan saw this many pages a second being written.
    pub fn scanned(&self, dirty_pages_per_s: f64) {
        self.lock().dirty_pages_per_s = dirty_pages_per_s;
    }

    /// Lets `f` change the page counts.
    pub fn count(&self, f: impl FnOnce(&mut PageCounts)) {
        f(&mut self.lock().pages);
    }

    /// Asks the scan thread to give up.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.inbox.wake();
    }

    /// Whether somebody asked for that.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// The flag itself, for waits that watch it.
    pub fn cancel_flag(&self) -> &AtomicBool {
        &self.cancelled
    }
}
