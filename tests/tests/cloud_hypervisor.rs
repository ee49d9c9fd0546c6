//! Cloud Hypervisor's migrations, carried by agents between two hosts: with
//! peers that play it after the description of its protocol (`chplay`). A real
//! one cannot be moved on every machine's KVM: docs/vmm-cloud-hypervisor.md.

use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use tests::check::HoldWatcher;
use tests::chplay::ChPlay;
use tests::opened::{Opened, connected};
use tests::play::until;
use tests::stage::Stage;
use tests::topology::Host;

/// Where the VMs start, and where they go.
const ENDS: [&str; 2] = ["r1h1", "r2h1"];
const VMS: [&str; 2] = ["c1", "c2"];
const MIB: u64 = 24;
/// Pages that both have.
const COMMON_PAGES: u64 = 1024;

fn host<'a>(stage: &'a Stage, at: &str) -> Result<&'a Host> {
    let mut hosts = stage.lab.hosts.iter();
    hosts.find(|host| host.name == at).context("no such host")
}

fn socket(stage: &Stage, at: usize, vm: &str) -> PathBuf {
    let agent = stage.cluster.agent(ENDS[at]);
    agent.files.transport.join(format!("{vm}.sock"))
}

/// The guest counts on.
fn lives(vm: &ChPlay) -> Result<u64> {
    let before = vm.status()?.tick;
    until("the guest to go on", || {
        let now = vm.status()?;
        Ok((now.state == "running" && now.tick > before).then_some(now.tick))
    })
}

/// A VMM that waits for a VM on the target's host.
fn waiting(stage: &Stage, vm: &str) -> Result<ChPlay> {
    let target = ChPlay::start(host(stage, ENDS[1])?, vm, None)?;
    let at = socket(stage, 1, vm);
    std::fs::create_dir_all(at.parent().context("no folder")?)?;
    target.receive(&at)?;
    Ok(target)
}

/// One has its tables for rounds, the other (local=on) gives its RAM away; what
/// both have crosses once; RAM of both sides is equal
/// byte for byte when the guests stand still, and they go on from where they
/// were. Sources end, as they do when the answer to Complete has come.
#[test]
fn two_vms_move_as_one_gang_and_share_their_pages() -> Result<()> {
    let stage = Stage::new(400)?;
    let from = stage.cluster.agent(ENDS[0]);
    let mut sources = Vec::new();
    let mut targets = Vec::new();
    for (vm, seed) in VMS.iter().zip(1..) {
        sources.push(ChPlay::start(
            host(&stage, ENDS[0])?,
            vm,
            Some((MIB, seed)),
        )?);
        targets.push(waiting(&stage, vm)?);
    }
    let watcher = HoldWatcher::start(&stage.hold_dir())?;
    let opened = Opened::start(from, ENDS[1], &VMS, &["--verify", "full"])?;
    let mut before = Vec::new();
    for (source, vm) in sources.iter().zip(VMS) {
        before.push(source.status()?.tick);
        let to = socket(&stage, 0, vm);
        match vm {
            "c1" => source.send(&to)?,
            _ => source.send_local(&to)?,
        }
    }
    let report = opened.end()?.all_arrived(watcher)?;
    for vm in &report.vms {
        ensure!(vm.kind == "cloud-hypervisor", "{vm:?}");
    }
    let shared: u64 = report.vms.iter().map(|vm| vm.pages.reference).sum();
    ensure!(shared >= COMMON_PAGES, "{shared} references: {report:#?}");
    for ((mut source, target), before) in sources.into_iter().zip(&targets).zip(before) {
        ensure!(lives(target)? > before, "the guest begins anew");
        until("the source's end", || Ok(source.has_ended()?.then_some(())))?;
    }
    drop(targets);
    stage.finish()
}

/// Whatever fails before the target has everything leaves the VM where it is.
#[test]
fn what_fails_lets_the_source_run_on() -> Result<()> {
    let stage = Stage::new(400)?;
    let from = stage.cluster.agent(ENDS[0]);
    let vm = VMS[0];
    let source = ChPlay::start(host(&stage, ENDS[0])?, vm, Some((MIB, 1)))?;
    let failed = |opened: Opened, why: &str| -> Result<()> {
        let ended = opened.end()?;
        ensure!(
            ended.code == Some(1) && ended.said.contains(vm) && ended.said.contains(why),
            "no `{why}` in {}",
            ended.said
        );
        lives(&source)?;
        ensure!(!socket(&stage, 0, vm).exists(), "the socket is left");
        Ok(())
    };

    // Nobody listens at the target.
    let opened = Opened::start(from, ENDS[1], &[vm], &[])?;
    source.send(&socket(&stage, 0, vm))?;
    failed(opened, "nobody listens")?;

    // The target's VMM dies while the source waits for its turn or is read.
    let target = waiting(&stage, vm)?;
    let hold = stage.moments_dir().join(format!("last-pages.{vm}.hold"));
    std::fs::write(&hold, b"")?;
    let reached = hold.with_extension("reached");
    let opened = Opened::start(from, ENDS[1], &[vm], &[])?;
    source.send(&socket(&stage, 0, vm))?;
    until("its last pages", || Ok(reached.exists().then_some(())))?;
    drop(target);
    std::fs::remove_file(&hold)?;
    failed(opened, vm)?;

    // The operator gives it up while it waits for another.
    let opened = Opened::start(from, ENDS[1], &[vm, VMS[1]], &["--wait-for", "2"])?;
    source.send(&socket(&stage, 0, vm))?;
    connected(from, vm)?;
    drop(opened);
    until("the socket to go", || {
        Ok((!socket(&stage, 0, vm).exists()).then_some(()))
    })?;
    lives(&source)?;
    ensure!(!source.status()?.error.is_empty(), "it was not told");
    drop(source);
    stage.finish()
}
