//! Guest RAM as a file: where the VMM has it mapped, and reading and placing
//! pages while the guest runs.
//!
//! Pages move by `pread`/`pwrite` on the RAM file, not through a mapping of
//! our own. That is as fast for first touches, and it has no surprises: a full
//! tmpfs is an error instead of SIGBUS, reading a page that was never touched
//! does not bring it into being, and guest RAM does not count as the agent's
//! memory. It also keeps Rust's rules simple: there is never a reference to
//! memory that the guest is changing. hugetlbfs has no `write`, so there (and
//! only there) placing goes through a mapping; its huge pages are reserved
//! when the VMM maps the file, so it cannot run out later.
//!
//! A page that the guest writes while it is read may come out mixed. The dirty
//! log reports it again, so a later round reads it whole.
#![allow(unsafe_code)]

mod file;
mod huge;
mod layout;

pub use file::{RamFile, check_len, check_space, free_bytes, free_memory, parse_kib};
pub use layout::{RamLayout, RamMapping, find_layout};

use super::process::{ProcessError, VmProcess};
use crate::types::{Gfn, PAGE_SIZE, Page};
use huge::HugeMap;
use layout::open_mapped;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;

const HUGETLBFS_MAGIC: i64 = 0x958458f6;
static ZEROES: [u8; 16 * PAGE_SIZE] = [0; 16 * PAGE_SIZE];

/// What can go wrong with a RAM file. Messages name the file.
#[derive(Debug, Error)]
pub enum RamError {
    /// A file operation failed.
    #[error("{what} {path} failed")]
    File {
        /// What was tried.
        what: &'static str,
        /// The RAM file or its directory.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Somebody else's file is where the RAM file should be made.
    #[error(
        "RAM file {path} exists already: another VM of this name, or the rest of one; make sure no VMM uses it (`fuser {path}`), then remove it"
    )]
    Exists {
        /// The RAM file.
        path: PathBuf,
    },
    /// Not enough room.
    #[error(
        "{path} has {free_mib} MiB free, the VM needs {need_mib} MiB: free memory, enlarge the file system (`mount -o remount,size=…`) or choose another target"
    )]
    NoSpace {
        /// The directory of RAM files.
        path: PathBuf,
        /// Free, in MiB.
        free_mib: u64,
        /// Needed, in MiB.
        need_mib: u64,
    },
    /// RAM of a size that cannot be.
    #[error(
        "guest RAM of {len} bytes: it must be more than 0, at most 16 TiB, and a multiple of 4096"
    )]
    BadSize {
        /// Bytes.
        len: u64,
    },
    /// The VMM does not have the file mapped as needed.
    #[error(
        "process {pid} does not map {path} as shared writable memory from its first to its last byte ({why}); direct mode needs `memory-backend-file,share=on` with this path"
    )]
    NotMapped {
        /// The VMM.
        pid: i32,
        /// The RAM file.
        path: PathBuf,
        /// What is missing.
        why: &'static str,
    },
    /// The VMM's process could not be looked at.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

impl RamError {
    fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RamError {
        let path = path.to_owned();
        move |source| RamError::File { what, path, source }
    }
}

/// The RAM of one VM, open for reading (source) or reading and placing
/// (target). Shared between threads by `Arc`; all calls are blocking and short.
#[derive(Debug)]
pub struct GuestRam {
    file: File,
    path: PathBuf,
    len: u64,
    huge: Option<HugeMap>,
    can_punch: AtomicBool,
}

impl GuestRam {
    /// Opens the RAM that `process` has mapped per `layout`. `writable` is for
    /// targets: a source's RAM is never written by the agent.
    pub fn open(
        process: &VmProcess,
        layout: &RamLayout,
        writable: bool,
    ) -> Result<GuestRam, RamError> {
        let rows = process.maps()?;
        let row = rows
            .iter()
            .find(|r| r.is_file(layout.file_id.0, layout.file_id.1))
            .ok_or_else(|| RamError::NotMapped {
                pid: process.pid(),
                path: layout.path.clone(),
                why: "it is not mapped any more",
            })?;
        let file = open_mapped(process, row, layout.file_id, writable)?;
        Self::from_file(file, &layout.path, layout.len, writable)
    }

    /// RAM in a file opened by the caller. `len` must be the file's length.
    pub fn from_file(
        file: File,
        path: &Path,
        len: u64,
        writable: bool,
    ) -> Result<GuestRam, RamError> {
        check_len(len)?;
        let meta = file
            .metadata()
            .map_err(RamError::file("looking at RAM file", path))?;
        if meta.len() != len {
            return Err(RamError::BadSize { len: meta.len() });
        }
        let fs = nix::sys::statfs::fstatfs(&file)
            .map_err(|e| RamError::file("asking for the file system of", path)(e.into()))?;
        let huge = if writable && fs.filesystem_type().0 as i64 == HUGETLBFS_MAGIC {
            Some(HugeMap::new(&file, len).map_err(RamError::file("mapping RAM file", path))?)
        } else {
            None
        };
        let can_punch = AtomicBool::new(true);
        Ok(GuestRam {
            file,
            path: path.to_owned(),
            len,
            huge,
            can_punch,
        })
    }

