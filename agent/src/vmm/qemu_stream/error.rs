//! What can be wrong with a stream, and what Drover does not take part in.

use thiserror::Error;

/// A stream that cannot be read on. `offset` is that of the record that could
/// not be read, from the beginning of its connection.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("byte {offset} of the stream")]
pub struct StreamError {
    /// Where.
    pub offset: u64,
    /// What.
    #[source]
    pub fault: Fault,
}

/// What is wrong with a record.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Fault {
    /// Something else should stand there.
    #[error("expected {expected}, found {found:#x}")]
    Expected {
        /// What should.
        expected: &'static str,
        /// What does.
        found: u64,
    },
    /// A length or count beyond what any QEMU sends.
    #[error("{what} is {found}, and may be {most} at most")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The stream's figure.
        found: u64,
        /// The cap.
        most: u64,
    },
    /// A page of a RAM block that the list of blocks does not have.
    #[error("expected a RAM block of the list, found \"{name}\"")]
    UnknownBlock {
        /// Its name, escaped.
        name: String,
    },
    /// The list has a block twice.
    #[error("the RAM block \"{name}\" is in the list twice")]
    BlockTwice {
        /// Its name, escaped.
        name: String,
    },
    /// A page says "same block as before", and there was none before.
    #[error("expected a page that names its RAM block: it is the first")]
    NoBlock,
    /// A page outside of its block.
    #[error(
        "expected a page within the {bytes} bytes of RAM block \"{block}\", found one at {offset:#x}"
    )]
    Beyond {
        /// The block's name, escaped.
        block: String,
        /// Its length.
        bytes: u64,
        /// The page's place.
        offset: u64,
    },
    /// The connection ended within the stream.
    #[error("the connection ended where {expected} was expected")]
    Ended {
        /// What should have come.
        expected: &'static str,
    },
    /// A kind of migration that is not carried.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// Kinds of migration that are not carried, and what to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Postcopy.
    #[error(
        "postcopy is not carried: switch the migration capability postcopy-ram off, on both QEMUs"
    )]
    Postcopy,
    /// A stream within the stream.
    #[error(
        "packaged state (of postcopy or COLO) is not carried: switch postcopy-ram and x-colo off, on both QEMUs"
    )]
    Packaged,
    /// COLO.
    #[error("COLO is not carried: switch the migration capability x-colo off, on both QEMUs")]
    Colo,
    /// QEMU's delta compression.
    #[error(
        "XBZRLE pages are not carried, Drover makes deltas itself: switch the migration capability xbzrle off"
    )]
    Xbzrle,
    /// QEMU's compression threads.
    #[error(
        "compressed pages are not carried, Drover compresses itself: switch the migration capability compress off"
    )]
    Compressed,
    /// Compression on multifd's connections.
    #[error(
        "compressed multifd packets are not carried, Drover compresses itself: set the migration parameter multifd-compression to none, on both QEMUs"
    )]
    MultifdCompression,
    /// VFIO's device state on multifd's connections.
    #[error(
        "device state on multifd connections is not carried: set x-migration-multifd-transfer=off for the VFIO devices"
    )]
    MultifdDeviceState,
    /// TLS.
    #[error(
        "the connection is encrypted by QEMU: unset the migration parameter tls-creds, on both QEMUs; Drover encrypts between hosts"
    )]
    Tls,
    /// RDMA's hooks.
    #[error("pages by RDMA are not carried: migrate to a unix: URI")]
    Rdma,
    /// Pages at fixed places of a file.
    #[error(
        "mapped-ram is for files: switch the migration capability mapped-ram off, on both QEMUs"
    )]
    MappedRam,
    /// Guests with pages of another size.
    #[error("the guest has pages of 2^{bits} bytes; only pages of 4 KiB are carried")]
    PageSize {
        /// Their size.
        bits: u32,
    },
    /// No return path.
    #[error(
        "without a return path the source would not notice a target that dies: switch the migration capability return-path on, on both QEMUs"
    )]
    NoReturnPath,
}

/// A name from the stream as it may be shown to people.
pub(crate) fn shown(name: &[u8]) -> String {
    name.escape_ascii().to_string()
}
