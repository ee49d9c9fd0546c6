//! The bodies of all fuzz targets: bytes in, and what must hold for whatever a
//! parser makes of them. libFuzzer runs them through `fuzz_targets/*.rs`, and
//! `agent/tests/fuzz_corpus.rs` runs the same code over the corpus with the
//! stable toolchain.
//!
//! Each returns whether (one of) its parsers accepted the bytes, so that the
//! test can tell a seed that has gone stale.

pub mod files;
pub mod host;
pub mod lane;
pub mod net;
pub mod stream;
pub mod vmm;

use drover::config::ClusterSecret;
use drover::net::preamble::MembershipKey;
use std::sync::LazyLock;

/// A target: its bytes, and whether a parser accepted them.
pub type Target = fn(&[u8]) -> bool;

/// Every target, by the name of its corpus directory.
pub const TARGETS: &[(&str, Target)] = &[
    ("lane_stream", lane::lane_stream),
    ("lane_entries", lane::lane_entries),
    ("lane_reverse", lane::lane_reverse),
    ("lane_records", lane::lane_records),
    ("certificates", net::certificates),
    ("preamble", net::preamble),
    ("rpc", net::rpc),
    ("rack", net::rack),
    ("config_files", files::config_files),
    ("vm_files", files::vm_files),
    ("values", files::values),
    ("json", host::json),
    ("host_text", host::host_text),
    ("ethernet", host::ethernet),
    ("map_values", host::map_values),
    ("stream_main", stream::stream_main),
    ("stream_multifd", stream::stream_multifd),
    ("stream_reply", stream::stream_reply),
    ("cloud_hypervisor", stream::cloud_hypervisor),
    ("vmm_link", vmm::vmm_link),
];

/// Pages of the VM that lane targets pretend to fill: 1 GiB.
pub const RAM_PAGES: u32 = 1 << 18;

/// The key of the preambles in the corpus.
pub static KEY: LazyLock<MembershipKey> =
    LazyLock::new(|| MembershipKey::derive(&ClusterSecret::from_bytes([1; 32])));

/// The nonce that answers in the corpus belong to.
pub const NONCE: [u8; 16] = [7; 16];

/// How long pieces are in which a stream is delivered a second time.
fn step(bytes: &[u8]) -> usize {
    1 + bytes.len() % 61
}
