//! Starting and ending QEMU processes.
//!
//! QEMU daemonizes itself: its start errors come back in order, on stderr with
//! an exit status, and it is no child that would end with the agent.

use super::definition::{Definition, DefinitionError, VmPaths};
use super::process::{ProcessError, VmProcess};
use super::qmp::{Qmp, QmpError, RunState};
use super::ram::{RamError, RamFile};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// How long QEMU may take from start to daemonized. Locking or preallocating
/// much RAM takes a while.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a VMM may take to end after `quit` before it is killed.
const QUIT_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to end after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How much of QEMU's log an error carries.
const LOG_TAIL: u64 = 2048;

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
    /// QEMU did not start.
    #[error("VM {vm}: {binary} did not start ({status}): {output}")]
    Qemu {
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
        /// Pid file or QMP socket that led to it.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The VMM's process cannot be held.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The VMM does not answer.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

/// What a VMM is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// To run the guest from its start.
    Run,
    /// To wait, stopped, for a migration's state (`-S -incoming defer`).
    Incoming,
}

/// A VMM with its QMP connection. Cloning shares both. Dropping it leaves the
/// VM running.
#[derive(Debug, Clone)]
pub struct Vmm {
    /// The VM's name.
    pub name: String,
    /// Its process.
    pub process: Arc<VmProcess>,
    /// Its monitor.
    pub qmp: Qmp,
    /// Its log, if we started it.
    pub log: Option<PathBuf>,
}

impl Vmm {
    /// Takes hold of a running VMM by its QMP socket; `pid` where the socket
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
            qmp,
            log: None,
        })
    }

    /// What the VMM says of its guest.
    pub async fn status(&self) -> Result<RunState, QmpError> {
        self.qmp.status().await
    }

    /// The socket by which it is driven.
    pub fn socket(&self) -> &Path {
        self.qmp.path()
    }

    /// The end of what QEMU has logged, for errors.
    pub fn log_tail(&self) -> String {
        self.log
            .as_deref()
            .map(|log| log_tail(log, 0))
            .unwrap_or_default()
    }

    /// Ends the VMM: `quit`, and SIGKILL if it does not listen.
    pub async fn end(&self) -> Result<(), ProcessError> {
        if self.process.is_alive() && self.qmp.quit().await.is_ok() {
            let process = self.process.clone();
            if blocking(move || process.wait_exit(QUIT_LIMIT)).await {
                return Ok(());
            }
            tracing::warn!(vm = self.name, "VMM does not quit, killing it");
        }
        let process = self.process.clone();
        blocking(move || process.kill_and_wait(KILL_LIMIT)).await
    }
}

/// Runs blocking work off the runtime's thread.
pub(super) async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(f).await {
        Ok(value) => value,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}

/// What belongs to a VM that the agent started: on drop the VMM is killed and
/// its files are removed, unless [`Launched::keep`] was called.
#[derive(Debug)]
pub struct Launched {
    vmm: Option<Vmm>,
    // Fields drop in this order: the RAM file goes after the VMM that has it mapped.
    killer: Killer,
    ram: RamFile,
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
        let ram = RamFile::create(&paths.ram, definition.ram_bytes).map_err(|source| {
            LaunchError::Ram {
                vm: vm.into(),
                source,
            }
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
            qmp,
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
        let Launched { ram, .. } = self;
        ram.keep();
        vmm
    }
}

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
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let names_it = |pid: &i32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments: Vec<&[u8]> = arguments.split(|b| *b == 0).collect();
        arguments
            .windows(2)
            .any(|pair| pair[0] == b"-pidfile" && pair[1] == pidfile.as_os_str().as_bytes())
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

/// The VM's run directory, made by us.
#[derive(Debug)]
struct RunDir {
    dir: PathBuf,
    armed: bool,
}

impl RunDir {
    fn create(vm: &str, dir: &Path) -> Result<RunDir, LaunchError> {
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

fn file_error(vm: &str, what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LaunchError {
    let (vm, path) = (vm.to_owned(), path.to_owned());
    move |source| LaunchError::File {
        vm,
        what,
        path,
        source,
    }
}
