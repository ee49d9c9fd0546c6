//! What can go wrong in moving a VM in direct mode.

use crate::vmm::dirty::DirtyLogError;
use crate::vmm::launch::{LaunchError, NoMonitor};
use crate::vmm::preflight::PreflightError;
use crate::vmm::process::ProcessError;
use crate::vmm::qmp::{MigrationStatus, QmpError, RunState};
use crate::vmm::ram::RamError;
use crate::vmm::relay::RelayError;
use std::path::PathBuf;
use thiserror::Error;

/// What can go wrong on either side. Messages carry the VM's name.
#[derive(Debug, Error)]
pub enum DirectError {
    /// Direct mode refuses the VM.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// It is no QEMU of ours.
    #[error(transparent)]
    NoMonitor(#[from] NoMonitor),
    /// The VMM could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// Guest RAM cannot be opened.
    #[error("VM {vm}: guest RAM cannot be opened")]
    Ram {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: RamError,
    },
    /// The dirty log failed.
    #[error("VM {vm}: its RAM cannot be watched")]
    Log {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: DirtyLogError,
    },
    /// No socket for the device state.
    #[error("VM {vm}: the socket {path} for its device state cannot be made")]
    Socket {
        /// The VM.
        vm: String,
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The device state did not get through.
    #[error("VM {vm}: its device state did not get to the target")]
    Relay {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: RelayError,
    },
    /// The VMM did not answer or refused.
    #[error("VM {vm}: {doing} failed{said}")]
    Qmp {
        /// The VM.
        vm: String,
        /// What was being done.
        doing: &'static str,
        /// What QEMU has logged last, if we have its log.
        said: String,
        /// Why.
        #[source]
        source: QmpError,
    },
    /// The device state did not arrive.
    #[error("VM {vm}: moving its device state ended as {status:?}: {why}")]
    State {
        /// The VM.
        vm: String,
        /// How it ended.
        status: MigrationStatus,
        /// QEMU's reason.
        why: String,
    },
    /// A VM is not in the state it must be in.
    #[error("VM {vm} is {have:?} after {doing}")]
    RunState {
        /// The VM.
        vm: String,
        /// What was done.
        doing: &'static str,
        /// What it is.
        have: RunState,
    },
    /// The VMM could not be ended.
    #[error("VM {vm}: its VMM could not be ended")]
    End {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: ProcessError,
    },
}
