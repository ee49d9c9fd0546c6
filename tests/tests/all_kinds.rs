//! One gang with a VM of every kind that there is: RAM that QEMU shares with the
//! agent, RAM that QEMU keeps to itself, a VM of libvirt's (the real one), one in
//! a VMM that answers KVM's own dirty log, and one in a Cloud Hypervisor (played:
//! `chplay`). The first four run the same guest under KVM and have content in common.

use anyhow::{Context, Result, ensure};
use std::time::Duration;
use tests::agentcfg::{self, Memory};
use tests::check::HoldWatcher;
use tests::chplay::ChPlay;
use tests::drover::Migrated;
use tests::gang::{Gang, Move};
use tests::guest::kvm::{self, KvmWork};
use tests::libvirt::Libvirtd;
use tests::opened::Opened;
use tests::play::until;
use tests::qemu::Guest;
use tests::save;
use tests::stage::Stage;

/// Where those start that their managers drive, and where they go.
const ENDS: [&str; 2] = ["r1h1", "r2h1"];
const TICKS: Duration = Duration::from_secs(20);
/// Pages of each guest under KVM: common, its own, and written once.
const COMMON: u64 = 4 << 8;
const OWN: u64 = 2 << 8;
const WRITTEN: u64 = 1 << 8;
/// Beyond that: the guest's image and what firmware left, for each.
const REST: u64 = 80;

/// Common pages that may cross again: a claim that is not answered in time, on a
/// busy machine, means that the page is sent.
const LATE: u64 = 3 * COMMON / 10;

/// Content that stands still, so that what crosses can be counted.
fn work(seed: u32) -> KvmWork {
    KvmWork {
        seed,
        common_mib: 4,
        own_mib: 2,
        ws_mib: 1,
        rate_kb: 0,
    }
}

fn guest(seed: u32) -> Result<Guest> {
    Ok(Guest::Kvm {
        elf: kvm::ensure()?,
        ram_mib: 32,
        work: work(seed),
    })
}

fn plan_of(gang: &Gang, moves: &[Move]) -> Vec<(String, String, String)> {
    let moves = moves.iter().map(|(i, to)| {
        let vm = &gang.vms[*i];
        (vm.name.clone(), vm.host.clone(), (*to).to_owned())
    });
    moves.collect()
}

/// Every distinct page crosses once, whatever the kind of the VM that sent it
/// first; RAM is equal byte for byte at each switch, and all guests live on.
#[test]
fn every_distinct_page_crosses_once_whatever_kind_of_vm_sent_it_first() -> Result<()> {
    let saves = [save::kvm_with(work(1))?, save::kvm_with(work(2))?];
    let stage = Stage::new(400)?;
    let host = |name: &str| {
        let found = stage.lab.hosts.iter().find(|host| host.name == name);
        found.context("no such host")
    };
    let libvirt = [
        Libvirtd::start(host(ENDS[0])?, &stage.lab.run_dir())?,
        Libvirtd::start(host(ENDS[1])?, &stage.lab.run_dir())?,
    ];
    libvirt[1].learn()?;
    libvirt[0].create_kvm("g1", &guest(4)?)?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &saves[0], "r1h1")?;
    gang.adopt_private("vm2", &saves[1], "r1h2")?;
    gang.run_linked("vm3", &guest(3)?, "r1h1", Memory::Own)?;
    let mut played = ChPlay::start(host(ENDS[0])?, "c1", Some((24, 5)))?;
    let [from, to] = ENDS.map(|end| stage.cluster.agent(end));
    let target = ChPlay::start(host(ENDS[1])?, "c1", None)?;
    let transport = |at: &tests::drover::Agent| at.files.transport.join("c1.sock");
    std::fs::create_dir_all(&to.files.transport)?;
    target.receive(&transport(to))?;
    libvirt[0].booted("g1")?;

    let moves = [(0, "r2h1"), (1, "r2h2"), (2, "r2h2")];
    let plan = stage.lab.run_dir().join("others.toml");
    std::fs::write(&plan, agentcfg::plan("others", &plan_of(&gang, &moves)))?;
    let watcher = HoldWatcher::start(&stage.hold_dir())?;
    let plan = plan.display().to_string();
    let opened = Opened::start(
        from,
        ENDS[1],
        &["g1", "c1"],
        &["--verify", "full", "--with", &plan],
    )?;
    let virsh = libvirt[0].migrate("g1", &libvirt[1])?;
    let before = played.status()?.tick;
    played.send(&transport(from))?;
    let report = opened.end()?.all_arrived(watcher)?;
    let mut kinds: Vec<_> = report.vms.iter().map(|vm| &*vm.kind).collect();
    kinds.sort_unstable();
    let every = [
        "cloud-hypervisor",
        "kvm-log",
        "qemu-direct",
        "qemu-managed",
        "qemu-stream",
    ];
    ensure!(kinds == every, "{kinds:?}");

    // All live on where they are now.
    let (moved, said) = virsh.end()?;
    ensure!(moved, "virsh migrate: {said}");
    libvirt[1].has(&["g1 running"])?;
    libvirt[1].serial("g1").ticks_on(2, TICKS)?;
    until("c1 to go on", || {
        let now = target.status()?;
        Ok((now.state == "running" && now.tick > before).then_some(()))
    })?;
    until("the source of c1 to end", || {
        Ok(played.has_ended()?.then_some(()))
    })?;
    let migrated = Migrated {
        success: true,
        report: report.clone(),
        stderr: String::new(),
    };
    gang.settle(&migrated, &moves)?;
    gang.check()?;

    // The played one writes all the while, and has nothing in common.
    let counted = report.vms.iter().filter(|vm| vm.name != "c1");
    let sum = |count: fn(&drover::gang::message::PageCounts) -> u64| -> u64 {
        counted.clone().map(|vm| count(&vm.pages)).sum()
    };
    let (sent, shared) = (sum(|pages| pages.sent), sum(|pages| pages.reference));
    let distinct = COMMON + 4 * (OWN + WRITTEN);
    println!(
        "{sent} sent, {shared} by reference, {distinct} distinct: {:#?}",
        report.vms
    );
    ensure!(
        sent <= distinct + 4 * REST + LATE,
        "{sent} pages crossed, of {distinct} distinct ones: {report:#?}"
    );
    ensure!(
        shared >= 3 * COMMON - LATE,
        "{shared} references, though four VMs have {COMMON} pages in common: {report:#?}"
    );
    drop(gang);
    drop((played, target));
    for daemon in libvirt {
        drop(daemon);
    }
    stage.finish()
}
