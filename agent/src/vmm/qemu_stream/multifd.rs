//! Multifd's connections: packets of up to 128 pages of one RAM block.
//!
//! Zero pages and device state stay on the main connection (QEMU 9.1 and newer
//! list zero pages here, without content). Fields that a packet does not use
//! hold whatever was there before, and are passed on as they are.

use super::cut::{Cut, Parse, Stop, cut_one, expected};
use super::error::{Fault, Refusal, StreamError};
use super::item::Tally;
use crate::types::{PAGE_SIZE, Page};
use std::ops::Range;

/// Of the first packet, and of all others.
pub const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;
/// The packet that a connection begins with.
pub const INIT_LEN: usize = 64;
/// Most pages of a packet: QEMU makes packets of 512 KiB.
pub const MAX_PAGES: u32 = 128;
/// A packet without its pages; always with room for all offsets.
pub const PACKET_LEN: usize = BLOCK_AT + BLOCK_LEN + MAX_PAGES as usize * 8;

const ID_AT: usize = 24;
const ZERO_AT: usize = 32;
const BLOCK_AT: usize = 64;
const BLOCK_LEN: usize = 256;

/// This packet ends what its connection has of a section.
pub const FLAG_SYNC: u32 = 1;
const COMPRESSION: u32 = 0x1f << 1;
const DEVICE_STATE: u32 = 1 << 6;

/// A piece of a multifd connection. Written by [`PacketItem::write`] in their
/// order, they make the stream again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PacketItem<'a> {
    /// The connection's beginning: the source's UUID and the channel's number.
    Init(Init<'a>),
    /// A packet begins; its pages follow.
    Packet(Packet<'a>),
    /// The content of a page of the packet.
    Page {
        /// Its place in its RAM block, in bytes.
        offset: u64,
        /// The content.
        content: &'a Page,
    },
}

impl PacketItem<'_> {
    /// Appends the item's bytes to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            PacketItem::Init(init) => out.extend_from_slice(init.0),
            PacketItem::Packet(packet) => out.extend_from_slice(packet.0),
            PacketItem::Page { content, .. } => out.extend_from_slice(*content),
        }
    }
}

/// The packet that a connection begins with, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Init<'a>(&'a [u8; INIT_LEN]);

impl Init<'_> {
    /// The channel's number.
    pub fn id(&self) -> u8 {
        self.0[ID_AT]
    }
}

/// A packet's header, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'a>(&'a [u8; PACKET_LEN]);

impl<'a> Packet<'a> {
    /// Pages with content, which follows.
    pub fn pages(&self) -> u32 {
        word(self.0, 16)
    }

    /// Zero pages, without content (QEMU 9.1 and newer).
    pub fn zeros(&self) -> u32 {
        word(self.0, ZERO_AT)
    }

    /// Whether the connection has no more of this section: [`FLAG_SYNC`].
    pub fn is_sync(&self) -> bool {
        word(self.0, 8) & FLAG_SYNC != 0
    }

    /// The RAM block of its pages; without pages, that of an earlier packet.
    pub fn block(&self) -> &'a [u8] {
        let field = &self.0[BLOCK_AT..][..BLOCK_LEN];
        field.split(|byte| *byte == 0).next().unwrap_or(field)
    }

    /// Places of its pages with content: bytes from the block's beginning.
    pub fn offsets(&self) -> impl ExactSizeIterator<Item = u64> + 'a {
        self.places(0..self.pages())
    }

    /// Places of its zero pages.
    pub fn zero_offsets(&self) -> impl ExactSizeIterator<Item = u64> + 'a {
        self.places(self.pages()..self.pages() + self.zeros())
    }

    /// Within [`MAX_PAGES`], as [`PacketParser`] checked.
    fn places(&self, range: Range<u32>) -> impl ExactSizeIterator<Item = u64> + 'a {
        let bytes = &self.0[BLOCK_AT + BLOCK_LEN..];
        let bytes = &bytes[range.start as usize * 8..range.end as usize * 8];
        let (words, _) = bytes.as_chunks();
        words.iter().map(|word| u64::from_be_bytes(*word))
    }
}

fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Init,
    Packet,
    /// The content of the pages of these indices.
    Pages(u32, u32),
}

/// Parser of a multifd connection. Holds one packet's offsets.
#[derive(Debug)]
pub struct PacketParser {
    state: State,
    offset: u64,
    places: Box<[u64; MAX_PAGES as usize]>,
    tally: Tally,
}

