//! The fixed-size messages of Cloud Hypervisor's migration protocol, all
//! little-endian. Pure.

use super::error::Fault;
use crate::types::PAGE_SIZE;

/// The protocol's version that Drover speaks; [`Command::Start`] carries it.
pub const VERSION: u16 = 0;
/// Length of a request without its payload, and of a response.
pub const HEAD_BYTES: usize = 16;
/// Length of an entry of a memory table.
pub const RANGE_BYTES: usize = 16;

/// What a source asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// A migration begins; the version is in the first two bytes of the header.
    Start = 1,
    /// JSON: the VM's configuration and the layout of its RAM.
    Config = 2,
    /// JSON: vCPUs and devices.
    State = 3,
    /// A table of ranges, then their contents, which `length` does not count.
    Memory = 4,
    /// It is over: let the VM run.
    Complete = 5,
    /// It has failed.
    Abandon = 6,
    /// A slot's number, and beside it the descriptor of its RAM.
    MemoryFd = 7,
    /// It is over: the VM was paused and stays so.
    CompletePaused = 8,
    /// A page wanted of a VM that runs already.
    PageFault = 9,
}

impl Command {
    const ALL: [Command; 9] = [
        Command::Start,
        Command::Config,
        Command::State,
        Command::Memory,
        Command::Complete,
        Command::Abandon,
        Command::MemoryFd,
        Command::CompletePaused,
        Command::PageFault,
    ];

    fn of(number: u16) -> Option<Command> {
        Self::ALL.into_iter().find(|c| *c as u16 == number)
    }
}

/// The head of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What is asked.
    pub command: Command,
    /// Means something with [`Command::Start`] only; passed on as it is.
    pub headers: [u8; 6],
    /// Bytes of payload that follow.
    pub length: u64,
}

impl Request {
    /// A command with so many bytes of payload.
    pub fn new(command: Command, length: u64) -> Request {
        Request {
            command,
            headers: [0; 6],
            length,
        }
    }

    /// The beginning of a migration of this version.
    pub fn start() -> Request {
        let [low, high] = VERSION.to_le_bytes();
        Request {
            headers: [low, high, 0, 0, 0, 0],
            ..Request::new(Command::Start, 0)
        }
    }

    /// The version that a [`Command::Start`] names.
    pub fn version(&self) -> u16 {
        u16::from_le_bytes([self.headers[0], self.headers[1]])
    }

    /// Reads one.
    ///
    /// # Errors
    /// When the command is none of the protocol's.
    pub fn parse(bytes: &[u8; HEAD_BYTES]) -> Result<Request, Fault> {
        let [c0, c1, headers @ .., l0, l1, l2, l3, l4, l5, l6, l7] = *bytes;
        let number = u16::from_le_bytes([c0, c1]);
        Ok(Request {
            command: Command::of(number).ok_or(Fault::Command { number })?,
            headers,
            length: u64::from_le_bytes([l0, l1, l2, l3, l4, l5, l6, l7]),
        })
    }

    /// Writes it.
    pub fn encode(&self) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        bytes[..2].copy_from_slice(&(self.command as u16).to_le_bytes());
        bytes[2..8].copy_from_slice(&self.headers);
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }
}

/// What a destination answers to a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Response {
    /// Done: go on.
    Ok,
    /// Not possible: the source lets its VM run on.
    Error,
}

impl Response {
    /// Reads one.
    ///
    /// # Errors
    /// When it is neither of the two, or has a payload: no version of the
    /// protocol sends one for the commands that Drover forwards.
    pub fn parse(bytes: &[u8; HEAD_BYTES]) -> Result<Response, Fault> {
        let [s0, s1, _, _, _, _, _, _, length @ ..] = *bytes;
        match u64::from_le_bytes(length) {
            0 => {}
            length => return Err(Fault::Payload { length }),
        }
        match u16::from_le_bytes([s0, s1]) {
            1 => Ok(Response::Ok),
            2 => Ok(Response::Error),
            number => Err(Fault::Status { number }),
        }
    }

    /// Writes it.
    pub fn encode(self) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        bytes[0] = match self {
            Response::Ok => 1,
            Response::Error => 2,
        };
        bytes
    }
}

/// A run of guest-physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

impl MemoryRange {
    /// Reads one.
    pub fn parse(bytes: &[u8; RANGE_BYTES]) -> MemoryRange {
        let [g0, g1, g2, g3, g4, g5, g6, g7, length @ ..] = *bytes;
        MemoryRange {
            gpa: u64::from_le_bytes([g0, g1, g2, g3, g4, g5, g6, g7]),
            bytes: u64::from_le_bytes(length),
        }
    }

    /// Writes it.
    pub fn encode(&self) -> [u8; RANGE_BYTES] {
        let mut bytes = [0; RANGE_BYTES];
        bytes[..8].copy_from_slice(&self.gpa.to_le_bytes());
        bytes[8..].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    /// Whether it is whole pages, and at least one.
    pub fn is_pages(&self) -> bool {
        let page = PAGE_SIZE as u64;
        self.bytes > 0 && self.gpa.is_multiple_of(page) && self.bytes.is_multiple_of(page)
    }
}
