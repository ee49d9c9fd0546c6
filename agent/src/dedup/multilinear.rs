//! The short half of a page's fingerprint: 32 bytes of [NH](super::nh) become 16.
//!
//! A multilinear hash over a prime field (Carter and Wegman, *Universal Classes of
//! Hash Functions*, 1979): the eight 32-bit words of the input, each times a secret
//! number below p, summed modulo p = 2^127 - 1. For two different inputs the
//! difference of their hashes is a sum with at least one non-zero factor, so it is
//! zero for one value in p of that factor's number: they collide with probability
//! 1/p. Modulo a Mersenne prime this takes some ten nanoseconds; a call of AES-GMAC
//! takes as long as half a page of NH.

use super::nh::HASH_LEN;
use zeroize::Zeroizing;

/// The prime 2^127 - 1.
const P: u128 = (1 << 127) - 1;
/// Words of 32 bits in an input.
const WORDS: usize = HASH_LEN / 4;

/// Bytes of a key.
const KEY_LEN: usize = 16 * WORDS;

/// A secret key; wiped when dropped.
pub(super) struct MultilinearKey(Zeroizing<[u128; WORDS]>);

impl MultilinearKey {
    /// Takes uniformly random (or pseudo-random) bytes as key. (Of 2^127 numbers
    /// one is p, which is as good as 0: that makes it non-uniform by 2^-127.)
    pub(super) fn new(bytes: &[u8; KEY_LEN]) -> MultilinearKey {
        let mut numbers = Zeroizing::new([0; WORDS]);
        for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks().0) {
            *number = u128::from_le_bytes(*bytes) & P;
        }
        MultilinearKey(numbers)
    }

    /// The hash of an input: 127 bits, the value below p. The lowest bit, for which
    /// that has no room, is one of the input's, so that all 128 serve as a hash.
    pub(super) fn hash(&self, input: &[u8; HASH_LEN]) -> u128 {
        // Of each number the low 64 bits and the high 63, times 32 bits, eight
        // times: neither sum is longer than 99 bits.
        let (mut low, mut high) = (0u128, 0u128);
        for (number, word) in self.0.iter().zip(input.as_chunks().0) {
            let word = u128::from(u32::from_le_bytes(*word));
            low += u128::from(*number as u64) * word;
            high += (number >> 64) * word;
        }
        // 2^127 is 1: what of `high` is at 2^127 or above, comes in at the bottom.
        let sum = ((high & (P >> 64)) << 64) + (high >> 63) + low;
        let sum = (sum & P) + (sum >> 127);
        let value = if sum >= P { sum - P } else { sum };
        value << 1 | u128::from(input[0] & 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// a · b mod p by doubling and adding.
    fn product(a: u128, b: u32) -> u128 {
        let add = |x: u128, y: u128| (x + y) % P;
        (0..32).rev().fold(0, |sum, bit| {
            let twice = add(sum, sum);
            if b >> bit & 1 == 1 {
                add(twice, a % P)
            } else {
                twice
            }
        })
    }

    fn plain(key: &[u8; KEY_LEN], input: &[u8; HASH_LEN]) -> u128 {
        let numbers = key
            .as_chunks()
            .0
            .iter()
            .map(|n| u128::from_le_bytes(*n) & P);
        let words = input.as_chunks().0.iter().map(|w| u32::from_le_bytes(*w));
        let value = numbers
            .zip(words)
            .fold(0, |sum, (n, w)| (sum + product(n, w)) % P);
        value << 1 | u128::from(input[0] & 1)
    }

    proptest! {
        #[test]
        fn it_is_what_the_definition_gives(key: [[u8; 32]; KEY_LEN / 32], input: [u8; HASH_LEN]) {
            let key: [u8; KEY_LEN] = key.concat().try_into().expect("of this length");
            prop_assert_eq!(MultilinearKey::new(&key).hash(&input), plain(&key, &input));
        }
    }

    #[test]
    fn extremes_are_reduced() {
        for (key, input) in [
            (0xff, 0xff),
            (0xff, 0x01),
            (0x7f, 0xff),
            (0, 0xff),
            (0xff, 0),
        ] {
            let (key, input) = ([key; KEY_LEN], [input; HASH_LEN]);
            assert_eq!(MultilinearKey::new(&key).hash(&input), plain(&key, &input));
        }
    }
}
