//! The meter: two classifiers for an uplink, one for each direction. They
//! count and never touch: every frame goes on to whatever comes next.
#![allow(unsafe_code)]
#![no_std]
#![no_main]
#![allow(
    missing_docs,
    unreachable_pub,
    reason = "the classifier macro re-exports each program, undocumented"
)]

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, LpmTrie, PerCpuArray};
use aya_ebpf::programs::TcContext;
use drover_ebpf::frame::{self, Addresses, Load};
use drover_ebpf::{
    CELLS, Counter, Direction, MAX_PLACES, PLACE_AGENT, PLACE_IN_RACK, PORT_WORDS, Settings, cell,
    port_bit,
};

#[map]
static COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(CELLS, 0);
#[map]
static PLACES_V4: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(MAX_PLACES, 0);
#[map]
static PLACES_V6: LpmTrie<[u8; 16], u32> = LpmTrie::with_max_entries(MAX_PLACES, 0);
#[map]
static PORTS: Array<u64> = Array::with_max_entries(PORT_WORDS, 0);
#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// Counts what leaves.
#[classifier]
pub fn drover_egress(ctx: TcContext) -> i32 {
    count(&ctx, Direction::Egress);
    TC_ACT_UNSPEC
}

/// Counts what arrives.
#[classifier]
pub fn drover_ingress(ctx: TcContext) -> i32 {
    count(&ctx, Direction::Ingress);
    TC_ACT_UNSPEC
}

struct Skb<'a>(&'a TcContext);

impl Load for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.load(offset as usize).ok()
    }
}

#[inline(always)]
fn count(ctx: &TcContext, direction: Direction) {
    // SAFETY: the kernel passes a valid context; the verifier rewrites these
    // reads to the fields of the frame's sk_buff.
    let (len, segment, mark, wire_len) = unsafe {
        let skb = ctx.skb.skb;
        ((*skb).len, (*skb).gso_size, (*skb).mark, (*skb).wire_len)
    };
    let frame = frame::parse(&Skb(ctx), segment != 0);

    let (in_rack, mut migration) = match &frame {
        Some(frame) => place(frame, direction),
        // ARP, LLDP and the like do not leave the rack.
        None => (true, false),
    };
    if let (Direction::Egress, Some(settings)) = (direction, SETTINGS.get(0)) {
        migration |= settings.mark != 0 && settings.mark == mark;
    }

    let header_len = frame.map_or(0, |f| f.header_len);
    let (mut bytes, packets) = frame::on_wire(len, header_len, segment);
    // On the way out the kernel has already done this sum for the qdisc, for
    // every protocol it can segment.
    if let (Direction::Egress, true) = (direction, wire_len >= len) {
        bytes = u64::from(wire_len);
    }

    if let Some(counter) = COUNTERS.get_ptr_mut(cell(direction, in_rack, migration)) {
        // SAFETY: the cell belongs to this CPU, and the hooks run with bottom
        // halves disabled, so nothing else writes it meanwhile.
        unsafe {
            (*counter).bytes += bytes;
            (*counter).packets += packets;
        }
    }
}

/// Is the far end in this rack, and is this an agent's data connection?
#[inline(always)]
fn place(frame: &frame::Frame, direction: Direction) -> (bool, bool) {
    let far = match (frame.addresses, direction) {
        (Addresses::V4 { destination, .. }, Direction::Egress) => v4(destination),
        (Addresses::V4 { source, .. }, Direction::Ingress) => v4(source),
        (Addresses::V6 { destination, .. }, Direction::Egress) => v6(destination),
        (Addresses::V6 { source, .. }, Direction::Ingress) => v6(source),
    };
    let migration = far & PLACE_AGENT != 0
        && match frame.tcp_ports {
            Some((source, destination)) => data_port(source) || data_port(destination),
            None => false,
        };
    (far & PLACE_IN_RACK != 0, migration)
}

#[inline(always)]
fn v4(address: [u8; 4]) -> u32 {
    PLACES_V4.get(Key::new(32, address)).copied().unwrap_or(0)
}

#[inline(always)]
fn v6(address: [u8; 16]) -> u32 {
    PLACES_V6.get(Key::new(128, address)).copied().unwrap_or(0)
}

#[inline(always)]
fn data_port(port: u16) -> bool {
    let (word, bit) = port_bit(port);
    PORTS.get(word).is_some_and(|ports| ports & bit != 0)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
