//! The main connection's stream, record by record.
//!
//! ```text
//! QEVM 3  [07 configuration [05 subsection]…]  08 OPEN_RETURN_PATH  08 PING
//! 01 ram: MEM_SIZE, blocks, EOS, [7e footer]        setup
//! 02 ram: pages, EOS, [7e footer]        …          while the guest runs
//! 03 ram: pages, EOS, [7e footer]                   the guest stands still
//! 04 device …                                       unread, up to the end
//! ```

use super::blocks::{BlockId, Blocks};
use super::cut::{Cut, Parse, Stop, cut_one, expected};
use super::error::{Fault, Refusal, StreamError, shown};
use super::item::{Item, PageHead, Phase, RawFrom, Tally};
use super::sink::ITEM_BYTES;
use crate::types::PAGE_SIZE;

/// `QEVM`.
pub const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
/// First byte of a footer, which follows a section of RAM.
pub(in crate::vmm) const FOOTER: u8 = kind::FOOTER;
/// Of the section `ram`.
const RAM_VERSION: u32 = 4;
/// Longest name of a machine type.
const MAX_MACHINE: u32 = 255;
/// Most migration capabilities that a stream lists.
const MAX_CAPABILITIES: u32 = 256;
const PAGE_BITS: u32 = PAGE_SIZE.trailing_zeros();

/// Types of sections.
pub(super) mod kind {
    pub(crate) const EOF: u8 = 0x00;
    pub(crate) const START: u8 = 0x01;
    pub(crate) const PART: u8 = 0x02;
    pub(crate) const END: u8 = 0x03;
    pub(crate) const FULL: u8 = 0x04;
    pub(crate) const SUBSECTION: u8 = 0x05;
    pub(crate) const VMDESC: u8 = 0x06;
    pub(crate) const CONFIGURATION: u8 = 0x07;
    pub(crate) const COMMAND: u8 = 0x08;
    pub(crate) const FOOTER: u8 = 0x7e;
}

/// Flags of records of RAM: the low bits of a page's place.
pub(super) mod flag {
    pub(crate) const FULL: u64 = 0x01;
    pub(crate) const ZERO: u64 = 0x02;
    pub(crate) const MEM_SIZE: u64 = 0x04;
    pub(crate) const PAGE: u64 = 0x08;
    pub(crate) const EOS: u64 = 0x10;
    pub(crate) const CONTINUE: u64 = 0x20;
    pub(crate) const XBZRLE: u64 = 0x40;
    pub(crate) const HOOK: u64 = 0x80;
    pub(crate) const COMPRESSED: u64 = 0x100;
    pub(crate) const MULTIFD_FLUSH: u64 = 0x200;
    pub(crate) const ALL: u64 = 0xfff;
}

/// Commands.
mod command {
    pub(crate) const OPEN_RETURN_PATH: u16 = 1;
    pub(crate) const PING: u16 = 2;
    pub(crate) const PACKAGED: u16 = 7;
    pub(crate) const ENABLE_COLO: u16 = 8;
}

/// What may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Magic,
    Section(After),
    /// Names of capabilities.
    Capabilities(u32),
    /// Data of a command nobody here knows.
    CommandData(u16),
    /// Bytes of RAM that the list of blocks has yet to name.
    List(u64),
    Ram(Phase),
    Raw,
}

/// What the next section comes after: not every type may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    Magic,
    Configuration,
    /// A section of RAM: a footer, of machine types since 2.4.
    Ram,
    Other,
}

/// Parser of the main connection. Holds the list of blocks and nothing else.
#[derive(Debug)]
pub struct StreamParser {
    state: State,
    offset: u64,
    blocks: Blocks,
    has_list: bool,
    /// The id of the section of RAM, and whether its last part is through.
    ram: Option<(u32, bool)>,
    /// The block of the last page, across sections.
    current: Option<BlockId>,
    return_path: bool,
    ignores_shared: bool,
    raw: Option<RawFrom>,
    tally: Tally,
}

