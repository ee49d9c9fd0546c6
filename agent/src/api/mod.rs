//! The operator's HTTP/JSON interface on a Unix socket.
//!
//! The HTTP side ([`ApiServer`]) knows no agent: it turns each request into an
//! [`ApiCall`] with a one-shot reply and sends it to whoever holds the other
//! end of the channel (the agent's main loop, which is single-threaded and
//! needs no locks). [`client`] is the other end of the socket, used by the
//! command line. Who may ask what is decided in [`access`].

pub mod access;
mod call;
pub mod client;
pub mod metrics;
mod offers;
mod peer;
mod routes;
mod server;
pub mod types;

pub use access::{Access, Role};
pub use call::{ApiCall, ApiError, ApiResult, ErrorKind, Reply};
pub use client::{ApiClient, ClientError};
pub use peer::Caller;
pub use server::{ApiLimits, ApiServer, ServeError};

#[cfg(test)]
mod tests;
