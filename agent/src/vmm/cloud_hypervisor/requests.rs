//! What a source sends, command by command. Pure: bytes in, events out.
//!
//! ```text
//! Start ─▶ MemoryFd* ─▶ Config ─▶ Memory* ─▶ State ─▶ Complete | CompletePaused
//!              each answered before the next is sent; Abandon at any time
//! ```
//! What a length says is never allocated: the configuration is waited for in
//! the caller's buffer, up to [`MAX_CONFIG`]; of a memory table at most
//! [`MAX_RANGES`] entries are kept; contents and state go on in pieces.

use super::error::Fault;
use super::layout::Layout;
use super::wire::{Command, HEAD_BYTES, MemoryRange, RANGE_BYTES, Request, VERSION};
use crate::types::{Gfn, PAGE_SIZE};
use std::collections::{BTreeSet, VecDeque};

/// Longest configuration taken, in bytes.
pub const MAX_CONFIG: u64 = 16 << 20;
/// Longest state taken, in bytes.
pub const MAX_STATE: u64 = 1 << 30;
/// Most ranges of one memory table: every other page of 16 GiB; 32 MiB.
pub const MAX_RANGES: u64 = 1 << 21;

/// What has come. Slices are of the input.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A migration of [`VERSION`] begins.
    Start,
    /// Beside these bytes comes the descriptor of this slot's RAM.
    MemoryFd {
        /// The slot.
        slot: u32,
    },
    /// The configuration, JSON.
    Config(&'a [u8]),
    /// A round of so many pages begins.
    Table {
        /// Pages, those that come twice counted twice.
        pages: u64,
    },
    /// Contents of pages that follow each other.
    Pages {
        /// The first.
        start: Gfn,
        /// Whole pages.
        data: &'a [u8],
    },
    /// The round is complete.
    TableEnd,
    /// A piece of the state; the guest stands still.
    State(&'a [u8]),
    /// The state is complete.
    StateEnd,
    /// The source has given the VM away.
    Complete {
        /// Whether the VM was paused and is to stay so.
        paused: bool,
    },
    /// The source has given up.
    Abandon,
}

impl Event<'_> {
    /// Whether the source waits for a response now.
    pub fn is_answered(&self) -> bool {
        !matches!(
            self,
            Event::Table { .. } | Event::Pages { .. } | Event::State(_)
        )
    }
}

/// What one call has read.
#[derive(Debug, PartialEq, Eq)]
pub struct Step<'a> {
    /// Bytes of the input that are done with.
    pub used: usize,
    /// What they told.
    pub event: Option<Event<'a>>,
}

impl<'a> Step<'a> {
    const MORE: Step<'static> = Step {
        used: 0,
        event: None,
    };

    fn of(used: usize, event: Option<Event<'a>>) -> Step<'a> {
        Step { used, event }
    }

    /// Whether nothing can be read without more input.
    pub fn needs_more(&self) -> bool {
        self.used == 0 && self.event.is_none()
    }
}

/// How far the migration has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Nothing,
    Started,
    Configured,
    HasState,
    Over,
}

/// What of a command is still to come.
#[derive(Debug)]
enum Within {
    /// A head.
    Head,
    /// All of the configuration.
    Config(u64),
    /// A slot's number.
    Slot,
    /// So many entries of a table.
    Table(u64),
    /// Contents of the ranges.
    Contents,
    /// So many bytes of state.
    State(u64),
}

/// See the module.
#[derive(Debug)]
pub struct RequestParser {
    stage: Stage,
    within: Within,
    slots: BTreeSet<u32>,
    layout: Layout,
    ranges: VecDeque<MemoryRange>,
}

impl Default for RequestParser {
    fn default() -> RequestParser {
        RequestParser {
            stage: Stage::Nothing,
            within: Within::Head,
            slots: BTreeSet::new(),
            layout: Layout::default(),
            ranges: VecDeque::new(),
        }
    }
}

impl RequestParser {
    /// The VM's RAM; empty until the configuration has come.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether a command's head comes next.
    pub fn is_between(&self) -> bool {
        matches!(self.within, Within::Head)
    }

    /// Whether a stream may end here: before anything has begun, or when all
    /// is over.
    pub fn may_end(&self) -> bool {
        matches!(self.stage, Stage::Nothing | Stage::Over) && matches!(self.within, Within::Head)
    }

