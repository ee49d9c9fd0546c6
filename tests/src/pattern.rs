//! Content that a reader can check: what guests and image builders write.
//!
//! The guest's init (`guests/linux/init.rs`) includes this very file, so what
//! the host stamps on a disk and what the guest expects there cannot drift.

/// Bytes of one disk sector as the stamps see it.
pub const SECTOR: usize = 512;

/// SplitMix64's output function: a bijection that scatters its input.
pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Word `i` of a page weighs in its checksum with this odd factor, so that
/// words which change places change the sum.
pub fn weight(i: usize) -> u64 {
    (i as u64).wrapping_mul(0xd6e8_feb8_6659_fd94) | 1
}

/// Checksum of a page (or of any run of words): the weighted sum of its
/// words. A change of one word changes it by `(new - old) * weight`, so a
/// writer keeps it up to date without reading the rest of the page, and a
/// page that lost another word stays wrong.
pub fn checksum(words: &[u64]) -> u64 {
    let mut sum = 0u64;
    for (i, w) in words.iter().enumerate() {
        sum = sum.wrapping_add(w.wrapping_mul(weight(i)));
    }
    sum
}

/// Fills `words` with incompressible content that depends on `seed` alone.
pub fn fill(words: &mut [u64], seed: u64) {
    let mut x = mix(seed) | 1;
    for w in words {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        *w = x;
    }
}

/// Word `k` of the stamped sector `lba` of disk `disk`.
pub fn stamp_word(disk: u8, lba: u64, k: usize) -> u64 {
    mix((u64::from(disk) << 56) ^ (lba << 8) ^ k as u64)
}

/// Writes the stamp of sector `lba` into `words` (one sector: 64 words).
pub fn stamp_sector(disk: u8, lba: u64, words: &mut [u64]) {
    for (k, w) in words.iter_mut().enumerate() {
        *w = stamp_word(disk, lba, k);
    }
}

/// The first sector of `words` that does not carry the stamps of `disk` from
/// `lba` on, or `None` if all do.
pub fn check_sectors(disk: u8, lba: u64, words: &[u64]) -> Option<u64> {
    for (s, sector) in words.chunks(SECTOR / 8).enumerate() {
        for (k, w) in sector.iter().enumerate() {
            if *w != stamp_word(disk, lba + s as u64, k) {
                return Some(lba + s as u64);
            }
        }
    }
    None
}
