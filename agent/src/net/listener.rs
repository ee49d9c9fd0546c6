//! The agent's one listening port.

use super::Roster;
use super::accept::{AcceptError, accept};
use super::places::{PeerLimits, Places};
use super::preamble::{Hello, Verdict};
use super::stream::Stream;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

pub use super::places::ConnectionPermit;

/// Bounds of a [`Listener`].
#[derive(Debug, Clone, Copy)]
pub struct ListenerLimits {
    /// Connections open at a time, of all kinds.
    pub connections: usize,
    /// Those of one peer.
    pub per_peer: PeerLimits,
    /// Callers at a time, from one address of a peer, that have not finished
    /// their preamble; more are hung up on. Nobody waits for another peer's.
    pub handshakes: usize,
    /// The same for callers from all other addresses together. They would be
    /// refused anyway, but those by mistake are told why.
    pub strangers: usize,
    /// Time a caller has for its preamble.
    pub preamble: Duration,
}

impl Default for ListenerLimits {
    fn default() -> Self {
        ListenerLimits {
            connections: 4096,
            per_peer: PeerLimits::default(),
            handshakes: 32,
            strangers: 8,
            preamble: Duration::from_secs(3),
        }
    }
}

/// A connection that was accepted.
#[derive(Debug)]
pub struct Incoming {
    /// What the caller wants; `hello.from` is a peer of the roster.
    pub hello: Hello,
    /// Where it calls from.
    pub address: SocketAddr,
    /// The connection.
    pub stream: Stream,
    /// Keep this for as long as the connection is in use: it counts towards
    /// the limit of connections.
    pub permit: ConnectionPermit,
}

/// Who takes the connections.
pub trait ConnectionHandler {
    /// Whether the connection is wanted; the text of a refusal is shown to the
    /// caller's operator. Called before the caller gets its answer.
    fn admit(&self, hello: &Hello) -> Result<(), String>;

    /// Takes an accepted connection. Must not block: it runs on the control
    /// runtime, where it may spawn tasks.
    fn handle(&self, incoming: Incoming);
}

/// The agent cannot listen.
#[derive(Debug, Error)]
#[error(
    "cannot listen for agents on {address}; is another agent running, is the address this host's?"
)]
pub struct ListenError {
    /// The address wanted.
    pub address: SocketAddr,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

/// The listening port.
#[derive(Debug)]
pub struct Listener {
    tcp: TcpListener,
    limits: ListenerLimits,
}

impl Listener {
    /// Listens on `address`. Must be called on a runtime.
    pub fn bind(address: SocketAddr, limits: ListenerLimits) -> Result<Self, ListenError> {
        let listen = || {
            let std = std::net::TcpListener::bind(address)?;
            std.set_nonblocking(true)?;
            TcpListener::from_std(std)
        };
        match listen() {
            Ok(tcp) => Ok(Listener { tcp, limits }),
            Err(source) => Err(ListenError { address, source }),
        }
    }

    /// Where it listens, with the real port if port 0 was asked for.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Accepts connections until dropped. Must run in a `LocalSet` (as tasks
    /// of `tokio_uring::start` do).
    pub async fn run(self, roster: Arc<Roster>, handler: Rc<dyn ConnectionHandler>) {
        let open = Places::new(self.limits.connections, self.limits.per_peer);
        let mut handshakes: HashMap<IpAddr, Arc<Semaphore>> = HashMap::new();
        let strangers = Arc::new(Semaphore::new(self.limits.strangers));
        let mut tasks = tokio::task::JoinSet::new();
        loop {
            while tasks.try_join_next().is_some() {}
            let (tcp, address) = match self.tcp.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: callers wait.
                    tracing::warn!(%error, "cannot accept connections; trying again");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // Neither strangers nor other peers can keep a peer waiting.
            let ip = address.ip().to_canonical();
            let peer = roster.peers().find(|p| p.connects_from(ip));
            let places = match peer {
                Some(_) => handshakes
                    .entry(ip)
                    .or_insert_with(|| Arc::new(Semaphore::new(self.limits.handshakes))),
                None => &strangers,
            };
            let Ok(handshake) = places.clone().try_acquire_owned() else {
                match peer {
                    Some(peer) => roster.offences().note(
                        &peer.name,
                        &format!(
                            "calls without end: {} connections are unfinished",
                            self.limits.handshakes
                        ),
                    ),
                    None => tracing::debug!(from = %address, "too many strangers: hung up"),
                }
                continue;
            };
            let caller = Caller {
                tcp,
                address,
                places: open.clone(),
            };
            let (roster, handler) = (roster.clone(), handler.clone());
            let limit = self.limits.preamble;
            tasks.spawn_local(async move {
                if let Err(error) = welcome(caller, &roster, &*handler, limit).await {
                    turned_away(&roster, address, &error);
                }
                drop(handshake);
            });
        }
    }
}

/// A peer that is only refused is honest: its gang may have ended meanwhile.
fn turned_away(roster: &Roster, address: SocketAddr, error: &AcceptError) {
    let peer = roster.peers().find(|p| p.connects_from(address.ip()));
    let name = peer.map_or("nobody of this cluster", |p| &p.name);
    match error {
        AcceptError::TimedOut(_) => {
            roster
                .offences()
                .note(name, &format!("{error}, from {address}"));
        }
        _ => roster
            .offences()
            .refused(name, &format!("{error}, from {address}")),
    }
}

struct Caller {
    tcp: TcpStream,
    address: SocketAddr,
    places: Arc<Places>,
}

async fn welcome(
    caller: Caller,
    roster: &Roster,
    handler: &dyn ConnectionHandler,
    limit: Duration,
) -> Result<(), AcceptError> {
    let mut permit = None;
    let admit = |hello: &Hello| {
        let place = caller.places.take(hello);
        permit = Some(place.map_err(|reason| (Verdict::Busy, reason))?);
        handler.admit(hello).map_err(|why| (Verdict::Unwanted, why))
    };
    let (stream, hello) = accept(caller.tcp, caller.address, roster, admit, limit).await?;
    if let Some(permit) = permit {
        tracing::debug!(from = %hello.from, kind = ?hello.kind, "connection accepted");
        handler.handle(Incoming {
            hello,
            address: caller.address,
            stream,
            permit,
        });
    }
    Ok(())
}

#[cfg(test)]
#[path = "listener_tests.rs"]
mod tests;
