//! The pages that QEMU's stream reports, on their way from the thread that
//! reads the stream to the one that reads the pages.
//!
//! A report says that the page's *content at that moment or later* must get to
//! the target, not that it is the content in the stream. QEMU clears a page's
//! mark in the dirty log before it reads the page. So whoever reads the page
//! after its report sees everything written before the mark was cleared, and a
//! write after that sets the mark again: a later pass reports it, at the latest
//! the section that QEMU sends when the guest stands still.
//!
//! The reader waits while more than a certain number of reported pages have not
//! been staged: what QEMU has got rid of counts as sent in its view, and would
//! have to be sent while the guest stands still.

use crate::types::{Gfn, PAGE_SIZE};
use crate::vmm::PageSet;
use crate::vmm::source::PageRead;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::sync::watch;

/// Reported pages that wait, at first: 16 MiB of guest RAM.
const CAP: u64 = 4096;

/// Whether the guest stands still, as its VMM says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::vmm) enum Stand {
    /// It runs, or its operator has paused it.
    Runs,
    /// Its VMM has stopped it for the switch.
    Still(Instant),
    /// Nothing will come of this migration.
    Over(String),
}

/// How fast the stream of a QEMU may be read that decides alone when to stop its
/// guest: when what is left takes less than its `downtime-limit` at the speed of
/// the last 100 ms. Read at memory speed, the pages that have not changed would
/// have it stop a guest of which seconds of sending are left.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// At this rate pages that have changed can be sent, bytes of RAM a second.
    pub bytes_per_s: f64,
    /// The limit of the downtime.
    pub downtime: Duration,
}

impl Pace {
    /// Of a stream that has just begun.
    const FIRST: Pace = Pace {
        bytes_per_s: 1e6,
        downtime: Duration::from_millis(300),
    };
    /// While a pass of QEMU's goes through all of RAM, it may be read faster:
    /// so that what is left of the pass takes this many times the downtime limit
    /// at every moment.
    const AHEAD: u32 = 4;
    /// And so long at least: QEMU's measure is of the last 100 ms.
    const SHORTEST: Duration = Duration::from_secs(1);

    /// Bytes a second when so many bytes of the first pass are left.
    fn rate(&self, left: u64) -> f64 {
        let horizon = (self.downtime * Self::AHEAD).max(Self::SHORTEST);
        self.bytes_per_s.max(left as f64 / horizon.as_secs_f64())
    }
}

/// Shorter waits than this are put together.
const SHORT: Duration = Duration::from_millis(1);

/// How far the stream is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Times that QEMU has gone through all of RAM.
    pub passes: u32,
    /// Pages that the last whole pass reported.
    pub last_pass: u64,
    /// Pages reported that have not been staged.
    pub waiting: u64,
    /// The guest stands still.
    pub still: bool,
    /// The last section of RAM is through: nothing more will be reported.
    pub complete: bool,
}

/// What [`StreamPages::take`] found.
#[derive(Debug)]
pub struct Taken {
    /// Pages to be read and sent.
    pub pages: PageSet,
    /// How far the stream was then.
    pub progress: Progress,
}

/// The stream has broken off.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("QEMU's migration stream of VM {vm} broke off: {why}")]
pub struct FeedError {
    /// The VM.
    pub vm: Arc<str>,
    /// Why.
    pub why: String,
}

#[derive(Debug)]
struct State {
    reported: PageSet,
    /// How many are in `reported`.
    reported_len: u64,
    /// Taken, and not staged.
    taken: u64,
    cap: u64,
    /// How fast the reader may go, if that matters, and when it may go on.
    pace: Option<(Pace, Instant)>,
    progress: Progress,
    /// Of the pass under way.
    pass_pages: u64,
    last: Option<Gfn>,
    /// Nothing is waited for any more.
    lifted: bool,
    failed: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub struct Feed {
    vm: Arc<str>,
    pages: u32,
    state: Mutex<State>,
    changed: Condvar,
    stand: watch::Sender<Stand>,
}

impl Feed {
    /// Of a VM with so many pages.
    pub fn new(vm: &str, pages: u32) -> Feed {
        Feed {
            vm: vm.into(),
            pages,
            state: Mutex::new(State {
                reported: PageSet::new(pages),
                reported_len: 0,
                taken: 0,
                cap: CAP,
                pace: None,
                progress: Progress::default(),
                pass_pages: 0,
                last: None,
                lifted: false,
                failed: None,
            }),
            changed: Condvar::new(),
            stand: watch::Sender::new(Stand::Runs),
        }
    }

    /// Of a VM whose QEMU decides alone when to stop the guest.
    pub fn paced(vm: &str, pages: u32) -> Feed {
        let feed = Feed::new(vm, pages);
        feed.state().pace = Some((Pace::FIRST, Instant::now()));
        feed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock; the state is whole in any case.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, why: &str) -> FeedError {
        FeedError {
            vm: self.vm.clone(),
            why: why.to_owned(),
        }
    }

