//! What can go wrong with a VM that its manager moves.

use crate::vmm::cloud_hypervisor::SendError;
use crate::vmm::process::ProcessError;
use crate::vmm::qemu_stream::StreamError;
use crate::vmm::ram::RamError;
use crate::vmm::relay::RelayError;
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// What can go wrong on either side. Messages carry the VM's name.
#[derive(Debug, Error)]
pub enum ManagedError {
    /// Nobody listens.
    #[error(
        "VM {vm}: nobody listens on {path}: its migration has to be started with this path in \
         --migrateuri, and libvirtd here must see the same directory as the agent"
    )]
    NobodyListens {
        /// The VM.
        vm: String,
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A socket failed.
    #[error("VM {vm}: its migration's socket failed while {doing}")]
    Socket {
        /// The VM.
        vm: String,
        /// What was tried.
        doing: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// It was opened and nothing was said, or it was closed.
    #[error("VM {vm}: {what}")]
    Silent {
        /// The VM.
        vm: String,
        /// What was waited for.
        what: String,
    },
    /// What came is no stream that can be carried.
    #[error("VM {vm}: its migration cannot be carried")]
    Stream {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: StreamError,
    },
    /// It is a stream of another sort.
    #[error("VM {vm}: its migration cannot be carried: {why}")]
    Unfit {
        /// The VM.
        vm: String,
        /// Why, and what to leave out.
        why: String,
    },
    /// The target's Cloud Hypervisor does not take it.
    #[error(transparent)]
    Target {
        /// Why.
        source: SendError,
    },
    /// The VMM behind the socket cannot be told.
    #[error("VM {vm}: cannot tell which process is at the other end of its migration's socket")]
    Peer {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: PeerError,
    },
    /// The process behind the socket may not be one.
    #[error(
        "VM {vm}: process {pid} at the other end of its migration's socket runs {exe}, which is not \
         among `qemu_binaries` and `vmm_binaries` in agent.toml here"
    )]
    Stranger {
        /// The VM.
        vm: String,
        /// The process.
        pid: i32,
        /// What it runs.
        exe: PathBuf,
    },
    /// The VMM's process cannot be looked at.
    #[error("VM {vm}: its VMM cannot be looked at")]
    Process {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: ProcessError,
    },
    /// Guest RAM cannot be told from other memory.
    #[error("VM {vm}: guest RAM cannot be found in the memory of process {pid}: {why}")]
    NoRam {
        /// The VM.
        vm: String,
        /// The VMM.
        pid: i32,
        /// What was found.
        why: String,
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
    /// No thread for the stream.
    #[error("VM {vm}: no thread to read its migration")]
    Thread {
        /// The VM.
        vm: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Out of turn.
    #[error("VM {vm}: its stream has not been begun, or is over")]
    NotBegun {
        /// The VM.
        vm: String,
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
        source: io::Error,
    },
    /// The target's VMM did not take it.
    #[error(
        "VM {vm}: the VMM of its target failed to load it: see its log there (libvirt has one for each VM)"
    )]
    NotLoaded {
        /// The VM.
        vm: String,
    },
    /// The target was told to let it run, and whether it does is not known.
    #[error(
        "VM {vm}: its target was told to let it run, and has not confirmed that: it stands still here \
         as long as this agent lives. Look at both VMMs (`ch-remote info`); if it runs at its target, \
         end the one here; if it does not, end the one there first, then restart this agent, and it \
         runs on here"
    )]
    Unconfirmed {
        /// The VM.
        vm: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The connection between the source agent and the target's QEMU broke.
    #[error("VM {vm}: the rest of its stream did not get into its QEMU")]
    Play {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: RelayError,
    },
}

/// Why the process at the other end of a Unix socket cannot be told.
#[derive(Debug, Error)]
pub enum PeerError {
    /// The kernel was not asked, or gave no answer.
    #[error("the kernel's socket diagnosis failed ({doing}); it needs CONFIG_UNIX_DIAG")]
    Diagnosis {
        /// What was tried.
        doing: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The socket is not in this network namespace.
    #[error(
        "the kernel does not know its own end here: who connected is in another network namespace \
         than the agent"
    )]
    OtherNamespace,
    /// The answer is not understood.
    #[error("the kernel's socket diagnosis gave an answer that is not understood")]
    Answer,
    /// `/proc` cannot be read.
    #[error("cannot look through /proc")]
    Proc(#[source] io::Error),
    /// Nobody has it, or several have.
    #[error(
        "{holders} processes hold it (visible to the agent, which needs CAP_SYS_PTRACE in the \
         host's pid namespace)"
    )]
    Holders {
        /// How many.
        holders: usize,
    },
    /// It ended meanwhile.
    #[error(transparent)]
    Gone(#[from] ProcessError),
}
