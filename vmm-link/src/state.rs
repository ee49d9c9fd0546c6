//! A VM's state on the connection, in chunks.

use crate::connection::{Connection, ConnectionError};
use crate::wire::{Answer, MAX_CHUNK, MAX_STATE, Request, WireError};
use std::io::{self, Read, Write};

/// Sends what is written, chunk by chunk.
pub(crate) struct StateWriter<'a> {
    agent: &'a mut Connection,
    chunk: Vec<u8>,
    total: u64,
    broken: Option<io::Error>,
}

impl StateWriter<'_> {
    pub(crate) fn new(agent: &mut Connection) -> StateWriter<'_> {
        StateWriter {
            agent,
            chunk: Vec::with_capacity(MAX_CHUNK),
            total: 0,
            broken: None,
        }
    }

    /// Sends the rest; how much there was. Fails if the connection did.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        let _kept = self.send_chunk();
        match self.broken {
            Some(error) => Err(error),
            None => Ok(self.total),
        }
    }

    fn send_chunk(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::take(&mut self.chunk);
        let sent = self.agent.send(|out| Answer::Chunk(&chunk).encode(out));
        self.chunk = chunk;
        self.chunk.clear();
        sent.map_err(|error| {
            let kind = error.kind();
            self.broken = Some(error);
            kind.into()
        })
    }
}

impl Write for StateWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(MAX_CHUNK - self.chunk.len());
        if self.total + n as u64 > MAX_STATE {
            return Err(io::Error::other(format!(
                "state of more than {MAX_STATE} bytes"
            )));
        }
        self.chunk.extend_from_slice(&bytes[..n]);
        self.total += n as u64;
        if self.chunk.len() == MAX_CHUNK {
            self.send_chunk()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what the agent sends, chunk by chunk, to the announced end.
pub(crate) struct StateReader<'a> {
    agent: &'a mut Connection,
    chunk: Vec<u8>,
    at: usize,
    total: u64,
    over: bool,
    broken: Option<ConnectionError>,
}

impl StateReader<'_> {
    pub(crate) fn new(agent: &mut Connection) -> StateReader<'_> {
        StateReader {
            agent,
            chunk: Vec::new(),
            at: 0,
            total: 0,
            over: false,
            broken: None,
        }
    }

    /// Reads to the end; how much was left. Fails if the connection did.
    pub(crate) fn finish(mut self) -> Result<u64, ConnectionError> {
        let mut left = 0;
        while self.broken.is_none() {
            left += (self.chunk.len() - self.at) as u64;
            self.at = self.chunk.len();
            if self.over {
                return Ok(left);
            }
            self.next();
        }
        Err(self.broken.expect("the loop ended by it"))
    }

    /// Gets the next chunk, or learns that there is none.
    fn next(&mut self) {
        let mut receive = || -> Result<Option<u64>, ConnectionError> {
            let (kind, body) = self.agent.receive()?;
            match Request::decode(kind, body)? {
                Request::Chunk(bytes) => {
                    self.chunk.clear();
                    self.chunk.extend_from_slice(bytes);
                    Ok(None)
                }
                Request::ChunksEnd(total) => Ok(Some(total)),
                _ => Err(WireError::Kind(kind).into()),
            }
        };
        match receive() {
            Ok(None) => {
                self.at = 0;
                self.total += self.chunk.len() as u64;
                if self.total > MAX_STATE {
                    self.fail(self.total);
                }
            }
            Ok(Some(total)) if total == self.total => self.over = true,
            Ok(Some(total)) => self.fail(total),
            Err(error) => self.broken = Some(error),
        }
    }

    fn fail(&mut self, value: u64) {
        let what = "length of the state";
        self.broken = Some(WireError::Value { what, value }.into());
    }
}

impl Read for StateReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at == self.chunk.len() && !self.over && self.broken.is_none() {
            self.next();
        }
        if let Some(error) = &self.broken {
            return Err(io::Error::other(error.to_string()));
        }
        let n = into.len().min(self.chunk.len() - self.at);
        into[..n].copy_from_slice(&self.chunk[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}
