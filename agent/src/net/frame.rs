//! Length-prefixed frames over a byte stream, with bounded buffers.
//!
//! A frame is its payload's length (u32, little-endian) and the payload.
//! Reading and writing are split from waiting: [`FrameReader::fill`] and
//! [`FrameWriter::drain`] each do one cancel-safe system call, so a
//! connection's task can wait for both, its timers and its commands in one
//! `select!` and never blocks in the middle of a frame.

use std::io;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const PREFIX: usize = 4;

/// A frame announced by the peer is longer than agreed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a frame of {length} bytes; at most {max} are allowed")]
pub struct TooLong {
    /// Announced or wanted length of the payload, bytes.
    pub length: usize,
    /// The limit.
    pub max: usize,
}

/// Where the first frame of `bytes` ends: its whole length with prefix, or
/// `None` if more bytes are needed to tell.
pub fn frame_len(bytes: &[u8], max: usize) -> Result<Option<usize>, TooLong> {
    let Some(prefix) = bytes.first_chunk::<PREFIX>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*prefix) as usize;
    if length > max {
        return Err(TooLong { length, max });
    }
    Ok(Some(PREFIX + length))
}

/// The reading side.
#[derive(Debug)]
pub struct FrameReader<R> {
    inner: R,
    buffer: Vec<u8>,
    start: usize,
    max: usize,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Frames of at most `max` bytes of payload from `inner`.
    pub fn new(inner: R, max: usize) -> Self {
        FrameReader {
            inner,
            buffer: Vec::new(),
            start: 0,
            max,
        }
    }

    /// Bytes that were read and not taken out as frames yet.
    pub fn unread(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// Waits for some more bytes. Cancel-safe. The end of the stream is an
    /// error: peers never end a connection silently in the middle of things.
    pub async fn fill(&mut self) -> io::Result<()> {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        // Room for a good many small frames, or for the rest of a large one.
        let wanted = match frame_len(&self.buffer, self.max) {
            Ok(Some(whole)) => whole.saturating_sub(self.buffer.len()),
            _ => 0,
        };
        self.buffer.reserve(wanted.max(64 << 10));
        match self.inner.read_buf(&mut self.buffer).await? {
            0 => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the peer closed the connection",
            )),
            _ => Ok(()),
        }
    }

    /// The payload of the next whole frame that was read, if any.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, TooLong> {
        let bytes = &self.buffer[self.start..];
        let Some(whole) = frame_len(bytes, self.max)? else {
            return Ok(None);
        };
        if bytes.len() < whole {
            return Ok(None);
        }
        let payload = self.start + PREFIX..self.start + whole;
        self.start += whole;
        Ok(Some(&self.buffer[payload]))
    }
}

/// The writing side.
#[derive(Debug)]
pub struct FrameWriter<W> {
    inner: W,
    buffer: Vec<u8>,
    start: usize,
    /// What was written may still be in a buffer of `inner`: TLS has one.
    unflushed: bool,
    max: usize,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Frames of at most `max` bytes of payload to `inner`.
    pub fn new(inner: W, max: usize) -> Self {
        FrameWriter {
            inner,
            buffer: Vec::new(),
            start: 0,
            unflushed: false,
            max,
        }
    }

    /// Bytes that wait to be written; not 0 while [`drain`](Self::drain) has
    /// anything to do.
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.start + usize::from(self.unflushed)
    }

    /// Adds a frame whose payload `fill` appends. Nothing is added if it gets
    /// too long.
    pub fn push(&mut self, fill: impl FnOnce(&mut Vec<u8>)) -> Result<(), TooLong> {
        if self.start > 0 && self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        }
        let at = self.buffer.len();
        self.buffer.extend_from_slice(&[0; PREFIX]);
        fill(&mut self.buffer);
        let length = self.buffer.len() - at - PREFIX;
        if length > self.max {
            self.buffer.truncate(at);
            return Err(TooLong {
                length,
                max: self.max,
            });
        }
        self.buffer[at..at + PREFIX].copy_from_slice(&(length as u32).to_le_bytes());
        Ok(())
    }

    /// Writes some of what waits. Cancel-safe. Returns at once if nothing
    /// waits.
    pub async fn drain(&mut self) -> io::Result<()> {
        if self.start < self.buffer.len() {
            match self.inner.write(&self.buffer[self.start..]).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => self.start += n,
            }
            self.unflushed = true;
            if self.start == self.buffer.len() {
                self.buffer.clear();
                self.start = 0;
                // Do not keep the room of one large burst for ever.
                self.buffer.shrink_to(1 << 20);
            } else if self.start > 256 << 10 {
                self.buffer.drain(..self.start);
                self.start = 0;
            }
        }
        // While there is more to write, that pushes on what went before.
        if self.unflushed && self.buffer.is_empty() {
            self.inner.flush().await?;
            self.unflushed = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[tokio::test]
    async fn frames_come_out_as_they_went_in_however_the_stream_is_cut() {
        for chunk in [1, 3, 7, 4096] {
            let (a, b) = tokio::io::duplex(chunk);
            let mut writer = FrameWriter::new(a, 1000);
            let mut reader = FrameReader::new(b, 1000);
            let frames: Vec<Vec<u8>> = (0..50u8).map(|i| vec![i; usize::from(i) * 20]).collect();
            for frame in &frames {
                writer.push(|out| out.extend_from_slice(frame)).unwrap();
            }
            let mut got = Vec::new();
            while got.len() < frames.len() {
                while let Some(frame) = reader.next_frame().unwrap() {
                    got.push(frame.to_vec());
                }
                if got.len() < frames.len() {
                    tokio::select! {
                        done = writer.drain(), if writer.pending() > 0 => done.unwrap(),
                        filled = reader.fill() => filled.unwrap(),
                    }
                }
            }
            assert_eq!(got, frames);
        }
    }

    #[test]
    fn long_frames_are_neither_sent_nor_received() {
        let mut writer = FrameWriter::new(tokio::io::sink(), 10);
        assert!(writer.push(|out| out.extend_from_slice(&[0; 11])).is_err());
        assert_eq!(writer.pending(), 0);
        assert!(frame_len(&[11, 0, 0, 0], 10).is_err());
        assert_eq!(frame_len(&[10, 0, 0, 0], 10), Ok(Some(14)));
    }

    proptest! {
        #[test]
        fn the_length_is_never_beyond_the_limit(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            if let Ok(Some(whole)) = frame_len(&bytes, 1 << 20) {
                prop_assert!(whole <= PREFIX + (1 << 20));
            }
        }
    }
}
