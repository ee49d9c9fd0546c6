//! What a hostile source does to its gang, one act after the other.

use super::acts::{self, Target};
use super::identity::{CONNECT, Identity};
use super::member::{ACCOMPLICE, Seen};
use anyhow::{Context, Result, bail, ensure};
use drover::gang::message::{GangRequest, GangResponse, GangSpec, SourceFacts};
use drover::lane::Reference;
use drover::net::rack::{ClaimAnswer, ClaimOp, ClaimOutcome, RackService};
use drover::net::rpc::{RpcClient, RpcLimits};
use drover::types::{Fingerprint, Gfn, HolderId, VmIndex};
use drover::vmm::kinds::VmFacts;
use std::time::Duration;
use tokio::sync::oneshot;

/// References that lead nowhere.
pub const LOOPED: u32 = 4096;
/// Contents claimed that nobody has.
const CLAIMED: u64 = 1_000_000;
/// How long a claim may take to be answered.
const CLAIM: Duration = Duration::from_secs(5);

/// A source that lies.
#[derive(Debug)]
pub struct Source {
    /// An honest agent, and its VM that this one's VM is said to be like.
    pub like: (String, String),
    /// Contents that the honest VMs have, as their owner or another tenant of
    /// the domain knows them.
    pub known: Vec<Fingerprint>,
    /// Frames that it sent in an earlier gang, where they were taken.
    pub earlier: Vec<u8>,
}

/// The `i`-th fingerprint of a content that does not exist.
pub fn made_up(i: u64) -> Fingerprint {
    // Zeroes would be the page of zeroes, which everybody has.
    let i = i + 1;
    let mut bytes = [0xee; 16];
    bytes[..8].copy_from_slice(&i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    bytes[8..].copy_from_slice(&i.wrapping_mul(0xc2b2_ae3d_27d4_eb4f).to_be_bytes());
    Fingerprint(bytes)
}

/// What an honest agent says of its VM, in the name of another.
///
/// # Errors
/// When it does not say it.
pub async fn borrowed_facts(
    identity: &Identity,
    like: &(String, String),
    vm: &str,
) -> Result<SourceFacts> {
    let (host, theirs) = like;
    let request = GangRequest::CheckSource { vm: theirs.clone() };
    let GangResponse::Source(mut facts) = ask(identity, host, &request).await? else {
        bail!("{host} says nothing of {theirs}");
    };
    match &mut facts.vmm {
        VmFacts::QemuDirect(known) | VmFacts::QemuStream(known) => known.name = vm.to_owned(),
        VmFacts::Managed(known) => known.name = vm.to_owned(),
        VmFacts::KvmLog(_) => bail!("{theirs} is no QEMU"),
    }
    let quoted = |name: &str| format!("name = {name:?}");
    facts.definition = facts.definition.replace(&quoted(theirs), &quoted(vm));
    Ok(facts)
}

/// One request.
///
/// # Errors
/// When no response comes.
pub async fn ask(identity: &Identity, host: &str, request: &GangRequest) -> Result<GangResponse> {
    let client = RpcClient::new(identity.roster.clone(), host, RpcLimits::default());
    Ok(client.call(request, CONNECT).await?)
}

impl Source {
    pub(super) async fn facts(&self, identity: &Identity, vm: &str) -> Result<SourceFacts> {
        borrowed_facts(identity, &self.like, vm).await
    }

    /// Does everything it can think of to its target and to its rack.
    pub(super) async fn lie(
        &self,
        identity: &Identity,
        rack: &RackService,
        spec: &GangSpec,
        seen: &Seen,
    ) {
        let Some((vm, plan)) = spec.leaving(identity.name()).next() else {
            return;
        };
        let target = Target {
            identity,
            name: &plan.to,
            gang: spec.id,
            vm,
        };
        seen.note(
            "claims for pages never sent",
            self.claim(rack, spec, &plan.to).await,
        );
        seen.note(
            "references in a loop",
            self.loops(&target, spec, &plan.to).await,
        );
        seen.note(
            "frames of an earlier gang",
            target.lane_refused(&self.earlier).await,
        );
        seen.note("pages of another's VM", {
            let other = VmIndex(u16::from(vm.0 == 0));
            target
                .lane_refused(&acts::page_frame(spec.id, other, Gfn(1024)))
                .await
        });
        for (what, frame) in acts::huge_lane_frames(spec.id, vm) {
            seen.note(what, target.lane_refused(&frame).await);
        }
        for (what, payload) in acts::huge_control_messages(spec.id, vm) {
            seen.note(what, target.control_refused(&payload).await);
        }
        seen.note("a million open requests", target.flood().await);
    }

    /// Claims what honest sources will want to send, and much besides, for the
    /// host the honest VM goes to.
    async fn claim(&self, rack: &RackService, spec: &GangSpec, target: &str) -> Result<String> {
        let holder = spec.holder(target).context("no holder")?;
        let rack_name = spec.rack_of(target).context("no rack")?;
        let space = spec.claim_space(rack_name).context("no claims")?;
        let claims = rack.claims();
        let invented: Vec<_> = (0..CLAIMED).map(|i| made_up(i + (1 << 40))).collect();
        let (mut yours, mut all) = (0, 0);
        for fps in self.known.chunks(4096).chain(invented.chunks(4096)) {
            let (tell, told) = oneshot::channel();
            let op = ClaimOp::Claim {
                fps: fps.to_vec(),
                holder,
            };
            let sink = Box::new(move |outcome: ClaimOutcome| drop(tell.send(outcome)));
            claims.submit(&self.like.0, space, op, CLAIM, sink);
            let outcome = told.await?;
            ensure!(outcome != ClaimOutcome::NotInTime, "no answer to claims");
            let answers = outcome.answers(fps.len());
            all += answers.len();
            yours += answers.iter().filter(|a| **a == ClaimAnswer::Yours).count();
        }
        Ok(format!("{yours} of {all} granted"))
    }

    /// References to contents that are on no host: at the target itself, at an
    /// accomplice who asks the target for them, at a host that there is not.
    async fn loops(&self, target: &Target<'_>, spec: &GangSpec, to: &str) -> Result<String> {
        let me = spec.holder(to).context("no holder")?;
        let accomplice = spec.holder(ACCOMPLICE).context("no accomplice")?;
        let mut refs = (0..LOOPED).map(|i| Reference {
            gfn: Gfn(i),
            holder: [me, accomplice, HolderId(99)][i as usize % 3],
            fingerprint: made_up(u64::from(i)),
        });
        let mut lane = target.lane().await?;
        let mut batch = 0;
        loop {
            let some: Vec<Reference> = refs.by_ref().take(256).collect();
            if some.is_empty() {
                break;
            }
            batch += 1;
            lane.send(&acts::refs_frame(target.gang, target.vm, batch, some))
                .await?;
        }
        // It is asked for every one of these pages in full.
        let needed = lane.needs(LOOPED as usize, Duration::from_secs(15)).await?;
        Ok(format!("asked for {needed} pages in full"))
    }
}
