//! KVM's own dirty log, answered inside a VMM that embeds `drover-vmm`.

use anyhow::{Context, Result, ensure};
use drover::types::{Gfn, PAGE_SIZE};
use drover::vmm::kvm_log::{KvmLogSource, LinkClient};
use drover::vmm::{PageSet, PageSource};
use drover_vmm::wire::{LogKind, Phase};
use std::sync::Arc;
use std::time::Duration;
use tests::check;
use tests::guest::kvm::KvmWork;
use tests::kvmm::{self, FIRST_FREE_PAGE, Inside, Kvmm, Setup, every};

/// Bitmaps, and rings that never come near to full: a KVM that emulates its
/// guests (PVM) overflows them (docs/vmm-kvm-log.md).
const LOGS: [Option<usize>; 2] = [None, Some(65_536)];
const PATIENCE: Duration = Duration::from_secs(60);

fn own_image(pages: u32) -> PageSet {
    let mut set = PageSet::new(pages);
    set.insert(Gfn(0)..Gfn(FIRST_FREE_PAGE));
    set
}

#[test]
fn all_logs_report_just_the_pages_that_the_guest_wrote() -> Result<()> {
    for ring in LOGS {
        let mut vm = Kvmm::start(&Setup {
            ram_mib: 64,
            ring,
            inside: Inside::Writer,
        })?;
        let link = vm.connect()?;
        ensure!((link.log_kind() == LogKind::Ring) == ring.is_some());
        // Both begin with the guest standing still.
        link.pause()?;
        let mut inside = KvmLogSource::start(link.clone())?;
        let mut outside = vm.outside_log()?;
        outside.restart()?;
        let pages = inside.pages();
        let first = FIRST_FREE_PAGE;
        // Scattered, all of it, one, the same again.
        let rounds = [
            (first, 157, 97),
            (first, pages - first, 1),
            (pages - 1, 1, 1),
            (first + 63, 40, 64),
            (first + 63, 40, 64),
        ];
        for (first, count, stride) in rounds {
            link.resume()?;
            vm.write(first, count, stride)?;
            link.pause()?;
            let by_kvm = kvmm::round(&mut inside)?;
            let by_mm = kvmm::outside_round(&mut outside)?;
            ensure!(
                by_kvm == by_mm,
                "{ring:?}: KVM reports {} pages, userfaultfd {}; only KVM {:?}, only userfaultfd {:?}",
                by_kvm.len(),
                by_mm.len(),
                difference(&by_kvm, &by_mm),
                difference(&by_mm, &by_kvm)
            );
            let mut written = by_kvm;
            written.subtract(&own_image(pages));
            let wanted = every(pages, first, count, stride);
            ensure!(
                written == wanted,
                "{ring:?}: {} pages for {}",
                written.len(),
                wanted.len()
            );
            // Nobody wrote since.
            ensure!(
                kvmm::round(&mut inside)?.is_empty()
                    && kvmm::outside_round(&mut outside)?.is_empty()
            );
        }
    }
    Ok(())
}

/// Whether KVM stops the vCPU in time or emulates on past a full ring: what it
/// lost is in a round all the same.
#[test]
fn a_ring_that_is_too_small_costs_a_round_of_all_ram_and_no_page() -> Result<()> {
    let mut vm = Kvmm::start(&Setup {
        ram_mib: 32,
        ring: Some(512),
        inside: Inside::Writer,
    })?;
    let link = vm.connect()?;
    let mut source = KvmLogSource::start(link.clone())?;
    let pages = source.pages();
    let (first, count) = (FIRST_FREE_PAGE, pages - FIRST_FREE_PAGE);
    for _ in 0..2 {
        vm.write(first, count, 1)?;
        let mut missing = every(pages, first, count, 1);
        missing.subtract(&kvmm::round(&mut source)?);
        ensure!(missing.is_empty(), "{} pages are lost", missing.len());
    }
    // The log is as good as new.
    link.pause()?;
    kvmm::round(&mut source)?;
    ensure!(kvmm::round(&mut source)?.is_empty());
    Ok(())
}

