//! For tests: RAM that nobody reads.

use crate::types::Gfn;
use crate::vmm::source::PageRead;
use std::io;
use std::ops::Range;

/// Of so many pages.
pub(super) struct NoRam(pub(super) u32);

impl PageRead for NoRam {
    fn pages(&self) -> u32 {
        self.0
    }
    fn read_run(&self, _: Gfn, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn data_runs(&self) -> io::Result<Vec<Range<Gfn>>> {
        Ok(Vec::new())
    }
    fn place(&self) -> String {
        "nowhere".to_owned()
    }
}
