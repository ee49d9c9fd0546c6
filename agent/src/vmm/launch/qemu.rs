//! Starting QEMU, which daemonizes itself.

use super::error::LaunchError;
use super::{START_LIMIT, log_tail, open_log};
use crate::vmm::definition::{Definition, Family, Role, VmPaths};
use crate::vmm::process::VmProcess;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// The definition's arguments and those the agent adds.
pub(super) fn full_args(
    definition: &Definition,
    paths: &VmPaths,
    host: &BTreeMap<String, String>,
    role: Role,
) -> Result<Vec<String>, LaunchError> {
    let mut args = definition.expand(paths, host, role)?;
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
        path(paths.log(Family::Qemu)),
        "-daemonize".into(),
    ]);
    if role == Role::Incoming {
        args.extend(["-S", "-incoming", "defer"].map(str::to_owned));
    }
    Ok(args)
}

/// Runs the command until it has daemonized.
pub(super) async fn run_daemonizing(
    vm: &str,
    binary: &Path,
    args: &[String],
    log: &Path,
) -> Result<(), LaunchError> {
    let (begin, out, err) = open_log(vm, log)?;
    let failed = |status: String, output| LaunchError::NotStarted {
        vm: vm.to_owned(),
        binary: binary.to_owned(),
        status,
        output,
    };
    let mut child = tokio::process::Command::new(binary)
        .args(args)
        .stdin(Stdio::null())
        .stdout(out)
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
pub(super) fn process_of_pidfile(pidfile: &Path, binary: &Path) -> Result<VmProcess, LaunchError> {
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
