//! Provided buffers: memory from which the kernel picks a buffer whenever data
//! has arrived for a multishot receive.
#![allow(unsafe_code)]

use io_uring::IoUring;
use io_uring::types::BufRingEntry;
use memmap2::{MmapMut, MmapRaw};
use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

/// The one group of provided buffers of a lane's ring.
pub(super) const GROUP: u16 = 0;

/// Anonymous memory.
pub(super) fn map(bytes: usize) -> io::Result<MmapRaw> {
    Ok(MmapRaw::from(MmapMut::map_anon(bytes)?))
}

/// A ring of provided buffers: memory the kernel picks from as data arrives.
pub(super) struct Provided {
    /// `count` entries of 16 bytes, shared with the kernel.
    table: MmapRaw,
    memory: MmapRaw,
    count: u16,
    len: u32,
    tail: u16,
}

impl Provided {
    /// Allocates `count` (a power of two) buffers of `len` bytes and registers
    /// them with `uring`, which must be dropped before what is returned.
    pub(super) fn new(uring: &IoUring, count: u16, len: u32) -> io::Result<Provided> {
        debug_assert!(count.is_power_of_two());
        let table = map(usize::from(count) * size_of::<BufRingEntry>())?;
        let memory = map(usize::from(count) * len as usize)?;
        // SAFETY: `table` is page-aligned, holds `count` entries and outlives
        // the registration (it is dropped after the ring, see `Ring`).
        unsafe {
            uring.submitter().register_buf_ring_with_flags(
                table.as_mut_ptr().addr() as u64,
                count,
                GROUP,
                0,
            )?;
        }
        let mut provided = Provided {
            table,
            memory,
            count,
            len,
            tail: 0,
        };
        for id in 0..count {
            provided.provide(id);
        }
        Ok(provided)
    }

    fn buffer(&self, id: u16) -> *mut u8 {
        self.memory
            .as_mut_ptr()
            .wrapping_add(usize::from(id) * self.len as usize)
    }

    /// Memory in use, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.memory.len() + self.table.len()
    }

    /// The first `len` bytes of buffer `id`.
    ///
    /// # Safety
    /// The kernel must have handed `id` over and not been given it back.
    pub(super) unsafe fn filled(&mut self, id: u16, len: usize) -> &mut [u8] {
        if id >= self.count {
            return &mut [];
        }
        // SAFETY: the buffer lies in `memory`; by the caller's promise the
        // kernel does not touch it now, and the borrow of `self` excludes any
        // other reference to it.
        unsafe { std::slice::from_raw_parts_mut(self.buffer(id), len.min(self.len as usize)) }
    }

    /// Gives buffer `id` to the kernel.
    pub(super) fn provide(&mut self, id: u16) {
        if id >= self.count {
            return;
        }
        let base = self.table.as_mut_ptr().cast::<BufRingEntry>();
        let at = usize::from(self.tail & (self.count - 1));
        // SAFETY: `at < count`, so the entry lies in the table; the kernel
        // reads entries only below the tail published next. Only this thread
        // writes them. Fields are set one by one: the first entry's spare
        // field is the tail itself.
        let entry = unsafe { &mut *base.add(at) };
        entry.set_addr(self.buffer(id).addr() as u64);
        entry.set_len(self.len);
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail is a u16 in the table, aligned, shared with the
        // kernel, and written by atomic stores only.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(base).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}
