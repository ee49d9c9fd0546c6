//! What crosses the API, shared by server and client. Field names are the
//! JSON names and part of the interface: add, don't rename.
//!
//! Requests refuse unknown fields, so that a misspelt option is an error and
//! not ignored; answers do not, so that an older client can read a newer
//! agent's.

pub use super::offers::{OfferInfo, OfferRequest, OfferState, Withdraw};
pub use crate::gang::message::{Compress, LostAgent, PageCounts, StopTimes, Verify};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: String,
    /// What to do about it.
    pub remedy: String,
}

/// `POST /v1/vms/run`: start a VM of this host's definitions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunVm {
    /// Name of the definition, `NAME.toml` in `vm_definitions`.
    pub name: String,
}

/// `POST /v1/vms/adopt`: take charge of a VM somebody else started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdoptVm {
    /// Name of the definition it was started from.
    pub name: String,
    /// Its QMP socket, or the one that its VMM serves with `drover-vmm`. No other
    /// client may hold it.
    pub qmp: PathBuf,
}

/// A VM this agent has in charge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// How it is moved: `qemu-direct`, `qemu-stream`, `kvm-log`; `qemu-managed` or
    /// `cloud-hypervisor` if its manager drives it; `none` if it cannot be moved.
    pub kind: String,
    /// All kinds, the possible ones first, the best of them first; empty while
    /// it moves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kinds: Vec<KindInfo>,
    /// QEMU's run state (`running`, `paused`, …) or what the agent does with
    /// it (`incoming`, `migrating`).
    pub status: String,
    /// Guest RAM, bytes.
    pub ram_bytes: u64,
    /// Pages fingerprinted since the agent took charge.
    pub pages_scanned: u64,
    /// Rate at which the guest dirties pages, bytes a second; `None` until
    /// measured.
    pub dirty_bytes_per_s: Option<u64>,
    /// Process id of the VMM.
    pub pid: u32,
    /// The socket by which it is driven: QMP, the link, or of a `qemu-managed` one
    /// that of its migration.
    pub qmp: PathBuf,
    /// Dedup domain.
    pub domain: String,
}

/// Whether a VM can be moved in one way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindInfo {
    /// As in [`VmInfo::kind`].
    pub kind: String,
    /// Why it is not possible, and what would make it so; none if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
}

/// How to run a migration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MigrationOptions {
    /// Pacing profile; the policy's default if `None`.
    pub profile: Option<String>,
    /// Check everything, move nothing.
    pub dry_run: bool,
    /// Longest stop of a guest to aim for, ms; 300 if `None`.
    pub downtime_limit_ms: Option<u64>,
    /// How each VM is verified at the switch.
    pub verify: Verify,
    /// Switch all VMs of the gang at the same time.
    pub align: bool,
    /// When page content is compressed.
    pub compress: Compress,
}

/// `POST /v1/migrations`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// What the operator calls the plan's file; for messages only.
    pub plan_file: String,
    /// The plan, TOML text.
    pub plan: String,
    /// How to run it.
    #[serde(default)]
    pub options: MigrationOptions,
}

/// Answer to `POST /v1/migrations`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationStarted {
    /// The gang's name in the plan.
    pub gang: String,
    /// Id of this run, 16 hexadecimal digits; ask for its progress by it.
    /// `None` for a dry run.
    pub id: Option<String>,
    /// What a dry run found; empty otherwise.
    pub checks: Vec<Check>,
}

/// One precondition that a dry run looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The VM it is about; `None` for the gang as a whole.
    pub vm: Option<String>,
    /// What was checked: `memory on b1`.
    pub what: String,
    /// Whether it holds.
    pub ok: bool,
    /// What was found, and if it does not hold, what to change.
    pub detail: String,
}

/// `POST /v1/migrations/{id}/cancel`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cancel {
    /// Only this VM; the whole gang if `None`.
    pub vm: Option<String>,
}

/// How far a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmPhase {
    /// Nothing was done yet.
    Waiting,
    /// The target's VMM is being started, the source's dirty log set up.
    Preparing,
    /// Rounds, while the guest runs.
    Precopy,
    /// Little is left; waits for the rest of an aligned gang.
    Ready,
    /// The guest stands still; the last pages are sent.
    StopCopy,
    /// Digests are compared, device state moves.
    Handover,
    /// It runs on the target.
    Arrived,
    /// It runs on the source again (or still); see `error`.
    Failed,
    /// Cancelled; it runs on the source.
    Cancelled,
    /// Handed over, and the target does not confirm that it runs; see `error`
    /// and `drover status` of the source.
    InDoubt,
}

