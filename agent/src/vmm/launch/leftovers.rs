//! What VMMs leave behind: files, and processes that nobody drives.

use super::error::{LaunchError, file_error};
use super::{KILL_LIMIT, linked};
use crate::vmm::definition::VmPaths;
use crate::vmm::process::{ProcessError, VmProcess};
use crate::vmm::ram::RamFile;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Removes what an ended VM leaves in `paths`.
pub fn remove_files(paths: &VmPaths) {
    drop(RamFile::adopt(paths.ram.clone()));
    drop(RunDir {
        dir: paths.dir.clone(),
        armed: true,
    });
}

/// VMMs that were started with these paths, whoever started them and however
/// far they came: an agent that was killed may have left one without a monitor.
fn leftovers(paths: &VmPaths) -> Vec<VmProcess> {
    let pidfile = paths.pidfile();
    let mark = linked::mark(paths);
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let parts = |pid: i32, file: &str| {
        let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let parts = bytes.split(|b| *b == 0).map(<[u8]>::to_vec);
        parts.collect::<Vec<_>>()
    };
    let names_it = |pid: &i32| {
        let qemu = parts(*pid, "cmdline")
            .windows(2)
            .any(|pair| pair[0] == b"-pidfile" && pair[1] == pidfile.as_os_str().as_bytes());
        qemu || parts(*pid, "environ").contains(&mark)
    };
    pids.filter(names_it)
        .filter_map(|pid| VmProcess::open(pid).ok())
        .filter(VmProcess::is_alive)
        .collect()
}

/// Whether a VMM of these paths lives.
pub fn has_leftover(paths: &VmPaths) -> bool {
    !leftovers(paths).is_empty()
}

/// Ends whatever VMM of these paths lives. Blocks.
pub fn end_leftovers(paths: &VmPaths) -> Result<(), ProcessError> {
    leftovers(paths)
        .iter()
        .try_for_each(|process| process.kill_and_wait(KILL_LIMIT))
}

/// The VM's run directory, made by us.
#[derive(Debug)]
pub(super) struct RunDir {
    dir: PathBuf,
    /// Whether dropping it removes it.
    pub(super) armed: bool,
}

impl RunDir {
    pub(super) fn create(vm: &str, dir: &Path) -> Result<RunDir, LaunchError> {
        if let Some(parent) = dir.parent() {
            fs::create_dir_all(parent).map_err(file_error(vm, "making the directory", parent))?;
        }
        fs::DirBuilder::new()
            .mode(0o700)
            .create(dir)
            .map_err(|source| match source.kind() {
                io::ErrorKind::AlreadyExists => LaunchError::Exists {
                    vm: vm.into(),
                    dir: dir.to_owned(),
                },
                _ => file_error(vm, "making the directory", dir)(source),
            })?;
        Ok(RunDir {
            dir: dir.to_owned(),
            armed: true,
        })
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(dir = %self.dir.display(), %error, "run directory could not be removed");
            }
            _ => {}
        }
    }
}
