//! QEMU in *stream mode*: a VM whose RAM is private to its VMM.
//!
//! ```text
//! source agent                                           target agent
//! reads RAM out of /proc/PID/mem  ── lanes ────────────▶ places it in /proc/PID/mem
//! QEMU ─ migrate unix: ─▶ reader ─▶ Feed (which pages)   of a QEMU -S -incoming defer
//!                           └─▶ residue, held ── once sealed ─▶ its incoming socket
//! ```
//!
//! QEMU's own migration is the dirty log: a page record of the machine's RAM
//! tells *that* the page is to be sent, its bytes are dropped, and the scan
//! thread reads the page out of QEMU's memory when its time comes ([`feed`] says
//! why that is right). What is left of the stream ([`filter`]) goes into the
//! target's QEMU when all pages are there. [`ProcessRam`] reads and places pages.
//! See `docs/vmm-qemu-stream.md`.

mod error;
mod feed;
mod filter;
mod preflight;
mod ram;
mod reading;
mod source;
mod target;
#[cfg(test)]
mod testing;

pub use error::{FilterError, StreamVmError};
pub(in crate::vmm) use feed::Stand;
pub use feed::{Feed, FeedError, Pace, Progress, StreamPages, Taken};
pub(in crate::vmm) use filter::{Chunk, MainBlock, Residue};
pub use preflight::MAX_OTHER_RAM;
pub use ram::ProcessRam;
pub(in crate::vmm) use reading::{Outgoing, Reading, hand_back};
pub use source::SourceVm;
pub use target::TargetVm;

/// QEMU 7.2 under TCG loses dirty pages if RAM is a multiple of this.
const TCG_LOSES: u64 = 256 << 10;

/// Whether a QEMU cannot be trusted to report every page: all are compared once
/// the guest stands still.
pub(in crate::vmm) fn loses_pages(kvm: bool, ram_bytes: u64) -> bool {
    !kvm && ram_bytes.is_multiple_of(TCG_LOSES)
}
