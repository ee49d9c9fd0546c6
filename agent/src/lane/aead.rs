//! AES-128-GCM as lanes use it: `ring`'s, which has code for processors with
//! wide AES but without AVX-512, where it seals and opens about three times as
//! fast as aws-lc. Handshakes, certificates and all other connections are
//! aws-lc-rs's; what either seals the other opens (`interop_tests.rs`).
//!
//! `ring` does not wipe its keys, so the only copy that lasts is wiped here.
#![allow(unsafe_code)]

use ring::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, Tag, UnboundKey};
use std::mem::{MaybeUninit, needs_drop};
use zeroize::zeroize_flat_type;

pub(super) use ring::aead::NONCE_LEN;

/// Bytes of a key.
pub(super) const KEY_LEN: usize = 16;

/// A key that leaves nothing of itself behind.
pub(super) struct Key {
    /// Never moved, so that there is one place to wipe. Initialised until it is
    /// dropped.
    key: Box<MaybeUninit<LessSafeKey>>,
}

// Overwriting a key that owned memory would leak it, and leave its secret there.
const _: () = assert!(!needs_drop::<LessSafeKey>());

impl Key {
    /// A key from its bytes, of which `ring` takes only the right number.
    pub(super) fn new(bytes: &[u8]) -> Option<Key> {
        let key = UnboundKey::new(&AES_128_GCM, bytes).ok()?;
        Some(Key {
            key: Box::new(MaybeUninit::new(LessSafeKey::new(key))),
        })
    }

    fn get(&self) -> &LessSafeKey {
        // SAFETY: `new` initialised it, and only `drop` ends that.
        unsafe { self.key.assume_init_ref() }
    }

    /// Encrypts `text` in place and returns its tag. `None` only for texts
    /// longer than any record. A nonce must never be used twice.
    pub(super) fn seal(
        &self,
        nonce: [u8; NONCE_LEN],
        header: &[u8],
        text: &mut [u8],
    ) -> Option<Tag> {
        let nonce = Nonce::assume_unique_for_key(nonce);
        self.get()
            .seal_in_place_separate_tag(nonce, Aad::from(header), text)
            .ok()
    }

    /// Decrypts `text`, its tag behind it, in place. `None` if it is not what
    /// was sealed; then `text` is of no use any more.
    pub(super) fn open<'t>(
        &self,
        nonce: [u8; NONCE_LEN],
        header: &[u8],
        text: &'t mut [u8],
    ) -> Option<&'t [u8]> {
        let nonce = Nonce::assume_unique_for_key(nonce);
        let opened = self.get().open_in_place(nonce, Aad::from(header), text);
        opened.ok().map(|text| &*text)
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        wipe(&mut self.key);
    }
}

/// Overwrites a key, which then is none.
fn wipe(key: &mut MaybeUninit<LessSafeKey>) {
    // SAFETY: any bytes are a valid `MaybeUninit`, the reference is exclusive,
    // and what is overwritten needs no drop (asserted above).
    unsafe { zeroize_flat_type(std::ptr::from_mut(key)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_dropped_leaves_only_zeros() {
        let mut key = Box::new(MaybeUninit::new(LessSafeKey::new(
            UnboundKey::new(&AES_128_GCM, &[0x5a; KEY_LEN]).unwrap(),
        )));
        wipe(&mut key);
        let len = size_of::<LessSafeKey>();
        // SAFETY: `wipe` has just written every byte.
        let bytes = unsafe { std::slice::from_raw_parts(key.as_ptr().cast::<u8>(), len) };
        assert!(bytes.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn only_keys_of_the_right_length_are_taken() {
        for len in [0, KEY_LEN - 1, KEY_LEN + 1, 32] {
            assert!(Key::new(&vec![1; len]).is_none(), "{len}");
        }
        assert!(Key::new(&[1; KEY_LEN]).is_some());
    }
}
