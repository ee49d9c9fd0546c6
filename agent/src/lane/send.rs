//! A sending lane's thread: connect, drive the connection, report what was
//! lost, connect again.

use super::batch::{BatchId, LaneEvent, LostBatch};
use super::drive::{Connection, Finish};
use super::encode::EncodeError;
use super::frame::{BatchHead, FrameError};
use super::pool::BufferPool;
use super::record::RecordError;
use super::set::Shared;
use super::setup::RingError;
use super::stats::LaneCounters;
use super::waker::Waker;
use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// Number and length of buffers for what comes back.
pub(super) const RECV_BUFFERS: (u16, u32) = (8, 4096);
/// Their memory.
pub(super) const RECV_BYTES: usize = 8 * 4096 + 4096;

/// Why a lane's connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LaneError {
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error("cannot set the socket up")]
    Socket(#[source] io::Error),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("io_uring failed")]
    Wait(#[source] io::Error),
    #[error("sending failed")]
    Send(#[source] io::Error),
    #[error("receiving failed")]
    Receive(#[source] io::Error),
    #[error("the target closed the connection")]
    Closed,
    #[error("no sign of life for {0:?}")]
    Silent(Duration),
    #[error("the target refused: {0}")]
    Refused(String),
    #[error("the target sent a bad frame")]
    Frame(#[from] FrameError),
    #[error("encryption failed")]
    Record(#[from] RecordError),
    #[error("the target acknowledged batch {} which is not under way", .0.0)]
    UnknownAck(BatchId),
    #[error("batch {} was submitted while it was still under way", .0.0)]
    BatchTwice(BatchId),
    #[error("events of the lane set are not being read")]
    EventsStuck,
    #[error("the batch cannot be encoded")]
    Encode(#[from] EncodeError),
    #[error("not everything was acknowledged before the lane had to close")]
    CloseTimeout,
}

/// An error with its causes, on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Batches on their way: taken from the queue, not acknowledged.
pub(super) type Unacked = HashMap<BatchId, LostBatch>;

pub(super) struct LaneThread {
    pub(super) shared: Arc<Shared>,
    pub(super) index: usize,
    pub(super) waker: Waker,
    pub(super) counters: Arc<LaneCounters>,
    /// Buffers for frames that are not written in place.
    pub(super) out: BufferPool,
}

impl LaneThread {
    /// Runs until the set is closed or its peer given up.
    pub(super) fn run(self) {
        let peer = self.shared.config.peer.clone();
        let (first, longest) = self.shared.config.backoff;
        let mut backoff = first;
        while !self.ended() {
            let mut unacked = Unacked::new();
            let began = Instant::now();
            let outcome = self.connection(&mut unacked);
            self.report_lost(unacked);
            let error = match outcome {
                Ok(Finish::Closed) => break,
                Ok(Finish::Worn) => {
                    tracing::debug!(%peer, lane = self.index, "lane reopens with fresh keys");
                    continue;
                }
                Err(error) => error,
            };
            let why = format!("lane {} to {peer}: {}", self.index, chain(&error));
            let connected = !matches!(error, LaneError::Connect(_));
            if connected {
                tracing::warn!("{why}; reopening");
                self.tell(LaneEvent::LaneDown {
                    lane: self.index,
                    why: why.clone(),
                });
                // A connection that held a while was good: start over softly.
                if began.elapsed() > Duration::from_secs(5) {
                    backoff = first;
                }
            } else {
                tracing::debug!("{why}");
            }
            if self.give_up(&why) {
                break;
            }
            self.pause(backoff);
            backoff = (backoff * 2).min(longest);
        }
        self.counters.up.set(0);
    }

    fn ended(&self) -> bool {
        let state = self.shared.state();
        state.failed.is_some() || state.closing.is_some()
    }

    /// One connection from beginning to end. `Ok` if it ended in order.
    fn connection(&self, unacked: &mut Unacked) -> Result<Finish, LaneError> {
        let stream = (self.shared.connect)().map_err(LaneError::Connect)?;
        let watch = self.shared.pacing.watch(stream.tcp.as_fd());
        let mut connection = Connection::open(self, stream, unacked)?;
        {
            let mut state = self.shared.state();
            if state.failed.is_some() {
                // Another lane has just given the peer up.
                return Ok(Finish::Closed);
            }
            state.queues[self.index].up = true;
            state.queues[self.index].link_bound = true;
        }
        self.counters.connections.add(1);
        self.counters.up.set(1);
        self.shared.changed.notify_all();
        let outcome = match self.event(LaneEvent::LaneUp { lane: self.index }) {
            Ok(()) => connection.run(),
            Err(error) => Err(error),
        };
        connection.tell_counters();
        drop(watch);
        outcome
    }

    /// Takes the lane out of use and reports everything it still had.
    fn report_lost(&self, unacked: Unacked) {
        self.counters.up.set(0);
        let queued: Vec<_> = {
            let mut state = self.shared.state();
            let queue = &mut state.queues[self.index];
            let was_up = std::mem::take(&mut queue.up);
            let stop_copy = std::mem::take(&mut queue.stop_copy);
            let precopy = std::mem::take(&mut queue.precopy);
            if was_up {
                state.last_up = Instant::now();
            }
            stop_copy.into_iter().chain(precopy).collect()
        };
        self.shared.changed.notify_all();
        let mut batches: Vec<LostBatch> = unacked
            .into_values()
            .chain(queued.into_iter().map(|b| LostBatch {
                head: b.head(),
                entries: b.entries,
            }))
            .collect();
        if batches.is_empty() {
            return;
        }
        batches.sort_unstable_by_key(|lost| lost.head.batch);
        self.counters.batches_lost.add(batches.len() as u64);
        self.tell(LaneEvent::Lost { batches });
    }

    /// Whether the set has now failed; the first to notice says so.
    fn give_up(&self, why: &str) -> bool {
        let limit = self.shared.config.give_up_after;
        let mut state = self.shared.state();
        if state.failed.is_some() {
            return true;
        }
        if state.queues.iter().any(|queue| queue.up) || state.last_up.elapsed() < limit {
            return false;
        }
        let why = format!("no lane could be opened for {limit:?}; last: {why}");
        state.failed = Some(why.clone());
        drop(state);
        self.shared.changed.notify_all();
        self.tell(LaneEvent::PeerFailed { why });
        true
    }

    /// Waits `time`, or until the set ends.
    fn pause(&self, time: Duration) {
        let state = self.shared.state();
        drop(
            self.shared
                .changed
                .wait_timeout_while(state, time, |state| {
                    state.failed.is_none() && state.closing.is_none()
                })
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Sends an event, which must be taken within the peer's patience.
    pub(super) fn event(&self, event: LaneEvent) -> Result<(), LaneError> {
        match self
            .shared
            .events
            .send_timeout(event, self.shared.config.patience)
        {
            Ok(()) | Err(crossbeam_channel::SendTimeoutError::Disconnected(_)) => Ok(()),
            Err(crossbeam_channel::SendTimeoutError::Timeout(_)) => Err(LaneError::EventsStuck),
        }
    }

    /// Sends an event where nothing more can be done about failure.
    fn tell(&self, event: LaneEvent) {
        if let Err(error) = self.event(event) {
            tracing::error!(peer = %self.shared.config.peer, lane = self.index, "{error}");
        }
    }

    /// Reports acknowledged batches, together as far as they are of one VM.
    /// With each comes whether its contents went compressed.
    pub(super) fn placed(&self, heads: &[(BatchHead, bool)]) -> Result<(), LaneError> {
        for group in heads.chunk_by(|(a, _), (b, _)| (a.gang, a.vm) == (b.gang, b.vm)) {
            let ids = |only: bool| {
                let wanted = group
                    .iter()
                    .filter(move |(_, compressed)| *compressed || !only);
                wanted.map(|(head, _)| head.batch).collect()
            };
            self.event(LaneEvent::Placed {
                gang: group[0].0.gang,
                vm: group[0].0.vm,
                batches: ids(false),
                compressed: ids(true),
            })?;
        }
        Ok(())
    }
}
