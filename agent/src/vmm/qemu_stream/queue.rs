//! The bounded queue between a connection's parser and what writes to the other
//! side: chunks of bytes that go round, so that nothing is allocated under way.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A chunk is handed over when it has this many bytes, or earlier when there is
/// nothing more to read at the moment.
pub const CHUNK_BYTES: usize = 256 << 10;
/// Most bytes of an item: pages and records are shorter, bytes passed on unread
/// come in pieces of this length.
pub const ITEM_BYTES: usize = 64 << 10;
/// Chunks of a queue: one being filled, one being written, one between them.
pub const CHUNKS: usize = 3;
const CAPACITY: usize = CHUNK_BYTES + ITEM_BYTES;

#[derive(Debug)]
struct State {
    full: VecDeque<Vec<u8>>,
    empty: Vec<Vec<u8>>,
    /// Nothing more will come, and all that came was whole.
    ended: bool,
    sender_gone: bool,
    receiver_gone: bool,
}

/// A lock and a condition: whoever waits sleeps at once. Channels that spin and
/// yield first lose the processor for whole time slices where it is contended,
/// and here each hand-over is followed by another.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    /// The state, once `ready` is through with it.
    fn wait(&self, mut ready: impl FnMut(&State) -> bool) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock; the state is whole in any case.
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed
            .wait_while(state, |state| !ready(state))
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.wait(|_| true));
        self.changed.notify_one();
    }
}

/// The end that fills chunks.
#[derive(Debug)]
pub struct ChunkSender {
    filling: Vec<u8>,
    shared: Arc<Shared>,
}

/// The end that empties them.
#[derive(Debug)]
pub struct ChunkReceiver(Arc<Shared>);

/// The other end of the queue is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone;

/// A queue of [`CHUNKS`] chunks, each for less than [`CHUNK_BYTES`] and one more item.
pub fn queue() -> (ChunkSender, ChunkReceiver) {
    let chunk = || Vec::with_capacity(CAPACITY);
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            full: VecDeque::with_capacity(CHUNKS),
            empty: (1..CHUNKS).map(|_| chunk()).collect(),
            ended: false,
            sender_gone: false,
            receiver_gone: false,
        }),
        changed: Condvar::new(),
    });
    let sender = ChunkSender {
        filling: chunk(),
        shared: shared.clone(),
    };
    (sender, ChunkReceiver(shared))
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

    /// Hands over what there is; waits for an empty chunk.
    pub fn flush(&mut self) -> Result<(), Gone> {
        if self.filling.is_empty() {
            return Ok(());
        }
        let ready = |state: &State| state.receiver_gone || !state.empty.is_empty();
        let mut state = self.shared.wait(ready);
        let next = state.empty.pop().filter(|_| !state.receiver_gone);
        let full = std::mem::replace(&mut self.filling, next.ok_or(Gone)?);
        state.full.push_back(full);
        drop(state);
        self.shared.changed.notify_one();
        Ok(())
    }

    /// Hands over the rest, and that it is the end. A sender that is dropped
    /// without it has broken off: nobody may take that for an end.
    pub fn end(mut self) -> Result<(), Gone> {
        self.flush()?;
        self.shared.change(|state| state.ended = true);
        Ok(())
    }
}

impl Drop for ChunkSender {
    fn drop(&mut self) {
        self.shared.change(|state| state.sender_gone = true);
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
        loop {
            let ready = |state: &State| !state.full.is_empty() || state.ended || state.sender_gone;
            let mut state = self.0.wait(ready);
            let Some(mut chunk) = state.full.pop_front() else {
                return Ok(if state.ended {
                    Drained::Whole
                } else {
                    Drained::Broken
                });
            };
            drop(state);
            to.write_all(&chunk)?;
            written(chunk.len());
            chunk.clear();
            self.0.change(|state| state.empty.push(chunk));
        }
    }
}

impl Drop for ChunkReceiver {
    fn drop(&mut self) {
        self.0.change(|state| state.receiver_gone = true);
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
