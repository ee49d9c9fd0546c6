//! `drover bench fingerprint` and `drover bench claims`: this machine's figures,
//! each beside references measured in the same run.

use super::{
    claim::{ClaimConfig, ClaimShard},
    fingerprint::{FingerprintKey, is_zero_page},
};
use crate::{
    bench::BenchRow,
    config::ClusterSecret,
    types::{Fingerprint, HolderId, PAGE_SIZE, Page},
};
use ahash::AHashMap;
use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use std::{
    collections::HashMap,
    hint::black_box,
    time::{Duration, Instant},
};

/// Pages measured over: 256 MiB, far more than any cache holds.
const PAGES: usize = 65_536;
/// Pages that stay in the first-level cache: 16 KiB.
const CACHED: usize = 4;
/// Best of this many passes, so that a neighbour's burst does not count.
const PASSES: usize = 5;

/// Bytes a second of `pass`, which goes over all of `bytes`, in GB/s.
fn rate(bytes: usize, mut pass: impl FnMut()) -> f64 {
    let best = (0..PASSES).map(|_| timed(&mut pass)).min();
    let best = best.unwrap_or(Duration::MAX);
    bytes as f64 / best.as_secs_f64() / 1e9
}

fn timed(f: impl FnOnce()) -> Duration {
    let start = Instant::now();
    f();
    start.elapsed()
}

/// Pages with content, each its own.
fn pages() -> Vec<Page> {
    let mut state = 1u64;
    let mut next = || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let mut pages = vec![[0; PAGE_SIZE]; PAGES];
    for page in &mut pages {
        for word in page.as_chunks_mut::<8>().0 {
            *word = next().to_le_bytes();
        }
    }
    pages
}

/// Sums a page in 64-bit words: what merely reading it costs.
fn read_page(page: &Page) -> u64 {
    let (words, _) = page.as_chunks::<8>();
    words.iter().fold(0, |sum: u64, word| {
        sum.wrapping_add(u64::from_le_bytes(*word))
    })
}

/// Fingerprinting on one core, beside this machine's single-core rates of reading
/// and copying the same pages. About 2 s.
pub fn bench_fingerprint() -> Vec<BenchRow> {
    let secret = ClusterSecret::from_bytes(std::array::from_fn(|i| i as u8));
    let key = FingerprintKey::derive(&secret, "bench");
    let pages = pages();
    let bytes = PAGES * PAGE_SIZE;

    let whole = rate(bytes, || {
        for page in &pages {
            black_box(key.fingerprint(black_box(page)));
        }
    });
    // What was decided against, and why: see `fingerprint`.
    let gmac_key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &[7; 16]).expect("16 bytes"));
    let gmac = rate(bytes, || {
        for page in &pages {
            let nonce = Nonce::assume_unique_for_key([0; 12]);
            let page = Aad::from(black_box(page));
            let tag = gmac_key.seal_in_place_separate_tag(nonce, page, &mut []);
            let _ = black_box(tag);
        }
    });
    let read = rate(bytes, || {
        for page in &pages {
            black_box(read_page(black_box(page)));
        }
    });
    // What the hash itself takes, without waiting for memory.
    let in_cache = rate(bytes, || {
        for _ in 0..PAGES / CACHED {
            for page in &pages[..CACHED] {
                black_box(key.fingerprint(black_box(page)));
            }
        }
    });
    let mut copy: Vec<Page> = vec![[1; PAGE_SIZE]; PAGES];
    let memcpy = rate(bytes, || {
        copy.copy_from_slice(black_box(&pages));
        black_box(&mut copy);
    });
    copy.fill([0; PAGE_SIZE]);
    let zero = rate(bytes, || {
        for page in &copy {
            assert!(is_zero_page(black_box(page)));
        }
    });
    let zero_read = rate(bytes, || {
        for page in &copy {
            black_box(read_page(black_box(page)));
        }
    });
    // As the scan does it: copy a page into a buffer, fingerprint the copy.
    let mut buffer = [0; PAGE_SIZE];
    let captured = rate(bytes, || {
        for page in &pages {
            buffer.copy_from_slice(black_box(page));
            black_box(key.fingerprint(black_box(&buffer)));
        }
    });
    vec![
        BenchRow::new("fingerprint.page", whole, "GB/s")
            .against("read_one_core", read)
            .against("memcpy_one_core", memcpy)
            .against("gmac_of_the_page", gmac)
            .against("share_of_read", whole / read),
        BenchRow::new("fingerprint.page_in_cache", in_cache, "GB/s").against("read_one_core", read),
        BenchRow::new("fingerprint.copy_then_page", captured, "GB/s")
            .against("memcpy_one_core", memcpy),
        BenchRow::new("fingerprint.zero_check", zero, "GB/s").against("read_one_core", zero_read),
    ]
}

