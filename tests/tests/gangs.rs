//! Whole gangs: four VMs from two hosts of one rack to two of another.

use anyhow::{Result, ensure};
use tests::bench::{bound, vm_name};
use tests::qemu::{Guest, Workload};
use tests::save;
use tests::stage::Stage;

const FROM: [&str; 4] = ["r1h1", "r1h2", "r1h1", "r1h2"];
const TO: [(usize, &str); 4] = [(0, "r2h1"), (1, "r2h2"), (2, "r2h1"), (3, "r2h2")];

#[test]
fn idle_gang_arrives_and_sends_each_distinct_page_once() -> Result<()> {
    let saves = save::linux(4, Workload::Idle)?;
    let bound = bound::of(&saves)?;
    let stage = Stage::new(1000)?;
    let mut gang = stage.gang();
    for (i, saved) in saves.iter().enumerate() {
        gang.adopt(&vm_name(i), saved, FROM[i])?;
    }
    let before = stage.lab.core()?;
    let migrated = stage.migrate(&mut gang, &TO, &["--compress", "never"])?;
    let core = stage.lab.core()?.since(&before).total() as f64;
    // Headers, page lists and acknowledgements on top of the pages.
    let most = bound.distinct_bytes as f64 * 1.10;
    ensure!(
        core <= most,
        "{core} bytes over the core for {} distinct",
        bound.distinct_bytes
    );
    let off = migrated.report.core_bytes as f64 / core - 1.0;
    ensure!(
        off.abs() < 0.05,
        "the report says {} core bytes, the shaper {core}",
        migrated.report.core_bytes
    );
    drop(gang);
    stage.finish()
}

#[test]
fn busy_gang_arrives_with_its_data_right() -> Result<()> {
    let saves = save::linux(4, Workload::Busy(4000))?;
    let stage = Stage::new(400)?;
    let mut gang = stage.gang();
    for (i, saved) in saves.iter().enumerate() {
        gang.adopt(&vm_name(i), saved, FROM[i])?;
    }
    let migrated = stage.migrate(&mut gang, &TO, &[])?;
    for vm in &migrated.report.vms {
        ensure!(vm.rounds >= 2, "a guest that writes takes rounds: {vm:?}");
    }
    // They write on where they are now.
    for vm in &gang.vms {
        let before = vm.serial().value("w")?;
        vm.serial()
            .ticks_on(3, std::time::Duration::from_secs(20))?;
        ensure!(
            vm.serial().value("w")? > before,
            "{} writes no more",
            vm.name
        );
    }
    drop(gang);
    stage.finish()
}

#[test]
fn kvm_gang_started_by_agents_arrives() -> Result<()> {
    let stage = Stage::new(400)?;
    let mut gang = stage.gang();
    for (i, host) in FROM.iter().enumerate() {
        gang.run(&vm_name(i), &Guest::small_kvm(i as u32 + 1)?, host)?;
    }
    let migrated = stage.migrate(&mut gang, &TO, &["--verify", "full"])?;
    let references: u64 = migrated.report.vms.iter().map(|v| v.pages.reference).sum();
    ensure!(
        references > 2 * 1024,
        "4 MiB are common to four guests, but only {references} references"
    );
    drop(gang);
    stage.finish()
}

#[test]
fn aligned_gang_is_verified_in_full() -> Result<()> {
    let saves = save::linux(2, Workload::Idle)?;
    let stage = Stage::new(1000)?;
    let mut gang = stage.gang();
    for (i, saved) in saves.iter().enumerate() {
        gang.adopt(&vm_name(i), saved, FROM[i])?;
    }
    let args = ["--align", "--verify", "full", "--profile", "evacuate"];
    let migrated = stage.migrate(&mut gang, &TO[..2], &args)?;
    for vm in &migrated.report.vms {
        ensure!(vm.verified, "all of RAM was to be read again: {vm:?}");
    }
    drop(gang);
    stage.finish()
}
