//! From frame to socket: as it is, or sealed into TLS records.

use super::pool::{BUF_LEN, BufferPool};
use super::record::{Content, MAX_PLAIN, OVERHEAD, RecordError, RecordKey, plain_room, sealed_len};
use super::ring::SendMem;
use std::io;
use std::sync::Arc;

/// Buffers for sealed chunks: one being sent, the others until the network
/// card has let go of them.
pub(super) const SEALED_BUFS: usize = 4;
/// The alert that ends a connection in order: a warning, close_notify.
const CLOSE_NOTIFY: [u8; 2] = [1, 0];

/// Seals one direction of a connection.
pub(super) struct Sealer {
    key: RecordKey,
}

impl Sealer {
    pub(super) fn new(key: RecordKey) -> Sealer {
        Sealer { key }
    }

    /// Records sealed so far.
    pub(super) fn records(&self) -> u64 {
        self.key.sequence()
    }

    /// Seals `plain` into the start of `out`; returns how many bytes of it are
    /// records now.
    pub(super) fn seal(&mut self, plain: &[u8], out: &mut [u8]) -> Result<usize, RecordError> {
        self.seal_as(Content::Data, plain, out)
    }

    fn seal_as(
        &mut self,
        content: Content,
        plain: &[u8],
        out: &mut [u8],
    ) -> Result<usize, RecordError> {
        let mut at = 0;
        for piece in plain.chunks(MAX_PLAIN) {
            let end = at + piece.len() + OVERHEAD;
            let record = out.get_mut(at..end).ok_or(RecordError::Room)?;
            self.key.seal(content as u8, piece, record)?;
            at = end;
        }
        Ok(at)
    }

    /// A few bytes as records of their own.
    pub(super) fn small(&mut self, plain: &[u8]) -> Result<Vec<u8>, RecordError> {
        let mut out = vec![0; sealed_len(plain.len())];
        self.seal(plain, &mut out)?;
        Ok(out)
    }

    /// The record after which nothing comes.
    fn end(&mut self) -> Result<Vec<u8>, RecordError> {
        let mut out = vec![0; sealed_len(CLOSE_NOTIFY.len())];
        self.seal_as(Content::Alert, &CLOSE_NOTIFY, &mut out)?;
        Ok(out)
    }
}

/// What a connection does to the bytes it sends.
pub(super) enum Outflow {
    /// Nothing: sockets get frames where they lie.
    Plain,
    /// Seals them into registered buffers of its own.
    Sealed { sealer: Sealer, bufs: BufferPool },
}

impl Outflow {
    pub(super) fn new(key: Option<RecordKey>) -> io::Result<Outflow> {
        Ok(match key {
            None => Outflow::Plain,
            Some(key) => Outflow::Sealed {
                sealer: Sealer::new(key),
                bufs: BufferPool::new(SEALED_BUFS)?,
            },
        })
    }

    /// Bytes the socket gets for `plain` bytes of a frame.
    pub(super) fn wire_len(&self, plain: usize) -> usize {
        match self {
            Outflow::Plain => plain,
            Outflow::Sealed { .. } => sealed_len(plain),
        }
    }

    /// The longest piece of a frame that can be sent at a time now; 0 if no
    /// buffer is free.
    pub(super) fn room(&self) -> usize {
        match self {
            Outflow::Plain => usize::MAX,
            Outflow::Sealed { bufs, .. } if bufs.available() == 0 => 0,
            Outflow::Sealed { .. } => plain_room(BUF_LEN),
        }
    }

    /// Records sealed so far with the connection's key.
    pub(super) fn records(&self) -> u64 {
        match self {
            Outflow::Plain => 0,
            Outflow::Sealed { sealer, .. } => sealer.records(),
        }
    }

    /// `mem[from..to]` of a frame as the socket gets it: memory and range. At
    /// most [`room`](Self::room) bytes.
    pub(super) fn chunk(
        &mut self,
        mem: &Arc<SendMem>,
        from: usize,
        to: usize,
    ) -> Result<(Arc<SendMem>, usize, usize), RecordError> {
        match self {
            Outflow::Plain => Ok((Arc::clone(mem), from, to)),
            Outflow::Sealed { sealer, bufs } => {
                let mut buf = bufs.try_take().ok_or(RecordError::Room)?;
                let len = sealer.seal(&mem.bytes()[from..to], buf.bytes_mut())?;
                Ok((Arc::new(SendMem::Pool(buf)), 0, len))
            }
        }
    }

    /// A small frame as the socket gets it.
    pub(super) fn small(&mut self, frame: Vec<u8>) -> Result<Vec<u8>, RecordError> {
        match self {
            Outflow::Plain => Ok(frame),
            Outflow::Sealed { sealer, .. } => sealer.small(&frame),
        }
    }

    /// The last frame, with whatever ends the connection behind it.
    pub(super) fn last(&mut self, frame: Vec<u8>) -> Result<Vec<u8>, RecordError> {
        let mut bytes = self.small(frame)?;
        if let Outflow::Sealed { sealer, .. } = self {
            bytes.extend(sealer.end()?);
        }
        Ok(bytes)
    }
}
