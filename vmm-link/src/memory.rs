//! Guest RAM as the VMM has set it up.
#![allow(unsafe_code)]

use crate::wire::{MAX_FDS, MAX_PAGES, MAX_REGIONS, PAGE};
use std::fs::File;
use std::sync::Arc;
use thiserror::Error;

/// Memory that cannot be handed to an agent.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// No regions, too many, or too many files.
    #[error(
        "guest RAM of {regions} regions in {files} files: 1 to {MAX_REGIONS} in up to {MAX_FDS} are possible"
    )]
    Count {
        /// Regions.
        regions: usize,
        /// Files.
        files: usize,
    },
    /// Not made of pages.
    #[error(
        "slot {slot}: address, length and offset have to be multiples of {PAGE}, and not 0 bytes long"
    )]
    Unaligned {
        /// KVM's slot.
        slot: u32,
    },
    /// More than 16 TiB.
    #[error("{0} pages of guest RAM are more than Drover can number")]
    TooLarge(u64),
    /// Two regions share a slot or addresses.
    #[error("slots {0} and {1} are one, or overlap")]
    Overlap(u32, u32),
}

/// One memory slot of the VM, and where its memory is.
#[derive(Debug, Clone)]
pub struct Region {
    pub(crate) slot: u32,
    pub(crate) gpa: u64,
    pub(crate) len: u64,
    pub(crate) host: u64,
    pub(crate) file: Arc<File>,
    pub(crate) offset: u64,
}

impl Region {
    /// Slot `slot` of the VM: `len` bytes at guest-physical address `gpa`,
    /// which the VMM has mapped at `host`, shared, from `offset` of `file` on.
    /// Regions of one file are given the same `Arc`.
    ///
    /// # Safety
    /// The slot is set up in KVM with just these values
    /// (`KVM_SET_USER_MEMORY_REGION`) for as long as the [`Link`](crate::Link)
    /// lives, and has no flags but the dirty log's: switching the log sets the
    /// region again.
    pub unsafe fn new(
        slot: u32,
        gpa: u64,
        len: u64,
        host: *mut u8,
        file: Arc<File>,
        offset: u64,
    ) -> Region {
        Region {
            slot,
            gpa,
            len,
            host: host as u64,
            file,
            offset,
        }
    }

    /// Number of its pages.
    pub fn pages(&self) -> u64 {
        self.len / PAGE
    }

    /// The numbers of its pages that `len` bytes at `gpa` touch.
    pub(crate) fn pages_of(&self, gpa: u64, len: u64) -> std::ops::Range<u64> {
        let end = gpa.saturating_add(len).min(self.gpa + self.len);
        let start = gpa.max(self.gpa);
        if start >= end {
            return 0..0;
        }
        (start - self.gpa) / PAGE..(end - self.gpa).div_ceil(PAGE)
    }
}

/// The files of the regions, each once, and which of them each region is in.
pub(crate) fn files_of(regions: &[Region]) -> (Vec<Arc<File>>, Vec<u16>) {
    let mut files: Vec<Arc<File>> = Vec::new();
    let index = regions.iter().map(|region| {
        let known = files.iter().position(|f| Arc::ptr_eq(f, &region.file));
        known.unwrap_or_else(|| {
            files.push(region.file.clone());
            files.len() - 1
        }) as u16
    });
    let index = index.collect();
    (files, index)
}

pub(crate) fn check(regions: &[Region]) -> Result<(), MemoryError> {
    let files = files_of(regions).0.len();
    if regions.is_empty() || regions.len() > MAX_REGIONS || files > MAX_FDS {
        return Err(MemoryError::Count {
            regions: regions.len(),
            files,
        });
    }
    for (i, a) in regions.iter().enumerate() {
        if a.len == 0 || (a.gpa | a.len | a.offset | a.host) % PAGE != 0 {
            return Err(MemoryError::Unaligned { slot: a.slot });
        }
        let overlap = |b: &&Region| {
            a.slot == b.slot || (a.gpa < b.gpa + b.len && b.gpa < a.gpa.saturating_add(a.len))
        };
        if let Some(b) = regions[..i].iter().find(overlap) {
            return Err(MemoryError::Overlap(b.slot, a.slot));
        }
    }
    let pages = regions.iter().map(Region::pages).sum();
    if pages > MAX_PAGES {
        return Err(MemoryError::TooLarge(pages));
    }
    Ok(())
}