impl Default for StreamParser {
    fn default() -> StreamParser {
        StreamParser {
            state: State::Magic,
            offset: 0,
            blocks: Blocks::default(),
            has_list: false,
            ram: None,
            current: None,
            return_path: false,
            ignores_shared: false,
            raw: None,
            tally: Tally::default(),
        }
    }
}

impl Parse for StreamParser {
    type Item<'a> = Item<'a>;

    /// A page that names its block.
    const MAX_RECORD: usize = 8 + 1 + 255 + PAGE_SIZE;

    fn next<'a>(&mut self, input: &'a [u8]) -> Result<Option<(Item<'a>, usize)>, StreamError> {
        let mut offset = self.offset;
        let item = cut_one(input, &mut offset, |cut| self.record(cut));
        self.offset = offset;
        item
    }

    fn finish(&self, left: usize) -> Result<(), StreamError> {
        let expected = match self.state {
            State::Raw if left == 0 => return Ok(()),
            State::Raw | State::Section(_) => "a section",
            State::Magic => "the stream's magic number",
            State::Capabilities(_) => "the list of capabilities",
            State::CommandData(_) => "a command's data",
            State::List(_) => "the list of RAM blocks",
            State::Ram(_) => "a record of RAM",
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

impl StreamParser {
    /// The blocks listed so far.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Since where the stream is passed on unread, once it is.
    pub fn raw(&self) -> Option<&RawFrom> {
        self.raw.as_ref()
    }

    /// Pages so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    fn record<'a>(&mut self, cut: &mut Cut<'a>) -> Result<Item<'a>, Stop> {
        match self.state {
            State::Ram(phase) => self.ram_record(cut, phase),
            State::Raw => cut.some(ITEM_BYTES).map(Item::Raw),
            State::Magic => self.magic(cut),
            State::Section(after) => self.section(cut, after),
            State::List(left) => self.list_entry(cut, left),
            State::Capabilities(left) => self.capability(cut, left),
            State::CommandData(left) => {
                let data = cut.some(usize::from(left))?;
                self.command_data(left - data.len() as u16);
                Ok(Item::Bytes(data))
            }
        }
    }

    fn magic<'a>(&mut self, cut: &mut Cut<'a>) -> Result<Item<'a>, Stop> {
        let magic = cut.u32()?;
        if magic != MAGIC {
            return Err(expected("the magic number of a migration stream", magic).into());
        }
        let version = cut.u32()?;
        if version != VERSION {
            return Err(expected("version 3 of the migration stream", version).into());
        }
        self.state = State::Section(After::Magic);
        Ok(Item::Bytes(cut.record()))
    }

    fn section<'a>(&mut self, cut: &mut Cut<'a>, after: After) -> Result<Item<'a>, Stop> {
        let kind = cut.u8()?;
        match (kind, after) {
            (kind::CONFIGURATION, After::Magic) => {
                let len = cut.u32()?;
                if len > MAX_MACHINE {
                    return Err(Stop::Wrong(Fault::TooMany {
                        what: "the length of the machine type's name",
                        found: u64::from(len),
                        most: u64::from(MAX_MACHINE),
                    }));
                }
                cut.take(len as usize)?;
                self.state = State::Section(After::Configuration);
                Ok(Item::Bytes(cut.record()))
            }
            (kind::SUBSECTION, After::Configuration) => self.configuration(cut),
            (kind::FOOTER, After::Ram) => {
                self.check_id(cut)?;
                self.state = State::Section(After::Other);
                Ok(Item::Bytes(cut.record()))
            }
            (kind::COMMAND, _) => self.command(cut),
            (kind::START | kind::FULL, _) => self.start(cut, kind),
            (kind::PART | kind::END, _) => self.part(cut, kind),
            (kind::EOF | kind::VMDESC, _) => Ok(self.raw_from(cut, RawFrom::End)),
            (other, _) => Err(expected("the type of a section", other).into()),
        }
    }

    fn configuration<'a>(&mut self, cut: &mut Cut<'a>) -> Result<Item<'a>, Stop> {
        let name = cut.counted()?;
        let version = cut.u32()?;
        match (name, version) {
            (b"configuration/capabilities", 1) => {
                let count = cut.u32()?;
                if count > MAX_CAPABILITIES {
                    return Err(Stop::Wrong(Fault::TooMany {
                        what: "the number of capabilities",
                        found: u64::from(count),
                        most: u64::from(MAX_CAPABILITIES),
                    }));
                }
                self.capabilities(count);
            }
            (b"configuration/uuid", 1) => {
                cut.take(16)?;
            }
            (b"configuration/target-page-bits", 1) => {
                let bits = cut.u32()?;
                if bits != PAGE_BITS {
                    return Err(Refusal::PageSize { bits }.into());
                }
            }
            _ => {
                let from = self.unknown(name);
                return Ok(self.raw_from(cut, from));
            }
        }
        Ok(Item::Bytes(cut.record()))
    }

    fn capability<'a>(&mut self, cut: &mut Cut<'a>, left: u32) -> Result<Item<'a>, Stop> {
        match cut.counted()? {
            b"x-ignore-shared" => self.ignores_shared = true,
            b"mapped-ram" => return Err(Refusal::MappedRam.into()),
            _ => {}
        }
        self.capabilities(left - 1);
        Ok(Item::Bytes(cut.record()))
    }

    fn capabilities(&mut self, left: u32) {
        self.state = match left {
            0 => State::Section(After::Configuration),
            left => State::Capabilities(left),
        };
    }

    fn command<'a>(&mut self, cut: &mut Cut<'a>) -> Result<Item<'a>, Stop> {
        let (number, len) = (cut.u16()?, cut.u16()?);
        let known = |wanted: u16, what: &'static str| {
            (len == wanted)
                .then_some(())
                .ok_or_else(|| Stop::Wrong(expected(what, len)))
        };
        match number {
            command::OPEN_RETURN_PATH => {
                known(0, "OPEN_RETURN_PATH without data")?;
                self.return_path = true;
                self.command_data(0);
            }
            command::PING => {
                known(4, "PING with 4 bytes of data")?;
                cut.u32()?;
                self.command_data(0);
            }
            command::PACKAGED => return Err(Refusal::Packaged.into()),
            command::ENABLE_COLO => return Err(Refusal::Colo.into()),
            // ADVISE, LISTEN, RUN, RAM_DISCARD; RESUME, RECV_BITMAP.
            3..=6 | 9 | 10 => return Err(Refusal::Postcopy.into()),
            0 => return Err(expected("a command", number).into()),
            // SWITCHOVER_START, and newer ones: their length is in the stream.
            _ => self.command_data(len),
        }
        Ok(Item::Bytes(cut.record()))
    }

    fn command_data(&mut self, left: u16) {
        self.state = match left {
            0 => State::Section(After::Other),
            left => State::CommandData(left),
        };
    }

    fn start<'a>(&mut self, cut: &mut Cut<'a>, kind: u8) -> Result<Item<'a>, Stop> {
        let id = cut.u32()?;
        let name = cut.counted()?;
        let (_instance, version) = (cut.u32()?, cut.u32()?);
        if !self.return_path {
            return Err(Refusal::NoReturnPath.into());
        }
        let known = (name, version) == (b"ram", RAM_VERSION);
        match self.ram {
            None if kind == kind::START && known => {
                self.ram = Some((id, false));
                self.state = State::Ram(Phase::Setup);
                Ok(Item::Section(Phase::Setup, cut.record()))
            }
            Some((_, true)) if kind == kind::FULL => Ok(self.raw_from(cut, RawFrom::DeviceState)),
            _ => {
                let from = self.unknown(name);
                Ok(self.raw_from(cut, from))
            }
        }
    }

    fn part<'a>(&mut self, cut: &mut Cut<'a>, kind: u8) -> Result<Item<'a>, Stop> {
        let id = self.check_id(cut)?;
        if let Some((_, true)) = self.ram {
            return Err(expected("device state, RAM being complete", kind).into());
        }
        let last = kind == kind::END;
        let phase = if last {
            Phase::StopCopy
        } else {
            Phase::Precopy
        };
        self.ram = Some((id, last));
        self.state = State::Ram(phase);
        Ok(Item::Section(phase, cut.record()))
    }

    fn check_id(&self, cut: &mut Cut<'_>) -> Result<u32, Stop> {
        let id = cut.u32()?;
        match self.ram {
            Some((ram, _)) if ram == id => Ok(id),
            _ => Err(expected("the id of the section of RAM", id).into()),
        }
    }

    fn unknown(&self, name: &[u8]) -> RawFrom {
        RawFrom::Unknown {
            name: shown(name),
            offset: self.offset,
        }
    }

    /// Passes the record that was begun, and all that follows, on as it is.
    fn raw_from<'a>(&mut self, cut: &Cut<'a>, from: RawFrom) -> Item<'a> {
        self.raw = Some(from);
        self.state = State::Raw;
        Item::Raw(cut.record())
    }

    fn list_entry<'a>(&mut self, cut: &mut Cut<'a>, left: u64) -> Result<Item<'a>, Stop> {
        let name = cut.counted()?;
        let bytes = cut.u64()?;
        let address = self.ignores_shared.then(|| cut.u64()).transpose()?;
        if bytes > left {
            return Err(Stop::Wrong(Fault::TooMany {
                what: "the length of a RAM block",
                found: bytes,
                most: left,
            }));
        }
        self.blocks.add(name, bytes, address)?;
        self.list(left - bytes);
        Ok(Item::Block {
            name,
            bytes,
            address,
        })
    }

    fn list(&mut self, left: u64) {
        self.state = match left {
            0 => State::Ram(Phase::Setup),
            left => State::List(left),
        };
    }

    fn ram_record<'a>(&mut self, cut: &mut Cut<'a>, phase: Phase) -> Result<Item<'a>, Stop> {
        let word = cut.u64()?;
        let (offset, flags) = (word & !flag::ALL, word & flag::ALL);
        match flags & !flag::CONTINUE {
            flag::PAGE => {
                let head = self.page_head(cut, offset, flags)?;
                let content = cut.page()?;
                self.current = Some(head.block);
                self.tally.pages += 1;
                Ok(Item::Page(head, content))
            }
            flag::ZERO => {
                let head = self.page_head(cut, offset, flags)?;
                let fill = cut.u8()?;
                self.current = Some(head.block);
                self.tally.zeros += 1;
                Ok(Item::Zero(head, fill))
            }
            flag::XBZRLE => Err(Refusal::Xbzrle.into()),
            flag::COMPRESSED => Err(Refusal::Compressed.into()),
            flag::HOOK => Err(Refusal::Rdma.into()),
            flag::MEM_SIZE if word == offset | flag::MEM_SIZE && phase == Phase::Setup => {
                if self.has_list {
                    return Err(expected("one list of RAM blocks", word).into());
                }
                self.has_list = true;
                self.list(offset);
                Ok(Item::Bytes(cut.record()))
            }
            _ if word == flag::EOS => {
                self.state = State::Section(After::Ram);
                Ok(Item::SectionEnd(phase))
            }
            _ if word == flag::MULTIFD_FLUSH => Ok(Item::Bytes(cut.record())),
            flag::FULL => Err(expected("a record of QEMU 2.0 or newer", word).into()),
            _ => Err(expected("a record of RAM", word).into()),
        }
    }

    fn page_head(&self, cut: &mut Cut<'_>, offset: u64, flags: u64) -> Result<PageHead, Stop> {
        let named = flags & flag::CONTINUE == 0;
        let id = if named {
            let name = cut.counted()?;
            let found = self.blocks.find(name);
            found.ok_or_else(|| Fault::UnknownBlock { name: shown(name) })?
        } else {
            self.current.ok_or(Fault::NoBlock)?
        };
        match self.blocks.get(id) {
            Some(block) if offset < block.bytes => Ok(PageHead {
                block: id,
                offset,
                named,
            }),
            Some(block) => Err(Stop::Wrong(Fault::Beyond {
                block: shown(&block.name),
                bytes: block.bytes,
                offset,
            })),
            None => Err(Stop::Wrong(Fault::NoBlock)),
        }
    }
}
