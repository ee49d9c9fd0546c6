//! The log as the agent sees it: on, off, and rounds.

use crate::kvm::Vm;
use crate::marks::Marks;
use crate::memory::Region;
use crate::ring::DirtyRings;
use crate::wire::{LogKind, MAX_CHUNK};
use std::io;
use std::ops::Range;

/// Words of one `Bits`.
const WORDS: usize = MAX_CHUNK / 8;

#[derive(Debug)]
pub(crate) struct Log {
    vm: Vm,
    regions: Vec<Region>,
    marks: Marks,
    mode: Mode,
    on: bool,
    bits: Vec<u64>,
}

#[derive(Debug)]
enum Mode {
    Bitmap { manual: bool },
    Rings(DirtyRings),
}

impl Log {
    pub(crate) fn new(
        vm: Vm,
        regions: Vec<Region>,
        marks: Marks,
        rings: Option<DirtyRings>,
    ) -> io::Result<Log> {
        let mode = match rings {
            Some(rings) => {
                rings.collect_into(marks.clone());
                Mode::Rings(rings)
            }
            None => Mode::Bitmap {
                manual: vm.manual_protect()?,
            },
        };
        Ok(Log {
            vm,
            regions,
            marks,
            mode,
            on: false,
            bits: Vec::new(),
        })
    }

    pub(crate) fn kind(&self) -> LogKind {
        match self.mode {
            Mode::Bitmap { manual: false } => LogKind::Bitmap,
            Mode::Bitmap { manual: true } => LogKind::ManualBitmap,
            Mode::Rings(_) => LogKind::Ring,
        }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.on
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Every write after this returns is in a round. On failure the log is off.
    pub(crate) fn start(&mut self) -> io::Result<()> {
        self.stop()?;
        if let Mode::Rings(rings) = &self.mode {
            rings.begin();
        }
        self.marks.clear();
        // Also when it fails half-way: some slots may log then.
        self.on = true;
        let switched = self
            .regions
            .iter()
            .try_for_each(|region| self.vm.log_region(region, true));
        switched.inspect_err(|_| drop(self.stop()))
    }

    pub(crate) fn stop(&mut self) -> io::Result<()> {
        if !self.on {
            return Ok(());
        }
        for region in &self.regions {
            self.vm.log_region(region, false)?;
        }
        self.on = false;
        Ok(())
    }

    /// Calls `f` with region, first page and bits of all that was written since
    /// the log was started or last asked; returns how many pages that were. A
    /// page is protected again before `f` hears of it, so whoever reads it after
    /// that either has the write or finds it in the next round.
    ///
    /// `kick` makes each running vCPU leave the guest once: only then has it put
    /// into its ring what the processor has noted (PML).
    pub(crate) fn round(
        &mut self,
        kick: impl FnOnce(),
        mut f: impl FnMut(u16, u32, &[u64]) -> io::Result<()>,
    ) -> io::Result<u64> {
        if let Mode::Rings(rings) = &self.mode {
            kick();
            rings.drain()?;
        }
        let mut pages = 0;
        for (i, region) in self.regions.iter().enumerate() {
            let bits = &mut self.bits;
            bits.clear();
            bits.resize(region.pages().div_ceil(64) as usize, 0);
            if let Mode::Bitmap { manual } = self.mode {
                self.vm.dirty_log(region, bits)?;
                let span = span(bits);
                if manual && !span.is_empty() {
                    let first = span.start as u64 * 64;
                    self.vm.clear_dirty_log(region, first, &mut bits[span])?;
                }
            }
            self.marks.take_into(i, bits);
            for (n, words) in bits.chunks(WORDS).enumerate() {
                let span = span(words);
                if span.is_empty() {
                    continue;
                }
                let first = (n * WORDS + span.start) * 64;
                let words = &words[span];
                pages += words.iter().map(|w| u64::from(w.count_ones())).sum::<u64>();
                f(i as u16, first as u32, words)?;
            }
        }
        Ok(pages)
    }
}

/// From the first word that is not zero to the last.
fn span(words: &[u64]) -> Range<usize> {
    let some = |word: &u64| *word != 0;
    match (words.iter().position(some), words.iter().rposition(some)) {
        (Some(first), Some(last)) => first..last + 1,
        _ => 0..0,
    }
}
