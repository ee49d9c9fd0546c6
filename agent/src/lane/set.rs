//! All lanes between one source host and one target host.

use super::batch::{LaneEvent, Pacing, StagedBatch};
use super::encode::EncodeConfig;
use super::frame::FrameError;
use super::pool::{BUF_LEN, BufferPool};
use super::record::{KEY_RECORDS, LaneStream};
use super::seal::SEALED_BUFS;
use super::send::{self, LaneThread};
use super::stats::{LaneCounters, LaneStats};
use super::waker::Waker;
use crate::types::Class;
use crossbeam_channel::{Receiver, Sender};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Output buffers of one lane: being filled, being sent, waiting for the
/// kernel to let go.
pub(super) const OUT_BUFS: usize = 4;
/// Events that may wait to be read.
const EVENTS: usize = 4096;

/// Makes a lane's connection, preamble included: lanes call it when they start
/// and whenever a connection broke. It must keep its own time limit (a few
/// seconds), also in the preamble.
pub type Connector = Arc<dyn Fn() -> io::Result<LaneStream> + Send + Sync>;

/// How a set of lanes works.
#[derive(Debug, Clone)]
pub struct LaneSetConfig {
    /// The target's name, for logs and errors.
    pub peer: String,
    /// Connections, 1 to 64.
    pub lanes: usize,
    /// Batches that may wait at each lane, for each class; 1 or more.
    pub queue_depth: usize,
    /// Compression.
    pub encode: EncodeConfig,
    /// A peer that shows no sign of life for this long is given up (≤ 2 s for
    /// an agent that promises to notice within 2 s).
    pub patience: Duration,
    /// Batches sent and not acknowledged, per lane, before it waits.
    pub max_unacked: usize,
    /// First and longest wait between attempts to reopen a lane.
    pub backoff: (Duration, Duration),
    /// The set ends as failed when it had no connection for this long.
    pub give_up_after: Duration,
    /// Bytes of the kernel's send buffer.
    pub send_buffer: usize,
    /// Bytes that may wait unsent in the kernel: what stop-and-copy may have
    /// to wait behind.
    pub notsent_lowat: u32,
    /// Largest piece sent with one permission of a pacer that has a rate limit;
    /// without a limit a frame is sent in one piece.
    pub max_chunk: usize,
    /// TCP congestion control; `None` for the system's default.
    pub congestion: Option<String>,
    /// Records encrypted with one key; then the lane is reopened, in order, with
    /// fresh ones.
    pub key_records: u64,
}

impl LaneSetConfig {
    /// The defaults, for lanes to the target called `peer`.
    pub fn new(peer: impl Into<String>) -> LaneSetConfig {
        LaneSetConfig {
            peer: peer.into(),
            lanes: 2,
            queue_depth: 3,
            encode: EncodeConfig::default(),
            patience: Duration::from_millis(1800),
            max_unacked: 256,
            backoff: (Duration::from_millis(50), Duration::from_secs(1)),
            give_up_after: Duration::from_secs(10),
            send_buffer: 1 << 20,
            notsent_lowat: 128 << 10,
            max_chunk: 256 << 10,
            congestion: None,
            key_records: KEY_RECORDS,
        }
    }

    /// Memory of the set beside the staging pool, in bytes, when every lane
    /// compresses: output and sealed buffers, zstd contexts, receive buffers.
    pub fn bytes(&self) -> usize {
        let context = super::encode::context_bytes_bound(&self.encode);
        self.lanes * ((OUT_BUFS + SEALED_BUFS) * BUF_LEN + context + send::RECV_BYTES)
    }
}

/// Why a batch was not accepted; it comes back with the error.
#[derive(Debug, thiserror::Error)]
#[error("lanes to {peer}: {why}")]
pub struct SubmitError {
    /// The target.
    pub peer: String,
    /// The reason.
    pub why: Refusal,
    /// The batch.
    pub batch: Box<StagedBatch>,
}

/// The reasons of [`SubmitError`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// No lane had room in time.
    #[error("no room for a batch in {0:?}")]
    TimedOut(Duration),
    /// The peer was given up; see [`LaneEvent::PeerFailed`].
    #[error("given up: {0}")]
    PeerFailed(String),
    /// [`LaneSet::close`] was called.
    #[error("closed")]
    Closed,
    /// The entries are not a valid batch.
    #[error("invalid batch")]
    Invalid(#[source] FrameError),
}

