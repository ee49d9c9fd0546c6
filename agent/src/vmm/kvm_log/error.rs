//! What goes wrong between an agent and a VMM that is linked to it.

use crate::vmm::ram::RamError;
use drover_vmm::ConnectionError;
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// The VMM cannot be asked, or does not do it. Messages name the VM.
#[derive(Debug, Error)]
pub enum LinkClientError {
    /// Nobody answers on its socket.
    #[error(
        "VM {vm}: no VMM answers on {socket}; is it running, and does it embed drover-vmm of this release?"
    )]
    Connect {
        /// The VM.
        vm: String,
        /// The VMM's socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection ended or is not to be trusted any more.
    #[error("VM {vm}: {doing} by its VMM failed")]
    Connection {
        /// The VM.
        vm: String,
        /// What was asked.
        doing: &'static str,
        /// Why.
        #[source]
        source: ConnectionError,
    },
    /// The VMM answered something else than was asked.
    #[error("VM {vm}: its VMM answers {doing} with {what}: is it of another release?")]
    Answer {
        /// The VM.
        vm: String,
        /// What was asked.
        doing: &'static str,
        /// What came.
        what: String,
    },
    /// The VMM says no.
    #[error("VM {vm}: its VMM refuses {doing}: {text}")]
    Refused {
        /// The VM.
        vm: String,
        /// What was asked.
        doing: &'static str,
        /// In its words.
        text: String,
    },
    /// Guest RAM in a form that cannot be moved.
    #[error(
        "VM {vm}: its RAM is {what}; one file that holds all of it, once and without gaps, is supported"
    )]
    Layout {
        /// The VM.
        vm: String,
        /// What it is.
        what: String,
    },
    /// Guest RAM cannot be used.
    #[error("VM {vm}: its RAM cannot be opened")]
    Ram {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: RamError,
    },
    /// Device state could not be carried on.
    #[error("VM {vm}: its state could not be passed on")]
    State {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}
