//! Fetches of a host from itself: nothing crosses a socket, but pages that
//! have not arrived yet have to be waited for all the same.

use super::park::Parking;
use super::{FetchSink, Fetched, PageServer, Wanted};
use crate::types::GangId;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, watch};

/// What is left of a fetch after everything at hand was delivered.
pub(super) struct LocalFetch {
    pub(super) gang: GangId,
    /// Index in the request, and the page.
    pub(super) wanted: Vec<(usize, Wanted)>,
    pub(super) deadline: Instant,
    pub(super) sink: FetchSink,
}

/// Where one page goes. Dropping it undelivered, as when the service ends,
/// answers *not in time*.
struct Token {
    sink: Rc<RefCell<FetchSink>>,
    index: usize,
    delivered: Cell<bool>,
}

impl Token {
    fn deliver(&self, fetched: Fetched<'_>) {
        if !self.delivered.replace(true) {
            (self.sink.borrow_mut())(self.index, fetched);
        }
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.deliver(Fetched::NotInTime);
    }
}

/// Serves local fetches until the service ends.
pub(super) async fn run(
    server: Arc<dyn PageServer>,
    mut fetches: mpsc::Receiver<LocalFetch>,
    mut wakes: watch::Receiver<u64>,
) {
    let mut parking: Parking<Token> = Parking::new();
    loop {
        let next = parking.next_poll();
        let poll_at = next.unwrap_or_else(Instant::now);
        tokio::select! {
            fetch = fetches.recv() => {
                let Some(fetch) = fetch else { return };
                let sink = Rc::new(RefCell::new(fetch.sink));
                for (index, wanted) in fetch.wanted {
                    let token = Token {
                        sink: sink.clone(),
                        index,
                        delivered: Cell::new(false),
                    };
                    parking.park(fetch.gang, wanted, fetch.deadline, token);
                }
                parking.woken();
            }
            Ok(()) = wakes.changed() => parking.woken(),
            () = tokio::time::sleep_until(poll_at.into()), if next.is_some() => {
                parking.poll(&*server, |token, fetched| {
                    token.deliver(fetched);
                    true
                });
            }
        }
    }
}
