//! The answers to a round: bits of regions, checked and made runs of pages.

use crate::types::{Gfn, PAGE_SIZE};
use drover_vmm::wire::{Bits, RegionInfo};
use std::ops::Range;

/// Checks that a VMM's answers rise and stay within its RAM, and joins what is
/// adjacent.
#[derive(Debug)]
pub(super) struct RoundReader<'a> {
    regions: &'a [RegionInfo],
    /// Region and page from which on the next bits may be.
    next: (u16, u64),
    run: Range<u32>,
    pub(super) pages: u64,
    pub(super) runs: u64,
}

impl<'a> RoundReader<'a> {
    pub(super) fn new(regions: &'a [RegionInfo]) -> RoundReader<'a> {
        RoundReader {
            regions,
            next: (0, 0),
            run: 0..0,
            pages: 0,
            runs: 0,
        }
    }

    /// Takes one answer in. Fails with what is wrong with it.
    pub(super) fn take(
        &mut self,
        bits: &Bits<'_>,
        f: &mut dyn FnMut(Range<Gfn>),
    ) -> Result<(), String> {
        let region = self
            .regions
            .get(usize::from(bits.region))
            .ok_or_else(|| format!("pages of region {} of {}", bits.region, self.regions.len()))?;
        let first = u64::from(bits.first);
        if (bits.region, first) < self.next {
            return Err(format!("page {first} of region {} again", bits.region));
        }
        let pages = region.pages();
        if first + bits.span() > pages.next_multiple_of(64) {
            return Err(format!(
                "pages beyond the {pages} of region {}",
                bits.region
            ));
        }
        self.next = (bits.region, first + bits.span());
        let base = (region.offset / PAGE_SIZE as u64) as u32;
        for (at, mut word) in bits.words() {
            while word != 0 {
                let bit = u64::from(word.trailing_zeros());
                let n = u64::from((word >> bit).trailing_ones());
                word &= !((u64::MAX >> (64 - n)) << bit);
                if at + bit + n > pages {
                    return Err(format!(
                        "pages beyond the {pages} of region {}",
                        bits.region
                    ));
                }
                let start = base + (at + bit) as u32;
                self.add(start..start + n as u32, f);
            }
        }
        Ok(())
    }

    fn add(&mut self, run: Range<u32>, f: &mut dyn FnMut(Range<Gfn>)) {
        if self.run.end == run.start && !self.run.is_empty() {
            self.run.end = run.end;
            return;
        }
        self.flush(f);
        self.run = run;
    }

    /// Hands out what is left.
    pub(super) fn flush(&mut self, f: &mut dyn FnMut(Range<Gfn>)) {
        let run = std::mem::replace(&mut self.run, 0..0);
        if !run.is_empty() {
            self.pages += u64::from(run.end - run.start);
            self.runs += 1;
            f(Gfn(run.start)..Gfn(run.end));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_vmm::wire::{Answer, HEADER};

    const REGIONS: [RegionInfo; 2] = [
        RegionInfo {
            gpa: 0,
            len: 130 << 12,
            offset: 0,
            fd: 0,
        },
        RegionInfo {
            gpa: 1 << 32,
            len: 64 << 12,
            offset: 130 << 12,
            fd: 0,
        },
    ];

    fn read(answers: &[(u16, u32, &[u64])]) -> Result<Vec<Range<u32>>, String> {
        let mut reader = RoundReader::new(&REGIONS);
        let mut found = Vec::new();
        let mut note = |run: Range<Gfn>| found.push(run.start.0..run.end.0);
        for (region, first, words) in answers {
            let mut frame = Vec::new();
            Answer::encode_bits(&mut frame, *region, *first, words);
            let kind = u16::from_le_bytes([frame[4], frame[5]]);
            match Answer::decode(kind, &frame[HEADER..]) {
                Ok(Answer::Bits(bits)) => reader.take(&bits, &mut note)?,
                other => panic!("{other:?}"),
            }
        }
        reader.flush(&mut note);
        Ok(found)
    }

    #[test]
    fn bits_become_runs_of_pages_by_their_place_in_the_file() {
        let found = read(&[(0, 0, &[1 << 63, 0b1011]), (0, 128, &[0b10]), (1, 0, &[3])]);
        assert_eq!(found.unwrap(), [63..66, 67..68, 129..132]);
        assert_eq!(read(&[]).unwrap(), []);
        let all: Vec<_> = std::iter::once(0..128).collect();
        assert_eq!(read(&[(0, 0, &[u64::MAX; 2])]).unwrap(), all);
    }

    #[test]
    fn bits_outside_of_ram_or_out_of_order_are_refused() {
        for wrong in [
            &[(2, 0, &[1u64][..])][..],
            &[(0, 128, &[0b100])],
            &[(0, 192, &[1])],
            &[(1, 0, &[1, 1])],
            &[(0, 64, &[1]), (0, 0, &[1])],
            &[(0, 0, &[1]), (0, 0, &[1])],
            &[(1, 0, &[1]), (0, 0, &[1])],
        ] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
    }
}
