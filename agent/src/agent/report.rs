//! What is known of gangs and lanes, in the API's terms.

use super::Agent;
use crate::api::metrics::MetricsText;
use crate::api::types::{
    CoreLoad, GangPhase, GangProgress, GangReport, KindInfo, LaneCounters, LoadSource, Outcome,
    PeerStatus, TlsStatus, VmOutcome, VmPhase, VmProgress, VmReport,
};
use crate::gang::coordinator::GangState;
use crate::gang::message::{CoreState, Phase, VmState};
use crate::gang::source::SourceGang;
use crate::net::Security;
use crate::net::rpc::PeerState;
use crate::types::PAGE_SIZE;
use crate::vmm::kinds::{Survey, Unfit};
use std::time::UNIX_EPOCH;

/// How far a gang is.
pub(super) fn progress(state: &GangState) -> GangProgress {
    let all_preparing = state.vms.iter().all(|vm| vm.phase == Phase::Preparing);
    GangProgress {
        gang: state.spec.name.clone(),
        id: state.spec.id.to_string(),
        phase: match (state.ended, state.cancelled, all_preparing) {
            (true, ..) => GangPhase::Done,
            (_, true, _) => GangPhase::Cancelling,
            (.., true) => GangPhase::Checking,
            (.., false) => GangPhase::Moving,
        },
        elapsed_ms: state.total_ms as u64,
        vms: state.vms.iter().map(|vm| vm_progress(state, vm)).collect(),
        core: core_load(&state.core),
        lost: state
            .lost
            .iter()
            .filter(|l| !l.found_again)
            .cloned()
            .collect(),
    }
}

fn vm_progress(state: &GangState, vm: &VmState) -> VmProgress {
    let plan = &state.spec.vms[vm.vm.0 as usize];
    let rate = state.core.migration_mbit * 1e6 / 8.0;
    let left_bytes = vm.left_pages * PAGE_SIZE as u64;
    VmProgress {
        name: plan.name.clone(),
        from: plan.from.clone(),
        to: plan.to.clone(),
        phase: vm_phase(vm.phase),
        round: vm.round,
        dirty_pages_per_s: vm.dirty_pages_per_s as u64,
        left_bytes,
        total_bytes: vm.pages.total * PAGE_SIZE as u64,
        sent_bytes: (vm.pages.sent + vm.pages.reference) * PAGE_SIZE as u64,
        eta_ms: (vm.phase == Phase::Precopy && rate > 1e5)
            .then(|| (left_bytes as f64 / rate * 1e3) as u64),
        downtime_ms: vm.downtime_ms,
        error: vm.error.clone(),
    }
}

fn vm_phase(phase: Phase) -> VmPhase {
    match phase {
        Phase::Preparing => VmPhase::Preparing,
        Phase::Precopy => VmPhase::Precopy,
        Phase::Ready => VmPhase::Ready,
        Phase::StopCopy => VmPhase::StopCopy,
        Phase::Arrived => VmPhase::Arrived,
        Phase::Failed => VmPhase::Failed,
        Phase::Cancelled => VmPhase::Cancelled,
        Phase::InDoubt => VmPhase::InDoubt,
    }
}

/// How it ended.
pub(super) fn report(state: &GangState, warnings: Vec<String>) -> GangReport {
    let count = |phase| state.vms.iter().filter(|vm| vm.phase == phase).count();
    let arrived = count(Phase::Arrived);
    GangReport {
        gang: state.spec.name.clone(),
        id: state.spec.id.to_string(),
        outcome: match (
            arrived == state.vms.len(),
            arrived > 0,
            count(Phase::Cancelled) > 0,
        ) {
            (true, _, _) => Outcome::Arrived,
            (_, _, true) => Outcome::Cancelled,
            (_, true, _) => Outcome::Partial,
            _ => Outcome::Failed,
        },
        total_ms: state.total_ms as u64,
        core_bytes: state.core_bytes,
        vms: state.vms.iter().map(|vm| vm_report(state, vm)).collect(),
        error: None,
        warnings,
        lost: state.lost.clone(),
    }
}

/// How this agent's connections are protected.
pub(super) fn tls_status(security: &Security) -> TlsStatus {
    let store = match security {
        Security::Plaintext => None,
        Security::Tls(store) => Some(store.current()),
    };
    let certificate = store.as_ref().map(|tls| tls.credentials().certificate());
    TlsStatus {
        encrypted: certificate.is_some(),
        fingerprint: certificate.map(|c| c.fingerprint_hex()),
        expires_s: certificate.and_then(|c| {
            let expires = c.not_after.duration_since(UNIX_EPOCH).ok()?;
            Some(expires.as_secs())
        }),
    }
}

/// Kinds that are not possible.
fn not(unfit: &[Unfit]) -> Vec<KindInfo> {
    let each = unfit.iter().map(|Unfit { kind, why }| KindInfo {
        kind: kind.to_string(),
        why_not: Some(why.clone()),
    });
    each.collect()
}

/// All kinds of a VM.
pub(super) fn kind_infos(survey: &Survey) -> Vec<KindInfo> {
    let possible = survey.possible.iter().map(|kind| KindInfo {
        kind: kind.to_string(),
        why_not: None,
    });
    possible.chain(not(&survey.unfit)).collect()
}

