//! Why direct mode refuses a VM.

use super::MIN_VERSION;
use crate::vmm::dirty::KernelError;
use crate::vmm::launch::NoMonitor;
use crate::vmm::process::ProcessError;
use crate::vmm::qmp::{QmpError, Version};
use crate::vmm::ram::RamError;
use std::path::PathBuf;
use thiserror::Error;

/// Why direct mode refuses a VM. Messages carry its name and the remedy.
#[derive(Debug, Error)]
pub enum PreflightError {
    /// It is no QEMU of ours.
    #[error(transparent)]
    NoMonitor(#[from] NoMonitor),
    /// The kernel cannot.
    #[error("VM {vm}: this host's kernel cannot watch guest RAM")]
    Kernel {
        /// The VM.
        vm: String,
        /// What is missing.
        #[source]
        source: KernelError,
    },
    /// QEMU is too old.
    #[error(
        "VM {vm}: QEMU {have} is older than {MIN_VERSION}, which direct mode needs: restart the VM on a newer one"
    )]
    OldQemu {
        /// The VM.
        vm: String,
        /// Its version.
        have: Version,
    },
    /// QEMU lacks a migration capability.
    #[error(
        "VM {vm}: its QEMU {version} has no migration capability `{capability}`: use another QEMU, or stream mode"
    )]
    NoCapability {
        /// The VM.
        vm: String,
        /// Its QEMU's version.
        version: Version,
        /// The capability.
        capability: &'static str,
    },
    /// A capability that does not go together with direct mode is on.
    #[error(
        "VM {vm}: the migration capability `{capability}` is on and cannot be combined with direct mode: switch it off (QMP migrate-set-capabilities)"
    )]
    Capability {
        /// The VM.
        vm: String,
        /// The capability.
        capability: String,
    },
    /// Not one memory backend.
    #[error(
        "VM {vm} has {count} memory backends ({names}); direct mode wants all guest RAM in one: drop NUMA nodes and DIMMs from its arguments, or use stream mode"
    )]
    Backends {
        /// The VM.
        vm: String,
        /// How many.
        count: usize,
        /// Their ids.
        names: String,
    },
    /// RAM is not a file.
    #[error(
        "VM {vm}: guest RAM `{backend}` is a {type_name}, which others cannot share by name; use -object memory-backend-file,id=…,size=…,mem-path={{ram}},share=on -machine …,memory-backend=…"
    )]
    BackendType {
        /// The VM.
        vm: String,
        /// Id of the backend.
        backend: String,
        /// Its type.
        type_name: String,
    },
    /// `share=off`.
    #[error(
        "VM {vm}: guest RAM `{backend}` ({path}) has share=off, so what the guest writes never reaches the file: add share=on to the memory-backend-file and restart the VM"
    )]
    NotShared {
        /// The VM.
        vm: String,
        /// Id of the backend.
        backend: String,
        /// Its file.
        path: PathBuf,
    },
    /// `mem-path` is a directory.
    #[error(
        "VM {vm}: mem-path={path} is a directory, so guest RAM is a file without a name: give it the path of a file in it"
    )]
    Unnamed {
        /// The VM.
        vm: String,
        /// The directory.
        path: PathBuf,
    },
    /// The RAM file is not mapped as it must be.
    #[error("VM {vm}: its RAM cannot be shared")]
    Ram {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: RamError,
    },
    /// Much RAM outside of the file.
    #[error(
        "VM {vm}: {bytes} bytes of RAM blocks outside of its RAM file (largest: {largest}) would travel while it stands still: use stream mode"
    )]
    OtherRam {
        /// The VM.
        vm: String,
        /// Their size.
        bytes: u64,
        /// Name of the largest.
        largest: String,
    },
    /// A device whose writes to RAM nobody sees.
    #[error(
        "VM {vm}: {device} writes guest RAM past the dirty log (VFIO, vDPA and vhost-user do DMA of their own): unplug it first, or use stream mode"
    )]
    Device {
        /// The VM.
        vm: String,
        /// Type and id.
        device: String,
    },
    /// Another process can write guest RAM.
    #[error(
        "VM {vm}: process {pid} ({comm}) has its RAM mapped writable as well (a vhost-user back end?): end it, or use stream mode"
    )]
    SharedWith {
        /// The VM.
        vm: String,
        /// The other process.
        pid: i32,
        /// Its name.
        comm: String,
    },
    /// It migrates already.
    #[error("VM {vm} is being migrated already ({status}): let that end or cancel it")]
    Migrating {
        /// The VM.
        vm: String,
        /// The status of that migration.
        status: String,
    },
    /// Neither running nor paused.
    #[error(
        "VM {vm} is in state {state}, neither running nor paused: bring it back (`cont`) or end it"
    )]
    State {
        /// The VM.
        vm: String,
        /// Its state.
        state: String,
    },
    /// The definition says otherwise.
    #[error(
        "VM {vm}: its {what} is {have} but {wanted} on the {whose}: make both sides' definitions and QEMUs agree (name the machine with its version, e.g. pc-q35-7.2)"
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
        /// Where `wanted` is from.
        whose: &'static str,
    },
    /// An answer of QEMU's monitor is not understood.
    #[error("VM {vm}: cannot understand what QEMU {version} answers to `{command}`: {what}")]
    Monitor {
        /// The VM.
        vm: String,
        /// Its QEMU's version.
        version: Version,
        /// The command.
        command: &'static str,
        /// What is wrong.
        what: String,
    },
    /// The process cannot be looked at.
    #[error("VM {vm}: its process cannot be looked at")]
    Process {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: ProcessError,
    },
    /// The VMM does not answer.
    #[error("VM {vm}: its monitor does not answer")]
    Qmp {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: QmpError,
    },
}
