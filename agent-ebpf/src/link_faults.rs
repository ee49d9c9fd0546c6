//! A bad link for the tests: a classifier that drops frames, or changes a byte
//! in them below TCP. Never part of an agent.
#![allow(unsafe_code)]
#![no_std]
#![no_main]
#![allow(
    missing_docs,
    unreachable_pub,
    reason = "the classifier macro re-exports each program, undocumented"
)]

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::TcContext;
use drover_ebpf::fault::{Fate, Fault, Hits, fate};

#[map]
static FAULT: Array<Fault> = Array::with_max_entries(1, 0);
#[map]
static HITS: Array<Hits> = Array::with_max_entries(1, 0);

#[classifier]
pub fn drover_link_fault(ctx: TcContext) -> i32 {
    let (Some(fault), Some(hits)) = (FAULT.get(0), HITS.get_ptr_mut(0)) else {
        return TC_ACT_UNSPEC;
    };
    // SAFETY: the map's memory lives as long as the program; only addresses of
    // fields are taken.
    let (seen, dropped, corrupted) = unsafe {
        (
            &raw mut (*hits).seen,
            &raw mut (*hits).dropped,
            &raw mut (*hits).corrupted,
        )
    };
    let number = count(seen);
    match fate(fault, number, ctx.len()) {
        Fate::Pass => {}
        Fate::Drop => {
            count(dropped);
            return TC_ACT_SHOT;
        }
        Fate::Corrupt { offset, flip } => {
            let offset = offset as usize;
            if let Ok(byte) = ctx.load::<u8>(offset)
                && ctx.store(offset, &(byte ^ flip), 0).is_ok()
            {
                count(corrupted);
            }
        }
    }
    TC_ACT_UNSPEC
}

/// Adds one and returns what it was. BPF's `core` has no atomic addition; two
/// CPUs at the same moment may count one frame less, which does no harm.
#[inline(always)]
fn count(counter: *mut u64) -> u64 {
    // SAFETY: a field of a map's value, which is aligned and lives as long as
    // the program.
    unsafe {
        let was = counter.read_volatile();
        counter.write_volatile(was + 1);
        was
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
