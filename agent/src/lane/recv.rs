//! The target's end of a lane: a thread that receives, decodes, delivers to
//! the [`BatchSink`] and acknowledges.

use super::batch::{BatchId, BatchSink, SinkError};
use super::decode::DecodeError;
use super::encode::DEFAULT_WINDOW_LOG;
use super::frame::{FrameError, MAX_NEEDS};
use super::intake::Intake;
use super::record::{HEADER, LaneStream, MAX_BODY, RecordError};
use super::ring::{Ring, RingConfig};
use super::setup::RingError;
use super::stats::{ReceiverCounters, ReceiverStats};
use super::tcp;
use super::waker::Waker;
use crate::types::{GangId, Gfn, VmIndex};
use crossbeam_channel::Receiver;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Receive buffers handed to the kernel: number and length. 2 MiB.
const RECV_BUFFERS: (u16, u32) = (16, 128 * 1024);
/// Reverse frames that may wait to be written, in bytes: a source that does
/// not read them is given up.
pub(super) const MAX_OUTBOX: usize = 1 << 20;
/// Pages that may wait to be asked for.
const MAX_WAITING_NEEDS: usize = 1 << 20;

/// How a receiving lane works.
#[derive(Debug, Clone)]
pub struct ReceiveConfig {
    /// The source's name, for logs and errors.
    pub peer: String,
    /// Base-2 logarithm of the longest zstd history allowed, in bytes.
    pub window_log: u32,
    /// A source that shows no sign of life for this long is given up.
    pub patience: Duration,
}

impl ReceiveConfig {
    /// The defaults, for a lane from the source called `peer`.
    pub fn new(peer: impl Into<String>) -> ReceiveConfig {
        ReceiveConfig {
            peer: peer.into(),
            window_log: DEFAULT_WINDOW_LOG,
            patience: Duration::from_secs(2),
        }
    }

    /// Memory of the lane at most, in bytes: receive buffers, one record, one
    /// frame, one decoded batch, one zstd context.
    pub fn bytes(&self) -> usize {
        let (count, len) = RECV_BUFFERS;
        usize::from(count) * len as usize
            + HEADER
            + MAX_BODY
            + 2 * super::pool::BUF_LEN
            + (1 << self.window_log)
            + (1 << 20)
            + MAX_OUTBOX
            + MAX_WAITING_NEEDS * size_of::<Gfn>()
    }
}

