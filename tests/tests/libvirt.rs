//! VMs of libvirt's, which drives their migrations itself: the agents carry the
//! streams. With the real libvirt and two of its daemons.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;
use tests::check::HoldWatcher;
use tests::libvirt::{Libvirtd, VirshMigrate};
use tests::opened::{Opened, connected};
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

    /// Opens a gang at the agent of `ENDS[from]`.
    fn open(&self, from: usize, vms: &[&str], more: &[&str]) -> Result<Opened> {
        let agent = self.stage.cluster.agent(ENDS[from]);
        Opened::start(agent, ENDS[1 - from], vms, more)
    }

    fn socket(&self, at: usize, vm: &str) -> PathBuf {
        let agent = self.stage.cluster.agent(ENDS[at]);
        agent.files.transport.join(format!("{vm}.sock"))
    }

    fn migrate(&self, from: usize, vm: &str) -> Result<VirshMigrate> {
        self.libvirt[from].migrate(vm, &self.libvirt[1 - from])
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
    let report = ended.all_arrived(watcher)?;
    let shared: u64 = report.vms.iter().map(|vm| vm.pages.reference).sum();
    ensure!(shared >= COMMON_PAGES, "{shared} references: {report:#?}");
    hosts.run_at(1)?;

    // Back: one never comes, and the other's operator gives it up.
    let opened = hosts.open(1, &VMS, &["--wait-for", "2"])?;
    let virsh = hosts.migrate(1, "g1")?;
    connected(hosts.stage.cluster.agent(ENDS[1]), "g1")?;
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
