//! What is done with items on their way.

use super::error::Fault;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use thiserror::Error;

/// Most bytes of an item: pages and records are shorter, bytes passed on unread
/// come in pieces of this length.
pub const ITEM_BYTES: usize = 64 << 10;

/// Takes the items of one connection, in order.
pub trait Sink<I>: Send {
    /// Takes the next one. May wait for room.
    fn take(&mut self, item: I) -> Result<(), SinkError>;
    /// The bytes of the items taken since the last call, as they came. May
    /// wait for room.
    fn bytes(&mut self, items: &[u8]) -> Result<(), SinkError> {
        let _ = items;
        Ok(())
    }
    /// Nothing more is there to be read at the moment: what was taken must go
    /// on now, or a PING in it is never answered.
    fn flush(&mut self) -> Result<(), SinkError>;
    /// The connection has ended, and where it may. A sink that is dropped
    /// without it has seen a stream break off.
    fn end(self) -> Result<(), SinkError>;
}

/// Why a [`Sink`] takes no more.
#[derive(Debug, Error)]
pub enum SinkError {
    /// Where its output goes has failed, and tells why itself.
    #[error("the other side is gone")]
    Gone,
    /// Where its output goes cannot be written to.
    #[error("cannot write")]
    Write(#[from] io::Error),
    /// What the stream holds is not for this sink.
    #[error(transparent)]
    Refused(Box<dyn std::error::Error + Send + Sync>),
    /// Items that no parser makes.
    #[error("items that make no stream")]
    Items(#[from] Fault),
}

/// Passes on what was parsed, unchanged: the bytes leave from where they were
/// read into. Half a record never leaves.
pub(super) struct Verbatim<'a, W> {
    to: &'a UnixStream,
    written: W,
}

impl<'a, W: Fn(usize)> Verbatim<'a, W> {
    /// To this socket; `written` hears of each write.
    pub(super) fn new(to: &'a UnixStream, written: W) -> Self {
        Verbatim { to, written }
    }
}

impl<I, W: Fn(usize) + Send> Sink<I> for Verbatim<'_, W> {
    fn take(&mut self, _: I) -> Result<(), SinkError> {
        Ok(())
    }

    fn bytes(&mut self, items: &[u8]) -> Result<(), SinkError> {
        self.to.write_all(items)?;
        (self.written)(items.len());
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        Ok(())
    }

    /// The end of one direction only: the other side still answers. It may also
    /// have gone, having it all.
    fn end(self) -> Result<(), SinkError> {
        let _ = self.to.shutdown(Shutdown::Write);
        Ok(())
    }
}