    /// The stream has these pages, in this order and in so many bytes. Waits
    /// while too many are waiting, and for its pace.
    pub(in crate::vmm) fn report(&self, gfns: &[Gfn], bytes: usize) -> Result<(), FeedError> {
        let full =
            |s: &mut State| s.reported_len + s.taken >= s.cap && !s.lifted && s.failed.is_none();
        let waited = self.changed.wait_while(self.state(), full);
        let state = waited.unwrap_or_else(PoisonError::into_inner);
        let mut state = self.keep_pace(state, bytes);
        if let Some(why) = &state.failed {
            return Err(self.error(why));
        }
        for &gfn in gfns {
            if state.last.is_some_and(|last| gfn < last) {
                state.progress.passes += 1;
                state.progress.last_pass = std::mem::take(&mut state.pass_pages);
            }
            state.last = Some(gfn);
            state.pass_pages += 1;
            if !state.reported.contains(gfn) {
                state.reported.insert(gfn..Gfn(gfn.0 + 1));
                state.reported_len += 1;
            }
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn keep_pace<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        bytes: usize,
    ) -> MutexGuard<'a, State> {
        let passed = state.last.map_or(0, |last| last.0);
        let left = match state.progress.passes {
            0 => u64::from(self.pages - passed) * PAGE_SIZE as u64,
            _ => 0,
        };
        let Some((pace, due)) = &mut state.pace else {
            return state;
        };
        let now = Instant::now();
        let wait = due.saturating_duration_since(now);
        *due = (*due).max(now) + Duration::from_secs_f64(bytes as f64 / pace.rate(left));
        if wait < SHORT {
            return state;
        }
        let paced = |s: &mut State| !s.lifted && s.failed.is_none();
        let waited = self.changed.wait_timeout_while(state, wait, paced);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// The last section of RAM is through.
    pub(in crate::vmm) fn complete(&self) {
        self.state().progress.complete = true;
        self.changed.notify_all();
    }

    /// The guest has been stopped by its VMM: what it has not reported yet is
    /// taken at once.
    pub(in crate::vmm) fn stands_still(&self, since: Instant) {
        {
            let mut state = self.state();
            state.lifted = true;
            state.progress.still = true;
        }
        self.changed.notify_all();
        self.stand.send_if_modified(|stand| {
            let first = *stand == Stand::Runs;
            if first {
                *stand = Stand::Still(since);
            }
            first
        });
    }

    /// Nothing more will come. The first reason counts.
    pub(in crate::vmm) fn fail(&self, why: &str) {
        self.state().failed.get_or_insert_with(|| why.to_owned());
        self.changed.notify_all();
        self.stand.send_if_modified(|stand| {
            let first = !matches!(stand, Stand::Over(_));
            if first {
                *stand = Stand::Over(why.to_owned());
            }
            first
        });
    }

    /// Why nothing more will come, if so.
    pub(in crate::vmm) fn failure(&self) -> Option<String> {
        self.state().failed.clone()
    }

    /// Tells when the guest stands still.
    pub(in crate::vmm) fn stand(&self) -> watch::Receiver<Stand> {
        self.stand.subscribe()
    }
}

/// The scan thread's end of a [`Feed`], and the RAM that its pages are in.
#[derive(Debug)]
pub struct StreamPages {
    feed: Arc<Feed>,
    ram: Arc<dyn PageRead>,
    /// Everything is looked at once more when the guest stands still.
    distrust: bool,
    /// It was told that the guest stands still.
    told_still: bool,
}

impl std::fmt::Debug for dyn PageRead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.place())
    }
}

impl StreamPages {
    /// `distrust`: the VMM's own dirty log is known to miss writes, so that all
    /// pages are compared once the guest stands still.
    pub fn new(feed: Arc<Feed>, ram: Arc<dyn PageRead>, distrust: bool) -> StreamPages {
        StreamPages {
            feed,
            ram,
            distrust,
            told_still: false,
        }
    }

    /// Number of pages; gfns run from 0 to this.
    pub fn pages(&self) -> u32 {
        self.feed.pages
    }

    /// What may hold something now.
    pub fn data_runs(&self) -> io::Result<Vec<Range<Gfn>>> {
        self.ram.data_runs()
    }

    /// Takes what is reported, waiting for so long at most; the reader may then
    /// run so many pages ahead. Does not wait for what is new about the stream.
    pub fn take(&mut self, wait: Duration, cap: u64) -> Result<Taken, FeedError> {
        let told_still = self.told_still;
        let nothing = |s: &mut State| {
            let new = s.failed.is_some() || s.progress.complete || s.progress.still && !told_still;
            s.reported_len == 0 && !new
        };
        let feed = &self.feed;
        let waited = feed.changed.wait_timeout_while(feed.state(), wait, nothing);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = &state.failed {
            return Err(feed.error(why));
        }
        state.cap = cap;
        let pages = state.reported.take();
        state.taken += std::mem::take(&mut state.reported_len);
        state.progress.waiting = state.taken;
        self.told_still = state.progress.still;
        Ok(Taken {
            pages,
            progress: state.progress,
        })
    }

    /// What was taken is on its way.
    pub fn staged(&self) {
        self.feed.state().taken = 0;
        self.feed.changed.notify_all();
    }

    /// After the last page, the guest standing still: runs of pages that may
    /// have changed without being reported.
    pub fn recheck(&self) -> Vec<Range<Gfn>> {
        match self.distrust {
            true => vec![Gfn(0)..Gfn(self.feed.pages)],
            false => Vec::new(),
        }
    }

    /// Whether the VMM decides alone when to stop the guest.
    pub fn stops_alone(&self) -> bool {
        self.feed.state().pace.is_some()
    }

    /// How fast the stream may be read from now on, if its VMM goes by that.
    pub fn set_pace(&self, to: Pace) {
        if let Some((pace, _)) = &mut self.feed.state().pace {
            *pace = to;
        }
    }

    /// Whether something can still come of the stream.
    pub fn check(&self) -> Result<(), FeedError> {
        match &self.feed.state().failed {
            Some(why) => Err(self.feed.error(why)),
            None => Ok(()),
        }
    }

    /// Copies `out.len() / 4096` pages out, from `start` on.
    pub fn read_run(&self, start: Gfn, out: &mut [u8]) -> io::Result<()> {
        self.ram.read_run(start, out)
    }
}

#[cfg(test)]
#[path = "feed_tests.rs"]
mod tests;