/// What waits at one lane.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) stop_copy: VecDeque<StagedBatch>,
    pub(super) precopy: VecDeque<StagedBatch>,
    pub(super) up: bool,
    /// The lane carries what it is allowed to: another lane would not carry
    /// more. Assumed until the lane has found out.
    pub(super) link_bound: bool,
    /// The lane looked for a batch and found none: wake it when one comes.
    pub(super) hungry: bool,
}

impl Queue {
    pub(super) fn class(&mut self, class: Class) -> &mut VecDeque<StagedBatch> {
        match class {
            Class::Precopy => &mut self.precopy,
            Class::StopCopy => &mut self.stop_copy,
        }
    }
}

/// What threads of a set share.
pub(super) struct State {
    pub(super) queues: Vec<Queue>,
    /// When the last connection ended (or the set began).
    pub(super) last_up: Instant,
    pub(super) failed: Option<String>,
    /// Send and await acknowledgement of everything until then, then end.
    pub(super) closing: Option<Instant>,
}

pub(super) struct Shared {
    pub(super) config: LaneSetConfig,
    pub(super) state: Mutex<State>,
    /// Room in a queue, a lane up, or the end.
    pub(super) changed: Condvar,
    pub(super) events: Sender<LaneEvent>,
    pub(super) pacing: Arc<dyn Pacing>,
    pub(super) connect: Connector,
    pub(super) staging: BufferPool,
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Every change to the state is complete before its lock is released.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Lane {
    waker: Waker,
    counters: Arc<LaneCounters>,
}

/// Lanes of one (source host, target host) pair. Dropping the set ends its
/// threads; what was not acknowledged is then forgotten without an event.
pub struct LaneSet {
    shared: Arc<Shared>,
    lanes: Vec<Lane>,
    events: Receiver<LaneEvent>,
    /// Disconnected when every thread has ended.
    ended: Receiver<()>,
}

impl std::fmt::Debug for LaneSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LaneSet")
            .field("peer", &self.shared.config.peer)
            .finish_non_exhaustive()
    }
}

/// Why a set of lanes could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaneSetError {
    /// A number of [`LaneSetConfig`] makes no sense.
    #[error("lanes to {peer}: {what}")]
    Config {
        /// The target.
        peer: String,
        /// The number and its bounds.
        what: String,
    },
    /// Memory, threads, event descriptors.
    #[error("lanes to {peer} cannot be started")]
    Resources {
        /// The target.
        peer: String,
        /// What was missing.
        #[source]
        source: io::Error,
    },
}

