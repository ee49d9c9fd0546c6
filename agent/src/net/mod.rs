//! How agents talk to each other.
//!
//! Each agent listens on one TCP port. Every connection starts with a
//! [`preamble`] that says who calls whom and for what ([`Kind`]); the
//! [`listener`] checks it against the cluster's [`Roster`] and hands the
//! connection on:
//!
//! | kind | carries | served by |
//! |---|---|---|
//! | `Control` | requests and notices between agents, [`rpc`] | control runtime |
//! | `Rack` | claims, page fetches, load reports, [`rack`] | a thread of its own |
//! | `Lane` | pages | data threads, as a [`stream::LaneSocket`] |
//! | `DeviceState` | the device state of one VM | control runtime |
//!
//! All of them go through the one [`connect()`] and the one [`accept::accept`];
//! [`tls`] is what they are protected with.

pub mod accept;
pub mod connect;
mod explain;
pub mod frame;
pub mod listener;
mod offences;
pub mod places;
pub mod preamble;
pub mod rack;
mod roster;
pub mod rpc;
mod socket;
pub mod stream;
pub mod tls;

pub use connect::{ConnectError, ConnectFailure, connect};
pub use explain::TlsFailure;
pub use listener::{ConnectionHandler, Incoming, Listener, ListenerLimits};
pub use offences::Offences;
pub use preamble::{Hello, Kind};
pub use roster::{Member, Roster};
pub use socket::Socket;
pub use stream::{LaneSocket, Stream};
pub use tls::{Security, TlsStore};

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tls_tests;
