//! Guest RAM in the memory of its VMM, from outside.
//!
//! Read and written through `/proc/PID/mem` rather than `process_vm_readv`: the
//! descriptor stays with the address space it was opened on, so what a process
//! number comes to mean later is never touched, least of all written.

use crate::types::{Gfn, PAGE_SIZE};
use crate::vmm::process::VmProcess;
use crate::vmm::ram::RamError;
use crate::vmm::source::{PageRead, PageSink};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Entries of a pagemap that are read at once.
const ENTRIES: usize = 8 << 10;
/// Present, or in swap.
const TOUCHED: u64 = 1 << 63 | 1 << 62;
/// Pages that are made zero at once.
const ZERO_PAGES: u32 = 16;
static ZEROES: [u8; ZERO_PAGES as usize * PAGE_SIZE] = [0; ZERO_PAGES as usize * PAGE_SIZE];

/// One stretch of a VMM's memory: a RAM block. Shared between threads by
/// `Arc`; all calls are blocking and short.
#[derive(Debug)]
pub struct ProcessRam {
    mem: File,
    pagemap: File,
    path: PathBuf,
    address: u64,
    pages: u32,
    /// Never touched means zero: not so for what has a file behind it.
    sparse: bool,
}

impl ProcessRam {
    /// The `pages` pages at `address` in `process`. `writable` is for targets:
    /// a source's RAM is never written by the agent. `sparse`: the memory is
    /// anonymous, so that a page nobody has touched is zero.
    pub fn open(
        process: &VmProcess,
        address: u64,
        pages: u32,
        writable: bool,
        sparse: bool,
    ) -> Result<ProcessRam, RamError> {
        let opened = |file: &'static str, writable: bool| {
            let path = process.proc_path(file);
            let opened = OpenOptions::new().read(true).write(writable).open(&path);
            opened.map_err(|source| RamError::File {
                what: "opening guest RAM by",
                path,
                source,
            })
        };
        let ram = ProcessRam {
            mem: opened("mem", writable)?,
            pagemap: opened("pagemap", false)?,
            path: process.proc_path("mem"),
            address,
            pages,
            sparse,
        };
        // What was opened by number is what was looked at before.
        process.check_alive()?;
        Ok(ram)
    }

    fn at(&self, start: Gfn, len: usize) -> io::Result<u64> {
        let end = start.offset() as u64 + len as u64;
        if !len.is_multiple_of(PAGE_SIZE) || end > self.bytes() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{start} + {len} bytes lies outside of guest RAM ({} pages)",
                    self.pages
                ),
            ));
        }
        Ok(self.address + start.offset() as u64)
    }

    fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE_SIZE as u64
    }
}

impl PageRead for ProcessRam {
    fn pages(&self) -> u32 {
        self.pages
    }

    fn read_run(&self, start: Gfn, out: &mut [u8]) -> io::Result<()> {
        let at = self.at(start, out.len())?;
        self.mem.read_exact_at(out, at)
    }

    fn data_runs(&self) -> io::Result<Vec<Range<Gfn>>> {
        if !self.sparse {
            return Ok(vec![Gfn(0)..Gfn(self.pages)]);
        }
        let mut runs: Vec<Range<Gfn>> = Vec::new();
        let mut entries = vec![0; ENTRIES * 8];
        let mut gfn = 0;
        while gfn < self.pages {
            let count = (self.pages - gfn).min(ENTRIES as u32);
            let entries = &mut entries[..count as usize * 8];
            let first = self.address / PAGE_SIZE as u64 + u64::from(gfn);
            self.pagemap.read_exact_at(entries, first * 8)?;
            let touched = entries.chunks_exact(8).map(|entry| {
                entry
                    .try_into()
                    .is_ok_and(|entry| u64::from_ne_bytes(entry) & TOUCHED != 0)
            });
            for gfn in (gfn..)
                .zip(touched)
                .filter_map(|(gfn, is)| is.then_some(gfn))
            {
                match runs.last_mut() {
                    Some(run) if run.end.0 == gfn => run.end.0 += 1,
                    _ => runs.push(Gfn(gfn)..Gfn(gfn + 1)),
                }
            }
            gfn += count;
        }
        Ok(runs)
    }

