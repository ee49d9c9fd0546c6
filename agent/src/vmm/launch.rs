//! VMMs: starting them, taking hold of those that run, and ending them.
//!
//! QEMU daemonizes itself: its start errors come back in order, on stderr with
//! an exit status. A VMM that embeds `drover-vmm` is a child of the agent, which
//! it outlives: the agent waits for its link to answer, or for its end.

mod control;
mod error;
mod leftovers;
mod linked;
mod qemu;
mod start;

pub use control::{Control, ControlError, NoMonitor, Vmm};
pub use error::LaunchError;
pub use leftovers::{end_leftovers, has_leftover, remove_files};
pub use start::Launched;

pub use super::definition::Role;

use error::file_error;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

/// How long a VMM may take until it answers. Locking or preallocating much RAM
/// takes a while.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a VMM may take to end after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How much of a VMM's log an error carries.
const LOG_TAIL: u64 = 2048;

/// Runs blocking work off the runtime's thread.
pub(super) async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(f).await {
        Ok(value) => value,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}

/// Opens a VMM's log for what it will say: where that begins, and the file twice.
fn open_log(vm: &str, log: &Path) -> Result<(u64, fs::File, fs::File), LaunchError> {
    let mut file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .map_err(file_error(vm, "opening the log", log))?;
    let begin = file
        .seek(SeekFrom::End(0))
        .map_err(file_error(vm, "reading the log", log))?;
    let again = file
        .try_clone()
        .map_err(file_error(vm, "opening the log", log))?;
    Ok((begin, file, again))
}

/// The last of what a log holds after byte `from`.
fn log_tail(log: &Path, from: u64) -> String {
    let read = || -> io::Result<String> {
        let mut file = fs::File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(from.max(len.saturating_sub(LOG_TAIL))))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    read().unwrap_or_else(|e| format!("(its log {} cannot be read: {e})", log.display()))
}
