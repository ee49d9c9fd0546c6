//! The return path: what the target answers on the main connection.

use super::cut::{Cut, Parse, Stop, cut_one, expected};
use super::error::{Fault, Refusal, StreamError};

const SHUT: u16 = 1;
const PONG: u16 = 2;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;

/// A piece of the return path; [`Reply::bytes`] in their order make it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply<'a> {
    /// The target has it all (0), or has failed. The last message.
    Shut(u32, &'a [u8]),
    /// Answer to a PING of this number.
    Pong(u32, &'a [u8]),
    /// Of any other message.
    Bytes(&'a [u8]),
}

impl<'a> Reply<'a> {
    /// As they came.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            Reply::Shut(_, bytes) | Reply::Pong(_, bytes) | Reply::Bytes(bytes) => bytes,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Message,
    /// Data of a message nobody here knows.
    Data(u16),
    /// After SHUT.
    Over(u32),
}

/// Parser of the return path.
#[derive(Debug, Default)]
pub struct ReplyParser {
    state: State,
    offset: u64,
}

impl Parse for ReplyParser {
    type Item<'a> = Reply<'a>;

    const MAX_RECORD: usize = 8;

    fn next<'a>(&mut self, input: &'a [u8]) -> Result<Option<(Reply<'a>, usize)>, StreamError> {
        let mut offset = self.offset;
        let item = cut_one(input, &mut offset, |cut| match self.state {
            State::Message => self.message(cut),
            State::Data(left) => {
                let data = cut.some(usize::from(left))?;
                self.data(left - data.len() as u16);
                Ok(Reply::Bytes(data))
            }
            State::Over(_) => Err(expected("nothing after SHUT", cut.u8()?).into()),
        });
        self.offset = offset;
        item
    }

    fn finish(&self, left: usize) -> Result<(), StreamError> {
        let expected = match self.state {
            State::Over(_) if left == 0 => return Ok(()),
            _ => "SHUT, by which the target says that it has all",
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

impl ReplyParser {
    /// What SHUT said, once it came: 0 is success.
    pub fn shut(&self) -> Option<u32> {
        match self.state {
            State::Over(value) => Some(value),
            _ => None,
        }
    }

    fn data(&mut self, left: u16) {
        self.state = match left {
            0 => State::Message,
            left => State::Data(left),
        };
    }

    fn message<'a>(&mut self, cut: &mut Cut<'a>) -> Result<Reply<'a>, Stop> {
        let (kind, len) = (cut.u16()?, cut.u16()?);
        match kind {
            SHUT | PONG if len != 4 => {
                Err(expected("4 bytes of a return path message", len).into())
            }
            SHUT => {
                let value = cut.u32()?;
                self.state = State::Over(value);
                Ok(Reply::Shut(value, cut.record()))
            }
            PONG => Ok(Reply::Pong(cut.u32()?, cut.record())),
            0 => Err(expected("the type of a return path message", kind).into()),
            // REQ_PAGES_ID, REQ_PAGES, and of postcopy's recovery.
            3..=RECV_BITMAP | RESUME_ACK => Err(Refusal::Postcopy.into()),
            // SWITCHOVER_ACK, and newer ones: their length is in the stream.
            _ => {
                self.data(len);
                Ok(Reply::Bytes(cut.record()))
            }
        }
    }
}
