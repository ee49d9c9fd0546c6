//! What the main connection's stream is made of.

use super::blocks::BlockId;
use crate::types::Page;
use std::fmt;

/// A piece of the stream. Written by [`super::write::StreamWriter`] in their
/// order, they make the stream again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item<'a> {
    /// To be passed on as it is, in order: headers, footers, commands.
    Bytes(&'a [u8]),
    /// A section of RAM begins; these bytes are its header.
    Section(Phase, &'a [u8]),
    /// An entry of the list of RAM blocks.
    Block {
        /// Its name, 255 bytes at most.
        name: &'a [u8],
        /// Its length.
        bytes: u64,
        /// Its guest-physical address, with `x-ignore-shared`.
        address: Option<u64>,
    },
    /// A page.
    Page(PageHead, &'a Page),
    /// A page of equal bytes; in practice they are 0.
    Zero(PageHead, u8),
    /// The section of RAM ends. What it has must be in the target's QEMU before
    /// anything that follows.
    SectionEnd(Phase),
    /// Of the rest of the stream, which is passed on unread.
    Raw(&'a [u8]),
}

/// Where a page belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHead {
    /// Its block.
    pub block: BlockId,
    /// Its place there, in bytes.
    pub offset: u64,
    /// The stream names the block here; else it is that of the page before,
    /// which may be in an earlier section.
    pub named: bool,
}

/// Which section of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The list of blocks.
    Setup,
    /// Pages while the guest runs. QEMU makes sections by time: a pre-copy round
    /// has many of them.
    Precopy,
    /// Pages after the guest was stopped.
    StopCopy,
}

/// From where on the stream is passed on unread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RawFrom {
    /// Device state, after all RAM: nothing is lost by it.
    DeviceState,
    /// The end of all sections, before any device state.
    End,
    /// Something whose length the stream does not tell, before the end of RAM:
    /// the pages that follow are passed on as well, but not looked at.
    Unknown {
        /// Its name, escaped.
        name: String,
        /// Its first byte in the stream.
        offset: u64,
    },
}

impl fmt::Display for RawFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RawFrom::DeviceState => f.write_str("device state"),
            RawFrom::End => f.write_str("the end of all sections"),
            RawFrom::Unknown { name, offset } => write!(
                f,
                "\"{name}\" at byte {offset}, whose length is not known: all that follows is passed on unread"
            ),
        }
    }
}

/// Pages of one connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// With their content.
    pub pages: u64,
    /// Of equal bytes.
    pub zeros: u64,
}
