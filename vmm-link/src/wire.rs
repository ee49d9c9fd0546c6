//! The protocol between an agent and a VMM: messages, as bytes and back.
//!
//! A frame is a header of 8 bytes (`u32` length of the body, `u16` kind, `u16`
//! zero) and a body of at most [`MAX_BODY`] bytes; numbers are little-endian.
//! The agent asks, the VMM answers, one request at a time:
//!
//! ```text
//! agent                          VMM
//! Hello                       →  Welcome (+ descriptors of guest RAM)
//! Status                      →  Status
//! StartLog, StopLog           →  Done
//! Round                       →  Bits … Bits, RoundEnd
//! Pause                       →  Paused
//! Resume, End                 →  Done
//! SaveState                   →  Chunk … Chunk, ChunksEnd
//! LoadState, Chunk …, ChunksEnd → Done
//! anything                    →  Refused
//! ```
//! `Hello` comes first, once. What is not understood, out of order or too long
//! ends the connection.

mod codec;

use thiserror::Error;

/// First bytes of a `Hello`.
pub const MAGIC: [u8; 8] = *b"drovervm";
/// The version spoken here. Another one is refused: agent and VMM are of one
/// host, and updated together or not at all.
pub const VERSION: u16 = 1;
/// Bytes of a header.
pub const HEADER: usize = 8;
/// Most bytes of a `Chunk`'s content, and of the words of a `Bits`.
pub const MAX_CHUNK: usize = 64 << 10;
/// Most bytes of a body.
pub const MAX_BODY: usize = MAX_CHUNK + 16;
/// Most regions of guest RAM.
pub const MAX_REGIONS: usize = 128;
/// Most descriptors that come with a `Welcome`.
pub const MAX_FDS: usize = 64;
/// Most bytes of a refusal's text.
pub const MAX_TEXT: usize = 1024;
/// Most bytes of a VM's state: everything but RAM.
pub const MAX_STATE: u64 = 256 << 20;
/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Largest gap-free end of guest RAM in pages: gfns of the agent are `u32`.
pub const MAX_PAGES: u64 = u32::MAX as u64;

/// Bytes that are no message.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// A kind that nobody knows, or not in this direction.
    #[error("a message of unknown kind {0:#06x}")]
    Kind(u16),
    /// The header's last two bytes are not zero.
    #[error("a header with {0:#06x} where zero has to be")]
    Reserved(u16),
    /// Longer than it may be.
    #[error("a message of {len} bytes, at most {most} are taken")]
    TooLong {
        /// What it says.
        len: usize,
        /// What may be.
        most: usize,
    },
    /// Shorter or longer than its kind is.
    #[error("{what}: {len} bytes do not make one")]
    Length {
        /// The message.
        what: &'static str,
        /// Its body.
        len: usize,
    },
    /// A field with a value that cannot be.
    #[error("{what}: {value} is out of range")]
    Value {
        /// The field.
        what: &'static str,
        /// What it has.
        value: u64,
    },
    /// Not the magic of this protocol.
    #[error("no agent of Drover is speaking")]
    Magic,
    /// Another version.
    #[error("protocol version {got}, this is {VERSION}: use agent and VMM of one release")]
    Version {
        /// The other's.
        got: u16,
    },
}

/// A header: length of the body and kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes that follow.
    pub len: usize,
    /// What they are.
    pub kind: u16,
}

/// What the VMM learns of writes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogKind {
    /// `KVM_GET_DIRTY_LOG`, which clears and protects again by itself.
    Bitmap,
    /// The same under `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    ManualBitmap,
    /// `KVM_CAP_DIRTY_LOG_RING`.
    Ring,
}

/// What a VMM is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Its VM lives here, running or paused.
    Live,
    /// It waits for pages and state from elsewhere.
    Waiting,
    /// State has been loaded, and the guest has not run yet.
    Arrived,
}

/// A stretch of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// Which of the descriptors that came along is its file.
    pub fd: u16,
}

impl RegionInfo {
    /// Number of its pages.
    pub fn pages(&self) -> u64 {
        self.len / PAGE
    }

    fn check(self, fds: u16) -> Result<RegionInfo, WireError> {
        let value = |what, value| Err(WireError::Value { what, value });
        if self.len == 0 || !self.len.is_multiple_of(PAGE) || self.pages() > MAX_PAGES {
            return value("length of a region", self.len);
        }
        let end_in = |start: u64| {
            start.is_multiple_of(PAGE) && start.checked_add(self.len).is_some_and(|e| e <= 1 << 62)
        };
        if !end_in(self.gpa) {
            return value("address of a region", self.gpa);
        }
        if !end_in(self.offset) {
            return value("offset of a region", self.offset);
        }
        if self.fd >= fds {
            return value("descriptor of a region", self.fd.into());
        }
        Ok(self)
    }
}

/// How a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// What the VMM is in.
    pub phase: Phase,
    /// Whether its vCPUs run.
    pub running: bool,
    /// Whether writes are logged.
    pub logging: bool,
}

/// What an agent asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request<'a> {
    /// The first message. Carries magic and version.
    Hello,
    /// How is the VM?
    Status,
    /// Log writes from here on; what was logged before is forgotten.
    StartLog,
    /// The pages written since the log was started or last asked.
    Round,
    /// Log no longer.
    StopLog,
    /// Stop all vCPUs and finish all I/O into guest RAM.
    Pause,
    /// Let the guest run.
    Resume,
    /// The state of a paused VM.
    SaveState,
    /// Chunks of state follow.
    LoadState,
    /// A piece of it.
    Chunk(&'a [u8]),
    /// There was this much.
    ChunksEnd(u64),
    /// The VM lives elsewhere (or not at all): end the VMM.
    End,
}

/// Why a VMM refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Not in this phase or run state.
    State,
    /// KVM failed.
    Log,
    /// The VMM's own code failed.
    Vmm,
}

/// What a VMM answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<'a> {
    /// To `Hello`; as many descriptors as its regions name come with it.
    Welcome {
        /// How writes are logged.
        log: LogKind,
        /// How the VM is.
        status: Status,
        /// Descriptors that come along.
        fds: u16,
        /// Guest RAM.
        regions: Vec<RegionInfo>,
    },
    /// To `Status`.
    Status(Status),
    /// It is done.
    Done,
    /// Pages written, a bit a page.
    Bits(Bits<'a>),
    /// The round is complete; so many pages were in it.
    RoundEnd(u64),
    /// To `Pause`: whether the guest was running.
    Paused(bool),
    /// A piece of state.
    Chunk(&'a [u8]),
    /// There was this much.
    ChunksEnd(u64),
    /// It was not done.
    Refused {
        /// What kind of failure.
        why: Refusal,
        /// In words.
        text: String,
    },
}

/// Pages of one region, a bit a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bits<'a> {
    /// Index of the region in the `Welcome`.
    pub region: u16,
    /// The page of the region that the first bit is of, a multiple of 64.
    pub first: u32,
    bytes: &'a [u8],
}

impl<'a> Bits<'a> {
    /// The words, each with the number of the page its lowest bit is of.
    pub fn words(&self) -> impl Iterator<Item = (u64, u64)> + 'a {
        let first = u64::from(self.first);
        let words = self.bytes.chunks_exact(8).enumerate();
        words.map(move |(i, word)| {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            (first + i as u64 * 64, word)
        })
    }

    /// Number of pages that there are bits for.
    pub fn span(&self) -> u64 {
        self.bytes.len() as u64 * 8
    }
}
