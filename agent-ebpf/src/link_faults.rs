//! A bad link for the tests: a classifier that drops frames, or changes a byte
//! in them below TCP. Never part of an agent.
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
use core::sync::atomic::{AtomicU64, Ordering};
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
    // SAFETY: the map's memory lives as long as the program, its fields are
    // aligned and touched by atomic operations only.
    let (seen, dropped, corrupted) = unsafe {
        (
            AtomicU64::from_ptr(&raw mut (*hits).seen),
            AtomicU64::from_ptr(&raw mut (*hits).dropped),
            AtomicU64::from_ptr(&raw mut (*hits).corrupted),
        )
    };
    let number = seen.fetch_add(1, Ordering::Relaxed);
    match fate(fault, number, ctx.len()) {
        Fate::Pass => TC_ACT_UNSPEC,
        Fate::Drop => {
            dropped.fetch_add(1, Ordering::Relaxed);
            TC_ACT_SHOT
        }
        Fate::Corrupt { offset, flip } => {
            let offset = offset as usize;
            if let Ok(byte) = ctx.load::<u8>(offset)
                && ctx.store(offset, &(byte ^ flip), 0).is_ok()
            {
                corrupted.fetch_add(1, Ordering::Relaxed);
            }
            TC_ACT_UNSPEC
        }
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
