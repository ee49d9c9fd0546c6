//! The dirty log reports what the guest writes, no less and no more.

use crate::harness::*;
use drover::types::Gfn;
use drover::vmm::direct::SourceVm;
use drover::vmm::dirty::{DirtyLog, DirtyLogError};
use drover::vmm::qmp::RunState;
use drover::vmm::{DirectSource, PageSource};

use std::collections::BTreeSet;
use std::time::Duration;

fn scan(log: &mut DirtyLog) -> BTreeSet<u32> {
    let mut pages = BTreeSet::new();
    log.scan(|run| pages.extend(run.start.0..run.end.0))
        .unwrap();
    pages
}

const TICK_PAGE: u32 = 0x200;
const DONE_PAGE: u32 = 0x202;

fn exactly_what_was_written(accel: Accel) {
    run(async {
        let host = Host::new();
        let vm = host.start(&define("vm", "64M", accel, RAM, &[])).await;
        let source = SourceVm::open(vm.launched.vmm().clone()).await.unwrap();
        let (mut log, quiesced) = source.start_log().await.unwrap();
        assert!(quiesced.stopped > Duration::ZERO);
        vm.guest.wait_ticking();
        let mut at = 0x300u32;
        for round in 1..=20u32 {
            scan(&mut log);
            let (count, stride) = (round * 7 % 40 + 1, round % 5 + 1);
            vm.guest
                .order(round, u64::from(at) << 12, count, stride << 12);
            let mut wanted: BTreeSet<u32> = (0..count).map(|i| at + i * stride).collect();
            wanted.extend([TICK_PAGE, DONE_PAGE]);
            assert_eq!(scan(&mut log), wanted, "round {round}");
            at += 0x100;
        }
        assert!(log.recently_written().len() > 20);
        // With the guest stopped nothing is written, and the log says so.
        assert!(source.pause().await.unwrap());
        scan(&mut log);
        assert_eq!(scan(&mut log), BTreeSet::new());
        source.roll_back(true).await.unwrap();
        drop(log);
        vm.guest.wait_ticking();
        // And it can be had again.
        let (mut log, _) = source.start_log().await.unwrap();
        vm.guest.order(99, 0x80_0000, 1, 4096);
        assert!(scan(&mut log).contains(&0x800));
    });
}

#[test]
fn reports_exactly_what_was_written_tcg() {
    exactly_what_was_written(Accel::Tcg);
}

#[test]
fn reports_exactly_what_was_written_kvm() {
    exactly_what_was_written(Accel::Kvm);
}

#[test]
fn a_vm_paused_by_its_operator_stays_paused() {
    run(async {
        let host = Host::new();
        let vm = host.start(&tcg("vm")).await;
        vm.launched.vmm().qmp().unwrap().stop().await.unwrap();
        let source = SourceVm::open(vm.launched.vmm().clone()).await.unwrap();
        let (log, quiesced) = source.start_log().await.unwrap();
        assert_eq!(quiesced.stopped, Duration::ZERO);
        assert!(!source.facts().running);
        assert!(!source.pause().await.unwrap(), "it was paused before");
        source.roll_back(false).await.unwrap();
        assert_eq!(
            vm.launched.vmm().qmp().unwrap().status().await.unwrap(),
            RunState::Paused
        );
        assert!(vm.guest.is_still());
        drop(log);
    });
}

#[test]
fn holes_are_not_read_and_holes_made_later_are_noticed() {
    run(async {
        let host = Host::new();
        let vm = host.start(&tcg("vm")).await;
        vm.guest.order(1, 0x100_0000, 64, 4096);
        let source = SourceVm::open(vm.launched.vmm().clone()).await.unwrap();
        let (log, _) = source.start_log().await.unwrap();
        let mut pages = DirectSource::new(source.ram().clone(), log);
        let mut first = BTreeSet::new();
        pages
            .first_round(&mut |run| first.extend(run.start.0..run.end.0))
            .unwrap();
        assert!((0x1000..0x1040).all(|g| first.contains(&g)));
        assert!(!first.contains(&0x3000), "a page that nobody touched");
        assert!(
            first.len() < 2048,
            "{} of 16384 pages have data",
            first.len()
        );
        source.pause().await.unwrap();
        pages.next_round(&mut |_| ()).unwrap();
        // As QEMU's balloon does it.
        let ram = std::fs::OpenOptions::new()
            .write(true)
            .open(&vm.paths.ram)
            .unwrap();
        let flags = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
            | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(&ram, flags, 0x100_0000, 16 << 12).unwrap();
        pages
            .next_round(&mut |run| panic!("{run:?} was not written"))
            .unwrap();
        let again = pages.recheck().unwrap();
        assert!(again.contains(&(Gfn(0x1000)..Gfn(0x1010))), "{again:?}");
    });
}

#[test]
fn a_vmm_that_ends_is_an_error_and_not_an_empty_round() {
    run(async {
        let host = Host::new();
        let vm = host.start(&tcg("vm")).await;
        let source = SourceVm::open(vm.launched.vmm().clone()).await.unwrap();
        let (mut log, _) = source.start_log().await.unwrap();
        source.vmm().process.kill_and_wait(LIMIT).unwrap();
        assert!(matches!(log.scan(|_| ()), Err(DirtyLogError::Process(_))));
        let error = full(&source.pause().await.unwrap_err());
        assert!(
            error.contains("VM vm") && error.contains("closed"),
            "{error}"
        );
        drop((log, vm));
        host.assert_empty();
    });
}
