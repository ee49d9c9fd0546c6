//! What passes between [`super::source::SourceDedup`] and its callers: plans,
//! verdicts, sent batches, notes for the shards, errors.

use super::{
    source_vm::{Known, SourceVm},
    table::IndexError,
};
use crate::types::{Class, Fingerprint, Gfn, HolderId, Round, VmIndex};
use std::sync::Arc;

/// What to do with a captured page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The target has, or is being sent, exactly this: skip it.
    Unchanged,
    /// Send as part of a zero run.
    Zero,
    /// Send the content.
    Send,
    /// Send a reference to the content `holder` has or is being sent.
    Reference {
        /// Target host.
        holder: HolderId,
    },
}

/// Claims to make at one shard; part of a [`Plan`].
#[derive(Debug, Clone)]
pub struct ClaimBatch {
    /// Index of the shard's agent, as in the [`super::claim::ShardMap`].
    pub shard: usize,
    /// The fingerprints to claim, each once.
    pub fps: Vec<Fingerprint>,
    /// Where in the plan each stands.
    pub(super) at: Vec<u32>,
    pub(super) answered: bool,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    Done(Verdict),
    /// Sent in full whatever is known of it, and the claim moved here.
    Forced,
    /// Waits for the shard.
    Claimed,
    /// Another page of this host has asked already.
    Await,
}

#[derive(Debug)]
pub(super) struct Planned {
    pub(super) gfn: Gfn,
    pub(super) fp: Fingerprint,
    pub(super) step: Step,
    pub(super) arrived: bool,
}

/// A batch on its way through the claims. Ends in [`super::source::SourceDedup::settle`] or
/// [`super::source::SourceDedup::abandon`].
#[derive(Debug)]
pub struct Plan {
    pub(super) id: u64,
    pub(super) vm: Arc<SourceVm>,
    pub(super) class: Class,
    pub(super) round: Round,
    pub(super) pages: Vec<Planned>,
    pub(super) claims: Vec<ClaimBatch>,
    pub(super) release: Vec<Fingerprint>,
}

impl Plan {
    /// The claims to make; their indices go with the answers.
    pub fn claims(&self) -> &[ClaimBatch] {
        &self.claims
    }
    /// Whether every claim was answered or given up on.
    pub fn is_answered(&self) -> bool {
        self.claims.iter().all(|batch| batch.answered)
    }
}

/// One page of a settled batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SentPage {
    /// Which page.
    pub gfn: Gfn,
    /// What was captured.
    pub fp: Fingerprint,
    /// What to do with it.
    pub verdict: Verdict,
}

/// A settled batch: to be kept until its arrival is known, and then given to
/// [`super::source::SourceDedup::placed`] or [`super::source::SourceDedup::lost`].
#[derive(Debug, Clone)]
pub struct SentBatch {
    /// Whose pages.
    pub vm: VmIndex,
    /// The round that captured them.
    pub round: Round,
    /// The VM's target host; the holder in `notes` and in confirmations.
    pub holder: HolderId,
    /// The pages, in the order they were planned.
    pub pages: Vec<SentPage>,
    /// What the shards are to be told. Only saves work: may be dropped.
    pub notes: Vec<ShardNote>,
}

/// Fingerprints for one shard, all with the batch's holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardNote {
    /// Index of the shard's agent.
    pub shard: usize,
    /// To [`super::claim::ClaimShard::reassign`]: sent in full, since its holder
    /// did not have it.
    pub reassign: Vec<Fingerprint>,
    /// To [`super::claim::ClaimShard::release`]: claimed, but never arrived.
    pub release: Vec<Fingerprint>,
    /// To [`super::claim::ClaimShard::confirm`]: arrived.
    pub confirm: Vec<Fingerprint>,
}

/// Why a VM cannot be added, or is not there.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Its index is taken.
    #[error("VM {} of the plan is being moved from this host already", vm.0)]
    Twice {
        /// The VM named.
        vm: VmIndex,
    },
    /// The VM is not being moved from this host.
    #[error("VM {} of the plan is not being moved from this host", vm.0)]
    NoVm {
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
    /// A round while batches of another are open, or after a later one.
    #[error(
        "VM {}: round {} cannot be planned while {open} batch(es) of round {} are open or after it; \
         settle or abandon them, and count rounds upwards", vm.0, round.0, current.0
    )]
    RoundOrder {
        /// The VM named.
        vm: VmIndex,
        /// The round asked for.
        round: Round,
        /// The latest round so far.
        current: Round,
        /// Batches of it that are not settled.
        open: u32,
    },
    /// A page outside the VM's RAM.
    #[error("{gfn} is outside VM {}'s {pages} pages of RAM", vm.0)]
    OutOfRange {
        /// The VM named.
        vm: VmIndex,
        /// The page named.
        gfn: Gfn,
        /// Pages the VM has.
        pages: u32,
    },
}

/// A shard answered something that is no answer. Treat as no answer.
#[derive(Debug, thiserror::Error)]
#[error(
    "claim shard {shard} answered {answers} of {claims} claims; check that its agent runs this version"
)]
pub struct BadAnswer {
    /// Index of the shard's agent.
    pub shard: usize,
    /// Claims made.
    pub claims: usize,
    /// Answers given.
    pub answers: usize,
}

/// In stop-and-copy the guest waits, so only content that has arrived is worth a
/// reference.
pub(super) fn verdict(class: Class, known: Known) -> Verdict {
    match class {
        Class::StopCopy if !known.arrived => Verdict::Send,
        _ => Verdict::Reference {
            holder: known.holder,
        },
    }
}

#[derive(Default)]
pub(super) struct Notes(pub(super) Vec<ShardNote>);

impl Notes {
    pub(super) fn of(&mut self, shard: usize) -> &mut ShardNote {
        let at = self.0.iter().position(|note| note.shard == shard);
        let at = at.unwrap_or_else(|| {
            self.0.push(ShardNote {
                shard,
                reassign: Vec::new(),
                release: Vec::new(),
                confirm: Vec::new(),
            });
            self.0.len() - 1
        });
        &mut self.0[at]
    }
}
