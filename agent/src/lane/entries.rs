//! The entry list of a batch: which pages of the VM it says something about.
//!
//! Three columns, each a run-length or delta code over gfns, little-endian
//! base-128 varints (`v`), zigzag for signed differences (`z`):
//!
//! ```text
//! v n        zero runs:  n × { z first − end of the run before, v count − 1 }
//! v n        page runs:  n × { z first − end of the run before, v count − 1 }
//! v n        ref groups: n × { v holder, v count − 1,
//!                              count × z gfn − (gfn before + 1),
//!                              count × 16-byte fingerprint }
//! ```
//!
//! "Before" starts at 0 in each column. A reference in a run of neighbours
//! with one holder costs 17 bytes. Page contents follow the list in the order
//! of its page runs. No gfn may occur twice in a batch.

use super::frame::FrameError;
use super::pool::PAGES_PER_BUF;
use crate::types::{Fingerprint, Gfn, HolderId};

/// References one batch may carry.
pub const MAX_REFS: usize = 384;
/// Zero runs one batch may carry.
pub const MAX_ZERO_RUNS: usize = 384;

/// Bytes of the longest list that keeps to the counts: what header room is
/// reckoned by.
pub const MAX_LIST_LEN: usize = 3 * 2 // the three counts
    + MAX_ZERO_RUNS * 10
    + PAGES_PER_BUF * 10
    + MAX_REFS * (3 + 2 + 5 + 16);

/// Neighbouring pages that are all zero bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroRun {
    /// The first page.
    pub first: Gfn,
    /// How many (≥ 1).
    pub count: u32,
}

/// A page whose content a host of the target rack already holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reference {
    /// The page to be filled.
    pub gfn: Gfn,
    /// The host that has the content.
    pub holder: HolderId,
    /// What the content must fingerprint to.
    pub fingerprint: Fingerprint,
}

/// What a batch says about pages of its VM. Sender and receiver see the pages
/// in the same order; the order of references is the codec's own
/// ([`normalize`](Entries::normalize)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entries {
    /// Pages of zeroes, as runs; at most [`MAX_ZERO_RUNS`].
    pub zeros: Vec<ZeroRun>,
    /// Pages whose content is in the batch, in the order it is packed; at most
    /// [`PAGES_PER_BUF`].
    pub pages: Vec<Gfn>,
    /// Pages served by reference; at most [`MAX_REFS`].
    pub refs: Vec<Reference>,
}

impl Entries {
    /// Adds a zero page; a neighbour of the last run makes it longer. Returns
    /// false (and adds nothing) when the batch has [`MAX_ZERO_RUNS`].
    #[must_use]
    pub fn push_zero(&mut self, gfn: Gfn) -> bool {
        if let Some(run) = self.zeros.last_mut()
            && run.first.0.checked_add(run.count) == Some(gfn.0)
        {
            run.count += 1;
            return true;
        }
        if self.zeros.len() == MAX_ZERO_RUNS {
            return false;
        }
        self.zeros.push(ZeroRun {
            first: gfn,
            count: 1,
        });
        true
    }

    /// No entry at all.
    pub fn is_empty(&self) -> bool {
        self.zeros.is_empty() && self.pages.is_empty() && self.refs.is_empty()
    }

    /// No further page content, reference or zero run may fit.
    pub fn is_full(&self) -> bool {
        self.zeros.len() >= MAX_ZERO_RUNS
            || self.pages.len() >= PAGES_PER_BUF
            || self.refs.len() >= MAX_REFS
    }

    /// Pages the batch speaks of: zero, content and reference together.
    pub fn page_count(&self) -> u64 {
        self.zeros
            .iter()
            .map(|run| u64::from(run.count))
            .sum::<u64>()
            + (self.pages.len() + self.refs.len()) as u64
    }

    /// Every gfn in the batch: zero runs, then pages, then references.
    pub fn gfns(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.zeros
            .iter()
            .flat_map(|run| (run.first.0..).take(run.count as usize).map(Gfn))
            .chain(self.pages.iter().copied())
            .chain(self.refs.iter().map(|r| r.gfn))
    }

