//! Starting a VMM that embeds `drover-vmm`: it stays in the foreground, and is
//! up when its link answers.

use super::error::LaunchError;
use super::{START_LIMIT, blocking, log_tail, open_log};
use crate::vmm::definition::VmPaths;
use crate::vmm::kvm_log::{LinkClient, LinkClientError};
use crate::vmm::process::VmProcess;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::process::Child;

/// How often its socket is tried.
const POLL: Duration = Duration::from_millis(5);

/// Tells a VMM, and whoever looks for one that nobody drives, whose it is.
const MARK: &str = "DROVER_VM_DIR";

/// The entry of its environment by which a VMM of these paths is known.
pub(super) fn mark(paths: &VmPaths) -> Vec<u8> {
    let mut mark = format!("{MARK}=").into_bytes();
    mark.extend_from_slice(paths.dir.as_os_str().as_bytes());
    mark
}

/// A VMM that is coming up.
pub(super) struct Started<'a> {
    vm: &'a str,
    binary: &'a Path,
    log: &'a Path,
    /// Where its log begins.
    begin: u64,
    /// Not killed with us. If it ends while we live, tokio reaps it.
    child: Child,
    /// The same.
    pub(super) process: Arc<VmProcess>,
}

impl<'a> Started<'a> {
    /// Starts it so that it outlives us: what it says goes to its log, signals
    /// to our process group pass it by.
    pub(super) fn spawn(
        vm: &'a str,
        binary: &'a Path,
        args: &[String],
        paths: &VmPaths,
        log: &'a Path,
    ) -> Result<Started<'a>, LaunchError> {
        let (begin, out, err) = open_log(vm, log)?;
        let mut child = tokio::process::Command::new(binary)
            .args(args)
            .env(MARK, &paths.dir)
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .map_err(|e| LaunchError::NotStarted {
                vm: vm.to_owned(),
                binary: binary.to_owned(),
                status: e.to_string(),
                output: "check vmm.binary in its definition".to_owned(),
            })?;
        // It has not been waited for: there is a number, and it is its own.
        let pid = child.id().unwrap_or_default() as i32;
        let process = VmProcess::open(pid).inspect_err(|_| drop(child.start_kill()))?;
        Ok(Started {
            vm,
            binary,
            log,
            begin,
            child,
            process: Arc::new(process),
        })
    }

    /// Waits until it answers on its link, which has to be its own.
    pub(super) async fn link(&mut self, socket: &Path) -> Result<LinkClient, LaunchError> {
        let until = Instant::now() + START_LIMIT;
        let link = loop {
            let (name, path) = (self.vm.to_owned(), socket.to_owned());
            match blocking(move || LinkClient::connect(&name, &path)).await {
                Ok(link) => break link,
                Err(LinkClientError::Connect { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.failed(status.to_string()));
            }
            if Instant::now() > until {
                let what = format!(
                    "nobody listens on {} after {START_LIMIT:?}",
                    socket.display()
                );
                return Err(self.failed(what));
            }
            tokio::time::sleep(POLL).await;
        };
        if link.pid() != self.process.pid() {
            return Err(LaunchError::WrongProcess {
                pid: link.pid(),
                path: socket.to_owned(),
                why: format!(
                    "process {} was started: the VMM has to stay in the foreground and serve the \
                     link itself",
                    self.process.pid()
                ),
            });
        }
        Ok(link)
    }

    fn failed(&self, status: String) -> LaunchError {
        LaunchError::NotStarted {
            vm: self.vm.to_owned(),
            binary: PathBuf::from(self.binary),
            status,
            output: log_tail(self.log, self.begin),
        }
    }
}
