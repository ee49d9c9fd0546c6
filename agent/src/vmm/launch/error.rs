//! What goes wrong in starting and ending VMMs.

use crate::vmm::definition::DefinitionError;
use crate::vmm::kvm_log::LinkClientError;
use crate::vmm::process::ProcessError;
use crate::vmm::qmp::QmpError;
use crate::vmm::ram::RamError;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a VMM could not be started, adopted or ended.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// The definition cannot be expanded here.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// No RAM file.
    #[error("VM {vm}: no RAM for it")]
    Ram {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: RamError,
    },
    /// There is something of this name already.
    #[error(
        "VM {vm}: {dir} exists already: a VM of this name runs here, or one ended without cleaning up; make sure none runs, then remove it"
    )]
    Exists {
        /// The VM.
        vm: String,
        /// Its run directory.
        dir: PathBuf,
    },
    /// A file operation failed.
    #[error("VM {vm}: {what} {path} failed")]
    File {
        /// The VM.
        vm: String,
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The VMM did not start.
    #[error("VM {vm}: {binary} did not start ({status}): {output}")]
    NotStarted {
        /// The VM.
        vm: String,
        /// The binary.
        binary: PathBuf,
        /// How it ended.
        status: String,
        /// What it said.
        output: String,
    },
    /// The process found is not the VMM.
    #[error("process {pid} behind {path} is no VMM that can be adopted: {why}")]
    WrongProcess {
        /// The process.
        pid: i32,
        /// Pid file or socket that led to it.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The VMM's process cannot be held.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// QEMU does not answer.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// Nor does another VMM, or its RAM is not what can be moved.
    #[error(transparent)]
    Link(#[from] LinkClientError),
}

pub(super) fn file_error(
    vm: &str,
    what: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> LaunchError {
    let (vm, path) = (vm.to_owned(), path.to_owned());
    move |source| LaunchError::File {
        vm,
        what,
        path,
        source,
    }
}