    /// Brings references into the order the wire has them in, by holder and
    /// gfn, which is the shortest to write.
    pub fn normalize(&mut self) {
        self.refs.sort_unstable_by_key(|r| (r.holder, r.gfn));
    }

    /// Checks counts, and that no page occurs twice or lies at or beyond
    /// `ram_pages`.
    pub fn check(&self, ram_pages: u32) -> Result<(), FrameError> {
        if self.zeros.len() > MAX_ZERO_RUNS
            || self.pages.len() > PAGES_PER_BUF
            || self.refs.len() > MAX_REFS
        {
            return Err(FrameError::TooManyEntries);
        }
        let single = |gfn: Gfn| (u64::from(gfn.0), u64::from(gfn.0) + 1);
        let mut ranges: Vec<(u64, u64)> = self
            .zeros
            .iter()
            .map(|run| {
                (
                    u64::from(run.first.0),
                    u64::from(run.first.0) + u64::from(run.count),
                )
            })
            .chain(self.pages.iter().map(|&gfn| single(gfn)))
            .chain(self.refs.iter().map(|r| single(r.gfn)))
            .collect();
        ranges.sort_unstable();
        if let Some(pair) = ranges.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            return Err(FrameError::PageTwice { gfn: pair[1].0 });
        }
        match ranges.last() {
            Some(&(_, end)) if end > u64::from(ram_pages) => Err(FrameError::BeyondRam {
                gfn: end - 1,
                ram_pages,
            }),
            _ => Ok(()),
        }
    }

    /// Writes the list to the front of `out` and returns its length. Call
    /// [`normalize`](Self::normalize) first.
    pub fn encode(&self, out: &mut [u8]) -> Result<usize, FrameError> {
        let mut w = Writer { out, pos: 0 };
        w.varint(self.zeros.len() as u64)?;
        let mut end = 0i64;
        for run in &self.zeros {
            end = w.run(end, run.first, run.count)?;
        }
        let runs = || self.pages.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0));
        w.varint(runs().count() as u64)?;
        let mut end = 0i64;
        for run in runs() {
            end = w.run(end, run[0], run.len() as u32)?;
        }
        let groups = || self.refs.chunk_by(|a, b| a.holder == b.holder);
        w.varint(groups().count() as u64)?;
        let mut next = 0i64;
        for group in groups() {
            w.varint(u64::from(group[0].holder.0))?;
            w.varint(group.len() as u64 - 1)?;
            for r in group {
                w.zigzag(i64::from(r.gfn.0) - next)?;
                next = i64::from(r.gfn.0) + 1;
            }
            for r in group {
                w.bytes(&r.fingerprint.0)?;
            }
        }
        Ok(w.pos)
    }

    /// Reads a list that fills `list` exactly and names exactly `pages` page
    /// contents. Nothing is allocated beyond the counts' caps.
    pub fn decode(list: &[u8], pages: usize) -> Result<Entries, FrameError> {
        let mut r = Reader { list, pos: 0 };
        let mut entries = Entries::default();
        let count = r.count(MAX_ZERO_RUNS)?;
        entries.zeros.reserve(count);
        let mut end = 0i64;
        for _ in 0..count {
            let run = r.run(&mut end)?;
            entries.zeros.push(run);
        }
        let count = r.count(PAGES_PER_BUF)?;
        let mut end = 0i64;
        for _ in 0..count {
            let run = r.run(&mut end)?;
            if run.count as usize > PAGES_PER_BUF - entries.pages.len() {
                return Err(FrameError::TooManyEntries);
            }
            // A run may end with the very last gfn there can be.
            let last = run.first.0 + (run.count - 1);
            entries.pages.extend((run.first.0..=last).map(Gfn));
        }
        let groups = r.count(MAX_REFS)?;
        let mut next = 0i64;
        for _ in 0..groups {
            let holder = u16::try_from(r.varint()?).map_err(|_| FrameError::BadList)?;
            let count = r.count_less_one(MAX_REFS - entries.refs.len())?;
            let first = entries.refs.len();
            for _ in 0..count {
                let gfn = u32::try_from(next.saturating_add(r.zigzag()?))
                    .map_err(|_| FrameError::BadList)?;
                next = i64::from(gfn) + 1;
                entries.refs.push(Reference {
                    gfn: Gfn(gfn),
                    holder: HolderId(holder),
                    fingerprint: Fingerprint::ZERO,
                });
            }
            for reference in &mut entries.refs[first..] {
                reference.fingerprint = Fingerprint(r.bytes()?);
            }
        }
        if r.pos != list.len() {
            return Err(FrameError::BadList);
        }
        if entries.pages.len() != pages {
            return Err(FrameError::PageCount {
                header: pages,
                list: entries.pages.len(),
            });
        }
        Ok(entries)
    }
}