impl LaneSet {
    /// Starts the lanes' threads, which connect at once and on their own; the
    /// first news is in [`events`](Self::events). Contents of submitted
    /// batches must lie in buffers of `staging`.
    pub fn start(
        config: LaneSetConfig,
        staging: &BufferPool,
        pacing: Arc<dyn Pacing>,
        connect: Connector,
    ) -> Result<LaneSet, LaneSetError> {
        check(&config)?;
        let resources = |source| LaneSetError::Resources {
            peer: config.peer.clone(),
            source,
        };
        let (event_sender, events) = crossbeam_channel::bounded(EVENTS);
        let (alive, ended) = crossbeam_channel::bounded(0);
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                queues: (0..config.lanes).map(|_| Queue::default()).collect(),
                last_up: Instant::now(),
                failed: None,
                closing: None,
            }),
            changed: Condvar::new(),
            events: event_sender,
            pacing,
            connect,
            staging: staging.clone(),
            config: config.clone(),
        });
        // The set exists before its threads: if one cannot start, dropping it
        // ends the others.
        let mut set = LaneSet {
            shared,
            lanes: Vec::new(),
            events,
            ended,
        };
        for index in 0..config.lanes {
            let lane = Lane {
                waker: Waker::new().map_err(resources)?,
                counters: Arc::new(LaneCounters::default()),
            };
            let thread = LaneThread {
                shared: Arc::clone(&set.shared),
                index,
                waker: lane.waker.clone(),
                counters: Arc::clone(&lane.counters),
                out: BufferPool::new(OUT_BUFS).map_err(resources)?,
            };
            let alive = alive.clone();
            std::thread::Builder::new()
                .name(format!("lane-tx-{index}"))
                .spawn(move || {
                    let _alive = alive;
                    thread.run();
                })
                .map_err(resources)?;
            set.lanes.push(lane);
        }
        Ok(set)
    }

    /// The target's name.
    pub fn peer(&self) -> &str {
        &self.shared.config.peer
    }

    /// News of the set. All clones share one queue of bounded length: read it,
    /// or the lanes stop.
    pub fn events(&self) -> &Receiver<LaneEvent> {
        &self.events
    }

    /// Queues a batch at the lowest-numbered lane that is up and has room (so
    /// that one zstd history sees most pages; the next lane is used when one
    /// alone cannot carry the load), waiting at most `limit`.
    pub fn submit(&self, mut batch: StagedBatch, limit: Duration) -> Result<(), SubmitError> {
        if let Err(error) = batch.prepare() {
            return Err(self.refuse(batch, Refusal::Invalid(error)));
        }
        let end = Instant::now() + limit;
        let mut state = self.shared.state();
        loop {
            if let Some(why) = &state.failed {
                let why = why.clone();
                return Err(self.refuse(batch, Refusal::PeerFailed(why)));
            }
            if state.closing.is_some() {
                return Err(self.refuse(batch, Refusal::Closed));
            }
            if let Some(index) = state.room(batch.class, self.shared.config.queue_depth) {
                let queue = &mut state.queues[index];
                // Stop-and-copy is told at once: what it waits behind hurries.
                let wake = std::mem::take(&mut queue.hungry) || batch.class == Class::StopCopy;
                queue.class(batch.class).push_back(batch);
                drop(state);
                if wake {
                    self.lanes[index].waker.wake();
                }
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.refuse(batch, Refusal::TimedOut(limit)));
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn refuse(&self, batch: StagedBatch, why: Refusal) -> SubmitError {
        SubmitError {
            peer: self.shared.config.peer.clone(),
            why,
            batch: Box::new(batch),
        }
    }

    /// Counters of each lane.
    pub fn stats(&self) -> Vec<LaneStats> {
        self.lanes
            .iter()
            .map(|lane| lane.counters.snapshot())
            .collect()
    }

    /// Takes no more batches, sends what is queued, awaits acknowledgements,
    /// and ends the connections in order, all within about `limit`. Returns
    /// whether all threads have ended; events remain readable. What was not
    /// acknowledged in time is reported [`LaneEvent::Lost`].
    pub fn close(&self, limit: Duration) -> bool {
        {
            let mut state = self.shared.state();
            let end = Instant::now() + limit;
            state.closing = Some(state.closing.map_or(end, |before| before.min(end)));
        }
        self.shared.changed.notify_all();
        for lane in &self.lanes {
            lane.waker.wake();
        }
        // A thread may need a moment more: its ring has to come to rest.
        let grace = Duration::from_secs(3);
        let end = self.ended.recv_timeout(limit + grace);
        end == Err(crossbeam_channel::RecvTimeoutError::Disconnected)
    }
}

impl State {
    /// The lane a batch should wait at.
    fn room(&mut self, class: Class, depth: usize) -> Option<usize> {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if !queue.up {
                continue;
            }
            if queue.class(class).len() < depth {
                return Some(index);
            }
            if queue.link_bound {
                return None;
            }
        }
        None
    }
}

impl Drop for LaneSet {
    fn drop(&mut self) {
        if !self.close(Duration::ZERO) {
            tracing::error!(
                peer = self.peer(),
                "a lane thread does not end (is its connector stuck?); leaving it behind"
            );
        }
    }
}

fn check(config: &LaneSetConfig) -> Result<(), LaneSetError> {
    let what = if !(1..=64).contains(&config.lanes) {
        format!("{} lanes asked for, 1 to 64 are possible", config.lanes)
    } else if config.queue_depth == 0 || config.max_unacked == 0 {
        "queue_depth and max_unacked must be at least 1".to_owned()
    } else if config.max_chunk < 4096 {
        format!(
            "max_chunk is {} bytes, at least 4096 are needed",
            config.max_chunk
        )
    } else if !(17..=27).contains(&config.encode.window_log) {
        format!(
            "window_log is {}, 17 to 27 are possible",
            config.encode.window_log
        )
    } else if !(1..=19).contains(&config.encode.level) {
        format!(
            "zstd level is {}, 1 to 19 are possible",
            config.encode.level
        )
    } else if config.patience < Duration::from_millis(100) {
        format!(
            "patience is {:?}, at least 100 ms are needed",
            config.patience
        )
    } else {
        return Ok(());
    };
    Err(LaneSetError::Config {
        peer: config.peer.clone(),
        what,
    })
}
