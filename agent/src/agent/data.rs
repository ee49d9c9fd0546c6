//! What the data threads of this host answer other agents with: claim shards
//! and arriving pages, by gang.
//!
//! Who may ask follows from the gang's plan alone: claims are for sources of
//! the gang, each for the hosts its own VMs go to; pages are for its target
//! hosts. A cluster's agent that is neither is refused, and the connection it
//! asked on ends.

use crate::dedup::claim::{self, ClaimShard};
use crate::dedup::resolve;
use crate::gang::message::GangSpec;
use crate::gang::target::TargetGang;
use crate::net::rack::{
    ClaimAnswer, ClaimOp, ClaimReply, ClaimServer, NotOfTheGang, PageServer, Served, Wanted,
};
use crate::types::{GangId, HolderId, Page};
use ahash::{AHashMap, AHashSet};
use std::collections::hash_map::Entry;
use std::sync::{Arc, PoisonError, RwLock};

/// Claim shards and target stores of the gangs this host takes part in. A
/// gang that is not in here is answered as if nothing were known.
#[derive(Default)]
pub(super) struct DataPlane {
    shards: RwLock<AHashMap<GangId, Arc<Shard>>>,
    targets: RwLock<AHashMap<GangId, Arc<TargetGang>>>,
}

/// The claims of one gang for one target rack.
struct Shard {
    gang: GangId,
    claims: ClaimShard,
    /// Source agents, and the target hosts each may claim contents for.
    claimants: AHashMap<String, AHashSet<HolderId>>,
}

/// Two gangs' claims would meet.
#[derive(Debug, thiserror::Error)]
#[error("gang {other} has taken claim space {space} on this host; give the gang another id")]
pub(super) struct SpaceTaken {
    space: GangId,
    other: GangId,
}

impl DataPlane {
    /// Opens the claim shard of a gang for `rack`, under the name `space`; see
    /// [`GangSpec::claim_space`].
    pub(super) fn open_shard(
        &self,
        space: GangId,
        spec: &GangSpec,
        rack: &str,
    ) -> Result<(), SpaceTaken> {
        let mut claimants: AHashMap<String, AHashSet<HolderId>> = AHashMap::new();
        for vm in spec
            .vms
            .iter()
            .filter(|vm| spec.rack_of(&vm.to) == Some(rack))
        {
            if let Some(holder) = spec.holder(&vm.to) {
                claimants.entry(vm.from.clone()).or_default().insert(holder);
            }
        }
        let shard = Shard {
            gang: spec.id,
            claims: ClaimShard::default(),
            claimants,
        };
        let mut shards = self.shards.write().unwrap_or_else(PoisonError::into_inner);
        match shards.entry(space) {
            // Ids are random and so do not meet, unless somebody makes them.
            Entry::Occupied(taken) => Err(SpaceTaken {
                space,
                other: taken.get().gang,
            }),
            Entry::Vacant(free) => {
                free.insert(Arc::new(shard));
                Ok(())
            }
        }
    }

    /// Closes every claim shard of a gang.
    pub(super) fn close_shards(&self, gang: GangId) {
        self.shards
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|_, shard| shard.gang != gang);
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

    fn target(&self, gang: GangId) -> Option<Arc<TargetGang>> {
        let targets = self.targets.read().unwrap_or_else(PoisonError::into_inner);
        targets.get(&gang).cloned()
    }

    /// Bytes held by claim shards.
    pub(super) fn shard_bytes(&self) -> usize {
        let shards = self.shards.read().unwrap_or_else(PoisonError::into_inner);
        shards.values().map(|s| s.claims.memory_bytes()).sum()
    }
}

impl ClaimServer for DataPlane {
    fn handle(&self, gang: GangId, from: &str, op: ClaimOp) -> Result<ClaimReply, NotOfTheGang> {
        let shard = self
            .shards
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&gang)
            .cloned();
        let Some(shard) = shard else {
            return Ok(match op {
                ClaimOp::Claim { fps, .. } => {
                    ClaimReply::Claims(vec![ClaimAnswer::Yours; fps.len()])
                }
                _ => ClaimReply::Done,
            });
        };
        let mine = shard.claimants.get(from);
        if !mine.is_some_and(|holders| holders.contains(&op.holder())) {
            return Err(NotOfTheGang {
                gang: shard.gang,
                what: "claim contents for that host",
            });
        }
        let claims = &shard.claims;
        match op {
            ClaimOp::Claim { fps, holder } => {
                let answers = claims.claim(&fps, holder).into_iter().map(answer).collect();
                return Ok(ClaimReply::Claims(answers));
            }
            ClaimOp::Confirm { fps, holder } => claims.confirm(&fps, holder),
            ClaimOp::Reassign { fps, holder } => claims.reassign(&fps, holder),
            ClaimOp::Release { fps, holder } => claims.release(&fps, holder),
            ClaimOp::Forget { holder } => claims.forget_holder(holder),
        }
        Ok(ClaimReply::Done)
    }
}

