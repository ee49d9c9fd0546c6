//! What cannot work is refused or given up, with a reason, and the VM runs on.

use anyhow::{Result, ensure};
use drover::api::types::{VmOutcome, VmPhase};
use nix::mount::{MsFlags, mount};
use std::fs;
use tests::agentcfg::{self, AgentFiles};
use tests::bench::vm_name;
use tests::drover::Ended;
use tests::guest::kvm::KvmWork;
use tests::qemu::Guest;
use tests::save;
use tests::stage::Stage;

/// Every reason a refused or failed migration gave.
fn reasons(ended: &Ended) -> String {
    let report = ended.report.iter();
    let of_vms = report.flat_map(|r| {
        r.vms
            .iter()
            .filter_map(|v| v.error.clone())
            .chain(r.error.clone())
    });
    format!("{}\n{}", ended.said, of_vms.collect::<Vec<_>>().join("\n"))
}

#[test]
fn target_without_space_is_refused_and_the_vm_runs_on() -> Result<()> {
    let saves = save::kvm(1)?;
    let stage = Stage::new(400)?;
    let ram_dir = AgentFiles::of(stage.lab.host(2, 1)).ram_dir;
    // Unmounted with the lab, whatever happens.
    mount(
        Some("tmpfs"),
        &ram_dir,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=8m"),
    )?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &saves[0], "r1h1")?;
    let ended = gang.start_migration("gang", &[(0, "r2h1")], &[])?.end()?;
    let why = reasons(&ended);
    ensure!(!ended.success, "it cannot have arrived: {why}");
    ensure!(
        why.contains("r2h1") && (why.contains("space") || why.contains("memory")),
        "no reason in: {why}"
    );
    gang.check()?;
    // The other host of the rack has room.
    stage.migrate(&mut gang, &[(0, "r2h2")], &[])?;
    drop(gang);
    stage.finish()
}

#[test]
fn ram_that_is_not_shared_is_refused_and_the_vm_runs_on() -> Result<()> {
    let guest = Guest::small_kvm(1)?;
    let stage = Stage::new(400)?;
    for host in &stage.lab.hosts {
        let text = agentcfg::definition("vm1", "lab", &guest, false)
            .replace("share=on", "share=off")
            .replace("ram = ", "kind = \"qemu-direct\"\nram = ");
        fs::write(AgentFiles::of(host).definitions.join("vm1.toml"), text)?;
    }
    let agent = stage.cluster.agent("r1h1");
    let run = agent.try_run(&["vm", "run", "vm1"])?;
    if !run.status.success() {
        let said = String::from_utf8_lossy(&run.stderr);
        ensure!(said.contains("share=on"), "no remedy in: {said}");
        return stage.finish();
    }
    let moves = [("vm1".to_string(), "r1h1".to_string(), "r2h1".to_string())];
    let ended = stage
        .cluster
        .start_migration(&stage.lab, "gang", &moves, &[])?
        .end()?;
    let why = reasons(&ended);
    ensure!(
        !ended.success && why.contains("share=on"),
        "no remedy in: {why}"
    );
    tests::check::exactly_one_vmm(&stage.lab, "vm1")?;
    agent.run(&["vm", "stop", "vm1"])?;
    stage.finish()
}

#[test]
fn target_agent_down_is_refused_and_the_vm_runs_on() -> Result<()> {
    let saves = save::kvm(1)?;
    let mut stage = Stage::new(400)?;
    stage.cluster.agent_mut("r2h1").kill();
    let mut gang = stage.gang();
    gang.adopt("vm1", &saves[0], "r1h1")?;
    let ended = gang.start_migration("gang", &[(0, "r2h1")], &[])?.end()?;
    let why = reasons(&ended);
    ensure!(
        !ended.success && why.contains("r2h1"),
        "no reason in: {why}"
    );
    gang.check()?;
    drop(gang);
    Ok(())
}

#[test]
fn dead_claim_shard_costs_bytes_only() -> Result<()> {
    let saves = save::kvm(2)?;
    let mut stage = Stage::new(400)?;
    // No VM of the gang is on it, but it answers for half of the claims.
    stage.cluster.agent_mut("r1h2").kill();
    let mut gang = stage.gang();
    gang.adopt("vm1", &saves[0], "r1h1")?;
    gang.adopt("vm2", &saves[1], "r1h1")?;
    stage.migrate(&mut gang, &[(0, "r2h1"), (1, "r2h2")], &[])?;
    drop(gang);
    Ok(())
}

#[test]
fn target_agent_that_dies_on_the_way_fails_its_vm_alone() -> Result<()> {
    // 40 Mbit/s make 16 MB of pages last for seconds.
    let saves = [1, 2].map(|seed| {
        save::kvm_with(KvmWork {
            seed,
            common_mib: 1,
            own_mib: 6,
            ws_mib: 1,
            rate_kb: 100,
        })
    });
    let mut stage = Stage::new(40)?;
    let pid = stage.cluster.agent_mut("r2h1").pid();
    let mut gang = stage.gang();
    for (i, saved) in saves.into_iter().enumerate() {
        gang.adopt(&vm_name(i), &saved?, ["r1h1", "r1h2"][i])?;
    }
    let moves = [(0, "r2h1"), (1, "r2h2")];
    let watcher = tests::check::HoldWatcher::start(&stage.hold_dir())?;
    let migration = gang.start_migration("gang", &moves, &["--compress", "never"])?;
    let phase = stage.wait_phase("r1h1", "vm1", &[VmPhase::Precopy])?;
    ensure!(
        phase.is_some(),
        "the migration was over before the agent could be killed"
    );
    tests::registry::kill(&tests::registry::pidfd(pid)?);
    let migrated = migration.wait()?;
    let found = watcher.finish()?;
    let outcomes: Vec<VmOutcome> = migrated.report.vms.iter().map(|v| v.outcome).collect();
    ensure!(
        outcomes == [VmOutcome::Failed, VmOutcome::Arrived],
        "{:#?}",
        migrated.report
    );
    ensure!(
        found.get("vm2").is_some_and(Vec::is_empty),
        "RAM of vm2 at the switch: {found:?}"
    );
    gang.settle(&migrated, &moves)?;
    for vm in &gang.vms {
        vm.verify()?;
    }
    drop(gang);
    Ok(())
}