impl VmPhase {
    /// Whether nothing more will happen to the VM in this migration.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Self::Arrived | Self::Failed | Self::Cancelled | Self::InDoubt
        )
    }

    /// The JSON name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Preparing => "preparing",
            Self::Precopy => "precopy",
            Self::Ready => "ready",
            Self::StopCopy => "stop-copy",
            Self::Handover => "handover",
            Self::Arrived => "arrived",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::InDoubt => "in-doubt",
        }
    }
}

/// How far a gang is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GangPhase {
    /// The plan is checked on all hosts.
    Checking,
    /// VMs are moving.
    Moving,
    /// Cancelled; VMs that have not switched go back.
    Cancelling,
    /// Over: there is a report.
    Done,
}

/// How far a migration is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GangProgress {
    /// The gang's name in the plan.
    pub gang: String,
    /// Id of this run, 16 hexadecimal digits.
    pub id: String,
    /// How far the gang is.
    pub phase: GangPhase,
    /// Time since the start, ms.
    pub elapsed_ms: u64,
    /// Each VM, in the plan's order.
    pub vms: Vec<VmProgress>,
    /// The core link as this gang sees it.
    pub core: CoreLoad,
    /// Agents of the gang that are lost at this moment.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub lost: Vec<LostAgent>,
}

/// How far one VM is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmProgress {
    /// Its name.
    pub name: String,
    /// Source host.
    pub from: String,
    /// Target host.
    pub to: String,
    /// How far it is.
    pub phase: VmPhase,
    /// Round being sent, from 1; 0 before the first.
    pub round: u32,
    /// Pages dirtied a second in the last round.
    pub dirty_pages_per_s: u64,
    /// Guest RAM not yet at the target, bytes.
    pub left_bytes: u64,
    /// Guest RAM to move in this round and before, bytes: `left_bytes` of
    /// `total_bytes` are missing.
    pub total_bytes: u64,
    /// Bytes sent to the target host for it so far.
    pub sent_bytes: u64,
    /// Expected time to arrival, ms; `None` if it cannot be told.
    pub eta_ms: Option<u64>,
    /// How long the guest stood still, ms; `None` before the switch.
    pub downtime_ms: Option<f64>,
    /// Why it failed.
    pub error: Option<String>,
}

/// Load of the core link, Mbit/s on the wire.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CoreLoad {
    /// Tenants' traffic.
    pub tenant_mbit: f64,
    /// Migration traffic of all gangs.
    pub migration_mbit: f64,
    /// What the link can carry; `None` if the policy does not say.
    pub capacity_mbit: Option<f64>,
    /// Where the figures come from.
    pub source: LoadSource,
}

/// Who counted the load of the core link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadSource {
    /// The eBPF programs on the uplinks of the rack.
    Meter,
    /// No meter: lanes count their own bytes, tenants' are not known.
    #[default]
    Lanes,
}

/// How a gang's migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Every VM arrived.
    Arrived,
    /// Some did, the others run on at their sources.
    Partial,
    /// None did.
    Failed,
    /// Cancelled before every VM had arrived.
    Cancelled,
}

/// How one VM's migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmOutcome {
    /// It runs on the target.
    Arrived,
    /// It runs on the source.
    Failed,
    /// It runs on the source, as wished.
    Cancelled,
    /// It was handed over, and the target has not confirmed that it runs: the
    /// source's `drover status` shows what became of it, or what to do.
    InDoubt,
}

/// Report of a finished migration: what `drover migrate --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GangReport {
    /// The gang's name in the plan.
    pub gang: String,
    /// Id of this run.
    pub id: String,
    /// How it ended.
    pub outcome: Outcome,
    /// From the request to the last VM's end, ms.
    pub total_ms: u64,
    /// Bytes this gang sent over the core link, both directions.
    pub core_bytes: u64,
    /// Each VM, in the plan's order.
    pub vms: Vec<VmReport>,
    /// Why the gang failed as a whole.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// What its operator should know, such as that nothing was encrypted.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub warnings: Vec<String>,
    /// Agents that were lost on the way, those that came back among them.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub lost: Vec<LostAgent>,
}

/// Report of one VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmReport {
    /// Its name.
    pub name: String,
    /// Source host.
    pub from: String,
    /// Target host.
    pub to: String,
    /// How it was moved, as in [`VmInfo::kind`]; empty if it never came to that.
    #[serde(default)]
    pub kind: String,
    /// The better kinds that were not possible, and why.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub not: Vec<KindInfo>,
    /// How it ended.
    pub outcome: VmOutcome,
    /// How long the guest stood still, ms; 0 if it was never stopped.
    pub downtime_ms: f64,
    /// How much of that went by until both sides' journals had made the
    /// handover durable, ms.
    #[serde(default)]
    pub journal_ms: f64,
    /// Where the downtime went; `None` if it did not arrive.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stop: Option<StopTimes>,
    /// Rounds, the stop-and-copy round included.
    pub rounds: u32,
    /// What became of its pages.
    pub pages: PageCounts,
    /// Whether both sides' RAM was found equal at the switch.
    pub verified: bool,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// `GET /v1/migrations/{id}`; `{id}` is a run's id or a gang's name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationInfo {
    /// How far it is.
    pub progress: GangProgress,
    /// Once it is over.
    pub report: Option<GangReport>,
}

