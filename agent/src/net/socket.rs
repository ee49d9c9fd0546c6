//! The TCP connection under a [`super::Stream`]: it can change threads, and
//! under TLS it can be read record by record.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Bytes before the body of a TLS record.
const RECORD_HEADER: usize = 5;

/// A TCP connection of this runtime, or between runtimes.
#[derive(Debug)]
pub struct Socket {
    tcp: Tcp,
    /// While there is one, reads stop at the end of each TLS record, so that
    /// nothing is read that TLS has not also decrypted. A lane takes the keys
    /// out of TLS and goes on from there.
    records: Option<Records>,
}

#[derive(Debug)]
enum Tcp {
    Here(TcpStream),
    Between(std::net::TcpStream),
    /// Given away.
    Gone,
}

/// Where in the stream of records a reader is.
#[derive(Debug, Default)]
struct Records {
    header: [u8; RECORD_HEADER],
    have: usize,
    body_left: usize,
}

impl Records {
    /// Bytes up to where the next read must stop.
    fn room(&self) -> usize {
        match self.body_left {
            0 => RECORD_HEADER - self.have,
            left => left,
        }
    }

    /// Takes note of bytes read, at most [`room`](Self::room).
    fn read(&mut self, bytes: &[u8]) {
        if self.body_left > 0 {
            self.body_left = self.body_left.saturating_sub(bytes.len());
            return;
        }
        for &byte in bytes {
            if let Some(place) = self.header.get_mut(self.have) {
                *place = byte;
                self.have += 1;
            }
        }
        if self.have == RECORD_HEADER {
            self.have = 0;
            self.body_left = usize::from(u16::from_be_bytes([self.header[3], self.header[4]]));
        }
    }
}

impl Socket {
    /// A connection that is read as it comes.
    pub(super) fn whole(tcp: TcpStream) -> Socket {
        Socket {
            tcp: Tcp::Here(tcp),
            records: None,
        }
    }

    /// A connection that is read record by record, at its beginning.
    pub(super) fn by_record(tcp: TcpStream) -> Socket {
        Socket {
            tcp: Tcp::Here(tcp),
            records: Some(Records::default()),
        }
    }

    /// Reads as it comes from here on.
    pub(super) fn read_whole(&mut self) {
        self.records = None;
    }

    /// Takes the connection off its runtime.
    pub(super) fn detach(&mut self) -> io::Result<()> {
        self.tcp = match std::mem::replace(&mut self.tcp, Tcp::Gone) {
            Tcp::Here(tcp) => Tcp::Between(tcp.into_std()?),
            other => other,
        };
        Ok(())
    }

    /// Puts it on the runtime of this thread.
    pub(super) fn attach(&mut self) -> io::Result<()> {
        self.tcp = match std::mem::replace(&mut self.tcp, Tcp::Gone) {
            Tcp::Between(tcp) => Tcp::Here(TcpStream::from_std(tcp)?),
            other => other,
        };
        Ok(())
    }

    /// The connection in blocking mode, for a data thread.
    pub(super) fn into_blocking(mut self) -> io::Result<std::net::TcpStream> {
        self.detach()?;
        match self.tcp {
            Tcp::Between(tcp) => tcp.set_nonblocking(false).map(|()| tcp),
            Tcp::Here(_) | Tcp::Gone => Err(gone()),
        }
    }

    fn here(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        match &mut self.tcp {
            Tcp::Here(tcp) => Ok(Pin::new(tcp)),
            Tcp::Between(_) | Tcp::Gone => Err(gone()),
        }
    }
}

fn gone() -> io::Error {
    io::Error::other("the connection is on no runtime")
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Some(room) = this.records.as_ref().map(Records::room) else {
            return this.here()?.poll_read(cx, buf);
        };
        let room = room.min(buf.remaining());
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(room));
        ready!(this.here()?.poll_read(cx, &mut part))?;
        if let Some(records) = &mut this.records {
            records.read(part.filled());
        }
        let read = part.filled().len();
        buf.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().here()?.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().here()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().here()?.poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn reads_end_where_records_end() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let mut socket = Socket::by_record(listener.accept().await.unwrap().0);
        let mut bytes = Vec::new();
        for len in [3u16, 0, 500] {
            bytes.extend_from_slice(&[23, 3, 3]);
            bytes.extend_from_slice(&len.to_be_bytes());
            bytes.extend(vec![7; usize::from(len)]);
        }
        sender.write_all(&bytes).await.unwrap();
        sender.write_all(b"after").await.unwrap();
        let mut read = Vec::new();
        let mut sizes = Vec::new();
        let mut buf = [0; 4096];
        while read.len() < bytes.len() {
            let n = socket.read(&mut buf).await.unwrap();
            sizes.push(n);
            read.extend_from_slice(&buf[..n]);
        }
        assert_eq!(read, bytes);
        let ends: Vec<usize> = sizes
            .iter()
            .scan(0, |at, n| {
                *at += n;
                Some(*at)
            })
            .collect();
        assert!(ends.contains(&8) && ends.contains(&13), "{sizes:?}");
        socket.read_whole();
        assert_eq!(socket.read(&mut buf).await.unwrap(), 5);
    }
}
