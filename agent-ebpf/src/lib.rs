//! What the eBPF meter and the agent both have to know: the layout of the
//! maps, and how a frame's headers are read.
//!
//! The programs themselves are in `meter.rs` (built by `cargo xtask
//! build-ebpf` for `bpfel-unknown-none`). Everything here is plain `no_std`
//! Rust, so that the header parser runs, byte for byte the same, in the
//! kernel and in this crate's tests.
#![no_std]

pub mod fault;
pub mod frame;

/// Name of the classifier for frames that leave through an uplink.
pub const EGRESS_PROGRAM: &str = "drover_egress";
/// Name of the classifier for frames that arrive through an uplink.
pub const INGRESS_PROGRAM: &str = "drover_ingress";

/// One cell of the meter, per CPU.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counter {
    /// Bytes as a qdisc counts them: every segment with its own Ethernet, IP
    /// and transport header; no preamble, no frame check sequence.
    pub bytes: u64,
    /// Segments on the wire.
    pub packets: u64,
}

/// Which way a frame goes, seen from this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Direction {
    /// Out of the uplink.
    Egress = 0,
    /// In through the uplink.
    Ingress = 1,
}

/// Cells in the `COUNTERS` map.
pub const CELLS: u32 = 8;

/// Index in the `COUNTERS` map of one combination.
#[inline(always)]
pub const fn cell(direction: Direction, in_rack: bool, migration: bool) -> u32 {
    (direction as u32) << 2 | (in_rack as u32) << 1 | migration as u32
}

/// Value in the `PLACES_*` maps, bit 0: the address is inside this rack.
pub const PLACE_IN_RACK: u32 = 1;
/// Value in the `PLACES_*` maps, bit 1: the address is one of Drover's agents.
pub const PLACE_AGENT: u32 = 2;
/// Most prefixes and agents' addresses, together, in each `PLACES_*` map.
pub const MAX_PLACES: u32 = 16_384;

/// Entries of the `PORTS` map: one bit for each TCP port.
pub const PORT_WORDS: u32 = 65_536 / 64;

/// Word and bit of a port in the `PORTS` map.
#[inline(always)]
pub const fn port_bit(port: u16) -> (u32, u64) {
    ((port >> 6) as u32, 1 << (port & 63))
}

/// The single entry of the `SETTINGS` map.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    /// Frames that leave with this `skb->mark` are migration traffic. 0: no
    /// mark is looked at.
    pub mark: u32,
}
