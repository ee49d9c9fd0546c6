//! Counters of lanes, written by lane threads and read by anyone.

use super::tcp::TcpReading;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that one thread writes and others read.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
    pub(super) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What one sending lane has done since its set was made, over all its
/// connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct LaneStats {
    /// Whether it is connected now.
    pub up: bool,
    /// Connections made.
    pub connections: u64,
    /// Batches sent, and how many of them in which encoding.
    pub batches: u64,
    /// Batches sent as zstd frames; the rest went raw.
    pub batches_compressed: u64,
    /// Page contents sent.
    pub pages: u64,
    /// Page contents sent inside zstd frames.
    pub pages_compressed: u64,
    /// References sent.
    pub references: u64,
    /// Bytes of list and contents before encoding.
    pub plain_bytes: u64,
    /// Bytes given to TCP, frame and record headers included.
    pub wire_bytes: u64,
    /// Bytes received (acknowledgements and the like).
    pub reverse_bytes: u64,
    /// `SEND_ZC` sends whose data the kernel did not copy.
    pub sends_zero_copied: u64,
    /// `SEND_ZC` sends whose data the kernel copied after all.
    pub sends_copied: u64,
    /// Sends of the plain kind: small frames, or after falling back.
    pub sends_plain: u64,
    /// Whether zero copy was given up on the current connection.
    pub fell_back_to_plain: bool,
    /// Level of compression now: 0 is raw.
    pub level: u64,
    /// Time spent compressing, in microseconds.
    pub encode_us: u64,
    /// Time spent encrypting, in microseconds.
    pub seal_us: u64,
    /// Time spent waiting for the pacer, in microseconds.
    pub pacer_wait_us: u64,
    /// Time spent waiting for the socket to take data, in microseconds.
    pub socket_wait_us: u64,
    /// Chunks sent in the middle of a frame without the pacer's permission.
    pub overdrafts: u64,
    /// System calls of the lane's ring (`io_uring_enter`).
    pub ring_enters: u64,
    /// Memory of the zstd context, in bytes.
    pub context_bytes: u64,
    /// Batches reported lost.
    pub batches_lost: u64,
    /// The connection as the kernel sees it, read at most 50 ms ago.
    pub tcp: TcpReading,
}

/// The cells behind [`LaneStats`].
#[derive(Debug, Default)]
pub(super) struct LaneCounters {
    pub(super) up: Counter,
    pub(super) connections: Counter,
    pub(super) batches: Counter,
    pub(super) batches_compressed: Counter,
    pub(super) pages: Counter,
    pub(super) pages_compressed: Counter,
    pub(super) references: Counter,
    pub(super) plain_bytes: Counter,
    pub(super) wire_bytes: Counter,
    pub(super) reverse_bytes: Counter,
    pub(super) sends_zero_copied: Counter,
    pub(super) sends_copied: Counter,
    pub(super) sends_plain: Counter,
    pub(super) fell_back: Counter,
    pub(super) level: Counter,
    pub(super) encode_us: Counter,
    pub(super) seal_us: Counter,
    pub(super) pacer_wait_us: Counter,
    pub(super) socket_wait_us: Counter,
    pub(super) overdrafts: Counter,
    pub(super) ring_enters: Counter,
    pub(super) context_bytes: Counter,
    pub(super) batches_lost: Counter,
    pub(super) tcp: Mutex<TcpReading>,
}

impl LaneCounters {
    pub(super) fn snapshot(&self) -> LaneStats {
        LaneStats {
            up: self.up.get() != 0,
            connections: self.connections.get(),
            batches: self.batches.get(),
            batches_compressed: self.batches_compressed.get(),
            pages: self.pages.get(),
            pages_compressed: self.pages_compressed.get(),
            references: self.references.get(),
            plain_bytes: self.plain_bytes.get(),
            wire_bytes: self.wire_bytes.get(),
            reverse_bytes: self.reverse_bytes.get(),
            sends_zero_copied: self.sends_zero_copied.get(),
            sends_copied: self.sends_copied.get(),
            sends_plain: self.sends_plain.get(),
            fell_back_to_plain: self.fell_back.get() != 0,
            level: self.level.get(),
            encode_us: self.encode_us.get(),
            seal_us: self.seal_us.get(),
            pacer_wait_us: self.pacer_wait_us.get(),
            socket_wait_us: self.socket_wait_us.get(),
            overdrafts: self.overdrafts.get(),
            ring_enters: self.ring_enters.get(),
            context_bytes: self.context_bytes.get(),
            batches_lost: self.batches_lost.get(),
            tcp: *self.tcp.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

/// What one receiving lane has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct ReceiverStats {
    /// Batches decoded and given to the sink.
    pub batches: u64,
    /// Page contents among them.
    pub pages: u64,
    /// Bytes received.
    pub wire_bytes: u64,
    /// Time spent decrypting, in microseconds.
    pub open_us: u64,
    /// Time spent decoding, in microseconds.
    pub decode_us: u64,
    /// Time spent in the sink, in microseconds.
    pub sink_us: u64,
    /// System calls of the lane's ring (`io_uring_enter`).
    pub ring_enters: u64,
    /// Whether receiving is multishot.
    pub multishot: bool,
    /// Memory of the lane, in bytes: receive buffers, frame in progress,
    /// decoded frame, zstd context.
    pub memory_bytes: u64,
}

/// The cells behind [`ReceiverStats`].
#[derive(Debug, Default)]
pub(super) struct ReceiverCounters {
    pub(super) batches: Counter,
    pub(super) pages: Counter,
    pub(super) wire_bytes: Counter,
    pub(super) open_us: Counter,
    pub(super) decode_us: Counter,
    pub(super) sink_us: Counter,
    pub(super) ring_enters: Counter,
    pub(super) multishot: Counter,
    pub(super) memory_bytes: Counter,
}

impl ReceiverCounters {
    pub(super) fn snapshot(&self) -> ReceiverStats {
        ReceiverStats {
            batches: self.batches.get(),
            pages: self.pages.get(),
            wire_bytes: self.wire_bytes.get(),
            open_us: self.open_us.get(),
            decode_us: self.decode_us.get(),
            sink_us: self.sink_us.get(),
            ring_enters: self.ring_enters.get(),
            multishot: self.multishot.get() != 0,
            memory_bytes: self.memory_bytes.get(),
        }
    }
}
