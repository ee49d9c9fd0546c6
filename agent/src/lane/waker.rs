//! How other threads get a lane's thread out of its wait.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Wakes a lane's thread out of [`Ring::wait`].
#[derive(Debug, Clone)]
pub(super) struct Waker(Arc<EventFd>);

impl Waker {
    pub(super) fn new() -> io::Result<Waker> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Waker(Arc::new(EventFd::from_flags(flags)?)))
    }

    pub(super) fn wake(&self) {
        // EAGAIN means the counter is full: a wake-up is pending anyway.
        let _ = self.0.write(1);
    }

    /// Forgets wake-ups so far.
    pub(super) fn clear(&self) {
        let _ = self.0.read();
    }

    /// What becomes readable at a wake-up.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
