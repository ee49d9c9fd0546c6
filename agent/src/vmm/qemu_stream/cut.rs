//! Cutting records off the front of a buffer.

use super::error::{Fault, Refusal, StreamError};
use crate::types::{PAGE_SIZE, Page};

/// A parser of one connection: records in, items out, that borrow from the
/// input. No I/O, no allocation that the stream decides the size of.
pub trait Parse {
    /// What it finds.
    type Item<'a>;

    /// No record is longer: with this much input [`Parse::next`] always finds
    /// one, or a fault.
    const MAX_RECORD: usize;

    /// The first item of `input` and its length, or `None` if the input does not
    /// have all of it yet. The next call gets what follows it. However the
    /// stream is cut into inputs, joined items are the same; only bytes that
    /// are passed on as they are may come in other pieces.
    fn next<'a>(&mut self, input: &'a [u8])
    -> Result<Option<(Self::Item<'a>, usize)>, StreamError>;

    /// Whether the stream may end here, `left` bytes of input having made no item.
    fn finish(&self, left: usize) -> Result<(), StreamError>;

    /// Bytes that made items so far.
    fn offset(&self) -> u64;
}

/// Why a record could not be cut off.
pub(super) enum Stop {
    /// It is not whole yet.
    More,
    /// It is wrong.
    Wrong(Fault),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Stop {
        Stop::Wrong(fault)
    }
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Stop {
        Stop::Wrong(Fault::Refused(refusal))
    }
}

pub(super) fn expected(expected: &'static str, found: impl Into<u64>) -> Fault {
    let found = found.into();
    Fault::Expected { expected, found }
}

/// A place in the input.
pub(super) struct Cut<'a> {
    input: &'a [u8],
    at: usize,
}

impl<'a> Cut<'a> {
    pub(super) fn new(input: &'a [u8]) -> Cut<'a> {
        Cut { input, at: 0 }
    }

    /// Bytes cut off so far.
    pub(super) fn used(&self) -> usize {
        self.at
    }

    /// All that was cut off.
    pub(super) fn record(&self) -> &'a [u8] {
        &self.input[..self.at]
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], Stop> {
        let taken = self.input[self.at..].get(..len).ok_or(Stop::More)?;
        self.at += len;
        Ok(taken)
    }

    /// At least one byte and at most `most`.
    pub(super) fn some(&mut self, most: usize) -> Result<&'a [u8], Stop> {
        let len = most.min(self.input.len() - self.at);
        if len == 0 {
            return Err(Stop::More);
        }
        self.take(len)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], Stop> {
        let taken = self.input[self.at..].first_chunk().ok_or(Stop::More)?;
        self.at += N;
        Ok(taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Stop> {
        self.array::<1>().map(|[byte]| *byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Stop> {
        self.array().copied().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Stop> {
        self.array().copied().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Stop> {
        self.array().copied().map(u64::from_be_bytes)
    }

    /// A length of one byte, and so many bytes.
    pub(super) fn counted(&mut self) -> Result<&'a [u8], Stop> {
        let len = self.u8()?;
        self.take(usize::from(len))
    }

    pub(super) fn page(&mut self) -> Result<&'a Page, Stop> {
        self.array::<PAGE_SIZE>()
    }
}

/// Cuts one record with `record`, and moves `offset` behind it.
pub(super) fn cut_one<'a, I>(
    input: &'a [u8],
    offset: &mut u64,
    record: impl FnOnce(&mut Cut<'a>) -> Result<I, Stop>,
) -> Result<Option<(I, usize)>, StreamError> {
    let mut cut = Cut::new(input);
    match record(&mut cut) {
        Ok(item) => {
            *offset += cut.used() as u64;
            Ok(Some((item, cut.used())))
        }
        Err(Stop::More) => Ok(None),
        Err(Stop::Wrong(fault)) => Err(StreamError {
            offset: *offset,
            fault,
        }),
    }
}
