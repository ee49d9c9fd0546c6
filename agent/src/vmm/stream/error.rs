//! What can go wrong in moving a VM in stream mode.

use crate::vmm::direct::DirectError;
use crate::vmm::launch::{LaunchError, NoMonitor};
use crate::vmm::preflight::PreflightError;
use crate::vmm::qmp::{MigrationStatus, QmpError};
use crate::vmm::ram::RamError;
use crate::vmm::relay::RelayError;
use std::path::PathBuf;
use thiserror::Error;

/// What can go wrong on either side. Messages carry the VM's name.
#[derive(Debug, Error)]
pub enum StreamVmError {
    /// Neither mode takes the VM.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// It is no QEMU of ours.
    #[error(transparent)]
    NoMonitor(#[from] NoMonitor),
    /// The VMM could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// What both modes have in common.
    #[error(transparent)]
    Qemu(#[from] DirectError),
    /// Where guest RAM is cannot be told.
    #[error(
        "VM {vm}: where its RAM is in the VMM's memory cannot be told: {why}. Stream mode wants all \
         guest RAM in one block: drop NUMA nodes and DIMMs from its arguments"
    )]
    NoBlock {
        /// The VM.
        vm: String,
        /// What is in the way.
        why: String,
    },
    /// Much RAM besides the machine's.
    #[error(
        "VM {vm}: {bytes} bytes of RAM blocks besides `{main}` (largest: {largest}) would be held in \
         the agent's memory: give all guest RAM in one block, and video memory of at most {most} bytes"
    )]
    OtherRam {
        /// The VM.
        vm: String,
        /// The machine's RAM.
        main: String,
        /// Bytes of the others.
        bytes: u64,
        /// Name of the largest.
        largest: String,
        /// The most that is taken.
        most: u64,
    },
    /// Guest RAM cannot be opened.
    #[error("VM {vm}: guest RAM cannot be opened")]
    Ram {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: RamError,
    },
    /// The VMM did not answer or refused.
    #[error("VM {vm}: {doing} failed")]
    Qmp {
        /// The VM.
        vm: String,
        /// What was tried.
        doing: &'static str,
        /// Why.
        #[source]
        source: QmpError,
    },
    /// No socket for the stream.
    #[error("VM {vm}: the socket {path} for its migration cannot be made")]
    Socket {
        /// The VM.
        vm: String,
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The VMM did not come.
    #[error("VM {vm}: its QEMU did not connect to {path}: see `query-migrate` there")]
    NotConnected {
        /// The VM.
        vm: String,
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: RelayError,
    },
    /// No thread for the stream.
    #[error("VM {vm}: no thread to read its migration")]
    Thread {
        /// The VM.
        vm: String,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// Out of turn.
    #[error("VM {vm}: its migration has not been begun, or is over")]
    NotBegun {
        /// The VM.
        vm: String,
    },
    /// QEMU does not stop the guest.
    #[error("VM {vm}: QEMU did not stop it for the switch within {limit_s} s")]
    NotStopped {
        /// The VM.
        vm: String,
        /// How long it had.
        limit_s: u64,
    },
    /// The stream broke off.
    #[error("VM {vm}: QEMU's migration stream broke off: {why}")]
    Broken {
        /// The VM.
        vm: String,
        /// Why.
        why: String,
    },
    /// The rest of the stream did not get to the target.
    #[error("VM {vm}: its device state did not get to the target")]
    Forward {
        /// The VM.
        vm: String,
        /// What failed.
        #[source]
        source: std::io::Error,
    },
    /// QEMU's migration did not complete.
    #[error("VM {vm}: QEMU's migration ended as {status:?}: {why}")]
    State {
        /// The VM.
        vm: String,
        /// How it ended.
        status: MigrationStatus,
        /// QEMU's words.
        why: String,
    },
}

/// A stream that stream mode cannot take, though it may be one.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FilterError {
    /// The block of the machine's RAM is another than was looked at.
    #[error("expected the RAM block `{main}` of {wanted} bytes, the stream lists {found}")]
    MainBlock {
        /// Its name.
        main: String,
        /// Its length.
        wanted: u64,
        /// What the stream has.
        found: String,
    },
    /// Before RAM has ended something came whose length the stream does not
    /// tell, so that the pages behind it are not seen.
    #[error(
        "something came before the end of RAM whose length the stream does not tell, so that pages \
         cannot be told from it: remove the device, or switch off the migration capability that adds \
         it (dirty-bitmaps, block, early virtio-mem)"
    )]
    Undelimited,
    /// More than is held.
    #[error("{what} has more than {most} bytes, which the agent would have to hold")]
    TooMuch {
        /// What.
        what: &'static str,
        /// The cap.
        most: usize,
    },
}
