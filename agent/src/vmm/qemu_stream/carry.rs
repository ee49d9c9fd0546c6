//! One direction of one connection: read, cut into items, hand to a sink.

use super::cut::Parse;
use super::error::StreamError;
use super::sink::{Sink, SinkError};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
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
pub(in crate::vmm) fn carry<P, S>(
    from: &UnixStream,
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
        if start > 0 {
            sink.bytes(&buffer[..start])?;
        }
        // What is left is shorter than a record.
        buffer.copy_within(start..end, 0);
        end -= start;
        start = 0;
        let n = match receive(from, &mut buffer[end..], MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => {
                sink.flush()?;
                receive(from, &mut buffer[end..], MsgFlags::empty())
            }
            at_once => at_once,
        };
        match n.map_err(|errno| CarryError::Read(errno.into()))? {
            0 => {
                parser.finish(end)?;
                return Ok(sink.end()?);
            }
            n => {
                end += n;
                read(n);
            }
        }
    }
}

fn receive(from: &UnixStream, into: &mut [u8], how: MsgFlags) -> Result<usize, Errno> {
    loop {
        match recv(from.as_raw_fd(), into, how) {
            Err(Errno::EINTR) => {}
            // A peer that is gone and has not read everything: an end like any other.
            Err(Errno::ECONNRESET) => return Ok(0),
            received => return received,
        }
    }
}
