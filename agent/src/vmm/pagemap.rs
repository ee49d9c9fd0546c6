//! `PAGEMAP_SCAN`: which pages of another process were written since they were
//! last write-protected, and protecting them again in the same call.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

const PAGEMAP_SCAN: u64 = 0xC060_6610; // _IOWR('f', 16, struct pm_scan_arg)
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// Regions taken from the kernel in one call: 48 KiB of them.
const REGIONS: usize = 2048;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The pagemap of one process. It stays with the address space it was opened
/// on: after the process has exited, scans find nothing and do not fail, so
/// the caller has to ask whether the process lives *after* each scan.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    regions: Vec<PageRegion>,
}

impl std::fmt::Debug for PageRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl Pagemap {
    /// Opens `/proc/PID/pagemap`.
    pub fn open(pid: i32) -> io::Result<Pagemap> {
        Ok(Pagemap {
            file: File::open(format!("/proc/{pid}/pagemap"))?,
            regions: vec![PageRegion::default(); REGIONS],
        })
    }

    /// Calls `f` with each run of written pages in `range` (addresses in the
    /// process, page-aligned), write-protecting them again as they are found.
    /// A write that comes after the kernel looked at a page is found by the
    /// next call. Fails with `EPERM` if some of the range is not registered
    /// for asynchronous write-protect. Returns the number of calls made.
    pub fn take_written(
        &mut self,
        range: Range<u64>,
        mut f: impl FnMut(Range<u64>),
    ) -> io::Result<u32> {
        let mut at = range.start;
        let mut calls = 0;
        while at < range.end {
            let mut arg = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                start: at,
                end: range.end,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                category_mask: PAGE_IS_WRITTEN,
                return_mask: PAGE_IS_WRITTEN,
                ..PmScanArg::default()
            };
            // SAFETY: `arg` is the request's own structure; `vec`/`vec_len`
            // describe `self.regions`, which we borrow mutably for the call.
            let n = unsafe {
                libc::ioctl(
                    self.file.as_raw_fd(),
                    PAGEMAP_SCAN as libc::c_ulong,
                    &mut arg,
                )
            };
            if n < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            calls += 1;
            for region in &self.regions[..n as usize] {
                f(region.start..region.end);
            }
            if arg.walk_end <= at {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            at = arg.walk_end;
        }
        Ok(calls)
    }
}

/// Whether this kernel has `PAGEMAP_SCAN` (Linux 6.7), asked on our own pagemap.
pub fn supported() -> io::Result<bool> {
    let file = File::open("/proc/self/pagemap")?;
    // `vec_len` 0 and an empty range: valid, does nothing.
    let mut arg = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        category_mask: PAGE_IS_WRITTEN,
        return_mask: PAGE_IS_WRITTEN,
        ..PmScanArg::default()
    };
    // SAFETY: `arg` is the request's own structure and outlives the call; it names no buffer.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), PAGEMAP_SCAN as libc::c_ulong, &mut arg) };
    if rc >= 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOTTY) => Ok(false),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_number_carries_the_size_of_its_argument() {
        assert_eq!(
            (PAGEMAP_SCAN >> 16 & 0x3fff) as usize,
            size_of::<PmScanArg>()
        );
        assert_eq!(size_of::<PageRegion>(), 24);
    }

    #[test]
    fn memory_that_nobody_registered_is_refused() {
        let page = vec![1u8; 3 * 4096];
        let start = (page.as_ptr() as u64).next_multiple_of(4096);
        let mut pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let error = pagemap
            .take_written(start..start + 4096, |_| ())
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }
}
