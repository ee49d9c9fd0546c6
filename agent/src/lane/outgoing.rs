//! A frame on its way out, chunk by chunk.

use super::batch::BatchId;
use super::encode::EncodedFrame;
use super::record::RecordError;
use super::ring::SendMem;
use super::seal::Outflow;
use crate::types::Class;
use std::sync::Arc;
use std::time::Instant;

/// A frame on its way out.
pub(super) struct Outgoing {
    pub(super) batch: BatchId,
    pub(super) class: Class,
    /// When its last chunk went out; `None` before the first.
    pub(super) begun: Option<Instant>,
    /// Where the frame lies; given back once all of it is in chunks.
    mem: Option<Arc<SendMem>>,
    /// In chunks up to here,
    pos: usize,
    /// and to be sent up to here.
    to: usize,
    /// What the socket has not taken of the chunk it was given.
    chunk: Option<Chunk>,
}

/// A piece of a frame as the socket gets it.
struct Chunk {
    mem: Arc<SendMem>,
    pos: usize,
    to: usize,
}

impl Outgoing {
    pub(super) fn new(frame: EncodedFrame) -> Outgoing {
        Outgoing {
            batch: frame.head.batch,
            class: frame.head.class,
            begun: None,
            pos: frame.from,
            to: frame.to,
            mem: Some(Arc::new(SendMem::Pool(frame.buf))),
            chunk: None,
        }
    }

    /// Bytes of the frame that are in no chunk yet.
    pub(super) fn left(&self) -> usize {
        self.to - self.pos
    }

    /// Whether all of it was given to the socket.
    pub(super) fn submitted(&self) -> bool {
        self.left() == 0
    }

    /// Makes the next `len` bytes into a chunk.
    pub(super) fn cut(&mut self, len: usize, outflow: &mut Outflow) -> Result<(), RecordError> {
        let Some(mem) = &self.mem else {
            return Ok(());
        };
        let end = (self.pos + len).min(self.to);
        let (mem, pos, to) = outflow.chunk(mem, self.pos, end)?;
        self.chunk = Some(Chunk { mem, pos, to });
        self.pos = end;
        if self.left() == 0 {
            self.mem = None;
        }
        Ok(())
    }

    /// What the socket is to get now, if a chunk was cut: memory and range.
    pub(super) fn chunk(&self) -> Option<(&Arc<SendMem>, usize, usize)> {
        let chunk = self.chunk.as_ref()?;
        Some((&chunk.mem, chunk.pos, chunk.to))
    }

    /// The socket has taken `bytes` of the chunk. Returns whether that was the
    /// last of the frame.
    pub(super) fn taken(&mut self, bytes: usize, now: Instant) -> bool {
        self.begun = Some(now);
        if let Some(chunk) = &mut self.chunk {
            chunk.pos += bytes;
            if chunk.pos >= chunk.to {
                self.chunk = None;
            }
        }
        self.chunk.is_none() && self.left() == 0
    }
}
