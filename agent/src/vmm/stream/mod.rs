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
mod source;
mod target;
#[cfg(test)]
mod testing;

pub use error::{FilterError, StreamVmError};
pub use feed::{Feed, FeedError, Progress, StreamPages, Taken};
pub use preflight::MAX_OTHER_RAM;
pub use ram::ProcessRam;
pub use source::SourceVm;
pub use target::TargetVm;
