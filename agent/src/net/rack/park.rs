//! Wanted pages whose content is still on its way to this host.
//!
//! They are asked for again when content arrives ([`Parking::woken`]) and now
//! and then, never so often that asking takes more than a fifth of the time.

use super::{Fetched, PageServer, Served, Wanted};
use crate::types::{GangId, PAGE_SIZE, Page};
use std::time::{Duration, Instant};

/// Shortest pause between two polls of everything parked.
const PAUSE: Duration = Duration::from_millis(1);
/// Pause without a wake-up.
const IDLE_PAUSE: Duration = Duration::from_millis(10);

struct Parked<T> {
    gang: GangId,
    wanted: Wanted,
    deadline: Instant,
    token: T,
}

/// Parked pages; `T` says where the answer goes.
pub(super) struct Parking<T> {
    parked: Vec<Parked<T>>,
    page: Box<Page>,
    last_poll: Instant,
    poll_took: Duration,
    woken: bool,
}

impl<T> Parking<T> {
    pub(super) fn new() -> Self {
        Parking {
            parked: Vec::new(),
            page: Box::new([0; PAGE_SIZE]),
            last_poll: Instant::now(),
            poll_took: Duration::ZERO,
            woken: false,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.parked.len()
    }

    pub(super) fn park(&mut self, gang: GangId, wanted: Wanted, deadline: Instant, token: T) {
        self.parked.push(Parked {
            gang,
            wanted,
            deadline,
            token,
        });
    }

    /// Content has arrived: ask soon.
    pub(super) fn woken(&mut self) {
        self.woken = true;
    }

    /// When to call [`Parking::poll`] next; `None` while nothing is parked.
    pub(super) fn next_poll(&self) -> Option<Instant> {
        let pause = if self.woken { PAUSE } else { IDLE_PAUSE };
        let pause = pause.max(self.poll_took * 4);
        (!self.parked.is_empty()).then(|| self.last_poll + pause)
    }

    /// Asks for what is parked, at most while `deliver` says that there is room
    /// for more, and delivers what is there, gone or too late.
    pub(super) fn poll(
        &mut self,
        server: &dyn PageServer,
        mut deliver: impl FnMut(&T, Fetched<'_>) -> bool,
    ) {
        let start = Instant::now();
        self.woken = false;
        let mut room = true;
        self.parked.retain(|parked| {
            if !room {
                return true;
            }
            let fetched = match server.serve(parked.gang, &parked.wanted, &mut self.page) {
                Served::Page => Fetched::Page(&self.page),
                Served::Gone => Fetched::Gone,
                Served::NotYet if parked.deadline <= start => Fetched::NotInTime,
                Served::NotYet => return true,
            };
            room = deliver(&parked.token, fetched);
            false
        });
        self.last_poll = Instant::now();
        self.poll_took = self.last_poll - start;
    }
}
