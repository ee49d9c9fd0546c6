//! What passes between [`super::resolve::TargetStore`] and its callers: outcomes,
//! needs, errors, and the guest RAM it writes.

use super::table::IndexError;
use crate::types::{Fingerprint, Gfn, HolderId, Page, Round, VmIndex};

/// Guest RAM of an incoming VM. Called from several threads at once; never for the
/// same page by two writers, but readers may run beside a writer or the guest, and
/// may then see any mix of old and new bytes.
pub trait PageMemory: Send + Sync {
    /// Writes a page.
    fn write(&self, gfn: Gfn, page: &Page);
    /// Copies a page out.
    fn read(&self, gfn: Gfn, page: &mut Page);
    /// Makes `count` pages from `gfn` on read as zero, giving their memory back
    /// where that is possible.
    fn zero(&self, gfn: Gfn, count: u32);
}

/// What a message from outside got wrong, or a VM that is not here.
#[derive(Debug, thiserror::Error)]
pub enum ArriveError {
    /// The VM is not (or no longer) on this host.
    #[error("VM {} of the plan is not arriving on this host", vm.0)]
    NoVm {
        /// The VM named.
        vm: VmIndex,
    },
    /// Outside the VM's RAM.
    #[error("{count} page(s) at {gfn} are outside VM {}'s {pages} pages of RAM", vm.0)]
    OutOfRange {
        /// The VM named.
        vm: VmIndex,
        /// First page.
        gfn: Gfn,
        /// Pages from there.
        count: u32,
        /// Pages the VM has.
        pages: u32,
    },
    /// Round 0 or above [`super::target_vm::MAX_ROUND`].
    #[error("VM {}: {} is no round number", vm.0, round.0)]
    BadRound {
        /// The VM named.
        vm: VmIndex,
        /// The round named.
        round: Round,
    },
}

/// Why a VM cannot be added.
#[derive(Debug, thiserror::Error)]
pub enum AddVmError {
    /// Its index is taken.
    #[error("VM {} of the plan is on this host already", vm.0)]
    Twice {
        /// The VM named.
        vm: VmIndex,
    },
    /// The index has no room for its pages.
    #[error("VM {} cannot be indexed", vm.0)]
    Index {
        /// The VM named.
        vm: VmIndex,
        /// Why not.
        #[source]
        source: IndexError,
    },
}

/// What became of an arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// The page has this content now.
    Placed,
    /// A round as new was there already, or the VM is sealed: dropped.
    Stale,
}

/// What became of a reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefArrival {
    /// The content was on this host: placed.
    Placed,
    /// As [`Arrival::Stale`].
    Stale,
    /// Pending; the caller fetches the content from the holder and reports with
    /// [`super::resolve::TargetStore::fetched`] or [`super::resolve::TargetStore::not_fetched`].
    Fetch,
    /// Pending; this host is the holder and the content is on its way. The caller
    /// sets a deadline and then reports [`super::resolve::TargetStore::not_fetched`].
    Await,
    /// Pending; the content is being fetched or awaited already.
    Joined,
    /// Pending, but nothing is under way: ask the source for the page in full.
    Need,
}

/// A page to ask the source for in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Need {
    /// Whose page.
    pub vm: VmIndex,
    /// Which page.
    pub gfn: Gfn,
    /// The content that was not to be had.
    pub fp: Fingerprint,
}

/// Why content did not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum NotFetched {
    /// The holder does not have it (any more).
    Gone,
    /// Not in time, or the holder cannot be reached.
    Late,
}

/// What became of fetched content.
#[derive(Debug, PartialEq, Eq)]
pub enum Fetched {
    /// Right, and placed in that many waiting pages.
    Placed(u32),
    /// Nobody waits for it any more.
    Unwanted,
    /// Not the content that was asked for: the holder erred or lies. Nothing was
    /// written; ask the source for these pages.
    Wrong {
        /// Who sent it.
        holder: HolderId,
        /// The pages that waited.
        needs: Vec<Need>,
    },
}

/// Answer to a request for content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Copied out, checked.
    Page,
    /// Not here yet; it may come.
    NotYet,
    /// Not here, and not expected.
    Gone,
}

/// State of a VM at the end, see [`super::resolve::TargetStore::complete`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// References still waiting. The VM must not run while this is not 0.
    pub pending: u64,
    /// Digest of the fingerprint array, to compare with the source's.
    pub digest: [u8; 16],
}
