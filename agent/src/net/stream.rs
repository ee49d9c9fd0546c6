//! Opening connections: the one [`connect`] and the one [`accept`] that all
//! traffic between agents goes through, and where a stream gets wrapped.

use super::preamble::{
    ANSWER_FIXED, Answer, HELLO_FIXED, Hello, Kind, PreambleError, VERSION, Verdict,
};
use super::{Member, Roster};
use crate::types::GangId;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};

/// A connection between two agents, past its preamble.
#[derive(Debug)]
#[non_exhaustive]
pub enum Stream {
    /// TCP as it is.
    Plain(TcpStream),
}

impl Stream {
    /// Takes the connection off this runtime, so that another thread can have
    /// it; [`Detached::attach`] puts it on that thread's runtime.
    pub fn detach(self) -> io::Result<Detached> {
        match self {
            Stream::Plain(tcp) => tcp.into_std().map(Detached),
        }
    }

    /// The TCP connection in blocking mode, for a data thread.
    pub fn into_blocking(self) -> io::Result<std::net::TcpStream> {
        let Detached(tcp) = self.detach()?;
        tcp.set_nonblocking(false)?;
        Ok(tcp)
    }
}

/// A connection between runtimes.
#[derive(Debug)]
pub struct Detached(std::net::TcpStream);

impl Detached {
    /// Puts the connection on the runtime of this thread.
    pub fn attach(self) -> io::Result<Stream> {
        TcpStream::from_std(self.0).map(Stream::Plain)
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
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
        }
    }
}

/// A peer could not be reached, or refused.
#[derive(Debug, Error)]
#[error("cannot connect to agent {peer} at {address}")]
pub struct ConnectError {
    /// The peer.
    pub peer: String,
    /// Its address; `unknown` if it is no peer.
    pub address: String,
    /// Why.
    #[source]
    pub source: ConnectFailure,
}

