//! What deduplication alone, and with compression, could bring a gang down to.

use crate::save::Saved;
use anyhow::{Context, Result};
use std::collections::HashSet;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;
/// Pages compressed together.
const BATCH: usize = 64;

/// Bytes over the RAM of all guests of a gang.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Bound {
    /// Pages that are not zero, in bytes.
    pub nonzero_bytes: u64,
    /// Of these, one of each content.
    pub distinct_bytes: u64,
    /// The distinct ones as zstd level 1 batches of 64 pages.
    pub zstd1_bytes: u64,
}

/// Computes the bound of these guests.
///
/// # Errors
/// When a save cannot be read.
pub fn of(saves: &[Saved]) -> Result<Bound> {
    let mut sum = Summer::new()?;
    for saved in saves {
        let path = saved.ram();
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        let len = file.metadata()?.len();
        let mut buf = vec![0; 256 * PAGE];
        let mut at = 0;
        while at < len {
            let want = buf.len().min((len - at) as usize);
            file.read_exact_at(&mut buf[..want], at)?;
            for page in buf[..want].chunks_exact(PAGE) {
                sum.page(page)?;
            }
            at += want as u64;
        }
    }
    sum.finish()
}

struct Summer {
    seen: HashSet<(u64, u64)>,
    batch: Vec<u8>,
    zstd: zstd::bulk::Compressor<'static>,
    bound: Bound,
}

impl Summer {
    fn new() -> Result<Summer> {
        Ok(Summer {
            seen: HashSet::new(),
            batch: Vec::with_capacity(BATCH * PAGE),
            zstd: zstd::bulk::Compressor::new(1)?,
            bound: Bound::default(),
        })
    }

    fn page(&mut self, page: &[u8]) -> Result<()> {
        if page.iter().all(|b| *b == 0) {
            return Ok(());
        }
        self.bound.nonzero_bytes += PAGE as u64;
        // Two hashes of 64 bits that start differently tell pages apart.
        let hash = |first: u8| {
            let mut hasher = DefaultHasher::new();
            first.hash(&mut hasher);
            hasher.write(page);
            hasher.finish()
        };
        if self.seen.insert((hash(0), hash(1))) {
            self.bound.distinct_bytes += PAGE as u64;
            self.batch.extend_from_slice(page);
            if self.batch.len() == BATCH * PAGE {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if !self.batch.is_empty() {
            self.bound.zstd1_bytes += self.zstd.compress(&self.batch)?.len() as u64;
            self.batch.clear();
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Bound> {
        self.flush()?;
        Ok(self.bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_each_content_once_and_zeroes_never() -> Result<()> {
        let mut sum = Summer::new()?;
        for content in [0u8, 1, 2, 1, 0, 2] {
            sum.page(&[content; PAGE])?;
        }
        let bound = sum.finish()?;
        assert_eq!(
            (bound.nonzero_bytes, bound.distinct_bytes),
            (4 * 4096, 2 * 4096)
        );
        assert!(bound.zstd1_bytes > 0 && bound.zstd1_bytes < 200);
        Ok(())
    }
}
