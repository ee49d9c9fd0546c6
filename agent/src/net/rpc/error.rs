//! Why calls fail.

use crate::net::frame::TooLong;
use std::time::Duration;
use thiserror::Error;

/// Why a call has no answer. Unless it says so, the peer may or may not have
/// acted on the request.
#[derive(Debug, Error)]
pub enum RpcError {
    /// There was no connection within the time limit; the request was not
    /// sent.
    #[error("cannot reach agent {peer} at {address} within {limit:?}: {why}")]
    Unreachable {
        /// The peer.
        peer: String,
        /// Its address.
        address: String,
        /// The call's time limit.
        limit: Duration,
        /// What the last attempt to connect said.
        why: String,
    },
    /// The peer did not answer within the time limit.
    #[error("agent {peer} at {address} did not answer within {limit:?}")]
    TimedOut {
        /// The peer.
        peer: String,
        /// Its address.
        address: String,
        /// The call's time limit.
        limit: Duration,
    },
    /// The connection broke, or the peer fell silent, after the request was
    /// sent.
    #[error("lost agent {peer} at {address}: {why}")]
    Lost {
        /// The peer.
        peer: String,
        /// Its address.
        address: String,
        /// How it was lost.
        why: String,
    },
    /// The peer did not handle the request.
    #[error("agent {peer} at {address} did not handle the request: {why}")]
    Fault {
        /// The peer.
        peer: String,
        /// Its address.
        address: String,
        /// The peer's words.
        why: String,
    },
    /// The peer's answer cannot be read.
    #[error(
        "agent {peer} at {address} sent an answer that cannot be read; is the same drover installed on both hosts?"
    )]
    Malformed {
        /// The peer.
        peer: String,
        /// Its address.
        address: String,
    },
    /// The request is too long to send.
    #[error("a request to agent {peer} is too long")]
    TooLong {
        /// The peer.
        peer: String,
        /// How long.
        #[source]
        source: TooLong,
    },
    /// Too many notices wait to be sent.
    #[error("agent {peer} does not take messages as fast as they come")]
    Busy {
        /// The peer.
        peer: String,
    },
    /// The request cannot be encoded.
    #[error("a request to agent {peer} cannot be encoded")]
    Encode {
        /// The peer.
        peer: String,
        /// Why.
        #[source]
        source: postcard::Error,
    },
}
