//! Which connection is which: told by its first bytes.

use super::error::{Fault, Refusal};
use super::{main_channel, multifd};

/// Bytes that it takes.
pub const FIRST: usize = 4;

/// What a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The migration stream, and the return path.
    Main,
    /// Packets of pages.
    Multifd,
}

/// Tells a connection by its first bytes.
pub fn kind(first: [u8; FIRST]) -> Result<Kind, Fault> {
    match u32::from_be_bytes(first) {
        main_channel::MAGIC => Ok(Kind::Main),
        multifd::MAGIC => Ok(Kind::Multifd),
        // A TLS record with a handshake.
        _ if first[..2] == [0x16, 0x03] => Err(Refusal::Tls.into()),
        other => Err(Fault::Expected {
            expected: "the magic number of a migration stream or of multifd",
            found: u64::from(other),
        }),
    }
}