/// Claims per call, as agents send them.
const BATCH: usize = 512;
/// Distinct fingerprints claimed: a shard's share of a large gang.
const CLAIMS: usize = 4 << 20;

fn fingerprints() -> Vec<Fingerprint> {
    (0..CLAIMS as u64)
        .map(|i| {
            let mix = |x: u64| {
                let x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
                let x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
                x ^ (x >> 33)
            };
            let mut fp = [0; 16];
            fp[..8].copy_from_slice(&mix(2 * i + 1).to_le_bytes());
            fp[8..].copy_from_slice(&mix(2 * i + 2).to_le_bytes());
            Fingerprint(fp)
        })
        .collect()
}

fn millions_per_second(claims: usize, time: Duration) -> f64 {
    claims as f64 / time.as_secs_f64() / 1e6
}

/// A map with the same job, one entry for each fingerprint.
fn bench_map<S: std::hash::BuildHasher + Default>(fps: &[Fingerprint]) -> f64 {
    let mut map: HashMap<u128, u16, S> = HashMap::default();
    let time = timed(|| {
        for fp in fps {
            black_box(*map.entry(u128::from_le_bytes(fp.0)).or_insert(1));
        }
        for fp in fps {
            black_box(*map.entry(u128::from_le_bytes(fp.0)).or_insert(2));
        }
    });
    millions_per_second(2 * fps.len(), time)
}

/// Claims at one shard on one core, each fingerprint once by each of two hosts
/// (the first is told *yours*, the second *held*), the table growing from empty.
/// Beside it general hash maps doing the same. About 5 s.
pub fn bench_claims() -> Vec<BenchRow> {
    let fps = fingerprints();
    let mut best = [0f64; 3];
    let mut entry_bytes = 0.0;
    for _ in 0..2 {
        let shard = ClaimShard::new(ClaimConfig::default());
        let mut rates = [0f64; 3];
        let times: [Duration; 2] = [1, 2].map(|host| {
            timed(|| {
                for batch in fps.chunks(BATCH) {
                    black_box(shard.claim(black_box(batch), HolderId(host)));
                }
            })
        });
        rates[0] = millions_per_second(2 * CLAIMS, times[0] + times[1]);
        rates[1] = millions_per_second(CLAIMS, times[0]);
        rates[2] = millions_per_second(CLAIMS, times[1]);
        for (best, rate) in best.iter_mut().zip(rates) {
            *best = best.max(rate);
        }
        entry_bytes = shard.memory_bytes() as f64 / shard.len() as f64;
    }
    let std = bench_map::<std::hash::RandomState>(&fps);
    let ahash = bench_map::<ahash::RandomState>(&fps);
    let map_entry = {
        let mut map: AHashMap<u128, u16> = AHashMap::new();
        map.extend(fps.iter().map(|fp| (u128::from_le_bytes(fp.0), 1)));
        // hashbrown's buckets: a power of two, at most 7/8 full; 32 B and a byte each.
        let buckets = (map.len() * 8 / 7).next_power_of_two();
        buckets as f64 * (size_of::<(u128, u16)>() + 1) as f64 / map.len() as f64
    };
    vec![
        BenchRow::new("claims.rate", best[0], "million/s")
            .against("first_claims", best[1])
            .against("repeated_claims", best[2])
            .against("std_hashmap", std)
            .against("ahash_map", ahash),
        BenchRow::new("claims.entry", entry_bytes, "bytes/entry")
            .against("worst_case", 8.0 / 0.68)
            .against("ahash_map", map_entry),
    ]
}