/// Why a connection did not come about.
#[derive(Debug, Error)]
pub enum ConnectFailure {
    /// The name is not in the roster.
    #[error("there is no such peer; add a [[peer]] to agent.toml")]
    Unknown,
    /// TCP failed.
    #[error("{0}; is the agent running there, and port open?")]
    Io(#[from] io::Error),
    /// No answer.
    #[error("no answer within {0:?}; is the agent running there?")]
    TimedOut(Duration),
    /// The peer speaks otherwise.
    #[error(transparent)]
    Preamble(#[from] PreambleError),
    /// The peer refuses.
    #[error("it refuses: {reason}")]
    Refused {
        /// Which kind of refusal.
        verdict: Verdict,
        /// The peer's words.
        reason: String,
    },
    /// The system gives no random bytes.
    #[error("the system gave no random bytes for a nonce")]
    Random,
}

/// Connects to `peer` for `kind`. For `gang` and `tag` see [`Hello`]. Gives up
/// after `limit`.
pub async fn connect(
    roster: &Roster,
    peer: &str,
    kind: Kind,
    gang: GangId,
    tag: u64,
    limit: Duration,
) -> Result<Stream, ConnectError> {
    let member = roster.peer(peer);
    let attempt = async {
        let member = member.ok_or(ConnectFailure::Unknown)?;
        open(roster, member, kind, gang, tag).await
    };
    let result = match tokio::time::timeout(limit, attempt).await {
        Ok(result) => result,
        Err(_) => Err(ConnectFailure::TimedOut(limit)),
    };
    result.map_err(|source| ConnectError {
        peer: peer.to_owned(),
        address: member.map_or("unknown".to_owned(), |m| m.address.to_string()),
        source,
    })
}

async fn open(
    roster: &Roster,
    member: &Member,
    kind: Kind,
    gang: GangId,
    tag: u64,
) -> Result<Stream, ConnectFailure> {
    let socket = if member.address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // From the address this agent listens on: that is the one peers know.
    let mine = roster.me().address.ip();
    if !mine.is_unspecified() && mine.is_ipv4() == member.address.is_ipv4() {
        socket.bind(SocketAddr::new(mine, 0))?;
    }
    let mut tcp = socket.connect(member.address).await?;
    tune(&tcp)?;
    let mut nonce = [0; 16];
    aws_lc_rs::rand::fill(&mut nonce).map_err(|_| ConnectFailure::Random)?;
    let hello = Hello {
        kind,
        gang,
        tag,
        nonce,
        from: roster.me().name.clone(),
        to: member.name.clone(),
    };
    tcp.write_all(&hello.encode(roster.key())).await?;
    let mut bytes = vec![0; ANSWER_FIXED];
    tcp.read_exact(&mut bytes).await?;
    bytes.resize(ANSWER_FIXED + Answer::reason_len(&bytes)?, 0);
    tcp.read_exact(&mut bytes[ANSWER_FIXED..]).await?;
    let answer = Answer::decode(&bytes, roster.key(), &nonce)?;
    match answer.verdict {
        Verdict::Accepted => Ok(Stream::Plain(tcp)),
        verdict => Err(ConnectFailure::Refused {
            verdict,
            reason: answer.reason,
        }),
    }
}

/// A caller was turned away, or went away.
#[derive(Debug, Error)]
pub enum AcceptError {
    /// TCP failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The caller said nothing (whole) in time.
    #[error("no whole preamble within {0:?}")]
    TimedOut(Duration),
    /// The caller is no agent of this cluster.
    #[error("the caller is refused: {0}")]
    Preamble(#[from] PreambleError),
    /// The caller was told no.
    #[error("the caller is refused: {0}")]
    Refused(String),
}

/// Receives a caller's preamble, checks it against the roster, asks `admit`,
/// and answers. The stream comes back only if all agree.
pub async fn accept(
    mut tcp: TcpStream,
    from: SocketAddr,
    roster: &Roster,
    admit: impl FnOnce(&Hello) -> Result<(), (Verdict, String)>,
    limit: Duration,
) -> Result<(Stream, Hello), AcceptError> {
    let attempt = async {
        tune(&tcp)?;
        let mut bytes = vec![0; HELLO_FIXED];
        tcp.read_exact(&mut bytes).await?;
        let names = match Hello::names_len(&bytes) {
            Ok(names) => names,
            Err(error) => {
                refuse_unread(&mut tcp, roster, error).await?;
                return Err(error.into());
            }
        };
        bytes.resize(HELLO_FIXED + names, 0);
        tcp.read_exact(&mut bytes[HELLO_FIXED..]).await?;
        let hello = match Hello::decode(&bytes, roster.key()) {
            Ok(hello) => hello,
            Err(error) => {
                refuse_unread(&mut tcp, roster, error).await?;
                return Err(error.into());
            }
        };
        let decision = check(&hello, from, roster).and_then(|()| admit(&hello));
        let (verdict, reason) = match decision {
            Ok(()) => (Verdict::Accepted, String::new()),
            Err(refusal) => refusal,
        };
        let answer = Answer { verdict, reason };
        tcp.write_all(&answer.encode(roster.key(), &hello.nonce))
            .await?;
        match verdict {
            Verdict::Accepted => Ok((Stream::Plain(tcp), hello)),
            _ => Err(AcceptError::Refused(answer.reason)),
        }
    };
    match tokio::time::timeout(limit, attempt).await {
        Ok(result) => result,
        Err(_) => Err(AcceptError::TimedOut(limit)),
    }
}

fn check(hello: &Hello, from: SocketAddr, roster: &Roster) -> Result<(), (Verdict, String)> {
    let me = &roster.me().name;
    if hello.to != *me {
        let reason = format!(
            "this is agent {me}, not {}; correct the addresses in agent.toml",
            hello.to
        );
        return Err((Verdict::NotMe, reason));
    }
    let Some(peer) = roster.peer(&hello.from) else {
        let reason = format!(
            "{} is not a peer of {me}; add it to its agent.toml",
            hello.from
        );
        return Err((Verdict::Stranger, reason));
    };
    if !peer.connects_from(from.ip()) {
        let reason = format!(
            "{} connects from {}, which agent {me} does not know as its address; \
             add it to source_addresses of that [[peer]] on {me}",
            peer.name,
            from.ip()
        );
        return Err((Verdict::Stranger, reason));
    }
    Ok(())
}

/// Tells a caller whose hello could not be used. Strangers that do not speak
/// the protocol get no answer.
async fn refuse_unread(
    tcp: &mut TcpStream,
    roster: &Roster,
    error: PreambleError,
) -> Result<(), AcceptError> {
    let me = &roster.me().name;
    let (verdict, reason) = match error {
        PreambleError::Version(theirs) => (
            Verdict::Version,
            format!(
                "agent {me} speaks version {VERSION} of the protocol, not {theirs}; install the same drover on both hosts"
            ),
        ),
        PreambleError::Proof => (
            Verdict::Secret,
            format!(
                "agent {me} has another cluster secret; copy the secret file from one host to all others"
            ),
        ),
        _ => return Ok(()),
    };
    let answer = Answer { verdict, reason };
    tcp.write_all(&answer.encode(roster.key(), &[0; 16]))
        .await?;
    Ok(())
}

/// What every connection between agents needs: no waiting for more data
/// before sending, and an end to connections whose other host is gone.
fn tune(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(tcp);
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(5))
        .with_interval(Duration::from_secs(2))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(Duration::from_secs(10)))
}
