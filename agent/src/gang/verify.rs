//! `--verify full`: all of guest RAM, read again.

use super::message::Digest;
use crate::dedup::fingerprint::FingerprintKey;
use crate::dedup::table::FingerprintArray;
use crate::types::{Gfn, PAGE_SIZE};
use crate::vmm::ram::GuestRam;
use std::io;

/// Digest over the fingerprints of all of guest RAM, read now. Holes are zero
/// pages and not read.
pub fn full_digest(ram: &GuestRam, key: &FingerprintKey) -> io::Result<Digest> {
    let fps = FingerprintArray::new(ram.pages());
    let mut page = [0; PAGE_SIZE];
    for run in ram.data_extents(Gfn(0)) {
        let run = run?;
        for gfn in (run.start.0..run.end.0).map(Gfn) {
            ram.read_page(gfn, &mut page)?;
            fps.set(gfn, key.fingerprint(&page));
        }
    }
    Ok(fps.digest(key))
}
