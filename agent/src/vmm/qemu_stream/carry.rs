//! One direction of one connection: read, cut into items, hand to a sink.

use super::cut::Parse;
use super::error::StreamError;
use super::route::{Sink, SinkError};
use std::io::{self, ErrorKind, Read};
use thiserror::Error;

/// Bytes of a connection that are read at once.
pub const READ_BYTES: usize = 256 << 10;

/// Why a direction ended before its time.
#[derive(Debug, Error)]
pub enum CarryError {
    /// It could not be read.
    #[error("cannot read")]
    Read(#[source] io::Error),
    /// What was read is no stream, or not all of one.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The sink takes no more.
    #[error(transparent)]
    Sink(#[from] SinkError),
}

/// Carries all of `from` to `sink`, until `from` ends where it may. `first` was
/// read before. `read` hears how many bytes came each time.
pub(super) fn carry<P, S>(
    mut from: impl Read,
    first: &[u8],
    parser: &mut P,
    mut sink: S,
    read: impl Fn(usize),
) -> Result<(), CarryError>
where
    P: Parse,
    S: for<'a> Sink<P::Item<'a>>,
{
    const { assert!(READ_BYTES > P::MAX_RECORD) };
    let mut buffer = vec![0; READ_BYTES];
    buffer[..first.len()].copy_from_slice(first);
    let (mut start, mut end) = (0, first.len());
    loop {
        while let Some((item, used)) = parser.next(&buffer[start..end])? {
            start += used;
            sink.take(item)?;
        }
        sink.flush()?;
        // What is left is shorter than a record.
        buffer.copy_within(start..end, 0);
        end -= start;
        start = 0;
        let n = match from.read(&mut buffer[end..]) {
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            // A peer that is gone and has not read everything: an end like any other.
            Err(e) if e.kind() == ErrorKind::ConnectionReset => 0,
            Err(e) => return Err(CarryError::Read(e)),
        };
        if n == 0 {
            parser.finish(end)?;
            return Ok(sink.end()?);
        }
        end += n;
        read(n);
    }
}
