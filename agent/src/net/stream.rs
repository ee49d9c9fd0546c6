//! A connection between two agents, past its preamble.

use super::preamble::Kind;
use super::socket::Socket;
use super::tls::agent_of;
use rustls::ExtractedSecrets;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

/// A connection between two agents, past its preamble.
#[derive(Debug)]
#[non_exhaustive]
pub enum Stream {
    /// TCP as it is.
    Plain(Socket),
    /// Mutual TLS.
    Tls(Box<TlsStream<Socket>>),
}

/// A lane's connection for a data thread, which does TLS records itself.
pub struct LaneSocket {
    /// The connection, in blocking mode.
    pub tcp: std::net::TcpStream,
    /// The keys of both directions; `None` without TLS.
    pub secrets: Option<ExtractedSecrets>,
}

impl Stream {
    fn socket(&mut self) -> &mut Socket {
        match self {
            Stream::Plain(socket) => socket,
            Stream::Tls(tls) => match &mut **tls {
                TlsStream::Client(tls) => tls.get_mut().0,
                TlsStream::Server(tls) => tls.get_mut().0,
            },
        }
    }

    /// Takes the connection off this runtime, so that another thread can have
    /// it; [`Detached::attach`] puts it on that thread's runtime.
    pub fn detach(mut self) -> io::Result<Detached> {
        self.socket().detach()?;
        Ok(Detached(self))
    }

    /// Takes TCP connection and keys apart, for a lane. Only right after the
    /// preamble of a [`Kind::Lane`].
    pub fn into_lane(self) -> io::Result<LaneSocket> {
        let (socket, secrets) = match self {
            Stream::Plain(socket) => (socket, None),
            Stream::Tls(tls) => {
                let (socket, unread, secrets) = match *tls {
                    TlsStream::Client(tls) => {
                        let (socket, mut session) = tls.into_inner();
                        let unread = session.process_new_packets();
                        (socket, unread, session.dangerous_extract_secrets())
                    }
                    TlsStream::Server(tls) => {
                        let (socket, mut session) = tls.into_inner();
                        let unread = session.process_new_packets();
                        (socket, unread, session.dangerous_extract_secrets())
                    }
                };
                if unread.map_err(io::Error::other)?.plaintext_bytes_to_read() > 0 {
                    return Err(io::Error::other("the peer sent frames before it might"));
                }
                (socket, Some(secrets.map_err(io::Error::other)?))
            }
        };
        Ok(LaneSocket {
            tcp: socket.into_blocking()?,
            secrets,
        })
    }

    /// A connection past its preamble. Lanes go on record by record: whoever
    /// takes over must not miss any byte.
    pub(super) fn ready(mut self, kind: Kind) -> Self {
        if kind != Kind::Lane {
            self.socket().read_whole();
        }
        self
    }

    /// The agent the peer's certificate names; `None` without TLS.
    pub(super) fn peer_agent(&self) -> Option<Result<String, String>> {
        let Stream::Tls(tls) = self else {
            return None;
        };
        let (_, session) = tls.get_ref();
        Some(agent_of(session.peer_certificates()))
    }
}

/// A connection between runtimes.
#[derive(Debug)]
pub struct Detached(Stream);

impl Detached {
    /// Puts the connection on the runtime of this thread.
    pub fn attach(mut self) -> io::Result<Stream> {
        self.0.socket().attach()?;
        Ok(self.0)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Stream::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Stream::Tls(tls) => Pin::new(tls).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Stream::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Stream::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}

/// What every connection between agents needs: no waiting for more data
/// before sending, and an end to connections whose other host is gone.
pub(super) fn tune(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(tcp);
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(5))
        .with_interval(Duration::from_secs(2))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(Duration::from_secs(10)))
}
