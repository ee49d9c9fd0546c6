//! Who may ask what of the API, told by the `drover` binary run as other users
//! with other groups. The API it talks to is the real server; only what the
//! agent answers is written here. Needs root (to become others) and setpriv.

use drover::api::types::*;
use drover::api::{Access, ApiCall, ApiLimits, ApiServer};
use drover::config::HostGroup;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(20);
/// A user and groups that need not be known on this host.
const STRANGER: u32 = 61234;
const OPERATORS: u32 = 61301;
const LOOKERS: u32 = 61302;

/// An API server in this process, and the `drover` binary where everybody can
/// run it.
struct Api {
    dir: tempfile::TempDir,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Api {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        assert!(matches!(ended, Some(Ok(()))) || std::thread::panicking());
    }
}

impl Api {
    fn start(access: Access) -> Api {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests run commands as other users and need root"
        );
        let dir = tempfile::tempdir().unwrap();
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_drover"), dir.path().join("drover")).unwrap();
        std::fs::write(
            dir.path().join("plan.toml"),
            "gang = \"web\"\n[[vm]]\nname = \"w1\"\nfrom = \"a1\"\nto = \"b1\"\n",
        )
        .unwrap();
        let socket = dir.path().join("agent.sock");
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (ready, bound) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            tokio_uring::start(async move {
                let server = ApiServer::bind(&socket, access, ApiLimits::default()).unwrap();
                ready.send(()).unwrap();
                let (calls, queue) = tokio::sync::mpsc::channel(8);
                tokio::select! {
                    () = server.run(calls) => {}
                    () = answer(queue) => {}
                    _ = stopped => {}
                }
            });
        });
        bound.recv_timeout(LONG).unwrap();
        Api {
            dir,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    /// Runs `drover` as a user, with one group of its own and perhaps another.
    fn run_as(&self, uid: u32, gid: u32, groups: &[u32], args: &[&str]) -> (i32, String, String) {
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={uid}"), format!("--regid={gid}")]);
        match groups {
            [] => command.arg("--clear-groups"),
            groups => {
                let list: Vec<String> = groups.iter().map(u32::to_string).collect();
                command.arg(format!("--groups={}", list.join(",")))
            }
        };
        let output = command
            .arg(self.dir.path().join("drover"))
            .arg("--socket")
            .arg(self.socket())
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .output()
            .expect("setpriv of util-linux");
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    }
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

fn both_groups() -> Access {
    let group = |name: &str, gid| {
        let name = name.to_owned();
        Some(HostGroup { name, gid })
    };
    Access {
        full: group("operators", OPERATORS),
        read_only: group("lookers", LOOKERS),
    }
}

async fn answer(mut calls: tokio::sync::mpsc::Receiver<ApiCall>) {
    while let Some(call) = calls.recv().await {
        match call {
            ApiCall::ListVms { reply } => drop(reply.send(Ok(Vec::new()))),
            ApiCall::StopVm { reply, .. } => drop(reply.send(Ok(()))),
            ApiCall::StartMigration { reply, .. } => drop(reply.send(Ok(MigrationStarted {
                gang: "web".into(),
                id: None,
                checks: Vec::new(),
            }))),
            other => panic!("{other:?}"),
        }
    }
}

const LOOK: &[&str] = &["vm", "list"];
const CHANGE: &[&str] = &["vm", "stop", "w1"];
const DRY_RUN: &[&str] = &["migrate", "plan.toml", "--dry-run"];

#[test]
fn strangers_are_told_who_they_are_and_which_group_is_needed() {
    let api = Api::start(both_groups());
    assert_eq!(mode(&api.socket()), 0o666);
    for args in [LOOK, CHANGE, DRY_RUN] {
        let (code, stdout, stderr) = api.run_as(STRANGER, STRANGER, &[], args);
        assert_eq!((code, stdout.as_str()), (4, ""), "{stderr}");
        assert!(stderr.contains("user 61234 (group 61234"), "{stderr}");
        assert!(stderr.contains("group operators"), "{stderr}");
        assert!(stderr.contains("group lookers"), "{stderr}");
    }
}

#[test]
fn members_of_the_group_may_do_everything() {
    let api = Api::start(both_groups());
    for args in [LOOK, CHANGE, DRY_RUN] {
        for (uid, gid, groups) in [
            (STRANGER, OPERATORS, &[][..]),
            (STRANGER, STRANGER, &[7, OPERATORS][..]),
            (0, STRANGER, &[][..]),
        ] {
            let (code, _, stderr) = api.run_as(uid, gid, groups, args);
            assert_eq!(code, 0, "{uid} {gid} {groups:?} {args:?}: {stderr}");
        }
    }
}

#[test]
fn the_read_only_group_looks_and_changes_nothing() {
    let api = Api::start(both_groups());
    // More groups than are asked for at first.
    let many: Vec<u32> = (70_000..70_200).chain([LOOKERS]).collect();
    for groups in [&[LOOKERS][..], &many] {
        let (code, _, stderr) = api.run_as(STRANGER, STRANGER, groups, LOOK);
        assert_eq!(code, 0, "{stderr}");
        for args in [CHANGE, DRY_RUN] {
            let (code, _, stderr) = api.run_as(STRANGER, STRANGER, groups, args);
            assert_eq!(code, 4, "{stderr}");
            assert!(stderr.contains("may only look"), "{stderr}");
            assert!(stderr.contains("group operators"), "{stderr}");
        }
    }
}

#[test]
fn without_groups_the_socket_is_roots_alone() {
    let api = Api::start(Access::default());
    assert_eq!(mode(&api.socket()), 0o600);
    assert_eq!(api.run_as(0, 0, &[], LOOK).0, 0);
    let (code, _, stderr) = api.run_as(STRANGER, OPERATORS, &[LOOKERS], LOOK);
    assert_eq!(code, 4, "{stderr}");
    assert!(stderr.contains("user 61234 may not use"), "{stderr}");
    assert!(stderr.contains("api_group"), "{stderr}");
}
