//! What goes in and out of lanes: staged batches, events, and the traits by
//! which pacing and the target's pipeline are plugged in.

use super::entries::Entries;
use super::frame::{BatchHead, DecodedBatch, FrameError};
use super::pool::{PAGES_PER_BUF, PoolBuf};
use crate::types::{Class, GangId, Gfn, Round, VmIndex};
use std::any::Any;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// A batch's number, chosen by the sender: unique among the batches of one
/// `LaneSet`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BatchId(pub u64);

/// Pages of one VM, read and classified, ready to be encoded and sent.
#[derive(Debug)]
pub struct StagedBatch {
    /// The VM's gang.
    pub gang: GangId,
    /// The VM.
    pub vm: VmIndex,
    /// Its number.
    pub batch: BatchId,
    /// The round that read the pages.
    pub round: Round,
    /// Stop-and-copy overtakes pre-copy in every queue.
    pub class: Class,
    /// The VM's dedup domain, by any number: contents of different domains are
    /// not compressed with each other's history, which would show in the
    /// length whether they are alike.
    pub domain: u64,
    /// The pages. References are put in wire order by `submit`.
    pub entries: Entries,
    /// Contents of `entries.pages`, packed from slot 0 in that order, in a
    /// buffer of the pool the lane set was made with. May be `None` if there
    /// are no page contents.
    pub content: Option<PoolBuf>,
}

impl StagedBatch {
    /// The batch's header.
    pub fn head(&self) -> BatchHead {
        BatchHead {
            gang: self.gang,
            vm: self.vm,
            batch: self.batch,
            round: self.round,
            class: self.class,
        }
    }

    /// Normalizes and checks what the caller staged.
    pub(super) fn prepare(&mut self) -> Result<(), FrameError> {
        self.entries.normalize();
        self.entries.check(u32::MAX)?;
        let room = if self.content.is_some() {
            PAGES_PER_BUF
        } else {
            0
        };
        if self.entries.pages.len() > room {
            return Err(FrameError::PageCount {
                header: room,
                list: self.entries.pages.len(),
            });
        }
        Ok(())
    }
}

/// A batch that was not acknowledged before its connection broke. It may or
/// may not have arrived; its pages must be read and sent again (the target
/// ignores what it already has of the same round or a newer one).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostBatch {
    /// What it was about.
    pub head: BatchHead,
    /// Its entries, without content.
    pub entries: Entries,
}

/// News from a `LaneSet`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneEvent {
    /// A lane's connection is made (again).
    LaneUp {
        /// The lane's number in its set.
        lane: usize,
    },
    /// The target has placed these batches.
    Placed {
        /// The gang of the VM.
        gang: GangId,
        /// The VM.
        vm: VmIndex,
        /// The batches.
        batches: Vec<BatchId>,
        /// Those of them whose contents travelled compressed.
        compressed: Vec<BatchId>,
    },
    /// The target wants these pages with their content.
    Need {
        /// The gang of the VM.
        gang: GangId,
        /// The VM.
        vm: VmIndex,
        /// The pages.
        gfns: Vec<Gfn>,
    },
    /// These batches were on a connection that broke.
    Lost {
        /// Read and send their pages again.
        batches: Vec<LostBatch>,
    },
    /// A lane's connection broke; it is being reopened.
    LaneDown {
        /// The lane's number in its set.
        lane: usize,
        /// What happened, naming the peer.
        why: String,
    },
    /// No lane could be had for the configured time: the set has ended. Comes
    /// once, after the last `Lost`.
    PeerFailed {
        /// What happened, naming the peer.
        why: String,
    },
}

/// How a lane asks for permission to send. One pacer serves all lanes of an
/// agent; calls must return at once.
pub trait Pacing: Send + Sync {
    /// Takes `bytes` of the budget, or says how long to wait before asking
    /// again. Requests of [`Class::StopCopy`] must not wait for requests of
    /// [`Class::Precopy`].
    fn try_acquire(&self, bytes: usize, class: Class) -> Result<(), Duration>;

    /// Takes `bytes` although the budget has none, as a debt. A lane does so
    /// once a second in the middle of a frame that has no permission to go on,
    /// so that its peer can tell "slow" from "dead".
    fn overdraw(&self, bytes: usize, class: Class);

    /// The highest rate this lane may reach, in bytes per second; `None` if
    /// there is no limit. The kernel spaces the lane's packets by it.
    fn max_rate(&self) -> Option<u64>;

    /// Called with every new connection of a lane: the pacer may want to look
    /// at its delay. What is returned is dropped just before the connection.
    fn watch(&self, _socket: BorrowedFd<'_>) -> Option<Box<dyn Any + Send>> {
        None
    }
}

/// No pacing: every request is granted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unpaced;

impl Pacing for Unpaced {
    fn try_acquire(&self, _: usize, _: Class) -> Result<(), Duration> {
        Ok(())
    }
    fn overdraw(&self, _: usize, _: Class) {}
    fn max_rate(&self) -> Option<u64> {
        None
    }
}

/// What became of a batch given to a [`BatchSink`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// All of it is dealt with: acknowledge it.
    Placed,
    /// Some references are still being fetched: the sink will call
    /// [`ReverseHandle::placed`](super::ReverseHandle::placed) later.
    Pending,
}

/// Why a [`BatchSink`] refused a batch. The lane is closed and the text told
/// to the source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SinkError {
    /// The gang or VM is not expected here.
    #[error("gang {gang} vm {} is not being received here", vm.0)]
    UnknownVm {
        /// The gang named.
        gang: GangId,
        /// The VM named.
        vm: VmIndex,
    },
    /// The pipeline cannot go on.
    #[error("{0}")]
    Failed(String),
}

/// Where a [`LaneReceiver`](super::LaneReceiver) delivers. Called on the
/// lane's thread, one batch at a time a lane, several lanes at once. A call
/// that takes longer than the peer's patience (2 s) makes the source give the
/// lane up.
pub trait BatchSink: Send + Sync {
    /// Pages of RAM of the VM, or `None` if it is not being received here.
    /// Asked before each batch: entries at or beyond it close the lane.
    fn ram_pages(&self, gang: GangId, vm: VmIndex) -> Option<u32>;

    /// Takes a batch. Its memory is only lent for the call.
    fn batch(&self, batch: &DecodedBatch<'_>) -> Result<Placement, SinkError>;
}
