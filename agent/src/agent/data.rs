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
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
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
    /// Source agents.
    claimants: AHashMap<String, Claimant>,
}

/// One source agent of a gang, as a shard knows it.
#[derive(Default)]
struct Claimant {
    /// The target hosts it may claim contents for.
    holders: AHashSet<HolderId>,
    /// Contents that it was told to send: entries of the shard that it made.
    granted: AtomicU64,
    /// Contents of which it said that they arrived, or that it does not send
    /// them after all.
    settled: AtomicU64,
}

/// Entries that one agent may make in the shards of all gangs of this host, 12
/// bytes each: distinct contents of 128 GiB, times the agents the claims of a
/// rack are spread over. Beyond, its claims are answered and not recorded.
const MAX_CLAIMED: u64 = 1 << 25;
/// A holder that no gang has: claims for it are looked up and not recorded.
const NOBODY: HolderId = HolderId(u16::MAX);
/// With fewer claims left open than this, nobody is named: lanes break, VMs are
/// cancelled.
const NOTABLE: u64 = 256;

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
        let mut claimants: AHashMap<String, Claimant> = AHashMap::new();
        for vm in spec
            .vms
            .iter()
            .filter(|vm| spec.rack_of(&vm.to) == Some(rack))
        {
            if let Some(holder) = spec.holder(&vm.to) {
                let claimant = claimants.entry(vm.from.clone()).or_default();
                claimant.holders.insert(holder);
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
            .retain(|_, shard| {
                if shard.gang == gang {
                    shard.name_the_unsettled();
                }
                shard.gang != gang
            });
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

    /// Entries of all shards that agent `from` has made.
    fn claimed_by(&self, from: &str) -> u64 {
        let shards = self.shards.read().unwrap_or_else(PoisonError::into_inner);
        let claimants = shards.values().filter_map(|s| s.claimants.get(from));
        claimants.map(|c| c.granted.load(Relaxed)).sum()
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
        let claimant = shard.claimants.get(from);
        let Some(claimant) = claimant.filter(|c| c.holders.contains(&op.holder())) else {
            return Err(NotOfTheGang {
                gang: shard.gang,
                what: "claim contents for that host",
            });
        };
        let room = self.claimed_by(from) < MAX_CLAIMED;
        let count = op.fps().len() as u64;
        let claims = &shard.claims;
        match op {
            ClaimOp::Claim { fps, holder } => {
                let holder = if room { holder } else { NOBODY };
                let answers = claims.claim(&fps, holder);
                let yours = |a: &&claim::ClaimAnswer| **a == claim::ClaimAnswer::Yours;
                let granted = answers.iter().filter(yours).count() as u64;
                claimant.granted.fetch_add(granted, Relaxed);
                let answers = answers.into_iter().map(answer).collect();
                return Ok(ClaimReply::Claims(answers));
            }
            ClaimOp::Confirm { fps, holder } => {
                claimant.settled.fetch_add(count, Relaxed);
                claims.confirm(&fps, holder);
            }
            // It makes entries, too, where there are none.
            ClaimOp::Reassign { fps, holder } if room => {
                claimant.granted.fetch_add(count, Relaxed);
                claims.reassign(&fps, holder);
            }
            ClaimOp::Reassign { .. } => {}
            ClaimOp::Release { fps, holder } => {
                claimant.settled.fetch_add(count, Relaxed);
                claims.release(&fps, holder);
            }
            ClaimOp::Forget { holder } => claims.forget_holder(holder),
        }
        Ok(ClaimReply::Done)
    }
}

impl Shard {
    /// Names who claimed contents and mostly never said what became of them:
    /// others sent references to them instead.
    fn name_the_unsettled(&self) {
        for (from, claimant) in &self.claimants {
            let granted = claimant.granted.load(Relaxed);
            let open = granted.saturating_sub(claimant.settled.load(Relaxed));
            if open >= NOTABLE && open > granted / 2 {
                tracing::warn!(gang = %self.gang, peer = %from, granted, open,
                    "claimed contents and did not say of them that they arrived");
            }
        }
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
    use crate::gang::testing::spec;
    use crate::types::Fingerprint;

    const HELD: ClaimAnswer = ClaimAnswer::Held {
        holder: HolderId(2),
        arrived: false,
    };

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
    fn who_has_claimed_its_share_is_answered_without_being_recorded() {
        let plane = plane();
        let claimant = |shard: &Shard| shard.claimants["a1"].granted.store(MAX_CLAIMED, Relaxed);
        plane
            .shards
            .read()
            .unwrap()
            .values()
            .for_each(|s| claimant(s));
        let before = plane.shard_bytes();
        let yours = ClaimReply::Claims(vec![ClaimAnswer::Yours]);
        assert_eq!(claim(&plane, "a1", 2).unwrap(), yours);
        let (fps, holder) = (vec![Fingerprint([6; 16])], HolderId(2));
        let reassign = ClaimOp::Reassign { fps, holder };
        plane.handle(GangId(7), "a1", reassign).unwrap();
        assert_eq!(plane.shard_bytes(), before);
        // Others are not held to that, and it may use what they have.
        assert_eq!(claim(&plane, "a2", 3).unwrap(), yours);
        let held = ClaimAnswer::Held {
            holder: HolderId(3),
            arrived: false,
        };
        let held = ClaimReply::Claims(vec![held]);
        assert_eq!(claim(&plane, "a1", 2).unwrap(), held);
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
