//! QEMU's own migration stream: read item by item, written again byte by byte,
//! and relayed from one QEMU to another.
//!
//! [`main_channel`] cuts the stream of the main connection into [`Item`]s and
//! [`write`] makes the same bytes of them; [`multifd`] does both for multifd's
//! connections, [`reply`] for what the target answers, and [`channel`] tells
//! connections apart. None of these does I/O. [`carry`] reads a connection and
//! hands its items to a [`Sink`]: that of stream mode ([`super::stream`]), or that
//! of [`relay`], which stands between two QEMUs on one host, looks at everything
//! and changes nothing.
//!
//! What is parsed, and what is not, is in `docs/vmm-qemu-stream.md`.

mod blocks;
mod carry;
pub mod channel;
mod cut;
mod error;
pub mod fuzz;
mod item;
pub mod main_channel;
pub mod multifd;
mod relay;
pub mod reply;
mod session;
mod sink;
pub mod write;

#[cfg(test)]
mod relay_tests;
#[cfg(test)]
pub(in crate::vmm) mod samples;
#[cfg(test)]
mod tests;

pub use blocks::{Block, BlockId, Blocks, MAX_BLOCKS};
pub(in crate::vmm) use carry::carry;
pub use carry::{CarryError, READ_BYTES};
pub use cut::Parse;
pub use error::{Fault, Refusal, StreamError};
pub use item::{Item, PageHead, Phase, RawFrom, Tally};
pub(in crate::vmm) use main_channel::FOOTER;
pub use relay::{ChannelReport, Limits, RelayError, StreamRelay, StreamReport};
pub use session::{Channel, MAX_MULTIFD};
pub use sink::{ITEM_BYTES, Sink, SinkError};
