//! Being called by another agent: the one [`accept`] that all traffic between
//! agents goes through.

use super::Roster;
use super::explain::TlsFailure;
use super::preamble::{Answer, HELLO_FIXED, Hello, PreambleError, VERSION, Verdict};
use super::socket::Socket;
use super::stream::{Stream, tune};
use super::tls::{Security, Tls};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsStream};

/// The first byte of a TLS connection, and the one of a bare [`Hello`].
const TLS_FIRST: u8 = 22;
const HELLO_FIRST: u8 = b'D';
/// Time a caller that was turned away has for hanging up itself.
const LINGER: Duration = Duration::from_millis(500);

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
    /// TLS failed, or the caller's certificate is no good.
    #[error("the caller is refused: {0}")]
    Tls(#[from] TlsFailure),
    /// A caller that speaks TLS, where that was turned off.
    #[error(
        "the caller is refused: it speaks TLS, but agent.toml here says `plaintext = true`; protect both hosts alike"
    )]
    SpeaksTls,
    /// The caller was told no.
    #[error("the caller is refused: {0}")]
    Refused(String),
}

/// Receives a caller's preamble, inside TLS if that is what this agent speaks,
/// checks it against the roster, asks `admit`, and answers. The stream comes
/// back only if all agree.
pub async fn accept(
    tcp: TcpStream,
    from: SocketAddr,
    roster: &Roster,
    admit: impl FnOnce(&Hello) -> Result<(), (Verdict, String)>,
    limit: Duration,
) -> Result<(Stream, Hello), AcceptError> {
    let attempt = async {
        tune(&tcp)?;
        let mut first = [0];
        if tcp.peek(&mut first).await? == 0 {
            return Err(AcceptError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        let mut stream = match (roster.security(), first[0]) {
            (Security::Plaintext, TLS_FIRST) => {
                hang_up(Socket::whole(tcp)).await;
                return Err(AcceptError::SpeaksTls);
            }
            (Security::Plaintext, _) => Stream::Plain(Socket::whole(tcp)),
            (Security::Tls(_), HELLO_FIRST) => return Err(refuse_plaintext(tcp, roster).await?),
            (Security::Tls(store), _) => answer_call(tcp, &store.current()).await?,
        };
        let mut bytes = vec![0; HELLO_FIXED];
        stream.read_exact(&mut bytes).await.map_err(broken)?;
        let names = match Hello::names_len(&bytes) {
            Ok(names) => names,
            Err(error) => {
                refuse_unread(&mut stream, roster, error).await?;
                return Err(error.into());
            }
        };
        bytes.resize(HELLO_FIXED + names, 0);
        stream
            .read_exact(&mut bytes[HELLO_FIXED..])
            .await
            .map_err(broken)?;
        let hello = match Hello::decode(&bytes, roster.key()) {
            Ok(hello) => hello,
            Err(error) => {
                refuse_unread(&mut stream, roster, error).await?;
                return Err(error.into());
            }
        };
        let decision = check(&hello, from, roster)
            .and_then(|()| check_certificate(&hello, &stream))
            .and_then(|()| admit(&hello));
        let (verdict, reason) = match decision {
            Ok(()) => (Verdict::Accepted, String::new()),
            Err(refusal) => refusal,
        };
        let answer = Answer { verdict, reason };
        say(&mut stream, &answer, roster, &hello.nonce).await?;
        match verdict {
            Verdict::Accepted => Ok((stream.ready(hello.kind), hello)),
            _ => Err(AcceptError::Refused(answer.reason)),
        }
    };
    match tokio::time::timeout(limit, attempt).await {
        Ok(result) => result,
        Err(_) => Err(AcceptError::TimedOut(limit)),
    }
}

/// The called side's TLS handshake.
async fn answer_call(tcp: TcpStream, tls: &Tls) -> Result<Stream, AcceptError> {
    let acceptor = TlsAcceptor::from(tls.server.clone());
    let accepting = acceptor.accept(Socket::by_record(tcp)).into_fallible();
    match accepting.await {
        Ok(tls) => Ok(Stream::Tls(Box::new(TlsStream::Server(tls)))),
        Err((error, socket)) => {
            // The alert that says why is on its way.
            hang_up(socket).await;
            Err(match TlsFailure::of(error, true) {
                Ok(failure) => failure.into(),
                Err(error) => error.into(),
            })
        }
    }
}

fn broken(error: io::Error) -> AcceptError {
    match TlsFailure::of(error, false) {
        Ok(failure) => failure.into(),
        Err(error) => error.into(),
    }
}

/// Ends a connection so that the caller reads what it was told: closing with
/// bytes unread would reset it.
async fn hang_up(mut socket: Socket) {
    socket.read_whole();
    let drained = async {
        socket.shutdown().await?;
        let mut rest = [0; 4096];
        while socket.read(&mut rest).await? > 0 {}
        Ok::<(), io::Error>(())
    };
    // Whatever comes of it, the connection is over.
    let _ = tokio::time::timeout(LINGER, drained).await;
}

/// Tells a caller without TLS, in its own words, that this agent wants it.
async fn refuse_plaintext(tcp: TcpStream, roster: &Roster) -> Result<AcceptError, AcceptError> {
    let me = &roster.me().name;
    let reason = format!(
        "agent {me} speaks only TLS; remove `plaintext = true` from agent.toml and give the host \
         the bundle of `drover pki issue`"
    );
    let answer = Answer {
        verdict: Verdict::Tls,
        reason,
    };
    let mut socket = Socket::whole(tcp);
    let bytes = answer.encode(roster.key(), &[0; 16]);
    socket.write_all(&bytes).await?;
    hang_up(socket).await;
    Ok(AcceptError::Refused(
        "it does not speak TLS; give its host the bundle of `drover pki issue`".into(),
    ))
}

/// A caller must be the agent its certificate names.
fn check_certificate(hello: &Hello, stream: &Stream) -> Result<(), (Verdict, String)> {
    let reason = match stream.peer_agent() {
        None => return Ok(()),
        Some(Ok(name)) if name == hello.from => return Ok(()),
        Some(Ok(name)) => format!(
            "{} calls with the certificate of agent {name}; give each host its own bundle of \
             `drover pki issue`",
            hello.from
        ),
        Some(Err(why)) => format!(
            "the certificate of {} names no agent ({why}); make it with `drover pki issue`",
            hello.from
        ),
    };
    Err((Verdict::Certificate, reason))
}

async fn say(
    stream: &mut Stream,
    answer: &Answer,
    roster: &Roster,
    nonce: &[u8; 16],
) -> io::Result<()> {
    stream
        .write_all(&answer.encode(roster.key(), nonce))
        .await?;
    stream.flush().await
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
    stream: &mut Stream,
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
    say(stream, &Answer { verdict, reason }, roster, &[0; 16]).await?;
    Ok(())
}
