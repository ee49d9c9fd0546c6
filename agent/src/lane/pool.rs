//! One region of memory cut into equal buffers, made to be registered with
//! io_uring.
//!
//! A buffer is *header room* followed by a *page area*:
//!
//! ```text
//! 0                      HEADER_ROOM                              BUF_LEN
//! |     … free … [header][list]|[page][page][page] … up to PAGES_PER_BUF |
//! ```
//!
//! Page contents are packed from the start of the page area; a raw frame's
//! header and entry list are written to end exactly where the pages begin, so
//! the whole frame is one contiguous send with nothing copied.
#![allow(unsafe_code)]

use crate::types::{PAGE_SIZE, Page};
use memmap2::{Advice, MmapMut, MmapRaw};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Pages whose content fits one buffer.
pub const PAGES_PER_BUF: usize = 128;
/// Bytes before the page area, for frame header and entry list.
pub const HEADER_ROOM: usize = 16 * 1024;
/// Bytes of the page area.
pub const PAGE_AREA: usize = PAGES_PER_BUF * PAGE_SIZE;
/// Bytes of one buffer: 528 KiB.
pub const BUF_LEN: usize = HEADER_ROOM + PAGE_AREA;

/// How often a cancellable wait looks at its flag.
const CANCEL_POLL: Duration = Duration::from_millis(20);

/// Why a [`BufferPool::take`] came back without a buffer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TakeError {
    /// Nothing was returned to the pool in time: the lanes do not move.
    #[error("no lane buffer came free in {0:?}: the lanes are stalled or the pool is too small")]
    TimedOut(Duration),
    /// The caller's flag was raised.
    #[error("cancelled while waiting for a lane buffer")]
    Cancelled,
}

struct Inner {
    region: MmapRaw,
    free: Mutex<Vec<u32>>,
    returned: Condvar,
    count: usize,
}

impl Inner {
    fn free(&self) -> MutexGuard<'_, Vec<u32>> {
        // The list is a plain stack of numbers: valid whatever panicked.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A fixed number of equal buffers in one anonymous mapping. Cloning gives
/// another handle to the same pool.
#[derive(Clone)]
pub struct BufferPool {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BufferPool")
            .field("count", &self.inner.count)
            .field("available", &self.available())
            .finish()
    }
}

impl BufferPool {
    /// Maps `count` (≥ 1) buffers of [`BUF_LEN`] bytes. Huge pages are asked
    /// for and done without where the kernel has none.
    pub fn new(count: usize) -> io::Result<BufferPool> {
        if count == 0 || count > u32::MAX as usize {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a buffer pool needs 1 to 2^32-1 buffers, not {count}"),
            ));
        }
        let bytes = count
            .checked_mul(BUF_LEN)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let region = MmapMut::map_anon(bytes)?;
        if let Err(error) = region.advise(Advice::HugePage) {
            tracing::debug!(%error, "no huge pages for the lane buffers; small pages do");
        }
        Ok(BufferPool {
            inner: Arc::new(Inner {
                region: MmapRaw::from(region),
                free: Mutex::new((0..count as u32).rev().collect()),
                returned: Condvar::new(),
                count,
            }),
        })
    }

    /// Memory of the pool, in bytes. It is all the pool will ever use.
    pub fn bytes(&self) -> usize {
        self.inner.count * BUF_LEN
    }

    /// Buffers in the pool, taken or not.
    pub fn count(&self) -> usize {
        self.inner.count
    }

    /// Buffers that could be taken now.
    pub fn available(&self) -> usize {
        self.inner.free().len()
    }

    /// Takes a buffer, waiting at most `limit` for one to be returned.
    pub fn take(&self, limit: Duration) -> Result<PoolBuf, TakeError> {
        self.take_unless(limit, &AtomicBool::new(false))
    }

    /// Like [`take`](Self::take), but gives up within 20 ms of `cancel`
    /// becoming true.
    pub fn take_unless(&self, limit: Duration, cancel: &AtomicBool) -> Result<PoolBuf, TakeError> {
        let end = Instant::now() + limit;
        let mut free = self.inner.free();
        loop {
            if let Some(index) = free.pop() {
                return Ok(PoolBuf {
                    inner: Arc::clone(&self.inner),
                    index,
                });
            }
            if cancel.load(Ordering::Relaxed) {
                return Err(TakeError::Cancelled);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TakeError::TimedOut(limit));
            }
            free = self
                .inner
                .returned
                .wait_timeout(free, left.min(CANCEL_POLL))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Takes a buffer if one is free this moment.
    pub fn try_take(&self) -> Option<PoolBuf> {
        let index = self.inner.free().pop()?;
        Some(PoolBuf {
            inner: Arc::clone(&self.inner),
            index,
        })
    }

    /// Start and length of the region, for `IORING_REGISTER_BUFFERS`. The
    /// region stays mapped as long as any handle or buffer of the pool exists.
    pub(super) fn region(&self) -> (*mut u8, usize) {
        (self.inner.region.as_mut_ptr(), self.inner.region.len())
    }
}

