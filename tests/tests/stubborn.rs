//! Guests that write faster than the link carries, and operators who change
//! their mind.

use anyhow::{Result, ensure};
use drover::api::types::{Outcome, VmOutcome, VmPhase};
use std::fs;
use std::time::{Duration, Instant};
use tests::agentcfg::AgentOptions;
use tests::guest::kvm::KvmWork;
use tests::save::{self, Saved};
use tests::stage::Stage;

/// Mbit/s: 2.5 MB/s, less than what the writer dirties.
const SLOW: u32 = 20;

fn writer(seed: u32) -> Result<Saved> {
    save::kvm_with(KvmWork {
        seed,
        common_mib: 1,
        own_mib: 2,
        ws_mib: 4,
        rate_kb: 4000,
    })
}

fn quiet(seed: u32) -> Result<Saved> {
    save::kvm_with(KvmWork {
        seed,
        common_mib: 1,
        own_mib: 2,
        ws_mib: 1,
        rate_kb: 0,
    })
}

fn policy(then: &str) -> AgentOptions {
    let policy = format!("[rounds]\nmax_rounds = 6\nstuck_rounds = 2\nthen = {then:?}\n");
    AgentOptions {
        policy,
        ..AgentOptions::default()
    }
}

#[test]
fn faster_than_the_link_stays_when_the_policy_says_fail() -> Result<()> {
    let stage = Stage::with(SLOW, policy("fail"))?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &writer(1)?, "r1h1")?;
    let migrated = stage.migrate_some(&mut gang, &[(0, "r2h1")], &["--compress", "never"])?;
    let vm = &migrated.report.vms[0];
    ensure!(
        !migrated.success && vm.outcome == VmOutcome::Failed,
        "{:#?}",
        migrated.report
    );
    ensure!(
        vm.rounds <= 7 && vm.error.is_some(),
        "no end of rounds, or no reason: {vm:?}"
    );
    drop(gang);
    stage.finish()
}

#[test]
fn faster_than_the_link_arrives_when_the_policy_says_force() -> Result<()> {
    let stage = Stage::with(SLOW, policy("force-switch"))?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &writer(1)?, "r1h1")?;
    stage.migrate(&mut gang, &[(0, "r2h1")], &["--compress", "never"])?;
    drop(gang);
    stage.finish()
}

#[test]
fn cancelled_in_any_phase_every_vm_runs_exactly_once() -> Result<()> {
    use VmPhase::{Handover, Precopy, Preparing, Ready, StopCopy, Waiting};
    let stage = Stage::new(SLOW)?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &quiet(1)?, "r1h1")?;
    gang.adopt("vm2", &writer(2)?, "r1h2")?;
    let moves = [(0, "r2h1"), (1, "r2h2")];
    // Aligned, vm1 is ready long before vm2, which never fits the limit.
    let args = ["--align", "--compress", "never"];
    let rows: [(&str, &[VmPhase]); 3] = [
        ("vm1", &[Waiting, Preparing]),
        ("vm2", &[Precopy]),
        ("vm1", &[Ready]),
    ];
    for (vm, phases) in rows {
        let migration = gang.start_migration("gang", &moves, &args)?;
        let reached = stage.wait_phase("r1h1", vm, phases)?;
        ensure!(reached.is_some(), "{vm} never came to {phases:?}");
        stage.cluster.agent("r1h1").run(&["cancel", "gang"])?;
        let migrated = migration.wait()?;
        ensure!(
            !migrated.success && migrated.report.outcome == Outcome::Cancelled,
            "cancelled in {reached:?}: {:#?}",
            migrated.report
        );
        gang.settle(&migrated, &moves)?;
        ensure!(
            gang.vms[0].host == "r1h1" && gang.vms[1].host == "r1h2",
            "moved though cancelled"
        );
        gang.check()?;
    }

    // At the switch itself either side may win, but only one.
    for phases in [&[StopCopy, Handover][..], &[Handover]] {
        let (from, to) = (
            gang.vms[0].host.clone(),
            if gang.vms[0].host == "r1h1" {
                "r2h1"
            } else {
                "r1h1"
            },
        );
        for entry in fs::read_dir(stage.hold_dir())? {
            fs::remove_file(entry?.path())?;
        }
        let migration = gang.start_migration("gang", &[(0, to)], &["--compress", "never"])?;
        if phases.len() == 1 {
            // Held at the switch: everything is at the target, nothing committed there.
            wait_for(&stage.hold_dir().join("vm1.ready"))?;
        } else {
            stage.wait_phase(&from, "vm1", phases)?;
        }
        stage.cluster.agent(&from).run(&["cancel", "gang"])?;
        fs::write(stage.hold_dir().join("vm1.go"), "")?;
        let migrated = migration.wait()?;
        gang.settle(&migrated, &[(0, to)])?;
        gang.check()?;
    }
    drop(gang);
    stage.finish()
}

fn wait_for(file: &std::path::Path) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(60);
    while !file.exists() {
        ensure!(Instant::now() < until, "{} did not come", file.display());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
