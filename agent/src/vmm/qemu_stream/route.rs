//! What is done with items on their way.

use super::error::Fault;
use super::item::Item;
use super::multifd::PacketItem;
use super::queue::{ChunkSender, Gone};
use super::write::StreamWriter;
use std::io;
use thiserror::Error;

/// Takes the items of one connection, in order.
pub trait Sink<I>: Send {
    /// Takes the next one. May wait for room.
    fn take(&mut self, item: I) -> Result<(), SinkError>;
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

impl From<Gone> for SinkError {
    fn from(_: Gone) -> SinkError {
        SinkError::Gone
    }
}

/// Makes the sinks of one migration. Claims and lanes will be one.
pub trait Route: Send + Sync + 'static {
    /// Sink of the main connection.
    type Main: for<'a> Sink<Item<'a>>;
    /// Sink of a multifd connection.
    type Multifd: for<'a> Sink<PacketItem<'a>>;

    /// For the main connection; `to` is written to the target's QEMU.
    fn main(&self, to: ChunkSender) -> Self::Main;
    /// For a multifd connection.
    fn multifd(&self, to: ChunkSender) -> Self::Multifd;
}

/// Every item is written as it was read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Identity;

/// [`Identity`] on the main connection.
#[derive(Debug)]
pub struct SameStream {
    writer: StreamWriter,
    to: ChunkSender,
}

/// [`Identity`] on a multifd connection.
#[derive(Debug)]
pub struct SamePackets(ChunkSender);

impl Route for Identity {
    type Main = SameStream;
    type Multifd = SamePackets;

    fn main(&self, to: ChunkSender) -> SameStream {
        let writer = StreamWriter::default();
        SameStream { writer, to }
    }

    fn multifd(&self, to: ChunkSender) -> SamePackets {
        SamePackets(to)
    }
}

impl Sink<Item<'_>> for SameStream {
    fn take(&mut self, item: Item<'_>) -> Result<(), SinkError> {
        self.writer.write(item, self.to.filling())?;
        Ok(self.to.full()?)
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        Ok(self.to.flush()?)
    }

    fn end(self) -> Result<(), SinkError> {
        Ok(self.to.end()?)
    }
}

impl Sink<PacketItem<'_>> for SamePackets {
    fn take(&mut self, item: PacketItem<'_>) -> Result<(), SinkError> {
        item.write(self.0.filling());
        Ok(self.0.full()?)
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        Ok(self.0.flush()?)
    }

    fn end(self) -> Result<(), SinkError> {
        Ok(self.0.end()?)
    }
}
