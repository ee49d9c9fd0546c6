//! Keyed 128-bit names for page content.
//!
//! The fingerprint of a page is made in two steps, both of them *universal hashes*
//! under secret keys: [NH](super::nh) turns the page into 32 bytes, a
//! [multilinear hash](super::multilinear) these into 16. Two different pages,
//! chosen without knowledge of the keys, collide in NH with probability at most
//! 2^-128, and otherwise in the second with 2^-127: together less than 2^-126. That
//! needs exactly one thing: the outputs stay secret, since the keys follow from
//! enough of them. So fingerprints are never logged (their `Debug` tells nothing),
//! never stored on disk, and cross the network only inside TLS, to agents that hold
//! the same cluster secret anyway. A guest never sees one, and what it could learn
//! from timing (that some page of its own domain equals one it wrote) does not
//! reveal bits of the output.
//!
//! AES-GMAC of the page with one fixed nonce is a universal hash in the same sense
//! (`GHASH_H(page) ⊕ constant`, bound 257/2^128 < 2^-119), and it is what digests of
//! fingerprints use. For pages it is too slow: where AES-GCM has no AVX-512 it takes
//! twice as long as reading the page (`drover bench fingerprint`).
//!
//! Keys are derived per *dedup domain*, so pages of different domains can match
//! only by the chance above. The one exception is the zero page: it is
//! [`Fingerprint::ZERO`] in every domain and is recognised without the key.

use super::{multilinear::MultilinearKey, nh::NhKey};
use crate::{
    config::ClusterSecret,
    types::{Fingerprint, PAGE_SIZE, Page},
};
use aws_lc_rs::{
    aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    hkdf::{HKDF_SHA256, KeyType, Prk, Salt},
};
use zeroize::Zeroizing;

/// Marks a page of which the target has nothing certain: never sent, or sent and
/// lost. No page has this fingerprint.
pub const UNSENT: Fingerprint = Fingerprint([0xff; 16]);

/// Fingerprints digested as one block.
pub(super) const DIGEST_BLOCK: usize = 4096;

const NONCE_BLOCK: [u8; 12] = *b"drover blck1";
const NONCE_ROOT: [u8; 12] = *b"drover root1";

/// The fingerprint key of one dedup domain. Cheap to use from several threads at
/// once; the keys are wiped when dropped.
pub struct FingerprintKey {
    pages: NhKey,
    shorten: MultilinearKey,
    digests: LessSafeKey,
}

/// For HKDF: how much of it is taken.
struct Len(usize);

impl KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

/// Key bytes for a purpose. The purposes have one length, so purpose and domain
/// cannot run into each other.
fn derive_bytes<const N: usize>(prk: &Prk, purpose: &[u8; 6], domain: &str) -> Zeroizing<[u8; N]> {
    const { assert!(N <= 255 * 32, "HKDF's limit") }
    let mut bytes = Zeroizing::new([0; N]);
    prk.expand(&[purpose, domain.as_bytes()], Len(N))
        .and_then(|okm| okm.fill(&mut bytes[..]))
        .expect("shorter than HKDF's limit");
    bytes
}

impl std::fmt::Debug for FingerprintKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FingerprintKey(..)")
    }
}

impl FingerprintKey {
    /// Derives the key of `domain`. The same secret and domain give the same key
    /// on every host; different domains give independent keys.
    pub fn derive(secret: &ClusterSecret, domain: &str) -> Self {
        let prk = Salt::new(HKDF_SHA256, b"drover dedup v2").extract(secret.as_bytes());
        let info: [&[u8]; 2] = [b"digest", domain.as_bytes()];
        let digests = prk
            .expand(&info, &AES_128_GCM)
            .expect("16 bytes are less than HKDF's limit");
        Self {
            pages: NhKey::new(&derive_bytes(&prk, b"page  ", domain)),
            shorten: MultilinearKey::new(&derive_bytes(&prk, b"short ", domain)),
            digests: LessSafeKey::new(UnboundKey::from(digests)),
        }
    }

    /// The fingerprint of a page: [`Fingerprint::ZERO`] exactly if all its bytes
    /// are zero.
    pub fn fingerprint(&self, page: &Page) -> Fingerprint {
        if is_zero_page(page) {
            return Fingerprint::ZERO;
        }
        let hash = self.shorten.hash(&self.pages.hash(page));
        keep_clear(Fingerprint(hash.to_le_bytes()))
    }

