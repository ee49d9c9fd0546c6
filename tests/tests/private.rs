//! VMs whose RAM is private to their VMM, moved like any other: QEMU's own
//! migration stream is their dirty log.

use anyhow::{Context, Result, ensure};
use drover::api::types::{VmInfo, VmOutcome};
use drover::gang::moments::Moment;
use tests::guest::kvm::KvmWork;
use tests::play::{BESIDE, ENDS, Play, VM};
use tests::qemu::Workload;
use tests::save;
use tests::stage::Stage;

/// The direct VM's pages and the private one's: what is common crosses once,
/// whoever sends it, and RAM is equal byte for byte when the guests, which write
/// all the while, stand still.
#[test]
fn private_and_shared_ram_move_in_one_gang_and_share_their_pages() -> Result<()> {
    let saves = save::kvm(2)?;
    let stage = Stage::new(400)?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &saves[0], "r1h1")?;
    gang.adopt_private("vm2", &saves[1], "r1h2")?;
    let moved = stage.migrate(
        &mut gang,
        &[(0, "r2h1"), (1, "r2h2")],
        &["--verify", "full"],
    )?;
    let pages = |field: fn(&drover::gang::message::PageCounts) -> u64| -> u64 {
        moved.report.vms.iter().map(|vm| field(&vm.pages)).sum()
    };
    let common = u64::from(KvmWork::small(1).common_mib) * 256;
    let shared = pages(|pages| pages.reference);
    ensure!(
        shared >= common * 9 / 10,
        "{shared} references for {common} common pages: {:?}",
        moved.report.vms
    );
    // Its kind is told, and why it is not the better one.
    let list = stage.cluster.agent("r2h2").run(&["vm", "list", "--json"])?;
    let vms: Vec<VmInfo> = serde_json::from_slice(&list.stdout)?;
    ensure!(vms.len() == 1 && vms[0].kind == "qemu-stream", "{vms:?}");
    let not = vms[0].kinds.iter().find(|info| info.kind == "qemu-direct");
    let why = not.and_then(|info| info.why_not.as_deref());
    let why = why.context("direct mode is said to be possible")?;
    ensure!(why.contains("memory-backend"), "{why}");
    let told: Vec<_> = moved
        .report
        .vms
        .iter()
        .map(|vm| (&*vm.kind, vm.not.len()))
        .collect();
    ensure!(told == [("qemu-direct", 0), ("qemu-stream", 1)], "{told:?}");
    // There and back: what has arrived can leave again.
    stage.migrate(&mut gang, &[(0, "r1h2"), (1, "r1h1")], &[])?;
    drop(gang);
    stage.finish()
}

/// The size of RAM is no multiple of 256 KiB: of those QEMU 7.2 loses writes
/// under TCG.
#[test]
fn a_linux_guest_with_private_ram_lives_on() -> Result<()> {
    let saves = save::linux(1, Workload::Busy(4000))?;
    let stage = Stage::new(1000)?;
    let mut gang = stage.gang();
    gang.adopt_private("vm1", &saves[0], "r1h1")?;
    ensure!(
        saves[0].guest.ram_bytes() % (256 << 10) != 0,
        "another size"
    );
    stage.migrate(&mut gang, &[(0, "r2h1")], &[])?;
    drop(gang);
    stage.finish()
}

#[test]
fn cancelled_while_the_stream_runs_or_waits_the_guest_stays() -> Result<()> {
    let mut play = Play::private()?;
    for moment in [Moment::Ready, Moment::Paused, Moment::Sealed] {
        let held = play.held_at(moment, BESIDE)?;
        play.agent(BESIDE).run(&["cancel", "gang"])?;
        play.cancelling(BESIDE)?;
        held.release()?;
        let report = held.end()?.report.context("no report")?;
        ensure!(
            report.vms[0].outcome == VmOutcome::Cancelled,
            "{}: {report:?}",
            moment.name()
        );
        play.runs_on(ENDS[0])
            .with_context(|| moment.name().to_owned())?;
    }
    play.stage.finish()
}

/// QEMU waits before its switch and does not notice that nobody reads its
/// stream any more: the restarted agent lets the guest run.
#[test]
fn an_agent_that_dies_while_qemu_waits_lets_the_guest_run_again() -> Result<()> {
    let mut play = Play::private()?;
    for (moment, at) in [(Moment::Paused, ENDS[0]), (Moment::Committed, ENDS[1])] {
        let held = play.held_at(moment, BESIDE)?;
        play.kill(ENDS[0]);
        held.release()?;
        play.start_again(ENDS[0])?;
        play.settled()?;
        held.end()?;
        play.runs_on(at)
            .with_context(|| format!("{VM}, its source killed at {}", moment.name()))?;
    }
    play.stage.finish()
}
