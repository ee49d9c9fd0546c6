//! NH, the fast half of a page's fingerprint: 4096 bytes become 32.
//!
//! NH is the almost-universal hash of UMAC (Black, Halevi, Krawczyk, Krovetz,
//! Rogaway: *UMAC: Fast and Secure Message Authentication*, CRYPTO '99). For words
//! `m` of 32 bits and as many key words `k` it is
//!
//! ```text
//! Σ (m[2i] + k[2i] mod 2^32) · (m[2i+1] + k[2i+1] mod 2^32)   mod 2^64
//! ```
//!
//! Two different inputs of equal length, chosen without the key, collide with
//! probability at most 2^-32 (theorem 1). Here four such sums are made, each with
//! the key moved on by one pair of words (the *Toeplitz* construction): all four
//! collide with probability at most 2^-128 (theorem 2), which is the best that 128
//! bits could do. It is a sum of products, so vector units do it at the speed of
//! memory, which no carry-less multiplication over the whole page does.
//!
//! The output is not yet short: see [`super::fingerprint`] for what becomes of it.

use crate::types::{PAGE_SIZE, Page};
use zeroize::Zeroizing;

/// Sums, each with the key moved on by a pair.
const SUMS: usize = 4;
/// Pairs of 32-bit words in a page.
const PAIRS: usize = PAGE_SIZE / 8;
/// Pairs of key words: those of the last sum end [`SUMS`] - 1 further.
const KEY_PAIRS: usize = PAIRS + SUMS - 1;
/// Pairs taken at once: what a vector register holds.
const LANES: usize = 4;

/// Bytes of a key.
const KEY_LEN: usize = 8 * KEY_PAIRS;
/// Bytes of a page's hash.
pub(super) const HASH_LEN: usize = 8 * SUMS;

/// A secret key; wiped when dropped.
pub(super) struct NhKey {
    /// Pairs of words, the first of a pair in the low half.
    pairs: Box<Zeroizing<[u64; KEY_PAIRS]>>,
    /// Whether this processor has AVX2, asked once.
    wide: bool,
}

impl NhKey {
    /// Takes uniformly random (or pseudo-random) bytes as key.
    pub(super) fn new(bytes: &[u8; KEY_LEN]) -> NhKey {
        let mut pairs = Box::new(Zeroizing::new([0; KEY_PAIRS]));
        for (pair, bytes) in pairs.iter_mut().zip(bytes.as_chunks().0) {
            *pair = u64::from_le_bytes(*bytes);
        }
        NhKey {
            pairs,
            wide: wide::available(),
        }
    }

    /// The hash of a page: its sums, each little-endian. The same whatever the
    /// processor.
    pub(super) fn hash(&self, page: &Page) -> [u8; HASH_LEN] {
        let sums = if self.wide {
            wide::sums(&self.pairs, page)
        } else {
            sums(&self.pairs, page)
        };
        let mut out = [0; HASH_LEN];
        for (out, sum) in out.as_chunks_mut().0.iter_mut().zip(sums) {
            *out = sum.to_le_bytes();
        }
        out
    }
}

/// The sums for any processor, in a shape that compilers can make vectors of.
fn sums(key: &[u64; KEY_PAIRS], page: &Page) -> [u64; SUMS] {
    let mut lanes = [[0u64; LANES]; SUMS];
    let (steps, _) = page.as_chunks::<{ 8 * LANES }>();
    for (step, at) in steps.iter().zip((0..).step_by(LANES)) {
        for (sum, lanes) in lanes.iter_mut().enumerate() {
            let pairs = step.as_chunks().0.iter().zip(&key[at + sum..]);
            for (lane, (pair, key)) in lanes.iter_mut().zip(pairs) {
                let (pair, low) = (u64::from_le_bytes(*pair), |wide: u64| wide as u32);
                let first = low(pair).wrapping_add(low(*key));
                let second = low(pair >> 32).wrapping_add(low(key >> 32));
                *lane = lane.wrapping_add(u64::from(first) * u64::from(second));
            }
        }
    }
    lanes.map(total)
}

fn total(lanes: [u64; LANES]) -> u64 {
    lanes.into_iter().fold(0, u64::wrapping_add)
}

#[cfg(target_arch = "x86_64")]
mod wide {
    #![allow(unsafe_code)]
    use super::{KEY_PAIRS, LANES, Page, SUMS, total};
    use std::arch::x86_64::{
        __m256i, _mm256_add_epi32, _mm256_add_epi64, _mm256_extract_epi64, _mm256_mul_epu32,
        _mm256_set_epi64x, _mm256_setzero_si256, _mm256_srli_epi64,
    };

