//! `--verify full`: all of guest RAM, read again.

use super::message::Digest;
use crate::dedup::fingerprint::FingerprintKey;
use crate::dedup::table::FingerprintArray;
use crate::types::{Gfn, PAGE_SIZE};
use crate::vmm::PageRead;
use std::io;

/// Digest over the fingerprints of all of guest RAM, read now. Pages
/// that were never touched are zero and not read.
pub fn full_digest(ram: &dyn PageRead, key: &FingerprintKey) -> io::Result<Digest> {
    let fps = FingerprintArray::new(ram.pages());
    let mut page = [0; PAGE_SIZE];
    for run in ram.data_runs()? {
        for gfn in (run.start.0..run.end.0).map(Gfn) {
            ram.read_run(gfn, &mut page)?;
            fps.set(gfn, key.fingerprint(&page));
        }
    }
    Ok(fps.digest(key))
}