fn difference(a: &PageSet, b: &PageSet) -> Vec<Gfn> {
    let mut only = a.clone();
    only.subtract(b);
    only.iter().take(5).collect()
}

/// Copies the runs of pages of a round.
fn carry(source: &mut KvmLogSource, first: bool, to: &drover::vmm::ram::GuestRam) -> Result<u64> {
    let mut runs = Vec::new();
    let mut note = |run| runs.push(run);
    let stats = match first {
        true => source.first_round(&mut note)?,
        false => source.next_round(&mut note)?,
    };
    let mut page = vec![0; PAGE_SIZE];
    for gfn in runs.into_iter().flat_map(|run| run.start.0..run.end.0) {
        source.read_run(Gfn(gfn), &mut page)?;
        to.write_run(Gfn(gfn), &page)?;
    }
    Ok(stats.pages)
}

/// From one VMM to another, page by page and round by round, by what the two
/// links offer; both guests stand still then, with all state loaded.
fn moved(from: &Kvmm, link: &Arc<LinkClient>, to: &Kvmm) -> Result<Arc<LinkClient>> {
    let there = to.connect()?;
    ensure!(there.status()?.phase == Phase::Waiting);
    let placed = there.ram(true)?;
    let mut source = KvmLogSource::start(link.clone())?;
    carry(&mut source, true, &placed)?;
    let mut dirtied = 0;
    for _ in 0..3 {
        // Some ticks of the guest, which writes 4 MB/s.
        from.serial.ticks_on(1, PATIENCE)?;
        dirtied += carry(&mut source, false, &placed)?;
    }
    ensure!(dirtied > 0, "the guest wrote, and nothing was logged");
    ensure!(link.pause()?, "it ran");
    carry(&mut source, false, &placed)?;
    ensure!(source.recheck()?.is_empty(), "nothing was given back");
    let mut state = Vec::new();
    link.save_state(&mut state)?;
    let differing = check::differing_pages(&from.ram, &to.ram)?;
    ensure!(differing.is_empty(), "first {}", differing[0]);
    there.load_state(&mut &state[..])?;
    let differing = check::differing_pages(&from.ram, &to.ram)?;
    ensure!(differing.is_empty(), "loading wrote RAM: {}", differing[0]);
    Ok(there)
}

fn lives_on(vm: &Kvmm) -> Result<()> {
    vm.serial.ticks_on(3, PATIENCE)?;
    // The guest's own count goes on from VMM to VMM, the file does not.
    let answers = |text: &str| text.matches("VERIFIED").count();
    let before = answers(&vm.serial.text()?);
    let _open = vm.tell("verify")?;
    vm.serial
        .wait("VERIFIED", PATIENCE, |text| answers(text) > before)
        .context("the guest checks all of its data")
}

#[test]
fn guest_moves_from_vmm_to_vmm_and_lives_on() -> Result<()> {
    let start = |inside| {
        Kvmm::start(&Setup {
            ram_mib: 32,
            ring: None,
            inside,
        })
    };
    let mut here = start(Inside::Checker(KvmWork::small(7)))?;
    for _ in 0..2 {
        let link = here.connect()?;
        // An agent that dies during pre-copy: the guest goes on, unlogged.
        let mut first_try = KvmLogSource::start(link.clone())?;
        kvmm::round(&mut first_try)?;
        drop((first_try, link));
        here.serial.ticks_on(2, PATIENCE)?;
        let link = here.connect()?;
        let status = link.status()?;
        ensure!(status.running && !status.logging, "{status:?}");
        // A move that fails at its end: the source goes on.
        let given_up = start(Inside::Incoming)?;
        drop((moved(&here, &link, &given_up)?, given_up));
        link.resume()?;
        lives_on(&here)?;
        // And one that does not.
        let there = start(Inside::Incoming)?;
        let arrived = moved(&here, &link, &there)?;
        link.end()?;
        here.ended()?;
        arrived.resume()?;
        lives_on(&there)?;
        ensure!(there.said().is_empty(), "{}", there.said());
        here = there;
    }
    Ok(())
}