struct Writer<'a> {
    out: &'a mut [u8],
    pos: usize,
}

impl Writer<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<(), FrameError> {
        let end = self.pos + bytes.len();
        self.out
            .get_mut(self.pos..end)
            .ok_or(FrameError::TooManyEntries)?
            .copy_from_slice(bytes);
        self.pos = end;
        Ok(())
    }

    fn varint(&mut self, mut value: u64) -> Result<(), FrameError> {
        let mut bytes = [0u8; 10];
        let mut len = 0;
        loop {
            bytes[len] = (value & 0x7f) as u8;
            value >>= 7;
            len += 1;
            if value == 0 {
                return self.bytes(&bytes[..len]);
            }
            bytes[len - 1] |= 0x80;
        }
    }

    fn zigzag(&mut self, value: i64) -> Result<(), FrameError> {
        self.varint(((value << 1) ^ (value >> 63)) as u64)
    }

    fn run(&mut self, before: i64, first: Gfn, count: u32) -> Result<i64, FrameError> {
        self.zigzag(i64::from(first.0) - before)?;
        self.varint(u64::from(count.checked_sub(1).ok_or(FrameError::BadList)?))?;
        Ok(i64::from(first.0) + i64::from(count))
    }
}

struct Reader<'a> {
    list: &'a [u8],
    pos: usize,
}

impl Reader<'_> {
    fn varint(&mut self) -> Result<u64, FrameError> {
        // No number in the list needs more than 34 bits.
        let mut value = 0u64;
        for shift in [0, 7, 14, 21, 28] {
            let byte = *self.list.get(self.pos).ok_or(FrameError::BadList)?;
            self.pos += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(FrameError::BadList)
    }

    fn zigzag(&mut self) -> Result<i64, FrameError> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    fn count(&mut self, cap: usize) -> Result<usize, FrameError> {
        match usize::try_from(self.varint()?) {
            Ok(count) if count <= cap => Ok(count),
            _ => Err(FrameError::TooManyEntries),
        }
    }

    fn count_less_one(&mut self, cap: usize) -> Result<usize, FrameError> {
        match usize::try_from(self.varint()?) {
            Ok(count) if count < cap => Ok(count + 1),
            _ => Err(FrameError::TooManyEntries),
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let bytes = self
            .list
            .get(self.pos..self.pos + N)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(FrameError::BadList)?;
        self.pos += N;
        Ok(bytes)
    }

    /// A run of pages that starts after `end`; moves `end` to its own end.
    fn run(&mut self, end: &mut i64) -> Result<ZeroRun, FrameError> {
        let first =
            u32::try_from(end.saturating_add(self.zigzag()?)).map_err(|_| FrameError::BadList)?;
        let count = u32::try_from(self.varint()?)
            .ok()
            .and_then(|less_one| less_one.checked_add(1))
            .ok_or(FrameError::BadList)?;
        *end = i64::from(first) + i64::from(count);
        if *end > i64::from(u32::MAX) + 1 {
            return Err(FrameError::BadList);
        }
        Ok(ZeroRun {
            first: Gfn(first),
            count,
        })
    }
}
