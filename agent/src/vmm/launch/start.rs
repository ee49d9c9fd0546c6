//! Starting QEMU.

use super::control::{Control, Vmm};
use super::error::{LaunchError, file_error};
use super::leftovers::RunDir;
use super::{KILL_LIMIT, log_tail};
use crate::vmm::definition::{Definition, VmPaths};
use crate::vmm::process::VmProcess;
use crate::vmm::qmp::Qmp;
use crate::vmm::ram::RamFile;
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

/// How long QEMU may take from start to daemonized. Locking or preallocating
/// much RAM takes a while.
const START_LIMIT: Duration = Duration::from_secs(60);

/// What a VMM is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// To run the guest from its start.
    Run,
    /// To wait, stopped, for a migration's state (`-S -incoming defer`).
    Incoming,
}
/// What belongs to a VM that the agent started: on drop the VMM is killed and
/// its files are removed, unless [`Launched::keep`] was called.
#[derive(Debug)]
pub struct Launched {
    vmm: Option<Vmm>,
    // Fields drop in this order: the RAM file goes after the VMM that has it mapped.
    killer: Killer,
    ram: Option<RamFile>,
    dir: RunDir,
}

impl Launched {
    /// Starts a VMM for `definition`: run directory, RAM file, QEMU, QMP. On
    /// failure nothing is left behind, and the error carries QEMU's own words.
    pub async fn start(
        definition: &Definition,
        paths: &VmPaths,
        host: &BTreeMap<String, String>,
        role: Role,
    ) -> Result<Launched, LaunchError> {
        let vm = definition.name.as_str();
        let args = full_args(definition, paths, host, role)?;
        let dir = RunDir::create(vm, &paths.dir)?;
        let ram = definition
            .has_ram_file()
            .then(|| RamFile::create(&paths.ram, definition.ram_bytes))
            .transpose()
            .map_err(|source| LaunchError::Ram {
                vm: vm.into(),
                source,
            })?;
        let file = paths.definition();
        fs::write(&file, &definition.text).map_err(file_error(vm, "writing", &file))?;
        // From here on a daemon may exist: it is found by its pid file, also if
        // this future is dropped.
        let mut launched = Launched {
            vmm: None,
            killer: Killer {
                process: None,
                pidfile: paths.pidfile(),
                binary: definition.binary.clone(),
                armed: true,
            },
            ram,
            dir,
        };
        run_daemonizing(vm, &definition.binary, &args, &paths.log()).await?;
        let process = Arc::new(process_of_pidfile(&paths.pidfile(), &definition.binary)?);
        launched.killer.process = Some(process.clone());
        let qmp = Qmp::connect(&paths.qmp()).await?;
        launched.vmm = Some(Vmm {
            name: vm.to_owned(),
            process,
            control: Control::Qmp(qmp),
            log: Some(paths.log()),
        });
        Ok(launched)
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        self.vmm.as_ref().expect("set before `start` returns")
    }

    /// Leaves the VM running and its files in place.
    pub fn keep(mut self) -> Vmm {
        self.killer.armed = false;
        self.dir.armed = false;
        let vmm = self.vmm.take().expect("set before `start` returns");
        if let Some(ram) = self.ram.take() {
            ram.keep();
        }
        vmm
    }
}
#[derive(Debug)]
struct Killer {
    process: Option<Arc<VmProcess>>,
    pidfile: PathBuf,
    binary: PathBuf,
    armed: bool,
}

impl Drop for Killer {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let process = self.process.take().or_else(|| {
            process_of_pidfile(&self.pidfile, &self.binary)
                .ok()
                .map(Arc::new)
        });
        if let Some(process) = process
            && let Err(error) = process.kill_and_wait(KILL_LIMIT)
        {
            tracing::error!(pid = process.pid(), %error, "VMM could not be ended");
        }
    }
}

/// The definition's arguments and those the agent adds.
fn full_args(
    definition: &Definition,
    paths: &VmPaths,
    host: &BTreeMap<String, String>,
    role: Role,
) -> Result<Vec<String>, LaunchError> {
    let mut args = definition.expand(paths, host)?;
    let path = |p: PathBuf| p.display().to_string();
    // A definition may set up the agent's monitor itself.
    if !definition.args.iter().any(|arg| arg.contains("{qmp}")) {
        let qmp = format!("unix:{},server=on,wait=off", path(paths.qmp()));
        args.extend(["-qmp".into(), qmp]);
    }
    args.extend([
        "-pidfile".into(),
        path(paths.pidfile()),
        // After daemonizing, QEMU keeps stderr only if it has a log file.
        "-D".into(),
        path(paths.log()),
        "-daemonize".into(),
    ]);
    if role == Role::Incoming {
        args.extend(["-S", "-incoming", "defer"].map(str::to_owned));
    }
    Ok(args)
}

/// Runs the command until it has daemonized.
async fn run_daemonizing(
    vm: &str,
    binary: &Path,
    args: &[String],
    log: &Path,
) -> Result<(), LaunchError> {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .map_err(file_error(vm, "opening the log", log))?;
    let begin = file
        .seek(SeekFrom::End(0))
        .map_err(file_error(vm, "reading the log", log))?;
    let err = file
        .try_clone()
        .map_err(file_error(vm, "opening the log", log))?;
    let failed = |status: String, output| LaunchError::Qemu {
        vm: vm.to_owned(),
        binary: binary.to_owned(),
        status,
        output,
    };
    let mut child = tokio::process::Command::new(binary)
        .args(args)
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(err)
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| failed(e.to_string(), "check qemu.binary in its definition".into()))?;
    match tokio::time::timeout(START_LIMIT, child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) if status.signal() == Some(libc::SIGSYS) => {
            let hint = "its -sandbox forbids what -daemonize needs: leave out spawn=deny and elevateprivileges=deny";
            Err(failed(status.to_string(), hint.into()))
        }
        Ok(Ok(status)) => Err(failed(status.to_string(), log_tail(log, begin))),
        Ok(Err(e)) => Err(failed(e.to_string(), log_tail(log, begin))),
        Err(_) => Err(failed(
            format!("not ready after {START_LIMIT:?}"),
            log_tail(log, begin),
        )),
    }
}
/// The process a pid file names, checked to run `binary`.
fn process_of_pidfile(pidfile: &Path, binary: &Path) -> Result<VmProcess, LaunchError> {
    let wrong = |pid, why: String| LaunchError::WrongProcess {
        pid,
        path: pidfile.to_owned(),
        why,
    };
    let text = fs::read_to_string(pidfile)
        .map_err(|e| wrong(0, format!("the pid file cannot be read: {e}")))?;
    let pid = text
        .trim()
        .parse()
        .map_err(|_| wrong(0, "the pid file holds no number".into()))?;
    let process = VmProcess::open(pid)?;
    let id = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino()));
    match (id(&process.proc_path("exe")), id(binary)) {
        (Ok(runs), Ok(wanted)) if runs == wanted => {}
        _ => return Err(wrong(pid, format!("it does not run {}", binary.display()))),
    }
    process.check_alive()?;
    Ok(process)
}