    /// Reads one thing. To be called again with what it leaves of the input,
    /// until it neither uses any nor tells anything: then more input is needed.
    ///
    /// # Errors
    /// When the source says what it may not. Nothing can be read afterwards.
    pub fn step<'a>(&mut self, input: &'a [u8]) -> Result<Step<'a>, Fault> {
        match self.within {
            Within::Head => match input.first_chunk::<HEAD_BYTES>() {
                Some(head) => {
                    let event = self.head(Request::parse(head)?)?;
                    Ok(Step::of(HEAD_BYTES, event))
                }
                None => Ok(Step::MORE),
            },
            Within::Config(length) => {
                let length = length as usize;
                let Some(json) = input.get(..length) else {
                    return Ok(Step::MORE);
                };
                self.layout = Layout::of_config(json)?;
                self.stage = Stage::Configured;
                Ok(self.done(length, Event::Config(json)))
            }
            Within::Slot => {
                let Some(number) = input.first_chunk() else {
                    return Ok(Step::MORE);
                };
                let slot = u32::from_le_bytes(*number);
                if !self.slots.insert(slot) {
                    return Err(Fault::SlotTwice { slot });
                }
                Ok(self.done(number.len(), Event::MemoryFd { slot }))
            }
            Within::Table(entries) => self.table(entries, input),
            Within::Contents => self.contents(input),
            Within::State(0) => {
                self.stage = Stage::HasState;
                Ok(self.done(0, Event::StateEnd))
            }
            Within::State(left) => {
                let n = input.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                if n == 0 {
                    return Ok(Step::MORE);
                }
                self.within = Within::State(left - n as u64);
                Ok(Step::of(n, Some(Event::State(&input[..n]))))
            }
        }
    }

    /// A command is through.
    fn done<'a>(&mut self, used: usize, event: Event<'a>) -> Step<'a> {
        self.within = Within::Head;
        Step::of(used, Some(event))
    }

    fn head(&mut self, request: Request) -> Result<Option<Event<'static>>, Fault> {
        let Request {
            command, length, ..
        } = request;
        let refuse = |when| Err(Fault::Order { command, when });
        let stage = self.stage;
        match (command, stage) {
            (Command::PageFault, _) => return Err(Fault::Postcopy),
            (Command::Start, Stage::Nothing) => {}
            (Command::Start, _) => return refuse("came twice"),
            (_, Stage::Nothing) => return refuse("came before the migration had begun"),
            (_, Stage::Over) => return refuse("came after the migration was over"),
            (Command::Config | Command::MemoryFd, Stage::Started) | (Command::Abandon, _) => {}
            (Command::Config | Command::MemoryFd, _) => return refuse("came too late"),
            (Command::Memory | Command::State, Stage::Configured) => {}
            (Command::Complete | Command::CompletePaused, Stage::HasState) => {}
            (Command::Memory | Command::State, Stage::HasState) => {
                return refuse("came after the VM's state");
            }
            _ => return refuse("came too early"),
        }
        match command {
            Command::Start => {
                none("the beginning", length)?;
                match request.version() {
                    VERSION => self.stage = Stage::Started,
                    found => return Err(Fault::Version { found }),
                }
                Ok(Some(Event::Start))
            }
            Command::Config => {
                self.within = Within::Config(capped("a configuration", length, MAX_CONFIG)?);
                Ok(None)
            }
            Command::MemoryFd => {
                if length != size_of::<u32>() as u64 {
                    return Err(Fault::Length {
                        what: "a RAM slot",
                        found: length,
                        wanted: "4",
                    });
                }
                self.within = Within::Slot;
                Ok(None)
            }
            Command::Memory => {
                let most = MAX_RANGES * RANGE_BYTES as u64;
                let length = capped("a memory table", length, most)?;
                if length % RANGE_BYTES as u64 != 0 {
                    return Err(Fault::Length {
                        what: "a memory table",
                        found: length,
                        wanted: "a multiple of 16",
                    });
                }
                self.within = Within::Table(length / RANGE_BYTES as u64);
                Ok(None)
            }
            Command::State => {
                self.within = Within::State(capped("a state", length, MAX_STATE)?);
                Ok(None)
            }
            Command::Complete | Command::CompletePaused => {
                none("the end", length)?;
                self.stage = Stage::Over;
                let paused = command == Command::CompletePaused;
                Ok(Some(Event::Complete { paused }))
            }
            Command::Abandon => {
                none("giving up", length)?;
                self.stage = Stage::Over;
                Ok(Some(Event::Abandon))
            }
            Command::PageFault => Err(Fault::Postcopy),
        }
    }

    fn table<'a>(&mut self, entries: u64, input: &'a [u8]) -> Result<Step<'a>, Fault> {
        let (whole, _) = input.as_chunks::<RANGE_BYTES>();
        let n = (whole.len() as u64).min(entries) as usize;
        for range in whole[..n].iter().map(MemoryRange::parse) {
            self.layout.gfn(range)?;
            self.ranges.push_back(range);
        }
        let used = n * RANGE_BYTES;
        match entries - n as u64 {
            0 => {
                self.within = Within::Contents;
                // Ranges may come twice: the sum has no bound of its own.
                let pages = self.ranges.iter().map(|r| r.bytes / PAGE_SIZE as u64);
                let pages = pages.fold(0, u64::saturating_add);
                Ok(Step::of(used, Some(Event::Table { pages })))
            }
            left => {
                self.within = Within::Table(left);
                Ok(Step::of(used, None))
            }
        }
    }

    fn contents<'a>(&mut self, input: &'a [u8]) -> Result<Step<'a>, Fault> {
        let Some(range) = self.ranges.front_mut() else {
            // A table of the next round may be short.
            self.ranges.shrink_to(0);
            return Ok(self.done(0, Event::TableEnd));
        };
        let have = input.len() - input.len() % PAGE_SIZE;
        let n = have.min(usize::try_from(range.bytes).unwrap_or(usize::MAX));
        if n == 0 {
            return Ok(Step::MORE);
        }
        let start = self.layout.gfn(*range)?;
        range.gpa += n as u64;
        range.bytes -= n as u64;
        if range.bytes == 0 {
            self.ranges.pop_front();
        }
        let data = &input[..n];
        Ok(Step::of(n, Some(Event::Pages { start, data })))
    }
}

fn capped(what: &'static str, found: u64, most: u64) -> Result<u64, Fault> {
    match found <= most {
        true => Ok(found),
        false => Err(Fault::TooLong { what, found, most }),
    }
}

fn none(what: &'static str, found: u64) -> Result<(), Fault> {
    match found {
        0 => Ok(()),
        _ => Err(Fault::Length {
            what,
            found,
            wanted: "none",
        }),
    }
}
