//! The field's words as types: pages, frame numbers, rounds and names.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in a page of guest RAM. Everything is counted in pages of this size,
/// whatever the backing (4 KiB, THP or hugetlbfs) is made of.
pub const PAGE_SIZE: usize = 4096;

/// The content of one page.
pub type Page = [u8; PAGE_SIZE];

/// Guest frame number: the index of a page in the VM's RAM as this agent lays
/// it out. For QEMU in direct mode this is the page's place in the RAM file
/// (file offset / 4096), which equals the guest-physical frame number below
/// the PCI hole. 32 bits reach 16 TiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gfn(pub u32);

impl Gfn {
    /// Byte offset of the page in the VM's RAM.
    pub fn offset(self) -> usize {
        self.0 as usize * PAGE_SIZE
    }
    /// The index as `usize`.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {:#x}", self.0)
    }
}

/// Version of a page's content within one migration: the pre-copy round that
/// read it. Rounds count from 1; 0 means "nothing has arrived yet". A page of
/// an older round never overwrites one of a newer round.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Round(pub u32);

/// Index of a VM in its gang's plan. Both ends know it from the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VmIndex(pub u16);

/// Index of a target host in its gang's roster: the *holder* of a page's
/// content inside the target rack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HolderId(pub u16);

/// One run of a gang: drawn at random by the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GangId(pub u64);

impl fmt::Display for GangId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// 128-bit keyed fingerprint of a page's content, see `dedup::fingerprint`.
/// All zero bits stand for the zero page, in every dedup domain.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Fingerprint(pub [u8; 16]);

impl Fingerprint {
    /// The fingerprint of a page of zeroes.
    pub const ZERO: Fingerprint = Fingerprint([0; 16]);
}

/// Fingerprints never appear in logs, so `Debug` tells only zero from not.
impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::ZERO {
            "Fingerprint(zero)"
        } else {
            "Fingerprint(..)"
        })
    }
}

/// What a transfer is for; stop-and-copy goes first everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Class {
    /// The guest runs; this can wait.
    Precopy,
    /// The guest stands still until this has arrived.
    StopCopy,
}

/// An error with its sources, in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