/// One buffer of a [`BufferPool`], held alone by its owner and returned to the
/// pool when dropped. The content of a fresh buffer is whatever its last user
/// left.
pub struct PoolBuf {
    inner: Arc<Inner>,
    index: u32,
}

impl std::fmt::Debug for PoolBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PoolBuf({})", self.index)
    }
}

impl PoolBuf {
    fn start(&self) -> *mut u8 {
        // SAFETY: `index < count`, so the offset lies inside the mapping of
        // `count * BUF_LEN` bytes.
        unsafe {
            self.inner
                .region
                .as_mut_ptr()
                .add(self.index as usize * BUF_LEN)
        }
    }

    /// The whole buffer, header room and page area.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range lies in the mapping, which lives as long as
        // `inner`. Every index is in the free list or in exactly one PoolBuf,
        // so writers need `&mut self`, which this borrow excludes. The kernel
        // only reads from it (sends).
        unsafe { std::slice::from_raw_parts(self.start(), BUF_LEN) }
    }

    /// The whole buffer, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes this the only access. While
        // the kernel may read a buffer (a send in flight), the ring holds it
        // behind an `Arc`, so no `&mut` to it exists.
        unsafe { std::slice::from_raw_parts_mut(self.start(), BUF_LEN) }
    }

    /// The page area: room for [`PAGES_PER_BUF`] page contents.
    pub fn pages(&self) -> &[u8] {
        &self.bytes()[HEADER_ROOM..]
    }

    /// The page area, to write.
    pub fn pages_mut(&mut self) -> &mut [u8] {
        &mut self.bytes_mut()[HEADER_ROOM..]
    }

    /// Slot `slot` of the page area.
    ///
    /// # Panics
    /// If `slot` ≥ [`PAGES_PER_BUF`].
    pub fn page(&self, slot: usize) -> &Page {
        let (pages, _) = self.pages().as_chunks::<PAGE_SIZE>();
        &pages[slot]
    }

    /// Slot `slot` of the page area, to write.
    ///
    /// # Panics
    /// If `slot` ≥ [`PAGES_PER_BUF`].
    pub fn page_mut(&mut self, slot: usize) -> &mut Page {
        let (pages, _) = self.pages_mut().as_chunks_mut::<PAGE_SIZE>();
        &mut pages[slot]
    }

    /// Whether the buffer is one of `pool`'s.
    pub fn belongs_to(&self, pool: &BufferPool) -> bool {
        Arc::ptr_eq(&self.inner, &pool.inner)
    }
}

impl Drop for PoolBuf {
    fn drop(&mut self) {
        self.inner.free().push(self.index);
        self.inner.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_distinct_writable_and_come_back() {
        let pool = BufferPool::new(3).unwrap();
        assert_eq!(pool.bytes(), 3 * 528 * 1024);
        let mut held: Vec<PoolBuf> = (0..3).map(|_| pool.take(Duration::ZERO).unwrap()).collect();
        for (n, buf) in held.iter_mut().enumerate() {
            buf.bytes_mut().fill(n as u8 + 1);
        }
        for (n, buf) in held.iter().enumerate() {
            assert!(buf.bytes().iter().all(|&b| b == n as u8 + 1));
            assert!(buf.belongs_to(&pool));
        }
        assert!(pool.try_take().is_none());
        held.pop();
        assert_eq!(pool.available(), 1);
        drop(pool.take(Duration::ZERO).unwrap());
        assert_eq!(pool.available(), 1);
    }

    #[test]
    fn an_empty_pool_waits_its_limit_and_no_longer() {
        let pool = BufferPool::new(1).unwrap();
        let held = pool.take(Duration::ZERO).unwrap();
        let limit = Duration::from_millis(60);
        let start = Instant::now();
        assert_eq!(pool.take(limit).unwrap_err(), TakeError::TimedOut(limit));
        assert!(start.elapsed() >= limit);
        let flag = AtomicBool::new(true);
        assert_eq!(
            pool.take_unless(Duration::from_secs(60), &flag)
                .unwrap_err(),
            TakeError::Cancelled
        );
        let other = pool.clone();
        let waiter = std::thread::spawn(move || other.take(Duration::from_secs(10)).is_ok());
        std::thread::sleep(Duration::from_millis(20));
        drop(held);
        assert!(waiter.join().unwrap());
    }

    #[test]
    fn pages_follow_the_header_room_directly() {
        let pool = BufferPool::new(1).unwrap();
        let mut buf = pool.take(Duration::ZERO).unwrap();
        buf.page_mut(0).fill(7);
        buf.page_mut(PAGES_PER_BUF - 1).fill(9);
        assert_eq!(buf.bytes()[HEADER_ROOM], 7);
        assert_eq!(buf.bytes()[BUF_LEN - 1], 9);
        assert!(BufferPool::new(0).is_err());
    }
}
