//! Requests and notices between agents over `Control` connections.
//!
//! Generic over the messages: whoever uses it brings two serde enums, one of
//! requests and one of responses. A payload ([`super::frame`]) is a kind byte,
//! an id (u64, little-endian) that pairs responses with requests, and a
//! postcard message. Both sides send a sign of life every [`RpcLimits::beat`]; a peer
//! from which nothing came for
//! [`RpcLimits::silence`] is lost.
//!
//! An agent calls through its own [`RpcClient`] for each peer and answers what
//! comes in with [`serve`]; so each pair of agents has up to two connections.

mod client;
mod error;
mod message;
mod server;

pub use client::{PeerState, RpcClient};
pub use error::RpcError;
pub use message::{Envelope, MalformedEnvelope};
pub use server::{RpcHandler, serve};

use std::time::Duration;

/// Bounds of RPC connections. Both sides must agree on `max_frame`.
#[derive(Debug, Clone, Copy)]
pub struct RpcLimits {
    /// Longest message, bytes.
    pub max_frame: usize,
    /// Requests of one client that may wait for their answers.
    pub in_flight: usize,
    /// Time between pings.
    pub beat: Duration,
    /// Beats without a word from the peer until it is lost.
    pub silent_beats: u32,
    /// Time in which a message that has begun to come must grow by
    /// [`RpcLimits::SLOW_BYTES`] or be whole: who sends a byte a second would hold
    /// its memory for ever.
    pub slow: Duration,
    /// Time for connecting.
    pub connect: Duration,
    /// First pause after a failed connect; it doubles up to `backoff_max`.
    pub backoff_min: Duration,
    /// Longest pause between connects.
    pub backoff_max: Duration,
}

impl RpcLimits {
    /// See [`RpcLimits::slow`].
    pub const SLOW_BYTES: usize = 4096;

    /// How long a peer may say nothing.
    pub fn silence(&self) -> Duration {
        self.beat * self.silent_beats
    }
}

impl Default for RpcLimits {
    fn default() -> Self {
        RpcLimits {
            max_frame: 4 << 20,
            in_flight: 256,
            beat: Duration::from_millis(300),
            silent_beats: 6,
            slow: Duration::from_secs(10),
            connect: Duration::from_secs(2),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(1),
        }
    }
}

#[cfg(test)]
mod tests;
