//! Lanes: the TCP connections that carry pages from a source agent to a
//! target agent.
//!
//! Follow a batch: the source's scan thread fills a [`PoolBuf`] of registered
//! memory with page contents and hands it over as a [`StagedBatch`] to a
//! [`LaneSet`] (all lanes of one pair of hosts). A lane thread encodes it
//! ([`encode`]: in place, or through the connection's zstd stream), waits for
//! the pacer's permission ([`Pacing`]), encrypts it into registered memory
//! ([`record`]) and sends it through its own io_uring, without a copy where the
//! network card allows. On the target a [`LaneReceiver`] decrypts what comes
//! where it lies, puts frames together ([`assemble`]), decodes them
//! ([`decode`]) and calls the [`BatchSink`]; acknowledgements come back on
//! the same connection and leave the set as [`LaneEvent`]s.
//!
//! A lane keeps no page content once it is sent: what was not acknowledged
//! when a connection broke is reported as [`LaneEvent::Lost`], to be read from
//! guest RAM anew. Every queue is bounded and every wait has a limit; the sums
//! are in `docs/lanes.md`, the bytes on the wire in `docs/protocol.md`.

pub mod adapt;
mod aead;
pub mod assemble;
pub mod batch;
pub mod bench;
pub mod bench_zstd;
pub mod decode;
mod drive;
pub mod encode;
pub mod entries;
pub mod frame;
mod inbox;
mod intake;
pub mod open;
mod outgoing;
pub mod pool;
mod provided;
pub mod record;
pub mod recv;
mod ring;
mod seal;
mod send;
pub mod set;
mod setup;
pub mod sparse;
pub mod stats;
pub mod tcp;
mod waker;

pub use batch::{
    BatchId, BatchSink, LaneEvent, LostBatch, Pacing, Placement, SinkError, StagedBatch, Unpaced,
};
pub use bench::bench_lane;
pub use bench_zstd::bench_zstd;
pub use encode::{Compress, EncodeConfig};
pub use entries::{Entries, Reference, ZeroRun};
pub use frame::{BatchHead, DecodedBatch, Encoding, FrameError};
pub use pool::{BufferPool, PoolBuf, TakeError};
pub use record::{LaneKeys, LaneStream, RecordError};
pub use recv::{LaneEnd, LaneReceiver, ReceiveConfig, ReceiveError, ReverseHandle};
pub use set::{Connector, LaneSet, LaneSetConfig, LaneSetError, Refusal, SubmitError};
pub use setup::RingError;
pub use stats::{LaneStats, ReceiverStats};
pub use tcp::TcpReading;

#[cfg(test)]
mod codec_tests;
#[cfg(test)]
mod interop_tests;
#[cfg(test)]
mod record_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_fault;
#[cfg(test)]
mod tests_sealed;
