//! A VMM, and what it is driven by.

use super::error::LaunchError;
use super::{KILL_LIMIT, blocking, log_tail};
use crate::vmm::definition::{Definition, Family};
use crate::vmm::kvm_log::{LinkClient, LinkClientError, run_state};
use crate::vmm::process::{ProcessError, VmProcess};
use crate::vmm::qmp::{Qmp, QmpError, RunState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// How long a VMM may take to end after it was told to, before it is killed.
const QUIT_LIMIT: Duration = Duration::from_secs(10);

/// What a VMM is driven by. Cloning shares it.
#[derive(Debug, Clone)]
pub enum Control {
    /// QEMU's monitor.
    Qmp(Qmp),
    /// The link of a VMM that embeds `drover-vmm`.
    Link(Arc<LinkClient>),
}

impl Control {
    /// In an operator's words.
    pub fn name(&self) -> &'static str {
        match self {
            Control::Qmp(_) => "QMP",
            Control::Link(_) => "a link of drover-vmm",
        }
    }
}

/// A VMM does not answer, or refuses.
#[derive(Debug, Error)]
pub enum ControlError {
    /// On QMP.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// On its link.
    #[error(transparent)]
    Link(#[from] LinkClientError),
}

/// What was asked can only be done through QEMU's monitor.
#[derive(Debug, Error)]
#[error(
    "VM {vm} is driven by {by}, not by QMP: give its definition the kind that goes with that, or `auto`"
)]
pub struct NoMonitor {
    /// The VM.
    pub vm: String,
    /// What drives it.
    pub by: &'static str,
}

/// A VMM with what drives it. Cloning shares both. Dropping it leaves the VM
/// running.
#[derive(Debug, Clone)]
pub struct Vmm {
    /// The VM's name.
    pub name: String,
    /// Its process.
    pub process: Arc<VmProcess>,
    /// What it is driven by.
    pub control: Control,
    /// Its log, if we started it.
    pub log: Option<PathBuf>,
}

impl Vmm {
    /// Takes hold of a running QEMU by its QMP socket; `pid` where the socket
    /// was made by another process (libvirt passes it on).
    pub async fn adopt(name: &str, socket: &Path, pid: Option<i32>) -> Result<Vmm, LaunchError> {
        let qmp = Qmp::connect(socket).await?;
        let pid = pid
            .or(qmp.peer_pid())
            .ok_or_else(|| LaunchError::WrongProcess {
                pid: 0,
                path: socket.to_owned(),
                why: "its number is not visible here (another pid namespace?)".into(),
            })?;
        let process = VmProcess::open(pid)?;
        let wrong = |why: String| LaunchError::WrongProcess {
            pid,
            path: socket.to_owned(),
            why,
        };
        let exe = process.exe()?;
        let threads = qmp
            .execute("query-cpus-fast", serde_json::Value::Null)
            .await?;
        // The VMM's own word for its threads: proof that socket and process belong together.
        let thread = threads[0]["thread-id"]
            .as_u64()
            .ok_or_else(|| wrong("it has no vCPU".into()))?;
        if !process.proc_path("task").join(thread.to_string()).exists() {
            return Err(wrong(format!(
                "{} does not have the vCPU thread {thread} that the monitor names; give the VMM's pid",
                exe.display()
            )));
        }
        process.check_alive()?;
        Ok(Vmm {
            name: name.to_owned(),
            process: Arc::new(process),
            control: Control::Qmp(qmp),
            log: None,
        })
    }

    /// Takes hold of a running VMM that embeds `drover-vmm`, by its link.
    pub async fn adopt_linked(name: &str, socket: &Path) -> Result<Vmm, LaunchError> {
        let (vm, path) = (name.to_owned(), socket.to_owned());
        let link = blocking(move || LinkClient::connect(&vm, &path)).await?;
        if link.pid() == 0 {
            return Err(LaunchError::WrongProcess {
                pid: 0,
                path: socket.to_owned(),
                why: "its number is not visible here (another pid namespace?)".into(),
            });
        }
        let process = VmProcess::open(link.pid())?;
        // Who still answers is the one that the number is of.
        let link = Arc::new(link);
        let asked = link.clone();
        blocking(move || asked.status()).await?;
        Ok(Vmm {
            name: name.to_owned(),
            process: Arc::new(process),
            control: Control::Link(link),
            log: None,
        })
    }

    /// Takes hold of the running VMM of a definition, by the socket it has.
    pub async fn find(definition: &Definition, socket: &Path) -> Result<Vmm, LaunchError> {
        match definition.family {
            Family::Qemu => Self::adopt(&definition.name, socket, None).await,
            Family::Linked => Self::adopt_linked(&definition.name, socket).await,
        }
    }

    /// QEMU's monitor. For code that is about QEMU: fails of other VMMs.
    pub fn qmp(&self) -> Result<&Qmp, NoMonitor> {
        match &self.control {
            Control::Qmp(qmp) => Ok(qmp),
            other => Err(NoMonitor {
                vm: self.name.clone(),
                by: other.name(),
            }),
        }
    }

    /// What the VMM says of its guest, in QEMU's words.
    pub async fn status(&self) -> Result<RunState, ControlError> {
        match &self.control {
            Control::Qmp(qmp) => Ok(qmp.status().await?),
            Control::Link(link) => {
                let link = link.clone();
                Ok(run_state(blocking(move || link.status()).await?))
            }
        }
    }

    /// The socket by which it is driven.
    pub fn socket(&self) -> &Path {
        match &self.control {
            Control::Qmp(qmp) => qmp.path(),
            Control::Link(link) => link.socket(),
        }
    }

    /// Whether it is known to have ended without having let its guest run
    /// since it was last told anything.
    pub fn ended_unresumed(&self) -> bool {
        match &self.control {
            Control::Qmp(qmp) => qmp.ended_unresumed(),
            // Nothing tells in what order it did what it was told.
            Control::Link(_) => false,
        }
    }

    /// The end of what the VMM has logged, for errors.
    pub fn log_tail(&self) -> String {
        self.log
            .as_deref()
            .map(|log| log_tail(log, 0))
            .unwrap_or_default()
    }

    /// Ends the VMM: it is told to, and killed if it does not listen.
    pub async fn end(&self) -> Result<(), ProcessError> {
        if self.process.is_alive() && self.quit().await {
            let process = self.process.clone();
            if blocking(move || process.wait_exit(QUIT_LIMIT)).await {
                return Ok(());
            }
            tracing::warn!(vm = self.name, "VMM does not quit, killing it");
        }
        let process = self.process.clone();
        blocking(move || process.kill_and_wait(KILL_LIMIT)).await
    }

    /// Tells it to end; whether it heard.
    async fn quit(&self) -> bool {
        match &self.control {
            Control::Qmp(qmp) => qmp.quit().await.is_ok(),
            Control::Link(link) => {
                let link = link.clone();
                blocking(move || link.end()).await.is_ok()
            }
        }
    }
}
