//! What goes wrong between an agent and a VMM that is linked to it.

use crate::vmm::launch::LaunchError;
use crate::vmm::ram::RamError;
use crate::vmm::relay::RelayError;
use drover_vmm::ConnectionError;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
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
    /// Somebody else answers on its socket.
    #[error(
        "VM {vm}: another VMM than process {pid} answers on {socket} now: stop the VM here, then start or adopt it again"
    )]
    Replaced {
        /// The VM.
        vm: String,
        /// The VMM's socket.
        socket: PathBuf,
        /// The VMM's process.
        pid: i32,
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

/// What goes wrong in moving a VM of this kind. Messages carry its name.
#[derive(Debug, Error)]
pub enum KvmLogVmError {
    /// Its VMM does not do what it was asked.
    #[error(transparent)]
    Link(#[from] LinkClientError),
    /// The VMM could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The VMM has a monitor, or belongs to somebody, and no link.
    #[error(
        "VM {vm} is driven by {by}, not by a link of drover-vmm: give its definition another kind than kvm-log, or `auto`"
    )]
    NoLink {
        /// The VM.
        vm: String,
        /// What drives it.
        by: &'static str,
    },
    /// The VMM is not in the phase that it has to be in.
    #[error("VM {vm}: its VMM {is}, and has to be one that {wanted}")]
    Phase {
        /// The VM.
        vm: String,
        /// What it does.
        is: &'static str,
        /// What it should do.
        wanted: &'static str,
    },
    /// The guest runs, or stands, and should not.
    #[error("VM {vm} {is} after {doing}: somebody else drives its VMM")]
    RunState {
        /// The VM.
        vm: String,
        /// What it does.
        is: &'static str,
        /// What was done.
        doing: &'static str,
    },
    /// Both sides' RAM is not alike.
    #[error(
        "VM {vm}: {what} is {have} here and {wanted} by its {whose}: use one definition, and one release of its VMM"
    )]
    Differs {
        /// The VM.
        vm: String,
        /// What differs.
        what: &'static str,
        /// Here.
        have: String,
        /// There.
        wanted: String,
        /// Whose word that is.
        whose: &'static str,
    },
    /// No socket, or no thread, for the device state.
    #[error("VM {vm}: nothing can be made ready for its device state")]
    Socket {
        /// The VM.
        vm: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The device state did not get to the target, or its answer did not get back.
    #[error("VM {vm}: its device state did not get through")]
    Carried {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: RelayError,
    },
    /// The same, in the words of one end.
    #[error("VM {vm}: its device state did not get through: {why}")]
    State {
        /// The VM.
        vm: String,
        /// What happened.
        why: String,
    },
    /// Nothing came of it in time.
    #[error("VM {vm}: {what} took longer than {limit:?}")]
    Limit {
        /// The VM.
        vm: String,
        /// What did.
        what: &'static str,
        /// How long it may take.
        limit: Duration,
    },
}
