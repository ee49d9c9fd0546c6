//! Placing pages on hugetlbfs, which has no `write`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// A writable mapping of a hugetlbfs file.
#[derive(Debug)]
pub(super) struct HugeMap {
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain memory that lives as long as the value; it is
// only touched by `copy_in`, which is fine from any thread (see there).
unsafe impl Send for HugeMap {}
// SAFETY: as above.
unsafe impl Sync for HugeMap {}

impl HugeMap {
    pub(super) fn new(file: &File, len: u64) -> io::Result<HugeMap> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: a fresh shared mapping at an address the kernel chooses; it
        // aliases no Rust object.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(HugeMap {
            base: base.cast(),
            len,
        })
    }

    pub(super) fn copy_in(&self, at: u64, data: &[u8]) {
        let at = at as usize;
        assert!(
            at.checked_add(data.len())
                .is_some_and(|end| end <= self.len)
        );
        // SAFETY: within the mapping (asserted), which outlives the call. No
        // reference to the mapping is ever made. Others (the VMM, other lane
        // threads) may touch the same bytes: then their mixture is what guest
        // RAM holds, as with two writers on real hardware; placing is ordered
        // by the target's stripe locks, and the guest does not run yet.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.base.add(at), data.len()) }
    }
}

impl Drop for HugeMap {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `new` mapped; nothing points into it any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