/// `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusInfo {
    /// The agent's name.
    pub agent: String,
    /// Its rack.
    pub rack: String,
    /// Its version.
    pub version: String,
    /// Time since it started, s.
    pub uptime_s: u64,
    /// VMs in its charge.
    pub vms: u64,
    /// The other agents.
    pub peers: Vec<PeerStatus>,
    /// Uplinks with a working meter.
    pub metered_uplinks: Vec<String>,
    /// How connections to other agents are protected.
    pub tls: TlsStatus,
    /// What the operator should do something about.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub warnings: Vec<String>,
    /// The core link.
    pub core: CoreLoad,
    /// Sends of all lanes so far.
    pub lanes: LaneCounters,
    /// Migrations this agent coordinates or takes part in, newest first.
    pub migrations: Vec<GangProgress>,
    /// Handovers under way here, those in doubt among them; then what a
    /// restarted agent found and settled.
    #[serde(default)]
    pub handovers: Vec<HandoverInfo>,
}

/// One side of a VM's handover.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverInfo {
    /// The VM.
    pub vm: String,
    /// Id of the gang.
    pub gang: String,
    /// `source` or `target`: which end this agent is.
    pub side: String,
    /// The agent at the other end.
    pub peer: String,
    /// Where it stands, or how it ended.
    pub state: String,
    /// Why; empty while there is nothing to tell.
    pub why: String,
    /// Whether it is over.
    pub settled: bool,
    /// If the other side's word is missing: what is not known.
    pub in_doubt: Option<String>,
    /// Then: what to do, for each case.
    pub remedies: Vec<String>,
    /// How long this agent has had it in hand, ms.
    pub age_ms: u64,
}

/// `POST /v1/handovers/resolve`: where a VM in doubt is to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resolve {
    /// The VM.
    pub vm: String,
    /// Source or target host of its move.
    pub runs_on: String,
}

/// How connections to other agents are protected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsStatus {
    /// Whether they are encrypted.
    pub encrypted: bool,
    /// SHA-256 of this agent's certificate, in hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fingerprint: Option<String>,
    /// When it expires, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expires_s: Option<u64>,
}

/// Another agent, as seen from this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub name: String,
    /// Its rack.
    pub rack: String,
    /// Where it listens.
    pub address: String,
    /// `connected`, `idle` (nothing wanted from it yet) or why it cannot be
    /// reached.
    pub state: String,
}

/// What lanes did since the agent started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneCounters {
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Sends the kernel did without copying.
    pub zero_copied: u64,
    /// Sends the kernel copied.
    pub copied: u64,
    /// Lanes that broke and were opened again.
    pub reopened: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_the_documented_shape() {
        let report = GangReport {
            gang: "web".into(),
            id: "00".into(),
            outcome: Outcome::Partial,
            total_ms: 5,
            core_bytes: 6,
            vms: vec![VmReport {
                name: "v".into(),
                from: "a".into(),
                to: "b".into(),
                kind: "qemu-direct".into(),
                not: Vec::new(),
                outcome: VmOutcome::Arrived,
                downtime_ms: 1.5,
                journal_ms: 0.5,
                stop: None,
                rounds: 2,
                pages: PageCounts::default(),
                verified: true,
                error: None,
            }],
            error: None,
            warnings: Vec::new(),
            lost: Vec::new(),
        };
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "gang": "web", "id": "00", "outcome": "partial", "total_ms": 5, "core_bytes": 6,
                "vms": [{
                    "name": "v", "from": "a", "to": "b", "kind": "qemu-direct",
                    "outcome": "arrived",
                    "downtime_ms": 1.5, "journal_ms": 0.5, "rounds": 2, "verified": true,
                    "pages": {"total": 0, "zero": 0, "sent": 0, "compressed": 0,
                              "reference": 0, "unchanged": 0, "resent": 0},
                }],
            })
        );
    }

    #[test]
    fn misspelt_options_are_refused() {
        let error = serde_json::from_str::<MigrationOptions>(r#"{"alin": true}"#).unwrap_err();
        assert!(error.to_string().contains("alin"), "{error}");
    }

    #[test]
    fn phase_names_are_their_json() {
        for phase in [VmPhase::Waiting, VmPhase::StopCopy, VmPhase::Cancelled] {
            let json = serde_json::to_value(phase).unwrap();
            assert_eq!(json, phase.as_str());
        }
    }
}
