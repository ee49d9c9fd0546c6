//! Device state on its way between two agents: out of one VMM and into the
//! other, in the frames of [`drover_vmm::wire`].
//!
//! ```text
//! source agent                    target agent
//! SaveState → its VMM
//! Chunk … Chunk, ChunksEnd  ────▶ LoadState → its VMM
//!                           ◀──── Done, or Refused
//! ```
//! Only a target whose VMM has all of it says `Done`.

use super::client::LinkClient;
use super::error::{KvmLogVmError, LinkClientError};
use crate::types::chain;
use drover_vmm::wire::{Answer, MAX_CHUNK, MAX_STATE, MAX_TEXT, Refusal, Request};
use drover_vmm::{Connection, ConnectionError};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Sends the state of a paused VM to the target agent that `stream` leads to,
/// and waits until its VMM has it. Blocks.
pub(super) fn send(
    link: &LinkClient,
    stream: UnixStream,
    limit: Duration,
) -> Result<u64, KvmLogVmError> {
    let failed = |source: ConnectionError| not_through(link, &source);
    let mut target = Connection::new(stream).map_err(failed)?;
    target.set_limit(limit).map_err(|e| failed(e.into()))?;
    let total = link.save_state(&mut Frames(&mut target))?;
    let sent = target.send(|out| Request::ChunksEnd(total).encode(out));
    sent.map_err(|e| failed(e.into()))?;
    let (kind, body) = target.receive().map_err(failed)?;
    match Answer::decode(kind, body).map_err(|e| failed(e.into()))? {
        Answer::Done => Ok(total),
        Answer::Refused { text, .. } => Err(KvmLogVmError::State {
            vm: link.vm().to_owned(),
            why: format!("at the target: {text}"),
        }),
        _ => Err(KvmLogVmError::State {
            vm: link.vm().to_owned(),
            why: "the target answers with something else: are all agents of one version?".into(),
        }),
    }
}

/// Takes the state that comes on `stream` into a waiting VMM, and says what came
/// of it there. The first of it may be as long in coming as it likes. Blocks.
pub(super) fn take(
    link: &LinkClient,
    stream: UnixStream,
    limit: Duration,
) -> Result<u64, KvmLogVmError> {
    let failed = |source: ConnectionError| not_through(link, &source);
    let mut source = Connection::new(stream).map_err(failed)?;
    source.set_limit(limit).map_err(|e| failed(e.into()))?;
    let mut state = Unframed::new(&mut source, limit);
    // Not before there is any of it: nobody else could ask the VMM meanwhile.
    let begun = state.next();
    let loaded = match begun {
        Ok(()) => link.load_state(&mut state),
        Err(source) => Err(LinkClientError::State {
            vm: link.vm().to_owned(),
            source,
        }),
    };
    let answer = match &loaded {
        Ok(_) => Answer::Done,
        Err(error) => {
            let mut text = chain(error);
            text.truncate(text.floor_char_boundary(MAX_TEXT));
            let why = Refusal::Vmm;
            Answer::Refused { why, text }
        }
    };
    let told = source.send(|out| answer.encode(out));
    let total = loaded?;
    // A source that has not heard it does not commit.
    told.map_err(|e| failed(e.into()))?;
    Ok(total)
}

fn not_through(link: &LinkClient, source: &ConnectionError) -> KvmLogVmError {
    KvmLogVmError::State {
        vm: link.vm().to_owned(),
        why: chain(source),
    }
}

/// Makes a frame of each write.
struct Frames<'a>(&'a mut Connection);

impl Write for Frames<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = &bytes[..bytes.len().min(MAX_CHUNK)];
        self.0.send(|out| Request::Chunk(bytes).encode(out))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what is in the frames, to the announced end.
struct Unframed<'a> {
    source: &'a mut Connection,
    limit: Duration,
    chunk: Vec<u8>,
    at: usize,
    total: u64,
    over: bool,
}

impl Unframed<'_> {
    fn new(source: &mut Connection, limit: Duration) -> Unframed<'_> {
        Unframed {
            source,
            limit,
            chunk: Vec::new(),
            at: 0,
            total: 0,
            over: false,
        }
    }

    /// Gets the next frame.
    fn next(&mut self) -> io::Result<()> {
        let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let received = match self.total {
            0 => self.source.receive_some_day(self.limit),
            _ => self.source.receive(),
        };
        let (kind, body) = received.map_err(|e| match e {
            ConnectionError::Io(error) => error,
            other => wrong(chain(&other)),
        })?;
        match Request::decode(kind, body).map_err(|e| wrong(e.to_string()))? {
            Request::Chunk(bytes) => {
                self.chunk.clear();
                self.chunk.extend_from_slice(bytes);
                self.at = 0;
                self.total += bytes.len() as u64;
                match self.total {
                    0..=MAX_STATE => Ok(()),
                    total => Err(wrong(format!("{total} bytes of state, and no end"))),
                }
            }
            Request::ChunksEnd(total) if total == self.total => {
                self.over = true;
                Ok(())
            }
            Request::ChunksEnd(total) => Err(wrong(format!("{} of {total} bytes", self.total))),
            _ => Err(wrong(format!("a message of kind {kind:#06x} in it"))),
        }
    }
}

impl Read for Unframed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.at == self.chunk.len() && !self.over {
            self.next()?;
        }
        let n = into.len().min(self.chunk.len() - self.at);
        into[..n].copy_from_slice(&self.chunk[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}