    /// Bytes of guest RAM.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Guest RAM is never empty.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Number of pages; gfns run from 0 to this.
    pub fn pages(&self) -> u32 {
        (self.len / PAGE_SIZE as u64) as u32
    }

    /// The RAM file's path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies one page out. A hole reads as zeroes and stays a hole.
    pub fn read_page(&self, gfn: Gfn, page: &mut Page) -> io::Result<()> {
        self.read_run(gfn, page)
    }

    /// Copies `out.len() / 4096` pages out, from `start` on: one call for a run
    /// is about twice as fast as a call for each page.
    pub fn read_run(&self, start: Gfn, out: &mut [u8]) -> io::Result<()> {
        let at = self.check(start, out.len())?;
        self.file.read_exact_at(out, at)
    }

    /// Places one page. Fails with `ENOSPC` when the host has no memory for it.
    pub fn write_page(&self, gfn: Gfn, page: &Page) -> io::Result<()> {
        self.write_run(gfn, page)
    }

    /// Places `data.len() / 4096` pages from `start` on.
    pub fn write_run(&self, start: Gfn, data: &[u8]) -> io::Result<()> {
        let at = self.check(start, data.len())?;
        match &self.huge {
            None => self.file.write_all_at(data, at),
            Some(map) => {
                map.copy_in(at, data);
                Ok(())
            }
        }
    }

    /// Makes a run of pages zero, giving their memory back where the file can
    /// (tmpfs), else by writing zeroes.
    pub fn zero_run(&self, run: Range<Gfn>) -> io::Result<()> {
        let pages = run.end.0.saturating_sub(run.start.0) as usize;
        if pages == 0 {
            return Ok(());
        }
        let at = self.check(run.start, pages * PAGE_SIZE)?;
        if self.huge.is_none() && self.can_punch.load(Ordering::Relaxed) {
            match self.punch(at, (pages * PAGE_SIZE) as u64) {
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    self.can_punch.store(false, Ordering::Relaxed);
                }
                done => return done,
            }
        }
        let mut gfn = run.start.0;
        while gfn < run.end.0 {
            let n = (run.end.0 - gfn).min(16);
            self.write_run(Gfn(gfn), &ZEROES[..n as usize * PAGE_SIZE])?;
            gfn += n;
        }
        Ok(())
    }

    /// Makes one page zero, see [`Self::zero_run`].
    pub fn zero_page(&self, gfn: Gfn) -> io::Result<()> {
        self.check(gfn, PAGE_SIZE)?;
        self.zero_run(gfn..Gfn(gfn.0 + 1))
    }

    /// The runs of pages that hold data, by rising gfn, from `from` on. Pages
    /// outside of them are holes: they read as zeroes, were never touched (or
    /// were given back), and nothing was read to know it.
    pub fn data_extents(&self, from: Gfn) -> DataExtents<'_> {
        DataExtents {
            ram: self,
            at: from.offset() as u64,
        }
    }

    /// Bytes that the RAM's file system can still take, see [`free_bytes`].
    pub fn fs_free_bytes(&self) -> Result<u64, RamError> {
        free_bytes(self.path.parent().unwrap_or(Path::new("/")))
    }

    fn check(&self, start: Gfn, len: usize) -> io::Result<u64> {
        let at = start.offset() as u64;
        if !len.is_multiple_of(PAGE_SIZE) || at + len as u64 > self.len {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{start} + {len} bytes lies outside of guest RAM ({} pages)",
                    self.pages()
                ),
            ));
        }
        Ok(at)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        use nix::fcntl::{FallocateFlags, fallocate};
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, flags, at as i64, len as i64)?)
    }

    /// The next place of data or hole at or after `at`; `None` when there is none.
    fn seek(&self, at: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
        // SAFETY: integers and a descriptor we own; the file's position is used by nobody.
        let found = unsafe { libc::lseek(self.file.as_raw_fd(), at as i64, whence) };
        if found >= 0 {
            return Ok(Some(found as u64));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ENXIO) {
            Ok(None)
        } else {
            Err(error)
        }
    }
}

/// Iterator of [`GuestRam::data_extents`].
#[derive(Debug)]
pub struct DataExtents<'a> {
    ram: &'a GuestRam,
    at: u64,
}

impl Iterator for DataExtents<'_> {
    type Item = io::Result<Range<Gfn>>;

    fn next(&mut self) -> Option<Self::Item> {
        let page = PAGE_SIZE as u64;
        if self.at >= self.ram.len {
            return None;
        }
        let run = (|| {
            let Some(data) = self.ram.seek(self.at, libc::SEEK_DATA)? else {
                return Ok(None);
            };
            let hole = self
                .ram
                .seek(data, libc::SEEK_HOLE)?
                .unwrap_or(self.ram.len);
            // Outward to whole pages; data appended meanwhile is not RAM.
            let start = data / page * page;
            let end = hole.next_multiple_of(page).min(self.ram.len);
            Ok((start < end).then_some((start, end)))
        })();
        match run {
            Ok(Some((start, end))) => {
                self.at = end;
                Some(Ok(Gfn((start / page) as u32)..Gfn((end / page) as u32)))
            }
            Ok(None) => {
                self.at = self.ram.len;
                None
            }
            Err(error) => {
                self.at = self.ram.len;
                Some(Err(error))
            }
        }
    }
}

#[cfg(test)]
mod tests;