    fn place(&self) -> String {
        format!(
            "{}@{:#x}+{:#x}",
            self.path.display(),
            self.address,
            self.bytes()
        )
    }
}

impl PageSink for ProcessRam {
    fn write_run(&self, start: Gfn, data: &[u8]) -> io::Result<()> {
        let at = self.at(start, data.len())?;
        self.mem.write_all_at(data, at)
    }

    /// Pages that are zero are left alone: writing would give them memory.
    fn zero_run(&self, run: Range<Gfn>) -> io::Result<()> {
        let mut now = [0; ZEROES.len()];
        let mut gfn = run.start.0;
        while gfn < run.end.0 {
            let count = (run.end.0 - gfn).min(ZERO_PAGES);
            let len = count as usize * PAGE_SIZE;
            self.read_run(Gfn(gfn), &mut now[..len])?;
            if now[..len] != ZEROES[..len] {
                self.write_run(Gfn(gfn), &ZEROES[..len])?;
            }
            gfn += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapMut;

    const PAGES: u32 = 40;

    /// This process is the VMM of these tests.
    fn with_memory(test: impl FnOnce(ProcessRam)) {
        let memory = MmapMut::map_anon(PAGES as usize * PAGE_SIZE).unwrap();
        let me = VmProcess::open(std::process::id() as i32).unwrap();
        let address = memory.as_ptr() as u64;
        test(ProcessRam::open(&me, address, PAGES, true, true).unwrap());
    }

    #[test]
    fn pages_are_read_where_they_were_placed_and_the_untouched_ones_are_known() {
        with_memory(|ram| {
            assert!(ram.data_runs().unwrap().is_empty());
            let data: Vec<u8> = (0..3 * PAGE_SIZE).map(|i| (i % 251) as u8).collect();
            ram.write_run(Gfn(5), &data).unwrap();
            ram.write_run(Gfn(39), &data[..PAGE_SIZE]).unwrap();
            let mut read = vec![0; data.len()];
            ram.read_run(Gfn(5), &mut read).unwrap();
            assert_eq!(read, data);
            let runs = ram.data_runs().unwrap();
            // With huge pages, neighbours are touched as well.
            let has = |gfn| runs.iter().any(|run| run.contains(&Gfn(gfn)));
            assert!(has(5) && has(7) && has(39));
        });
    }

    #[test]
    fn zeroing_changes_nothing_outside_of_the_run_and_gives_zero_pages_no_memory() {
        with_memory(|ram| {
            ram.zero_run(Gfn(0)..Gfn(PAGES)).unwrap();
            ram.write_run(Gfn(10), &[7; 20 * PAGE_SIZE]).unwrap();
            ram.zero_run(Gfn(11)..Gfn(29)).unwrap();
            let mut read = vec![0; 20 * PAGE_SIZE];
            ram.read_run(Gfn(10), &mut read).unwrap();
            let kept = |page: usize| read[page * PAGE_SIZE..][..PAGE_SIZE] == [7; PAGE_SIZE];
            assert!(kept(0) && kept(19));
            assert!(
                read[PAGE_SIZE..19 * PAGE_SIZE]
                    .iter()
                    .all(|byte| *byte == 0)
            );
        });
    }

    #[test]
    fn nothing_outside_of_the_block_is_touched() {
        with_memory(|ram| {
            assert!(ram.write_run(Gfn(PAGES - 1), &[1; 2 * PAGE_SIZE]).is_err());
            assert!(ram.read_run(Gfn(PAGES), &mut [0; PAGE_SIZE]).is_err());
            assert!(ram.read_run(Gfn(0), &mut [0; 100]).is_err());
        });
    }
}
