//! The `drover` binary as scripts and operators meet it: exit codes, what goes
//! to standard output, and Ctrl-C. The API it talks to is the real server;
//! only what the agent answers is written here.

use drover::api::types::*;
use drover::api::{Access, ApiCall, ApiLimits, ApiServer};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(20);
const PLAN: &str = "gang = \"web\"\n[[vm]]\nname = \"w1\"\nfrom = \"a1\"\nto = \"b1\"\n";

/// How the agent's migration ends.
#[derive(Clone, Copy)]
enum Script {
    /// With this outcome, at the third look.
    Ends(Outcome),
    /// As cancelled, once it is asked for.
    OnCancel,
    /// Never.
    Hangs,
}

struct Agent {
    dir: tempfile::TempDir,
    cancels: Arc<AtomicU32>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        assert!(matches!(ended, Some(Ok(()))) || std::thread::panicking());
    }
}

impl Agent {
    fn start(script: Script) -> Agent {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("plan.toml"), PLAN).unwrap();
        let socket = dir.path().join("agent.sock");
        let cancels = Arc::new(AtomicU32::new(0));
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (ready, bound) = mpsc::channel();
        let seen = cancels.clone();
        let thread = std::thread::spawn(move || {
            tokio_uring::start(async move {
                let server =
                    ApiServer::bind(&socket, Access::default(), ApiLimits::default()).unwrap();
                ready.send(()).unwrap();
                let (calls, queue) = tokio::sync::mpsc::channel(8);
                tokio::select! {
                    () = server.run(calls) => {}
                    () = answer(queue, script, seen) => {}
                    _ = stopped => {}
                }
            });
        });
        bound.recv_timeout(LONG).unwrap();
        Agent {
            dir,
            cancels,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    fn migrate(&self, json: bool) -> Running {
        let mut command = drover(&self.socket());
        command
            .arg("migrate")
            .arg(self.dir.path().join("plan.toml"));
        if json {
            command.arg("--json");
        }
        Running(Some(command.spawn().unwrap()))
    }
}

fn drover(socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_drover"));
    command
        .arg("--socket")
        .arg(socket)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// A running command; killed if the test fails.
struct Running(Option<Child>);

impl Running {
    fn interrupt(&self) {
        let pid = self.0.as_ref().unwrap().id();
        kill(Pid::from_raw(pid as i32), Signal::SIGINT).unwrap();
    }

    /// Waits for the end; the exit code, standard output and error.
    fn end(mut self) -> (i32, String, String) {
        let start = Instant::now();
        while self.0.as_mut().unwrap().try_wait().unwrap().is_none() {
            assert!(start.elapsed() < LONG, "the command hangs");
            std::thread::sleep(Duration::from_millis(10));
        }
        let child = self.0.take().unwrap();
        texts(child.wait_with_output().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn texts(output: Output) -> (i32, String, String) {
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn info(outcome: Option<Outcome>) -> MigrationInfo {
    let arrived = outcome == Some(Outcome::Arrived);
    let vm = VmProgress {
        name: "w1".into(),
        from: "a1".into(),
        to: "b1".into(),
        phase: if arrived {
            VmPhase::Arrived
        } else {
            VmPhase::Precopy
        },
        round: 2,
        dirty_pages_per_s: 10,
        left_bytes: 4096,
        total_bytes: 1 << 20,
        sent_bytes: 1 << 19,
        eta_ms: None,
        downtime_ms: arrived.then_some(12.0),
        error: None,
    };
    let report = |outcome| GangReport {
        gang: "web".into(),
        id: "ab".into(),
        outcome,
        total_ms: 1234,
        core_bytes: 99,
        vms: vec![VmReport {
            name: "w1".into(),
            from: "a1".into(),
            to: "b1".into(),
            kind: "qemu-direct".to_owned(),
            not: Vec::new(),
            outcome: if arrived {
                VmOutcome::Arrived
            } else {
                VmOutcome::Failed
            },
            downtime_ms: 12.0,
            journal_ms: 0.0,
            stop: None,
            rounds: 2,
            pages: PageCounts::default(),
            verified: arrived,
            error: None,
        }],
        error: None,
        warnings: Vec::new(),
        lost: Vec::new(),
    };
    MigrationInfo {
        progress: GangProgress {
            gang: "web".into(),
            id: "ab".into(),
            phase: if outcome.is_some() {
                GangPhase::Done
            } else {
                GangPhase::Moving
            },
            elapsed_ms: 500,
            vms: vec![vm],
            core: CoreLoad::default(),
            lost: Vec::new(),
        },
        report: outcome.map(report),
    }
}

async fn answer(
    mut calls: tokio::sync::mpsc::Receiver<ApiCall>,
    script: Script,
    cancels: Arc<AtomicU32>,
) {
    let mut looks = 0;
    while let Some(call) = calls.recv().await {
        match call {
            ApiCall::StartMigration { request, reply } => {
                assert_eq!(request.plan, PLAN);
                let started = MigrationStarted {
                    gang: "web".into(),
                    id: Some("ab".into()),
                    checks: Vec::new(),
                };
                reply.send(Ok(started)).unwrap();
            }
            ApiCall::Migration { id, reply } => {
                assert_eq!(id, "ab");
                looks += 1;
                let outcome = match script {
                    Script::Ends(outcome) => (looks >= 3).then_some(outcome),
                    Script::OnCancel if cancels.load(Ordering::SeqCst) > 0 => {
                        Some(Outcome::Cancelled)
                    }
                    _ => None,
                };
                let _ = reply.send(Ok(info(outcome)));
            }
            ApiCall::CancelMigration { id, vm, reply } => {
                assert_eq!((id.as_str(), vm), ("ab", None));
                cancels.fetch_add(1, Ordering::SeqCst);
                let _ = reply.send(Ok(()));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn json_is_one_object_on_standard_output_and_the_exit_code_tells_the_outcome() {
    for (outcome, code) in [
        (Outcome::Arrived, 0),
        (Outcome::Partial, 1),
        (Outcome::Failed, 1),
    ] {
        let agent = Agent::start(Script::Ends(outcome));
        let (got, stdout, stderr) = agent.migrate(true).end();
        assert_eq!(got, code, "{stderr}");
        assert_eq!(stdout.lines().count(), 1, "{stdout}");
        let report: GangReport = serde_json::from_str(&stdout).unwrap();
        assert_eq!(report.outcome, outcome);
        assert!(stderr.contains("web: 1 precopy"), "{stderr}");
    }
}

#[test]
fn without_json_the_report_is_for_people() {
    let agent = Agent::start(Script::Ends(Outcome::Arrived));
    let (code, stdout, _) = agent.migrate(false).end();
    assert_eq!(code, 0);
    assert!(
        stdout.contains("web: 1 of 1 VMs arrived in 1.2 s"),
        "{stdout}"
    );
}

/// Waits until the command follows the migration: only then does it mean
/// "cancel" by Ctrl-C.
fn interrupt_when_following(agent: &Agent, running: &Running, cancels: u32) {
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(500));
    running.interrupt();
    while agent.cancels.load(Ordering::SeqCst) < cancels {
        assert!(start.elapsed() < LONG, "the agent is not asked to cancel");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn ctrl_c_cancels_and_waits_for_the_report() {
    let agent = Agent::start(Script::OnCancel);
    let running = agent.migrate(true);
    interrupt_when_following(&agent, &running, 1);
    let (code, stdout, stderr) = running.end();
    assert_eq!(code, 130, "{stderr}");
    let report: GangReport = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report.outcome, Outcome::Cancelled);
}

#[test]
fn a_second_ctrl_c_leaves() {
    let agent = Agent::start(Script::Hangs);
    let running = agent.migrate(true);
    interrupt_when_following(&agent, &running, 1);
    running.interrupt();
    let (code, stdout, stderr) = running.end();
    assert_eq!((code, stdout.as_str()), (130, ""), "{stderr}");
    assert!(stderr.contains("the agent goes on with it"), "{stderr}");
    assert_eq!(agent.cancels.load(Ordering::SeqCst), 1);
}

#[test]
fn wrong_input_exits_with_2_and_a_missing_agent_with_3() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    let plan = dir.path().join("plan.toml");
    let run = |args: &[&str]| texts(drover(&socket).args(args).output().unwrap());
    let plan_arg = plan.to_str().unwrap();

    let (code, _, stderr) = run(&["migrate", plan_arg]);
    assert_eq!(code, 2, "{stderr}");
    std::fs::write(&plan, PLAN.replace("b1", "a1")).unwrap();
    let (code, _, stderr) = run(&["migrate", plan_arg]);
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("plan.toml:5:6: vm[1].to: a1 is the source"),
        "{stderr}"
    );
    std::fs::write(&plan, PLAN).unwrap();
    let (code, _, stderr) = run(&["migrate", plan_arg]);
    assert_eq!(code, 3, "{stderr}");
    assert!(
        stderr.contains("none.sock") && stderr.contains("start the agent"),
        "{stderr}"
    );
    assert_eq!(run(&["no-such-command"]).0, 2);
    assert_eq!(run(&["--help"]).0, 0);

    let config = dir.path().join("agent.toml");
    std::fs::write(&config, "nam = \"x\"\n").unwrap();
    for args in [["config", "check"], ["agent", "--config"]] {
        let (code, _, stderr) = run(&[args[0], args[1], config.to_str().unwrap()]);
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains("did you mean `name`?"), "{stderr}");
    }

    let secret = dir.path().join("secret");
    let init = ["secret", "init", secret.to_str().unwrap()];
    assert_eq!(run(&init).0, 0);
    let (code, _, stderr) = run(&init);
    assert_eq!(code, 1);
    assert!(stderr.contains("exists already"), "{stderr}");
}

#[test]
fn two_commands_make_a_cluster_ready_and_agents_accept_what_they_made() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    let run = |args: &[&str]| texts(drover(&socket).args(args).output().unwrap());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let pki = path("pki");
    assert_eq!(run(&["pki", "init", &pki, "--cluster", "lab"]).0, 0);
    let (code, stdout, stderr) = run(&["pki", "issue", &pki, "a1", "Rack_2.host-7"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("agents/a1, valid until 20"), "{stdout}");
    for (args, wanted) in [
        (&["pki", "init", &pki][..], "exists already"),
        (&["pki", "issue", &pki, "a1"], "drover pki renew"),
        (&["pki", "issue", &pki, "a/1"], "not a name"),
        (&["pki", "renew", &pki, "b1"], "drover pki issue"),
        (&["pki", "show", &path("nothing")], "nothing"),
    ] {
        let (code, _, stderr) = run(args);
        assert!(code == 1 || code == 2, "{args:?}");
        assert!(stderr.contains(wanted), "{wanted}: {stderr}");
    }
    let show = |what: &str| -> Vec<serde_json::Value> {
        let (code, stdout, stderr) = run(&["pki", "show", what, "--json"]);
        assert_eq!(code, 0, "{stderr}");
        serde_json::from_str(&stdout).unwrap()
    };
    let shown = show(&pki);
    let agents: Vec<_> = shown.iter().map(|c| c["agent"].as_str()).collect();
    assert_eq!(agents, [None, Some("Rack_2.host-7"), Some("a1")]);
    assert!(shown.iter().all(|c| c["valid"] == true));
    let before = show(&path("pki/agents/a1"))[1]["fingerprint"].clone();
    assert_eq!(run(&["pki", "renew", &pki]).0, 0);
    assert_ne!(show(&path("pki/agents/a1"))[1]["fingerprint"], before);

    // A bundle is all that an agent's configuration wants.
    let bundle = dir.path().join("pki/agents/a1");
    for made in ["vms", "run"] {
        std::fs::create_dir(bundle.join(made)).unwrap();
    }
    std::fs::write(bundle.join("policy.toml"), "").unwrap();
    let config = bundle.join("agent.toml");
    std::fs::write(
        &config,
        "name = \"a1\"\nrack = \"A\"\nlisten = \"127.0.0.1:7400\"\napi_socket = \"run/api.sock\"\n\
         state_dir = \"run/state\"\nrun_dir = \"run/vms\"\nram_dir = \"run/ram\"\nsecret_file = \"secret\"\n\
         policy = \"policy.toml\"\nvm_definitions = \"vms\"\n\
         [tls]\nca = \"ca.pem\"\ncert = \"cert.pem\"\nkey = \"key.pem\"\n",
    )
    .unwrap();
    let check = || run(&["config", "check", config.to_str().unwrap()]);
    let (code, _, stderr) = check();
    assert_eq!(code, 0, "{stderr}");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o640);
    std::fs::set_permissions(bundle.join("key.pem"), open).unwrap();
    let (code, _, stderr) = check();
    assert_eq!(code, 2);
    assert!(stderr.contains("chmod 0600"), "{stderr}");
}