fn vm_report(state: &GangState, vm: &VmState) -> VmReport {
    let plan = &state.spec.vms[vm.vm.0 as usize];
    let kinds = state.kinds.get(&vm.vm);
    VmReport {
        kind: kinds.map(|(kind, _)| kind.to_string()).unwrap_or_default(),
        not: kinds.map(|(_, unfit)| not(unfit)).unwrap_or_default(),
        name: plan.name.clone(),
        from: plan.from.clone(),
        to: plan.to.clone(),
        outcome: match vm.phase {
            Phase::Arrived => VmOutcome::Arrived,
            Phase::Cancelled => VmOutcome::Cancelled,
            Phase::InDoubt => VmOutcome::InDoubt,
            _ => VmOutcome::Failed,
        },
        downtime_ms: vm.downtime_ms.unwrap_or(0.0),
        journal_ms: vm.journal_ms.unwrap_or(0.0),
        stop: (vm.phase == Phase::Arrived).then_some(vm.stop),
        rounds: vm.round,
        pages: vm.pages,
        verified: vm.verified,
        error: vm.error.clone(),
    }
}

/// The core link, for operators.
pub(super) fn core_load(core: &CoreState) -> CoreLoad {
    CoreLoad {
        tenant_mbit: core.tenant_mbit,
        migration_mbit: core.migration_mbit,
        capacity_mbit: (core.capacity_mbit > 0.0).then_some(core.capacity_mbit),
        source: if core.metered {
            LoadSource::Meter
        } else {
            LoadSource::Lanes
        },
    }
}

fn totals(source: &SourceGang) -> LaneCounters {
    let mut sum = LaneCounters::default();
    for lane in source.lane_stats().iter().flat_map(|(_, lanes)| lanes) {
        sum.sent_bytes += lane.wire_bytes;
        sum.zero_copied += lane.sends_zero_copied;
        sum.copied += lane.sends_copied + lane.sends_plain;
        sum.reopened += lane.connections.saturating_sub(1);
    }
    sum
}

fn add(sum: &mut LaneCounters, more: LaneCounters) {
    sum.sent_bytes += more.sent_bytes;
    sum.zero_copied += more.zero_copied;
    sum.copied += more.copied;
    sum.reopened += more.reopened;
}

impl Agent {
    /// What lanes did since the agent started.
    pub(super) fn lane_totals(&self) -> LaneCounters {
        let mut sum = *self.lanes_before.borrow();
        for gang in self.open_gangs() {
            if let Some(source) = &gang.source {
                add(&mut sum, totals(source));
            }
        }
        sum
    }

    /// Keeps the counts of lanes that are about to be closed.
    pub(super) fn keep_lane_totals(&self, source: &SourceGang) {
        add(&mut self.lanes_before.borrow_mut(), totals(source));
    }

    pub(super) fn peer_states(&self) -> Vec<PeerStatus> {
        let state = |name: &str| match self.peers.get(name).map(|p| p.state()) {
            Some(PeerState::Connected { .. }) => "connected".to_owned(),
            Some(PeerState::Lost { why }) => why,
            Some(PeerState::Idle) | None => "idle".to_owned(),
        };
        self.roster
            .peers()
            .map(|peer| PeerStatus {
                name: peer.name.clone(),
                rack: peer.rack.clone(),
                address: peer.address.to_string(),
                state: state(&peer.name),
            })
            .collect()
    }

    pub(super) fn metrics(&self) -> String {
        let core = self.core_state();
        let lanes = self.lane_totals();
        let gangs = self.open_gangs();
        let sources: usize = gangs
            .iter()
            .filter_map(|g| Some(g.source.as_ref()?.memory_bytes()))
            .sum();
        let targets: usize = gangs
            .iter()
            .filter_map(|g| Some(g.target.as_ref()?.store.memory_bytes()))
            .sum();
        let mut text = MetricsText::new();
        text.gauge(
            "drover_vms",
            "VMs in this agent's charge",
            [(vec![], self.vms.len())],
        )
        .gauge("drover_gangs", "Gangs open here", [(vec![], gangs.len())])
        .gauge(
            "drover_tls_certificate_expires_seconds",
            "When this agent's certificate expires, s since 1970; none without TLS",
            tls_status(self.roster.security())
                .expires_s
                .map(|at| (vec![], at)),
        )
        .counter(
            "drover_core_bytes_total",
            "Migration bytes across the core, both directions, on the wire",
            [(vec![], core.core_bytes)],
        )
        .gauge(
            "drover_core_mbit",
            "Load of this rack's core link, Mbit/s",
            [
                (vec![("class", "tenant")], core.tenant_mbit),
                (vec![("class", "migration")], core.migration_mbit),
                (vec![("class", "capacity")], core.capacity_mbit),
            ],
        )
        .counter(
            "drover_lane_sent_bytes_total",
            "Bytes sent by lanes",
            [(vec![], lanes.sent_bytes)],
        )
        .counter(
            "drover_lane_sends_total",
            "Sends by lanes",
            [
                (vec![("copy", "zero")], lanes.zero_copied),
                (vec![("copy", "kernel")], lanes.copied),
            ],
        )
        .counter(
            "drover_lane_reopened_total",
            "Lanes that broke and were opened again",
            [(vec![], lanes.reopened)],
        )
        .gauge(
            "drover_memory_bytes",
            "Memory the agent holds for migrations",
            [
                (vec![("for", "page buffers")], self.pool.bytes()),
                (vec![("for", "source tables")], sources),
                (vec![("for", "claim shards")], self.data.shard_bytes()),
                (vec![("for", "target tables")], targets),
            ],
        );
        text.finish()
    }
}
