//! The pacer as lanes see it.

use crate::lane::Pacing;
use crate::pace::Pacer;
use crate::types::Class;
use std::any::Any;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// Plugs the agent's one pacer into every lane.
pub(super) struct LanePacing(pub(super) Pacer);

impl Pacing for LanePacing {
    fn try_acquire(&self, bytes: usize, class: Class) -> Result<(), Duration> {
        self.0.try_acquire(bytes, class)
    }

    fn overdraw(&self, bytes: usize, class: Class) {
        self.0.overdraw(bytes, class);
    }

    fn max_rate(&self) -> Option<u64> {
        Some(self.0.max_rate())
    }

    fn watch(&self, socket: BorrowedFd<'_>) -> Option<Box<dyn Any + Send>> {
        match self.0.watch_lane(socket) {
            Ok(watch) => Some(Box::new(watch)),
            Err(error) => {
                tracing::warn!(%error, "a lane's delay cannot be watched");
                None
            }
        }
    }
}