fn answer(answer: claim::ClaimAnswer) -> ClaimAnswer {
    match answer {
        claim::ClaimAnswer::Yours => ClaimAnswer::Yours,
        claim::ClaimAnswer::Held { holder, arrived } => ClaimAnswer::Held { holder, arrived },
    }
}

impl PageServer for DataPlane {
    fn admit(&self, gang: GangId, from: &str) -> Result<(), NotOfTheGang> {
        match self.target(gang) {
            Some(target) if target.spec.arriving(from).next().is_none() => Err(NotOfTheGang {
                gang,
                what: "fetch pages",
            }),
            _ => Ok(()),
        }
    }

    fn serve(&self, gang: GangId, wanted: &Wanted, page: &mut Page) -> Served {
        match self
            .target(gang)
            .map(|target| target.store.serve(&wanted.fp, page))
        {
            Some(resolve::Served::Page) => Served::Page,
            Some(resolve::Served::NotYet) => Served::NotYet,
            Some(resolve::Served::Gone) | None => Served::Gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gang::message::{Compress, GangHost, GangVm, Verify};
    use crate::types::Fingerprint;

    const HELD: ClaimAnswer = ClaimAnswer::Held {
        holder: HolderId(2),
        arrived: false,
    };

    /// web1 goes a1 → b1, web2 a2 → b2; a3 and b3 have no part in it.
    fn spec(id: u64) -> GangSpec {
        let host = |name: &str| GangHost {
            name: name.to_owned(),
            rack: name[..1].to_owned(),
        };
        let vm = |name: &str, from: &str, to: &str| GangVm {
            name: name.to_owned(),
            from: from.to_owned(),
            to: to.to_owned(),
        };
        GangSpec {
            id: GangId(id),
            name: "web".into(),
            coordinator: "a1".into(),
            hosts: ["a1", "a2", "b1", "b2"].map(host).into(),
            vms: vec![vm("web1", "a1", "b1"), vm("web2", "a2", "b2")],
            profile: "normal".into(),
            compress: Compress::Auto,
            verify: Verify::Digest,
            downtime_limit_ms: 300,
            align: false,
        }
    }

    fn claim(plane: &DataPlane, from: &str, holder: u16) -> Result<ClaimReply, NotOfTheGang> {
        let op = ClaimOp::Claim {
            fps: vec![Fingerprint([5; 16])],
            holder: HolderId(holder),
        };
        plane.handle(GangId(7), from, op)
    }

    fn plane() -> DataPlane {
        let plane = DataPlane::default();
        plane.open_shard(GangId(7), &spec(7), "b").unwrap();
        plane
    }

    #[test]
    fn only_sources_of_the_gang_claim_and_only_for_their_own_targets() {
        let plane = plane();
        let yours = ClaimReply::Claims(vec![ClaimAnswer::Yours]);
        assert_eq!(claim(&plane, "a1", 2).unwrap(), yours);
        assert_eq!(
            claim(&plane, "a2", 3).unwrap(),
            ClaimReply::Claims(vec![HELD])
        );
        // Outside the gang, a target, and a source for another one's target.
        for (from, holder) in [
            ("a3", 2),
            ("b1", 2),
            ("b3", 2),
            ("", 2),
            ("a2", 2),
            ("a1", 3),
        ] {
            let refused = claim(&plane, from, holder).unwrap_err();
            assert_eq!(refused.gang, GangId(7), "{from} for {holder}");
        }
    }

    #[test]
    fn who_is_refused_changes_nothing() {
        let plane = plane();
        claim(&plane, "a1", 2).unwrap();
        let (fps, holder) = (vec![Fingerprint([5; 16])], HolderId(2));
        for op in [
            ClaimOp::Release {
                fps: fps.clone(),
                holder,
            },
            ClaimOp::Reassign {
                fps: fps.clone(),
                holder,
            },
            ClaimOp::Confirm { fps, holder },
            ClaimOp::Forget { holder },
        ] {
            plane.handle(GangId(7), "a3", op.clone()).unwrap_err();
            plane.handle(GangId(7), "a2", op).unwrap_err();
        }
        assert_eq!(
            claim(&plane, "a2", 3).unwrap(),
            ClaimReply::Claims(vec![HELD])
        );
    }

    #[test]
    fn a_gang_cannot_take_another_ones_claims() {
        let plane = plane();
        claim(&plane, "a1", 2).unwrap();
        let error = plane.open_shard(GangId(7), &spec(6), "b").unwrap_err();
        assert!(error.to_string().contains("another id"), "{error}");
        plane.close_shards(GangId(6));
        assert_eq!(
            claim(&plane, "a2", 3).unwrap(),
            ClaimReply::Claims(vec![HELD])
        );
        plane.close_shards(GangId(7));
        let closed = claim(&plane, "a3", 2).unwrap();
        assert_eq!(closed, ClaimReply::Claims(vec![ClaimAnswer::Yours]));
    }
}
