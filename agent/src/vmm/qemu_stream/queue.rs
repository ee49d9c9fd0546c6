//! The bounded queue between a connection's parser and what writes to the other
//! side: chunks of bytes that go round, so that nothing is allocated under way.

use crossbeam_channel::{Receiver, Sender, bounded};
use std::io::{self, Write};

/// A chunk is handed over when it has this many bytes, or earlier when there is
/// nothing more to read at the moment.
pub const CHUNK_BYTES: usize = 256 << 10;
/// Most bytes of an item: pages and records are shorter, bytes passed on unread
/// come in pieces of this length.
pub const ITEM_BYTES: usize = 64 << 10;
/// Chunks of a queue: one being filled, one being written, one between them.
pub const CHUNKS: usize = 3;
const CAPACITY: usize = CHUNK_BYTES + ITEM_BYTES;

enum Piece {
    Chunk(Vec<u8>),
    /// Nothing more will come, and all that came was whole.
    End,
}

/// The end that fills chunks.
#[derive(Debug)]
pub struct ChunkSender {
    filling: Vec<u8>,
    full: Sender<Piece>,
    empty: Receiver<Vec<u8>>,
}

/// The end that empties them.
#[derive(Debug)]
pub struct ChunkReceiver {
    full: Receiver<Piece>,
    empty: Sender<Vec<u8>>,
}

/// The other end of the queue is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone;

/// A queue of [`CHUNKS`] chunks, each for less than [`CHUNK_BYTES`] and one more item.
pub fn queue() -> (ChunkSender, ChunkReceiver) {
    let (to_full, full) = bounded(CHUNKS + 1);
    let (to_empty, empty) = bounded(CHUNKS);
    for _ in 1..CHUNKS {
        // There is room for all of them.
        let _ = to_empty.try_send(Vec::with_capacity(CAPACITY));
    }
    let filling = Vec::with_capacity(CAPACITY);
    let sender = ChunkSender {
        filling,
        full: to_full,
        empty,
    };
    let receiver = ChunkReceiver {
        full,
        empty: to_empty,
    };
    (sender, receiver)
}

impl ChunkSender {
    /// The chunk to append the next item to.
    pub fn filling(&mut self) -> &mut Vec<u8> {
        &mut self.filling
    }

    /// Hands the chunk over if it is full; waits for an empty one.
    pub fn full(&mut self) -> Result<(), Gone> {
        if self.filling.len() < CHUNK_BYTES {
            return Ok(());
        }
        self.flush()
    }

    /// Hands over what there is.
    pub fn flush(&mut self) -> Result<(), Gone> {
        if self.filling.is_empty() {
            return Ok(());
        }
        let next = self.empty.recv().map_err(|_| Gone)?;
        let full = std::mem::replace(&mut self.filling, next);
        self.full.send(Piece::Chunk(full)).map_err(|_| Gone)
    }

    /// Hands over the rest, and that it is the end. A sender that is dropped
    /// without it has broken off: nobody may take that for an end.
    pub fn end(mut self) -> Result<(), Gone> {
        self.flush()?;
        self.full.send(Piece::End).map_err(|_| Gone)
    }
}

/// How a [`ChunkReceiver`] came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// All was written.
    Whole,
    /// The sender broke off.
    Broken,
}

impl ChunkReceiver {
    /// Writes chunks to `to` as they come; `written` hears of each.
    pub fn drain(self, mut to: impl Write, written: impl Fn(usize)) -> io::Result<Drained> {
        while let Ok(piece) = self.full.recv() {
            let Piece::Chunk(mut chunk) = piece else {
                return Ok(Drained::Whole);
            };
            to.write_all(&chunk)?;
            written(chunk.len());
            chunk.clear();
            // Nobody waits for it when the sender is gone.
            let _ = self.empty.send(chunk);
        }
        Ok(Drained::Broken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_slow_writer_holds_the_filler_and_memory_stays() {
        let (mut sender, receiver) = queue();
        let filled = std::thread::spawn(move || {
            for byte in 0..20_u8 {
                sender.filling().resize(CHUNK_BYTES + 99, byte);
                assert!(sender.filling().capacity() == CAPACITY);
                sender.full().unwrap();
            }
            sender.end().unwrap();
        });
        // Filling cannot run ahead of a writer that does not write.
        std::thread::sleep(Duration::from_millis(50));
        assert!(!filled.is_finished());
        let mut all = Vec::new();
        assert_eq!(receiver.drain(&mut all, |_| ()).unwrap(), Drained::Whole);
        filled.join().unwrap();
        let runs: Vec<&[u8]> = all.chunks(CHUNK_BYTES + 99).collect();
        assert_eq!(runs.len(), 20);
        for (i, run) in runs.iter().enumerate() {
            assert!(run.iter().all(|byte| usize::from(*byte) == i));
        }
    }

    #[test]
    fn breaking_off_is_no_end() {
        let (mut sender, receiver) = queue();
        sender.filling().push(1);
        sender.flush().unwrap();
        sender.filling().push(2);
        drop(sender);
        let mut all = Vec::new();
        assert_eq!(receiver.drain(&mut all, |_| ()).unwrap(), Drained::Broken);
        assert_eq!(all, [1]);
        let (mut sender, receiver) = queue();
        drop(receiver);
        sender.filling().push(1);
        assert_eq!(sender.flush(), Err(Gone));
    }
}