    /// A number that is the same for the same domain, and another one for
    /// another.
    pub fn domain_number(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.digest(&[]);
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    /// Digest of a list of fingerprints, to compare what a source sent with what its
    /// target placed. Equal lists give equal digests; different ones differ but for
    /// a chance below 2^-100. Whole arrays digest themselves, and keep what did not
    /// change: [`super::table::FingerprintArray::digest`].
    pub fn digest(&self, fps: &[Fingerprint]) -> [u8; 16] {
        let mut tags = Vec::new();
        for block in fps.chunks(DIGEST_BLOCK) {
            let bytes: Vec<u8> = block.iter().flat_map(|fp| fp.0).collect();
            tags.push(self.block_tag(&bytes));
        }
        self.root_tag(tags.into_iter(), fps.len() as u64)
    }

    /// Tag of one block of [`DIGEST_BLOCK`] fingerprints (the last may be shorter).
    pub(super) fn block_tag(&self, fps: &[u8]) -> [u8; 16] {
        gmac(&self.digests, NONCE_BLOCK, fps)
    }

    /// Digest of the tags of all blocks and the count of fingerprints.
    pub(super) fn root_tag(&self, tags: impl Iterator<Item = [u8; 16]>, count: u64) -> [u8; 16] {
        let mut bytes: Vec<u8> = tags.flatten().collect();
        bytes.extend_from_slice(&count.to_le_bytes());
        gmac(&self.digests, NONCE_ROOT, &bytes)
    }
}

fn gmac(key: &LessSafeKey, nonce: [u8; 12], data: &[u8]) -> [u8; 16] {
    let nonce = Nonce::assume_unique_for_key(nonce);
    let tag = key
        .seal_in_place_separate_tag(nonce, Aad::from(data), &mut [])
        .expect("AES-GCM of an empty plaintext has no way to fail");
    tag.as_ref().try_into().expect("tags have 16 bytes")
}

/// Moves the two bit patterns that mean something else out of the way. The chance
/// that this makes two pages equal is that of any other collision.
fn keep_clear(fp: Fingerprint) -> Fingerprint {
    let mut out = fp;
    if fp == Fingerprint::ZERO || fp == UNSENT {
        out.0[0] ^= 0x55;
    }
    out
}

/// Whether every byte of the page is zero. Looks at 256 bytes at a time, so pages
/// with content cost next to nothing and zero pages run at memory speed.
pub fn is_zero_page(page: &Page) -> bool {
    const STEP: usize = 256;
    const { assert!(PAGE_SIZE.is_multiple_of(STEP)) }
    let (steps, _) = page.as_chunks::<STEP>();
    // A fold over a fixed-size chunk has no early exit inside, which is what
    // lets the compiler turn it into wide ORs.
    steps
        .iter()
        .all(|step| step.iter().fold(0, |acc, byte| acc | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn secret() -> ClusterSecret {
        ClusterSecret::from_bytes(std::array::from_fn(|i| i as u8))
    }

    fn page(seed: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        page[..8].copy_from_slice(&seed.to_le_bytes());
        page[4088..].copy_from_slice(&seed.to_be_bytes());
        page
    }

    #[test]
    fn only_the_zero_page_has_the_zero_fingerprint() {
        let key = FingerprintKey::derive(&secret(), "a");
        assert_eq!(key.fingerprint(&[0; PAGE_SIZE]), Fingerprint::ZERO);
        for at in [0, 1, 255, 256, 2047, 4095] {
            let mut page = [0; PAGE_SIZE];
            page[at] = 1;
            assert!(!is_zero_page(&page));
            assert_ne!(key.fingerprint(&page), Fingerprint::ZERO, "byte {at}");
        }
        assert_ne!(keep_clear(Fingerprint::ZERO), Fingerprint::ZERO);
        assert_ne!(keep_clear(UNSENT), UNSENT);
    }

    #[test]
    fn domains_and_secrets_separate_fingerprints() {
        let other = ClusterSecret::from_bytes([9; 32]);
        let prints: Vec<_> = [
            FingerprintKey::derive(&secret(), "a"),
            FingerprintKey::derive(&secret(), "b"),
            FingerprintKey::derive(&other, "a"),
        ]
        .iter()
        .map(|key| key.fingerprint(&page(7)))
        .collect();
        assert!(prints[0] != prints[1] && prints[0] != prints[2] && prints[1] != prints[2]);
        let again = FingerprintKey::derive(&secret(), "a");
        assert_eq!(prints[0], again.fingerprint(&page(7)));
    }

    #[test]
    fn a_fingerprint_is_as_defined() {
        // Pins the definition, since agents of different builds must agree. The
        // value was computed from the definitions by another program.
        let key = FingerprintKey::derive(&secret(), "pinned");
        let fp = key.fingerprint(&page(1));
        let pinned = 0x413aedb0d555330a247a2161facfda42_u128;
        assert_eq!(fp.0, pinned.to_le_bytes());
    }

    #[test]
    fn digests_see_order_place_length_and_value() {
        let key = FingerprintKey::derive(&secret(), "a");
        let fps: Vec<_> = (0..10_000u64)
            .map(|i| key.fingerprint(&page(i + 1)))
            .collect();
        let whole = key.digest(&fps);
        assert_eq!(whole, key.digest(&fps.clone()));
        for (a, b) in [(0, 1), (1, 4097), (4095, 4096), (8192, 9999)] {
            let mut other = fps.clone();
            other.swap(a, b);
            assert_ne!(whole, key.digest(&other));
        }
        assert_ne!(whole, key.digest(&fps[..9_999]));
        let mut longer = fps.clone();
        longer.push(Fingerprint::ZERO);
        assert_ne!(whole, key.digest(&longer));
        assert_ne!(key.digest(&[]), key.digest(&[Fingerprint::ZERO]));
    }

    proptest! {
        #[test]
        fn zero_check_agrees_with_the_plain_definition(at in 0..PAGE_SIZE, value: u8) {
            let mut page = [0; PAGE_SIZE];
            page[at] = value;
            prop_assert_eq!(is_zero_page(&page), page.iter().all(|b| *b == 0));
        }
    }
}
