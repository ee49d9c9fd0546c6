//! What the data threads of this host answer other agents with: claim shards
//! and arriving pages, by gang.

use crate::dedup::claim::{self, ClaimShard};
use crate::dedup::resolve;
use crate::gang::target::TargetGang;
use crate::net::rack::{ClaimAnswer, ClaimOp, ClaimReply, ClaimServer, PageServer, Served, Wanted};
use crate::types::{GangId, Page};
use ahash::AHashMap;
use std::sync::{Arc, PoisonError, RwLock};

/// Claim shards and target stores of the gangs this host takes part in. A
/// gang that is not in here is answered as if nothing were known.
#[derive(Default)]
pub(super) struct DataPlane {
    shards: RwLock<AHashMap<GangId, Arc<ClaimShard>>>,
    targets: RwLock<AHashMap<GangId, Arc<TargetGang>>>,
}

impl DataPlane {
    /// Opens a claim shard for a claim space of a gang; see
    /// [`crate::gang::message::GangSpec::claim_space`].
    pub(super) fn open_shard(&self, space: GangId) {
        let shard = Arc::new(ClaimShard::default());
        self.shards
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(space, shard);
    }

    pub(super) fn close_shard(&self, space: GangId) {
        self.shards
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&space);
    }

    pub(super) fn open_target(&self, gang: GangId, target: Arc<TargetGang>) {
        self.targets
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(gang, target);
    }

    pub(super) fn close_target(&self, gang: GangId) {
        self.targets
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&gang);
    }

    /// Bytes held by claim shards.
    pub(super) fn shard_bytes(&self) -> usize {
        let shards = self.shards.read().unwrap_or_else(PoisonError::into_inner);
        shards.values().map(|shard| shard.memory_bytes()).sum()
    }
}

impl ClaimServer for DataPlane {
    fn handle(&self, gang: GangId, _from: &str, op: ClaimOp) -> ClaimReply {
        let shard = self
            .shards
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&gang)
            .cloned();
        let Some(shard) = shard else {
            return match op {
                ClaimOp::Claim { fps, .. } => {
                    ClaimReply::Claims(vec![ClaimAnswer::Yours; fps.len()])
                }
                _ => ClaimReply::Done,
            };
        };
        match op {
            ClaimOp::Claim { fps, holder } => {
                let answers = shard.claim(&fps, holder).into_iter().map(answer).collect();
                return ClaimReply::Claims(answers);
            }
            ClaimOp::Confirm { fps, holder } => shard.confirm(&fps, holder),
            ClaimOp::Reassign { fps, holder } => shard.reassign(&fps, holder),
            ClaimOp::Release { fps, holder } => shard.release(&fps, holder),
            ClaimOp::Forget { holder } => shard.forget_holder(holder),
        }
        ClaimReply::Done
    }
}

fn answer(answer: claim::ClaimAnswer) -> ClaimAnswer {
    match answer {
        claim::ClaimAnswer::Yours => ClaimAnswer::Yours,
        claim::ClaimAnswer::Held { holder, arrived } => ClaimAnswer::Held { holder, arrived },
    }
}

impl PageServer for DataPlane {
    fn serve(&self, gang: GangId, wanted: &Wanted, page: &mut Page) -> Served {
        let target = self
            .targets
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&gang)
            .cloned();
        match target.map(|target| target.store.serve(&wanted.fp, page)) {
            Some(resolve::Served::Page) => Served::Page,
            Some(resolve::Served::NotYet) => Served::NotYet,
            Some(resolve::Served::Gone) | None => Served::Gone,
        }
    }
}