    pub(super) fn available() -> bool {
        std::arch::is_x86_feature_detected!("avx2")
    }

    /// As [`super::sums`], four times as fast: compilers do not find these
    /// instructions by themselves. Only where they are [`available`].
    pub(super) fn sums(key: &[u64; KEY_PAIRS], page: &Page) -> [u64; SUMS] {
        assert!(available());
        // SAFETY: the processor has AVX2, as was just asked (and is remembered
        // by the standard library); the function itself is safe code.
        unsafe { sums_avx2(key, page) }
    }

    #[target_feature(enable = "avx2")]
    fn sums_avx2(key: &[u64; KEY_PAIRS], page: &Page) -> [u64; SUMS] {
        let mut lanes = [_mm256_setzero_si256(); SUMS];
        let (pairs, _) = page.as_chunks::<8>();
        let (steps, _) = pairs.as_chunks::<LANES>();
        for (step, at) in steps.iter().zip((0..).step_by(LANES)) {
            let words = vector(step.map(u64::from_le_bytes));
            for (sum, lanes) in lanes.iter_mut().enumerate() {
                let key = key[at + sum..].first_chunk().expect("the key is longer");
                let both = _mm256_add_epi32(words, vector(*key));
                let product = _mm256_mul_epu32(both, _mm256_srli_epi64::<32>(both));
                *lanes = _mm256_add_epi64(*lanes, product);
            }
        }
        lanes.map(|sum| {
            total([
                _mm256_extract_epi64::<0>(sum) as u64,
                _mm256_extract_epi64::<1>(sum) as u64,
                _mm256_extract_epi64::<2>(sum) as u64,
                _mm256_extract_epi64::<3>(sum) as u64,
            ])
        })
    }

    /// One load, in safe code.
    #[target_feature(enable = "avx2")]
    fn vector([a, b, c, d]: [u64; LANES]) -> __m256i {
        _mm256_set_epi64x(d as i64, c as i64, b as i64, a as i64)
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod wide {
    pub(super) use super::sums;

    pub(super) fn available() -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, word by word.
    fn plain(key: &[u8; KEY_LEN], page: &Page) -> [u8; HASH_LEN] {
        let word = |bytes: &[u8], i: usize| {
            u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().expect("four bytes"))
        };
        let mut out = [0; HASH_LEN];
        for sum in 0..SUMS {
            let total = (0..2 * PAIRS).step_by(2).fold(0u64, |total, i| {
                let plus = |i: usize| word(page, i).wrapping_add(word(key, i + 2 * sum));
                total.wrapping_add(u64::from(plus(i)) * u64::from(plus(i + 1)))
            });
            out[8 * sum..8 * sum + 8].copy_from_slice(&total.to_le_bytes());
        }
        out
    }

    fn filled<const N: usize>(seed: u64) -> [u8; N] {
        let mut state = seed;
        std::array::from_fn(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_way_gives_what_the_definition_gives(a: u64, b: u64) {
            let (key, page) = (filled(a), filled(b));
            let mut nh = NhKey::new(&key);
            let wanted = plain(&key, &page);
            prop_assert_eq!(nh.hash(&page), wanted);
            nh.wide = false;
            prop_assert_eq!(nh.hash(&page), wanted);
        }
    }

    #[test]
    fn extremes_wrap_as_defined() {
        for (key, page) in [(0xff, 0xff), (0xff, 0x01), (0x00, 0xff), (0x80, 0x80)] {
            let (key, page) = ([key; KEY_LEN], [page; PAGE_SIZE]);
            assert_eq!(NhKey::new(&key).hash(&page), plain(&key, &page));
        }
    }

    #[test]
    fn every_bit_of_a_page_counts_in_every_sum() {
        let nh = NhKey::new(&filled(7));
        let page: Page = filled(8);
        let before = nh.hash(&page);
        for bit in (0..8 * PAGE_SIZE).step_by(61) {
            let mut other = page;
            other[bit / 8] ^= 1 << (bit % 8);
            let after = nh.hash(&other);
            let sums = before
                .as_chunks::<8>()
                .0
                .iter()
                .zip(after.as_chunks::<8>().0);
            assert!(sums.clone().all(|(a, b)| a != b), "bit {bit}");
        }
    }
}
