//! VMs of kind `kvm-log`, in the small VMM `kvmm`: moved by agents like any
//! other, and together with others.

use anyhow::{Context, Result, ensure};
use drover::api::types::{VmInfo, VmOutcome};
use drover::gang::moments::Moment;
use tests::agentcfg::Memory;
use tests::play::{BESIDE, Play};
use tests::qemu::Guest;
use tests::stage::Stage;

/// RAM in a file that QEMU maps and the agent watches, and RAM in a memfd of `kvmm`,
/// which was adopted: what is common crosses once, and all of it is equal byte for
/// byte when the guests, which write all the while, stand still.
#[test]
fn kvm_log_and_direct_vms_move_in_one_gang_and_share_their_pages() -> Result<()> {
    let stage = Stage::new(400)?;
    let mut gang = stage.gang();
    gang.run("vm1", &Guest::least_kvm(1)?, "r1h1")?;
    gang.adopt_linked("vm2", &Guest::least_kvm(2)?, "r1h2")?;
    let moves = [(0, "r2h1"), (1, "r2h2")];
    let moved = stage.migrate(&mut gang, &moves, &["--verify", "full"])?;
    // 2 MiB of each are the same in both.
    let common = 2 * 256;
    let vms = &moved.report.vms;
    let shared: u64 = vms.iter().map(|vm| vm.pages.reference).sum();
    ensure!(
        shared >= common * 9 / 10,
        "{shared} references for {common} pages that both VMs have: {vms:?}"
    );
    let list = stage.cluster.agent("r2h2").run(&["vm", "list", "--json"])?;
    let vms: Vec<VmInfo> = serde_json::from_slice(&list.stdout)?;
    let well = |vm: &VmInfo| vm.kind == "kvm-log" && vm.status == "running";
    ensure!(vms.len() == 1 && well(&vms[0]), "{vms:?}");
    // What has arrived can leave again.
    stage.migrate(&mut gang, &[(0, "r1h2"), (1, "r1h1")], &[])?;
    let agent = stage.cluster.agent("r1h1");
    agent.run(&["vm", "stop", "vm2"])?;
    ensure!(tests::check::vmms_of(&stage.lab, "vm2")?.is_empty());
    drop(gang);
    stage.finish()
}

/// What befalls a move, when, and whether the VM arrives.
const CASES: [(Fate, Moment, bool); 5] = [
    (Fate::Cancelled, Moment::DeviceSent, false),
    (Fate::Killed(0), Moment::Precopy, false),
    (Fate::Killed(1), Moment::DeviceArrived, false),
    (Fate::Killed(1), Moment::TargetCommitted, true),
    (Fate::Killed(0), Moment::Committed, true),
];

#[derive(Debug, Clone, Copy)]
enum Fate {
    Cancelled,
    /// The agent of the source (0) or of the target (1), and it is started again.
    Killed(usize),
}

#[test]
fn cancelled_or_an_agent_killed_on_either_side_one_vm_runs_on() -> Result<()> {
    let mut play = Play::linked(Memory::File)?;
    for (fate, moment, arrives) in CASES {
        let case = || format!("{fate:?} at {}", moment.name());
        let (source, target) = (play.host().to_owned(), play.other());
        let held = play.held_at(moment, BESIDE).with_context(case)?;
        match fate {
            Fate::Cancelled => {
                play.agent(BESIDE).run(&["cancel", "gang"])?;
                play.cancelling(BESIDE)?;
                held.release()?;
            }
            Fate::Killed(side) => {
                let victim = [&source, target][side].to_owned();
                play.kill(&victim);
                held.release()?;
                play.start_again(&victim)?;
                play.settled().with_context(case)?;
            }
        }
        let ended = held.end()?;
        if let Fate::Cancelled = fate {
            let report = ended.report.context("no report")?;
            let outcome = report.vms[0].outcome;
            ensure!(outcome == VmOutcome::Cancelled, "{report:?}");
        }
        let expected = if arrives { target.to_owned() } else { source };
        play.runs_on(&expected).with_context(case)?;
    }
    play.stage.finish()
}
