//! What levels and windows of the lanes' zstd stream do to guests' RAM: the
//! table of `docs/lanes.md`, for RAM images of one's own.

use super::encode::{EncodeError, Encoder, Progress};
use super::*;
use crate::bench::BenchRow;
use crate::types::{Class, GangId, Gfn, PAGE_SIZE, Page, Round, VmIndex};
use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Level and base-2 logarithm of the window.
const SETTINGS: [(i32, u32); 8] = [
    (1, 23),
    (1, 24),
    (1, 26),
    (3, 23),
    (3, 24),
    (3, 25),
    (3, 26),
    (3, 27),
];
const PAGES: usize = pool::PAGES_PER_BUF;

/// Compresses the distinct pages of RAM images as lanes would: `per_host`
/// neighbouring images share a host and its one lane and are scanned in turns,
/// 128 pages at a time; a page goes with the first image that has it. With
/// `apart`, each image's scan starts at another place. One row per setting:
/// wire bytes by plain bytes, beside MB/s of one core, wire MB and MB of the
/// sender's context.
pub fn bench_zstd(images: &[PathBuf], per_host: usize, apart: bool) -> io::Result<Vec<BenchRow>> {
    let images: Vec<Vec<u8>> = images
        .iter()
        .map(std::fs::read)
        .collect::<io::Result<_>>()?;
    let hosts = streams(&images, per_host.max(1), apart);
    let plain: usize = hosts
        .iter()
        .flatten()
        .map(|batch| batch.len() * PAGE_SIZE)
        .sum();
    let pool = BufferPool::new(2)?;
    let mut rows = Vec::new();
    for (level, window_log) in SETTINGS {
        let config = EncodeConfig {
            compress: Compress::Always,
            level,
            window_log,
        };
        let start = Instant::now();
        let (mut wire, mut context) = (0, 0);
        for batches in &hosts {
            let mut encoder = Encoder::new(config);
            for batch in batches {
                wire += encoded_len(&mut encoder, &pool, batch).map_err(io::Error::other)?;
            }
            context = context.max(encoder.context_bytes());
        }
        let seconds = start.elapsed().as_secs_f64();
        let name = format!("zstd.level{level}.window{window_log}");
        rows.push(
            BenchRow::new(&name, wire as f64 / plain as f64, "wire/plain")
                .against("mb_per_s", plain as f64 / 1e6 / seconds)
                .against("wire_mb", wire as f64 / 1e6)
                .against("context_mb", context as f64 / 1e6),
        );
    }
    Ok(rows)
}

/// For each host the batches of its lane, as pages of the images.
fn streams(images: &[Vec<u8>], per_host: usize, apart: bool) -> Vec<Vec<Vec<&Page>>> {
    let mut hosts = vec![Vec::new(); images.len().div_ceil(per_host)];
    let mut staged: Vec<Vec<&Page>> = vec![Vec::new(); images.len()];
    let mut seen: HashSet<&Page> = HashSet::from([&[0; PAGE_SIZE]]);
    let longest = images
        .iter()
        .map(|image| image.len() / PAGE_SIZE)
        .max()
        .unwrap_or(0);
    for from in (0..longest).step_by(PAGES) {
        for (n, image) in images.iter().enumerate() {
            let (pages, _) = image.as_chunks::<PAGE_SIZE>();
            let offset = if apart {
                pages.len() * n / images.len()
            } else {
                0
            };
            for at in from..(from + PAGES).min(pages.len()) {
                let page = &pages[(at + offset) % pages.len()];
                if seen.insert(page) {
                    staged[n].push(page);
                }
                if staged[n].len() == PAGES {
                    hosts[n / per_host].push(std::mem::take(&mut staged[n]));
                }
            }
        }
    }
    for (n, rest) in staged
        .into_iter()
        .enumerate()
        .filter(|(_, rest)| !rest.is_empty())
    {
        hosts[n / per_host].push(rest);
    }
    hosts
}

fn encoded_len(
    encoder: &mut Encoder,
    pool: &BufferPool,
    pages: &[&Page],
) -> Result<usize, EncodeError> {
    let take = || pool.take(Duration::ZERO).map_err(|_| EncodeError::Room);
    let mut content = take()?;
    for (slot, page) in pages.iter().enumerate() {
        content.page_mut(slot).copy_from_slice(&page[..]);
    }
    let batch = StagedBatch {
        gang: GangId(1),
        vm: VmIndex(0),
        batch: BatchId(0),
        round: Round(1),
        class: Class::Precopy,
        domain: 0,
        entries: Entries {
            pages: (0..pages.len() as u32).map(Gfn).collect(),
            ..Entries::default()
        },
        content: Some(content),
    };
    let mut progress = encoder.start(batch, take()?)?;
    loop {
        progress = match progress {
            Progress::Done(frame) => return Ok(frame.to - frame.from),
            Progress::More(job) => encoder.step(job)?,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_once_and_alike_images_compress() {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..2).map(|n| dir.path().join(format!("ram{n}"))).collect();
        // Half a megabyte of text-like pages, the same in both; then zeroes.
        let mut image: Vec<u8> = (0..128)
            .flat_map(|n| super::super::testing::page(n * 3 + 2))
            .collect();
        image.resize(image.len() + 40 * PAGE_SIZE, 0);
        paths
            .iter()
            .for_each(|path| std::fs::write(path, &image).unwrap());
        for apart in [false, true] {
            let rows = bench_zstd(&paths, 2, apart).unwrap();
            assert_eq!(rows.len(), SETTINGS.len());
            for row in rows {
                assert!(row.value < 0.5, "{row:?}");
                assert!(
                    row.reference["wire_mb"] < 0.27,
                    "a page was sent twice: {row:?}"
                );
            }
        }
    }
}