/// Why a lane was closed from this side, or broke.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The source sent something that is not a valid frame.
    #[error("sent a bad frame")]
    Frame(#[from] FrameError),
    /// What came is not what the source sent.
    #[error("encryption failed")]
    Record(#[from] RecordError),
    /// The source sent a frame that cannot be decoded.
    #[error("sent a batch that cannot be decoded")]
    Decode(#[from] DecodeError),
    /// The target's pipeline did not take a batch.
    #[error("batch {} was refused", batch.0)]
    Sink {
        /// The batch.
        batch: BatchId,
        /// Why.
        #[source]
        source: SinkError,
    },
    /// The source's end vanished without a Bye.
    #[error("the connection ended in the middle of things")]
    Ended,
    /// Nothing was heard.
    #[error("no sign of life for {0:?}")]
    Silent(Duration),
    /// Acknowledgements are not read.
    #[error("does not read what is sent back ({0} bytes waiting)")]
    NotReading(usize),
    /// The socket.
    #[error("socket error")]
    Socket(#[source] io::Error),
    /// The ring.
    #[error("io_uring error")]
    Ring(#[source] io::Error),
    /// [`LaneReceiver::close`] was called.
    #[error("closed on this side")]
    Closed,
}

/// How a receiving lane ended.
#[derive(Debug)]
pub enum LaneEnd {
    /// The source said Bye.
    Orderly,
    /// Otherwise. Batches not acknowledged will be sent again on another lane.
    Broken(ReceiveError),
}

/// Why a lane could not be started.
#[derive(Debug, thiserror::Error)]
#[error("lane from {peer} cannot be started")]
pub struct StartError {
    /// The source.
    pub peer: String,
    /// What failed.
    #[source]
    pub source: RingError,
}

/// Why a message to the source was not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReverseError {
    /// The lane has ended: use another one of the same source.
    #[error("the lane has ended")]
    Ended,
    /// Too many pages are waiting to be asked for.
    #[error("{MAX_WAITING_NEEDS} pages are waiting to be asked for already")]
    Full,
}

/// What other threads want sent to the source.
#[derive(Default)]
pub(super) struct Waiting {
    pub(super) placed: Vec<BatchId>,
    pub(super) needs: VecDeque<(GangId, VmIndex, Vec<Gfn>)>,
    pub(super) need_count: usize,
    pub(super) close: bool,
    pub(super) ended: bool,
}

pub(super) struct Shared {
    waiting: Mutex<Waiting>,
    waker: Waker,
    pub(super) counters: ReceiverCounters,
    pub(super) end: OnceLock<LaneEnd>,
}

impl Shared {
    pub(super) fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends messages back to the source of a lane, from any thread.
#[derive(Clone)]
pub struct ReverseHandle(Arc<Shared>);

impl ReverseHandle {
    /// Asks the source for these pages with their content.
    pub fn need(&self, gang: GangId, vm: VmIndex, gfns: &[Gfn]) -> Result<(), ReverseError> {
        let mut waiting = self.0.waiting();
        if waiting.ended {
            return Err(ReverseError::Ended);
        }
        if waiting.need_count + gfns.len() > MAX_WAITING_NEEDS {
            return Err(ReverseError::Full);
        }
        waiting.need_count += gfns.len();
        for part in gfns.chunks(MAX_NEEDS) {
            waiting.needs.push_back((gang, vm, part.to_vec()));
        }
        drop(waiting);
        self.0.waker.wake();
        Ok(())
    }

    /// Acknowledges a batch for which the sink answered
    /// [`Placement::Pending`](super::Placement::Pending); once for each.
    pub fn placed(&self, batch: BatchId) -> Result<(), ReverseError> {
        let mut waiting = self.0.waiting();
        if waiting.ended {
            return Err(ReverseError::Ended);
        }
        waiting.placed.push(batch);
        drop(waiting);
        self.0.waker.wake();
        Ok(())
    }
}

/// A lane on the target: owns the connection and the thread that drives it.
/// Dropping it closes the lane.
pub struct LaneReceiver {
    shared: Arc<Shared>,
    /// Disconnected when the thread has ended.
    alive: Receiver<()>,
}

impl LaneReceiver {
    /// Takes an accepted connection, preamble done, and starts its thread.
    pub fn start(
        stream: LaneStream,
        config: ReceiveConfig,
        sink: Arc<dyn BatchSink>,
    ) -> Result<LaneReceiver, StartError> {
        let error = |source| StartError {
            peer: config.peer.clone(),
            source,
        };
        let LaneStream { tcp: stream, keys } = stream;
        tcp::prepare(&stream, config.patience).map_err(|e| error(RingError::Resources(e)))?;
        let shared = Arc::new(Shared {
            waiting: Mutex::new(Waiting::default()),
            waker: Waker::new().map_err(|e| error(RingError::Resources(e)))?,
            counters: ReceiverCounters::default(),
            end: OnceLock::new(),
        });
        let (alive_sender, alive) = crossbeam_channel::bounded::<()>(0);
        let (ready_sender, ready) = crossbeam_channel::bounded(1);
        let thread_shared = Arc::clone(&shared);
        let thread_config = config.clone();
        std::thread::Builder::new()
            .name("lane-rx".to_owned())
            .spawn(move || {
                let _alive = alive_sender;
                // The ring belongs to the thread that uses it.
                let ring = Ring::new(
                    stream,
                    &thread_config.peer,
                    thread_shared.waker.clone(),
                    &RingConfig {
                        pools: &[],
                        recv_buffers: RECV_BUFFERS,
                        deferred: true,
                    },
                );
                match ring {
                    Ok(ring) => {
                        let _ = ready_sender.send(Ok(()));
                        Intake::new(thread_shared, thread_config, sink, keys).run(ring);
                    }
                    Err(error) => {
                        let _ = ready_sender.send(Err(error));
                    }
                }
            })
            .map_err(|e| error(RingError::Resources(e)))?;
        match ready.recv() {
            Ok(Ok(())) => Ok(LaneReceiver { shared, alive }),
            Ok(Err(source)) => Err(error(source)),
            Err(_) => Err(error(RingError::Resources(io::Error::other(
                "the lane thread died",
            )))),
        }
    }

    /// A handle to send messages back with.
    pub fn handle(&self) -> ReverseHandle {
        ReverseHandle(Arc::clone(&self.shared))
    }

    /// Counters.
    pub fn stats(&self) -> ReceiverStats {
        self.shared.counters.snapshot()
    }

    /// Waits at most `limit` for the lane to end; `None` if it goes on.
    pub fn wait(&self, limit: Duration) -> Option<&LaneEnd> {
        // Nothing is ever sent: the answer is "gone" or "still there".
        let _ = self.alive.recv_timeout(limit);
        self.shared.end.get()
    }

    /// Closes the lane from this side and waits at most `limit` for its end.
    pub fn close(&self, limit: Duration) -> Option<&LaneEnd> {
        self.shared.waiting().close = true;
        self.shared.waker.wake();
        self.wait(limit)
    }
}

impl Drop for LaneReceiver {
    fn drop(&mut self) {
        self.close(Duration::from_secs(3));
    }
}