impl Default for PacketParser {
    fn default() -> PacketParser {
        PacketParser {
            state: State::Init,
            offset: 0,
            places: Box::new([0; MAX_PAGES as usize]),
            tally: Tally::default(),
        }
    }
}

impl Parse for PacketParser {
    type Item<'a> = PacketItem<'a>;

    const MAX_RECORD: usize = PAGE_SIZE;

    fn next<'a>(
        &mut self,
        input: &'a [u8],
    ) -> Result<Option<(PacketItem<'a>, usize)>, StreamError> {
        let mut offset = self.offset;
        let item = cut_one(input, &mut offset, |cut| match self.state {
            State::Init => self.init(cut),
            State::Packet => self.packet(cut),
            State::Pages(at, end) => {
                let content = cut.page()?;
                self.pages(at + 1, end);
                self.tally.pages += 1;
                let offset = self.places[at as usize];
                Ok(PacketItem::Page { offset, content })
            }
        });
        self.offset = offset;
        item
    }

    fn finish(&self, left: usize) -> Result<(), StreamError> {
        let expected = match self.state {
            State::Packet if left == 0 => return Ok(()),
            State::Init => "multifd's first packet",
            State::Packet => "the rest of a multifd packet",
            State::Pages(..) => "the pages of a multifd packet",
        };
        Err(StreamError {
            offset: self.offset,
            fault: Fault::Ended { expected },
        })
    }

    fn offset(&self) -> u64 {
        self.offset
    }
}

impl PacketParser {
    /// Pages so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    fn pages(&mut self, at: u32, end: u32) {
        self.state = match at {
            at if at < end => State::Pages(at, end),
            _ => State::Packet,
        };
    }

    fn init<'a>(&mut self, cut: &mut Cut<'a>) -> Result<PacketItem<'a>, Stop> {
        check_head(cut)?;
        cut.take(INIT_LEN - 8)?;
        let init = as_array(cut)?;
        self.state = State::Packet;
        Ok(PacketItem::Init(Init(init)))
    }

    fn packet<'a>(&mut self, cut: &mut Cut<'a>) -> Result<PacketItem<'a>, Stop> {
        check_head(cut)?;
        let flags = cut.u32()?;
        if flags & DEVICE_STATE != 0 {
            return Err(Refusal::MultifdDeviceState.into());
        }
        if flags & COMPRESSION != 0 {
            return Err(Refusal::MultifdCompression.into());
        }
        if flags & !FLAG_SYNC != 0 {
            return Err(expected("flags of a multifd packet", flags).into());
        }
        cut.take(PACKET_LEN - 12)?;
        let packet = Packet(as_array(cut)?);
        let (pages, zeros) = (packet.pages(), packet.zeros());
        let all = pages.saturating_add(zeros);
        if all > MAX_PAGES {
            return Err(Stop::Wrong(Fault::TooMany {
                what: "the number of pages of a multifd packet",
                found: u64::from(all),
                most: u64::from(MAX_PAGES),
            }));
        }
        // Stale in a packet without pages.
        let next_len = word(packet.0, 20);
        if pages > 0 && next_len != pages * PAGE_SIZE as u32 {
            return Err(expected("the length of a multifd packet's pages", next_len).into());
        }
        if all > 0 && packet.block().len() == BLOCK_LEN {
            return Err(expected("the end of the name of a RAM block", 0_u8).into());
        }
        let offsets = packet.offsets().chain(packet.zero_offsets());
        for (offset, place) in offsets.zip(self.places.iter_mut()) {
            if !offset.is_multiple_of(PAGE_SIZE as u64) {
                return Err(expected("the place of a whole page", offset).into());
            }
            *place = offset;
        }
        self.tally.zeros += u64::from(zeros);
        self.pages(0, pages);
        Ok(PacketItem::Packet(packet))
    }
}

fn check_head(cut: &mut Cut<'_>) -> Result<(), Stop> {
    let magic = cut.u32()?;
    if magic != MAGIC {
        return Err(expected("the magic number of a multifd packet", magic).into());
    }
    let version = cut.u32()?;
    if version != VERSION {
        return Err(expected("version 1 of multifd's packets", version).into());
    }
    Ok(())
}

/// The whole record, whose length the caller has just taken.
fn as_array<'a, const N: usize>(cut: &Cut<'a>) -> Result<&'a [u8; N], Stop> {
    cut.record().first_chunk().ok_or(Stop::More)
}
