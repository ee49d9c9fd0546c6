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
//! | `Lane` | pages | data threads, as a blocking-mode `TcpStream` |
//! | `DeviceState` | the device state of one VM | control runtime |
//!
//! [`stream`] has the one `connect()` and the one `accept()` all of them go
//! through.

pub mod frame;
pub mod listener;
pub mod places;
pub mod preamble;
pub mod rack;
mod roster;
pub mod rpc;
pub mod stream;

pub use listener::{ConnectionHandler, Incoming, Listener, ListenerLimits};
pub use preamble::{Hello, Kind};
pub use roster::{Member, Roster};
pub use stream::{ConnectError, Stream, connect};

#[cfg(test)]
mod testing;
