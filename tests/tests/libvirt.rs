//! VMs of libvirt's, which drives their migrations itself: the agents carry the
//! streams. With the real libvirt and two of its daemons.

use anyhow::{Context, Result, ensure};
use drover::api::types::{GangReport, Outcome};
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;
use tests::check::HoldWatcher;
use tests::libvirt::{Libvirtd, VirshMigrate};
use tests::limit;
use tests::play::until;
use tests::stage::Stage;

const TICKS: Duration = Duration::from_secs(20);
/// Where the VMs start, and where they go.
const ENDS: [&str; 2] = ["r1h1", "r2h1"];
const VMS: [&str; 2] = ["g1", "g2"];
/// Pages of the disk that all guests have in their page caches.
const COMMON_PAGES: u64 = 4096;

/// A stage with two daemons and two VMs.
struct Hosts {
    stage: Stage,
    libvirt: [Libvirtd; 2],
}

/// `drover gang open`, running.
struct Opened {
    command: Option<Child>,
}

struct Ended {
    code: Option<i32>,
    report: Option<GangReport>,
    said: String,
}

impl Hosts {
    fn up() -> Result<Hosts> {
        let stage = Stage::new(400)?;
        let daemon = |at: &str| {
            let host = stage.lab.hosts.iter().find(|host| host.name == at);
            Libvirtd::start(host.context("no such host")?, &stage.lab.run_dir())
        };
        let libvirt = [daemon(ENDS[0])?, daemon(ENDS[1])?];
        std::thread::scope(|scope| {
            let learning = scope.spawn(|| libvirt[1].learn());
            for (vm, seed) in VMS.iter().zip(1..) {
                libvirt[0].create(vm, seed)?;
            }
            learning
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        for vm in VMS {
            libvirt[0].booted(vm)?;
        }
        Ok(Hosts { stage, libvirt })
    }

    /// Opens a gang at the agent of `ENDS[from]` and waits until its sockets are
    /// there.
    fn open(&self, from: usize, vms: &[&str], more: &[&str]) -> Result<Opened> {
        let agent = self.stage.cluster.agent(ENDS[from]);
        let mut command = agent.command(&["gang", "open", "evac", "--domain", "lab", "--json"])?;
        command
            .args(["--to", ENDS[1 - from], "--wait", "60s"])
            .args(more);
        for vm in vms {
            command.args(["--vm", vm]);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let opened = Opened {
            command: Some(command.spawn()?),
        };
        until("the sockets", || {
            let all = vms.iter().all(|vm| self.socket(from, vm).exists());
            Ok(all.then_some(()))
        })?;
        Ok(opened)
    }

    fn socket(&self, at: usize, vm: &str) -> PathBuf {
        let agent = self.stage.cluster.agent(ENDS[at]);
        agent.files.transport.join(format!("{vm}.sock"))
    }

    fn migrate(&self, from: usize, vm: &str) -> Result<VirshMigrate> {
        self.libvirt[from].migrate(vm, &self.libvirt[1 - from])
    }

    /// Waits until the VM's QEMU has connected and waits.
    fn connected(&self, at: usize, vm: &str) -> Result<()> {
        let agent = self.stage.cluster.agent(ENDS[at]);
        until(&format!("{vm} to come"), || {
            let list = agent.run(&["vm", "list", "--json"])?;
            let list = String::from_utf8_lossy(&list.stdout).into_owned();
            let vms: Vec<drover::api::types::VmInfo> = serde_json::from_str(&list)?;
            let come = vms
                .iter()
                .any(|of| of.name == vm && of.status == "connected");
            Ok(come.then_some(()))
        })
    }

    /// Both VMs run at `ENDS[at]` and nowhere else, and nothing is left of their
    /// moves.
    fn run_at(&self, at: usize) -> Result<()> {
        self.libvirt[at].has(&["g1 running", "g2 running"])?;
        self.libvirt[1 - at].has(&[])?;
        for vm in VMS {
            self.libvirt[at].serial(vm).ticks_on(2, TICKS)?;
            let left = self.socket(at, vm);
            ensure!(!left.exists(), "{} is left", left.display());
        }
        Ok(())
    }
}

impl Opened {
    fn end(mut self) -> Result<Ended> {
        let child = self.command.take().context("waited for already")?;
        let output = limit::output(child, limit::COMMAND).context("drover gang open")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // The offers, and then the report.
        let report = text.lines().nth(1).map(serde_json::from_str).transpose()?;
        Ok(Ended {
            code: output.status.code(),
            report,
            said: format!("{text}{}", String::from_utf8_lossy(&output.stderr)),
        })
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(mut child) = self.command.take() {
            let _gone = child.kill();
            let _ = child.wait();
        }
    }
}

/// libvirt starts both migrations, stops the guests and lets them run; RAM of
/// both sides is equal byte for byte when they stand still, what both have
/// crosses the core once. Then what fails lets the guests run on where they are:
/// a migration that its operator aborts, and an agent of the target that dies.
#[test]
fn libvirts_vms_move_as_one_gang_and_stay_when_it_fails() -> Result<()> {
    let mut hosts = Hosts::up()?;
    let watcher = HoldWatcher::start(&hosts.stage.hold_dir())?;
    let opened = hosts.open(0, &VMS, &["--wait-for", "2", "--verify", "full"])?;
    let moves = [hosts.migrate(0, "g1")?, hosts.migrate(0, "g2")?];
    let ended = opened.end()?;
    for (vm, virsh) in VMS.iter().zip(moves) {
        let (arrived, said) = virsh.end()?;
        ensure!(arrived, "virsh migrate of {vm}: {said}\n{}", ended.said);
    }
    let report = ended.report.with_context(|| ended.said.clone())?;
    ensure!(
        ended.code == Some(0) && report.outcome == Outcome::Arrived,
        "{report:#?}\n{}",
        ended.said
    );
    let differing = watcher.finish()?;
    for vm in &report.vms {
        let pages = differing.get(&vm.name).context("not held at its switch")?;
        ensure!(pages.is_empty(), "{}: {pages:?}", vm.name);
        ensure!(vm.verified, "{vm:?}");
        eprintln!("{}: {:?}, {:?}", vm.name, vm.stop, vm.pages);
    }
    let shared: u64 = report.vms.iter().map(|vm| vm.pages.reference).sum();
    ensure!(shared >= COMMON_PAGES, "{shared} references: {report:#?}");
    hosts.run_at(1)?;

    // Back: one never comes, and the other's operator gives it up.
    let opened = hosts.open(1, &VMS, &["--wait-for", "2"])?;
    let virsh = hosts.migrate(1, "g1")?;
    hosts.connected(1, "g1")?;
    hosts.libvirt[1].virsh(&["domjobabort", "g1"])?;
    let (arrived, _) = virsh.end()?;
    let ended = opened.end()?;
    ensure!(!arrived && ended.code == Some(1), "{}", ended.said);
    ensure!(
        ended.said.contains("g1") && ended.said.contains("g2"),
        "{}",
        ended.said
    );
    hosts.run_at(1)?;

    // Once more: the target's agent dies when all of the RAM is there.
    let moments = hosts.stage.moments_dir();
    let (reached, hold) = (
        moments.join("last-pages.g1.reached"),
        moments.join("last-pages.g1.hold"),
    );
    let _of_the_first_move = fs::remove_file(&reached);
    fs::write(&hold, b"")?;
    let opened = hosts.open(1, &["g1"], &[])?;
    let virsh = hosts.migrate(1, "g1")?;
    until("the last pages", || Ok(reached.exists().then_some(())))?;
    hosts.stage.cluster.agent_mut(ENDS[0]).kill();
    fs::remove_file(&hold)?;
    let (arrived, said) = virsh.end()?;
    ensure!(!arrived, "{said}");
    // The gang's end need not wait for it then.
    let host = hosts.stage.lab.host(1, 1).clone();
    hosts.stage.cluster.agent_mut(ENDS[0]).start_again(&host)?;
    let ended = opened.end()?;
    ensure!(ended.code == Some(1), "{}", ended.said);
    hosts.run_at(1)?;

    let Hosts { stage, libvirt } = hosts;
    drop(libvirt);
    stage.finish()
}
