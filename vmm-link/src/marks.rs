//! Writes that KVM does not see: those of the VMM's own devices.

use crate::memory::Region;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Notes the writes of the VMM's devices into guest RAM, which pass KVM's log
/// by. Cheap to clone, one for each device thread.
///
/// Mark a page *after* it was written: a mark that comes first may be handed to
/// the agent, and the page read, before the write.
#[derive(Debug, Clone)]
pub struct Marks(Arc<Vec<Marked>>);

#[derive(Debug)]
struct Marked {
    region: Region,
    words: Box<[AtomicU64]>,
}

impl Marks {
    pub(crate) fn new(regions: &[Region]) -> Marks {
        let marked = regions.iter().map(|region| Marked {
            region: region.clone(),
            words: (0..region.pages().div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
        });
        Marks(Arc::new(marked.collect()))
    }

    /// Notes that `len` bytes at guest-physical address `gpa` were written.
    /// What is not RAM is ignored.
    pub fn wrote(&self, gpa: u64, len: u64) {
        for marked in self.0.iter() {
            marked.set(marked.region.pages_of(gpa, len));
        }
    }

    /// Notes a page of a slot, as KVM's ring names it.
    pub(crate) fn wrote_in_slot(&self, slot: u32, page: u64) {
        if let Some(marked) = self.0.iter().find(|m| m.region.slot == slot)
            && page < marked.region.pages()
        {
            marked.set(page..page + 1);
        }
    }

    /// Takes the marks of a region out, into `bits`.
    pub(crate) fn take_into(&self, region: usize, bits: &mut [u64]) {
        for (word, bits) in self.0[region].words.iter().zip(bits) {
            // Most words are empty, and an exchange costs more than a look.
            if word.load(Ordering::Relaxed) != 0 {
                *bits |= word.swap(0, Ordering::AcqRel);
            }
        }
    }

    pub(crate) fn clear(&self) {
        for word in self.0.iter().flat_map(|marked| &marked.words) {
            word.store(0, Ordering::Relaxed);
        }
    }
}

impl Marked {
    fn set(&self, pages: Range<u64>) {
        let mut page = pages.start;
        while page < pages.end {
            let (word, bit) = (page / 64, page % 64);
            let n = (64 - bit).min(pages.end - page);
            let bits = (u64::MAX >> (64 - n)) << bit;
            self.words[word as usize].fetch_or(bits, Ordering::AcqRel);
            page += n;
        }
    }
}
