//! The hazard of DMA: reads that were under way when the dirty log was reset
//! land in pages that the log then shows as clean.

use anyhow::{Result, ensure};
use std::time::Duration;
use tests::guest::disk;
use tests::qemu::Workload;
use tests::save;
use tests::slowdisk::SlowDisk;
use tests::stage::Stage;

/// Four readers share it, 128 KiB each: a read is under way for about 60 ms.
const READ_BYTES_PER_S: u64 = 8 << 20;

#[test]
fn direct_reads_into_ram_while_it_moves_are_all_there() -> Result<()> {
    let saved = save::linux(1, Workload::Dma)?.remove(0);
    let stage = Stage::new(400)?;
    let slow = SlowDisk::new(
        &format!("drover-lab-{}", stage.lab.id()),
        &disk::stamped(1)?,
        READ_BYTES_PER_S,
    )?;
    let mut gang = stage.gang();
    // One disk of the guest is read with native AIO, the other with io_uring.
    gang.adopt("vm1", &saved, "r1h1")?;
    slow.add(tests::check::exactly_one_vmm(&stage.lab, "vm1")?)?;
    let reads = gang.vms[0].serial().value("r")?;
    gang.vms[0].serial().ticks_on(5, Duration::from_secs(20))?;
    ensure!(
        gang.vms[0].serial().value("r")? > reads,
        "the guest does not read its disks"
    );
    let migrated = stage.migrate(&mut gang, &[(0, "r2h1")], &[])?;
    ensure!(
        migrated.report.vms[0].rounds >= 2,
        "no rounds, no hazard: {:#?}",
        migrated.report
    );
    drop(gang);
    let finished = stage.finish();
    drop(slow);
    finished
}
