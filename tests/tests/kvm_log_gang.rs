//! VMs of kind `kvm-log`, in the small VMM `kvmm`: moved by agents like any
//! other, and together with others.

use anyhow::{Context, Result, ensure};
use drover::api::types::{VmInfo, VmOutcome};
use drover::gang::moments::Moment;
use tests::agentcfg::Memory;
use tests::guest::kvm::KvmWork;
use tests::play::{BESIDE, ENDS, Play, VM};
use tests::qemu::Guest;
use tests::save;
use tests::stage::Stage;

/// RAM that QEMU maps and the agent watches, RAM in a file and RAM in a memfd of
/// `kvmm`: what is common crosses once, and all of it is equal byte for byte when
/// the guests, which write all the while, stand still.
#[test]
fn kvm_log_and_direct_vms_move_in_one_gang_and_share_their_pages() -> Result<()> {
    let saves = save::kvm(1)?;
    let stage = Stage::new(400)?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &saves[0], "r1h1")?;
    gang.run_linked("vm2", &Guest::small_kvm(2)?, "r1h2", Memory::File)?;
    gang.adopt_linked("vm3", &Guest::small_kvm(3)?, "r1h1")?;
    let moves = [(0, "r2h1"), (1, "r2h2"), (2, "r2h2")];
    let moved = stage.migrate(&mut gang, &moves, &["--verify", "full"])?;
    let common = u64::from(KvmWork::small(1).common_mib) * 256;
    let vms = &moved.report.vms;
    let shared: u64 = vms.iter().map(|vm| vm.pages.reference).sum();
    ensure!(
        shared >= 2 * common * 9 / 10,
        "{shared} references for {common} pages that three VMs have in common: {vms:?}"
    );
    let list = stage.cluster.agent("r2h2").run(&["vm", "list", "--json"])?;
    let vms: Vec<VmInfo> = serde_json::from_slice(&list.stdout)?;
    let well = |vm: &VmInfo| vm.kind == "kvm-log" && vm.status == "running";
    ensure!(vms.len() == 2 && vms.iter().all(well), "{vms:?}");
    // What has arrived can leave again.
    stage.migrate(&mut gang, &[(0, "r1h2"), (1, "r1h1"), (2, "r1h1")], &[])?;
    let agent = stage.cluster.agent("r1h1");
    agent.run(&["vm", "stop", "vm2"])?;
    ensure!(tests::check::vmms_of(&stage.lab, "vm2")?.is_empty());
    drop(gang);
    stage.finish()
}

#[test]
fn cancelled_before_the_commitment_the_guest_stays() -> Result<()> {
    let mut play = Play::linked(Memory::Own)?;
    for moment in [Moment::Ready, Moment::Paused, Moment::DeviceSent] {
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

/// Which of the two, when, and whether the VM arrives.
const DEATHS: [(usize, Moment, bool); 6] = [
    (0, Moment::Precopy, false),
    (1, Moment::Ready, false),
    (0, Moment::Paused, false),
    (1, Moment::DeviceArrived, false),
    (1, Moment::TargetCommitted, true),
    (0, Moment::Committed, true),
];

#[test]
fn an_agent_killed_on_either_side_leaves_one_vm_that_runs() -> Result<()> {
    let mut play = Play::linked(Memory::File)?;
    for (side, moment, arrives) in DEATHS {
        let (source, target) = (play.host().to_owned(), play.other());
        let victim = [&source, target][side].to_owned();
        let case = || format!("{VM}, {victim} killed at {}", moment.name());
        let held = play.held_at(moment, BESIDE)?;
        play.kill(&victim);
        held.release()?;
        play.start_again(&victim)?;
        play.settled().with_context(case)?;
        held.end()?;
        let expected = if arrives { target.to_owned() } else { source };
        play.runs_on(&expected).with_context(case)?;
    }
    play.stage.finish()
}
