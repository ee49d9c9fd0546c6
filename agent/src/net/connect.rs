//! Calling another agent: the one [`connect`] that all traffic between agents
//! goes through.

use super::explain::TlsFailure;
use super::preamble::{ANSWER_FIXED, Answer, Hello, Kind, PreambleError, Verdict};
use super::socket::Socket;
use super::stream::{Stream, tune};
use super::tls::{Security, Tls};
use super::{Member, Roster};
use crate::types::GangId;
use rustls::pki_types::ServerName;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::{TlsConnector, TlsStream};

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
    /// TLS failed, or the peer is not who it should be.
    #[error(transparent)]
    Tls(#[from] TlsFailure),
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
    let tcp = socket.connect(member.address).await?;
    tune(&tcp)?;
    let mut stream = match roster.security() {
        Security::Plaintext => Stream::Plain(Socket::whole(tcp)),
        Security::Tls(store) => call(tcp, member, &store.current()).await?,
    };
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
    let answer = converse(&mut stream, &hello, roster).await?;
    match answer.verdict {
        Verdict::Accepted => Ok(stream.ready(kind)),
        verdict => Err(ConnectFailure::Refused {
            verdict,
            reason: answer.reason,
        }),
    }
}

/// Encrypts a connection, and makes sure that `member` is at its other end.
async fn call(tcp: TcpStream, member: &Member, tls: &Tls) -> Result<Stream, ConnectFailure> {
    // The name for TLS is of no use here: the certificate names the agent.
    let address = ServerName::from(member.address.ip());
    let connector = TlsConnector::from(tls.client.clone());
    let tls = connector
        .connect(address, Socket::by_record(tcp))
        .await
        .map_err(|e| failure(e, true))?;
    let stream = Stream::Tls(Box::new(TlsStream::Client(tls)));
    match stream.peer_agent() {
        Some(Ok(name)) if name == member.name => Ok(stream),
        Some(Ok(name)) => Err(TlsFailure::OtherAgent {
            found: format!("agent {name}"),
            wanted: member.name.clone(),
        }
        .into()),
        Some(Err(why)) => Err(TlsFailure::Other(why).into()),
        None => Err(TlsFailure::NotTls.into()),
    }
}

async fn converse(
    stream: &mut Stream,
    hello: &Hello,
    roster: &Roster,
) -> Result<Answer, ConnectFailure> {
    // Only now the peer has seen this agent's certificate: it may refuse it.
    let failed = |e| failure(e, false);
    stream
        .write_all(&hello.encode(roster.key()))
        .await
        .map_err(failed)?;
    stream.flush().await.map_err(failed)?;
    let mut bytes = vec![0; ANSWER_FIXED];
    stream.read_exact(&mut bytes).await.map_err(failed)?;
    bytes.resize(ANSWER_FIXED + Answer::reason_len(&bytes)?, 0);
    stream
        .read_exact(&mut bytes[ANSWER_FIXED..])
        .await
        .map_err(failed)?;
    Ok(Answer::decode(&bytes, roster.key(), &hello.nonce)?)
}

fn failure(error: io::Error, handshaking: bool) -> ConnectFailure {
    match TlsFailure::of(error, handshaking) {
        Ok(failure) => failure.into(),
        Err(error) => error.into(),
    }
}
