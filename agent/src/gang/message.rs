//! What agents say to each other about a gang, over Control connections.
//!
//! The coordinator speaks to every source and target agent; a source agent
//! speaks to the target agent of each of its VMs. Every request names the gang
//! it belongs to, and an agent answers only for gangs it was admitted to.

pub use super::progress::{LostAgent, StopTimes};

use super::handover::machine::{Whose, Word};
use crate::types::{GangId, HolderId, VmIndex};
use crate::vmm::kinds::{Unfit, VmFacts};
use serde::{Deserialize, Serialize};

/// How page contents are compressed on the core link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// Raw pages only.
    Never,
    /// zstd while the core link, not the CPU, is the limit.
    #[default]
    Auto,
    /// zstd always.
    Always,
}

/// How guest RAM is verified at the switch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verify {
    /// Digest over the fingerprint arrays of both sides.
    #[default]
    Digest,
    /// Both sides fingerprint all of guest RAM anew before they compare.
    Full,
}

/// One agent of a gang.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GangHost {
    /// The agent's name.
    pub name: String,
    /// The rack it stands in.
    pub rack: String,
}

/// One VM of a gang. Its place in [`GangSpec::vms`] is its [`VmIndex`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GangVm {
    /// The VM's name.
    pub name: String,
    /// Source agent.
    pub from: String,
    /// Target agent.
    pub to: String,
}

/// Everything the agents of a gang must agree on. Fixed at its opening.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GangSpec {
    /// Drawn at random by the coordinator.
    pub id: GangId,
    /// The operator's name for it.
    pub name: String,
    /// The agent that coordinates.
    pub coordinator: String,
    /// Every agent that is a source or a target, in a fixed order: a
    /// [`HolderId`] is an index into this list.
    pub hosts: Vec<GangHost>,
    /// The VMs.
    pub vms: Vec<GangVm>,
    /// Profile of the policy that paces this gang.
    pub profile: String,
    /// Compression of page contents.
    pub compress: Compress,
    /// Verification at the switch.
    pub verify: Verify,
    /// Limit of the downtime, in milliseconds.
    pub downtime_limit_ms: u64,
    /// Switch every VM at the same time, once all are ready.
    pub align: bool,
}

impl GangSpec {
    /// The holder id of an agent, if it is in the gang.
    pub fn holder(&self, host: &str) -> Option<HolderId> {
        self.hosts
            .iter()
            .position(|h| h.name == host)
            .map(|i| HolderId(i as u16))
    }

    /// The agent behind a holder id.
    pub fn host(&self, holder: HolderId) -> Option<&GangHost> {
        self.hosts.get(holder.0 as usize)
    }

    /// The VM at an index.
    pub fn vm(&self, vm: VmIndex) -> Option<&GangVm> {
        self.vms.get(vm.0 as usize)
    }

    /// Agents that stand in the racks VMs arrive in, sorted, each rack once.
    pub fn target_racks(&self) -> Vec<&str> {
        let mut racks: Vec<&str> = self
            .vms
            .iter()
            .filter_map(|vm| self.hosts.iter().find(|h| h.name == vm.to))
            .map(|host| host.rack.as_str())
            .collect();
        racks.sort_unstable();
        racks.dedup();
        racks
    }

    /// The name under which contents bound for `rack` are claimed: claims for
    /// different target racks must not meet, since a reference is settled
    /// inside one rack.
    pub fn claim_space(&self, rack: &str) -> Option<GangId> {
        let at = self.target_racks().iter().position(|r| *r == rack)?;
        Some(GangId(self.id.0.wrapping_add(at as u64)))
    }

    /// The rack a host of the gang stands in.
    pub fn rack_of(&self, host: &str) -> Option<&str> {
        self.hosts
            .iter()
            .find(|h| h.name == host)
            .map(|h| h.rack.as_str())
    }

    /// The VMs that leave `host`, with their indices.
    pub fn leaving<'a>(&'a self, host: &'a str) -> impl Iterator<Item = (VmIndex, &'a GangVm)> {
        self.vms
            .iter()
            .enumerate()
            .filter(move |(_, v)| v.from == host)
            .map(index)
    }

    /// The VMs that arrive at `host`, with their indices.
    pub fn arriving<'a>(&'a self, host: &'a str) -> impl Iterator<Item = (VmIndex, &'a GangVm)> {
        self.vms
            .iter()
            .enumerate()
            .filter(move |(_, v)| v.to == host)
            .map(index)
    }

    /// Agents that share the claim table of pages bound for the racks of this
    /// gang: the sources that stand in the same rack as `host`, sorted.
    pub fn claim_members(&self, host: &str) -> Vec<&str> {
        let mine = self.rack_of(host);
        let mut members: Vec<&str> = self
            .vms
            .iter()
            .map(|v| v.from.as_str())
            .filter(|f| self.rack_of(f) == mine)
            .collect();
        members.sort_unstable();
        members.dedup();
        members
    }
}

fn index((i, vm): (usize, &GangVm)) -> (VmIndex, &GangVm) {
    (VmIndex(i as u16), vm)
}

/// What a source tells about a VM before the gang starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFacts {
    /// What the VMM and its RAM are like.
    pub vmm: VmFacts,
    /// The better kinds of moving that its source found not possible.
    pub unfit: Vec<Unfit>,
    /// Bytes of guest RAM that hold data (the rest was never touched).
    pub data_bytes: u64,
    /// The VM's definition, as TOML.
    pub definition: String,
}

/// Where a VM's migration stands, as its source sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Checks, RAM file and incoming VMM.
    Preparing,
    /// Pages move, the guest runs.
    Precopy,
    /// The rest fits; waits for its turn to switch.
    Ready,
    /// The guest stands still.
    StopCopy,
    /// It runs on the target.
    Arrived,
    /// It runs on the source; see the error.
    Failed,
    /// It runs on the source, by the operator's wish.
    Cancelled,
    /// It was handed over, and the target does not confirm that it runs; see
    /// the error. The source goes on asking.
    InDoubt,
}

impl Phase {
    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Phase::Arrived | Phase::Failed | Phase::Cancelled | Phase::InDoubt
        )
    }
}

/// Counts of one VM's pages. Every page entry falls in exactly one of the
/// fields besides `total` and `resent`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// Pages of guest RAM.
    pub total: u64,
    /// Zero pages: holes are counted here without having been read.
    pub zero: u64,
    /// Contents sent raw or compressed.
    pub sent: u64,
    /// Of those sent, contents that went compressed.
    pub compressed: u64,
    /// References sent.
    pub reference: u64,
    /// Pages that were written but held the same content.
    pub unchanged: u64,
    /// Pages sent again because a lane broke or the target asked.
    pub resent: u64,
}

/// Progress of one VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmState {
    /// Which VM of the gang.
    pub vm: VmIndex,
    /// Where it stands.
    pub phase: Phase,
    /// The pre-copy round.
    pub round: u32,
    /// Pages a second the guest dirties.
    pub dirty_pages_per_s: f64,
    /// Pages left in this round.
    pub left_pages: u64,
    /// Bytes handed to the lanes.
    pub sent_bytes: u64,
    /// Page counts.
    pub pages: PageCounts,
    /// Milliseconds the guest stood still, once known.
    pub downtime_ms: Option<f64>,
    /// Milliseconds of these in which both sides made the commitment durable.
    pub journal_ms: Option<f64>,
    /// Where the downtime went.
    pub stop: StopTimes,
    /// Whether the digests (or all of RAM) were compared and equal.
    pub verified: bool,
    /// Why it failed.
    pub error: Option<String>,
}

impl VmState {
    /// A VM that nothing has been done for yet.
    pub fn new(vm: VmIndex) -> Self {
        VmState {
            vm,
            phase: Phase::Preparing,
            round: 0,
            dirty_pages_per_s: 0.0,
            left_pages: 0,
            sent_bytes: 0,
            pages: PageCounts::default(),
            downtime_ms: None,
            journal_ms: None,
            stop: StopTimes::default(),
            verified: false,
            error: None,
        }
    }
}

/// Load of the core link as one agent measures it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct CoreState {
    /// Tenants' bits per second, of the whole rack.
    pub tenant_mbit: f64,
    /// Migration's bits per second, of the whole rack.
    pub migration_mbit: f64,
    /// Capacity by the policy.
    pub capacity_mbit: f64,
    /// Migration bytes that crossed this agent's uplinks to and from the core
    /// since the agent started.
    pub core_bytes: u64,
    /// Whether an eBPF meter measured it.
    pub metered: bool,
}

/// A request from an agent to another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum GangRequest {
    /// Coordinator → source: may this VM be moved?
    CheckSource {
        /// VM's name.
        vm: String,
    },
    /// Coordinator → target: is there room for this VM?
    CheckTarget {
        /// VM's name.
        vm: String,
        /// What its source said.
        facts: SourceFacts,
    },
    /// Coordinator → every agent: be part of this gang.
    Open(GangSpec),
    /// Coordinator → target: make the RAM file and start the incoming VMM.
    PrepareTarget {
        /// The gang.
        gang: GangId,
        /// The VM.
        vm: VmIndex,
        /// What its source said.
        facts: SourceFacts,
    },
    /// Coordinator → source: protect guest RAM and start pre-copy.
    StartSource {
        /// The gang.
        gang: GangId,
        /// The VM.
        vm: VmIndex,
    },
    /// Coordinator → source: how far are you?
    Progress {
        /// The gang.
        gang: GangId,
    },
    /// Coordinator → source: it is this VM's turn to switch over.
    Switch {
        /// The gang.
        gang: GangId,
        /// The VM.
        vm: VmIndex,
    },
    /// Coordinator → source: stop moving this VM, let it run where it is.
    Cancel {
        /// The gang.
        gang: GangId,
        /// The VM.
        vm: VmIndex,
    },
    /// Coordinator → every agent: the gang has ended; forget it.
    Close {
        /// The gang.
        gang: GangId,
    },
    /// Source → target: every page was sent; answer when every page is placed.
    Seal {
        /// The gang.
        gang: GangId,
        /// The VM.
        vm: VmIndex,
        /// Digest of the source's fingerprint array.
        digest: Digest,
        /// Fingerprint all of RAM anew before answering.
        full: bool,
        /// How long to wait for outstanding references, in milliseconds.
        wait_ms: u64,
    },
    /// Source → target: device state comes on a connection of its own; get the
    /// incoming VMM ready to take it.
    ExpectDevice {
        /// The gang.
        gang: GangId,
        /// The VM.
        vm: VmIndex,
    },
    /// Source → target: the source's VMM has sent all; answer when the
    /// target's has taken all.
    AwaitDevice {
        /// The gang.
        gang: GangId,
        /// The VM.
        vm: VmIndex,
        /// How long to wait, in milliseconds.
        wait_ms: u64,
    },
    /// Source → target: the journal says *committed*; the VM is yours. The
    /// point of no return lies before this message. It and the three that
    /// follow name the VM: they mean something also to an agent that has been
    /// restarted and knows the gang from its journal alone.
    Resume {
        /// The gang.
        gang: GangId,
        /// The VM.
        vm: String,
        /// Whether the guest is to run (an operator may have paused it before).
        run: bool,
    },
    /// Source or coordinator → target: end the half-made VM. Once all of its
    /// device state has arrived, only its source is listened to.
    Abort {
        /// The gang.
        gang: GangId,
        /// The VM.
        vm: String,
        /// Why, for the log.
        why: String,
    },
    /// Target → source: I have all of this VM; whose is it?
    WhoseIs {
        /// The gang.
        gang: GangId,
        /// The VM.
        vm: String,
    },
    /// Source → target: I know that the VM is yours, and have forgotten it.
    Settled {
        /// The gang.
        gang: GangId,
        /// The VM.
        vm: String,
    },
    /// Any agent of the gang → every agent: I coordinate it from now on. Only
    /// a coordinator that has fallen silent can be followed.
    TakeOver {
        /// The gang.
        gang: GangId,
    },
    /// Anyone: the core link as this agent sees it.
    Core,
}

/// Digest over a fingerprint array, keyed with the dedup domain's key.
pub type Digest = [u8; 16];

/// Answer to a [`GangRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum GangResponse {
    /// Done.
    Done,
    /// Answer to [`GangRequest::CheckSource`].
    Source(SourceFacts),
    /// Answer to [`GangRequest::Progress`].
    Progress(Vec<VmState>),
    /// Answer to [`GangRequest::ExpectDevice`].
    DeviceExpected {
        /// Path of the VM's RAM file on the target, for the debug hold.
        ram: String,
    },
    /// Answer to [`GangRequest::Seal`].
    Sealed {
        /// Whether the digests are equal.
        equal: bool,
        /// References that had not been resolved when the wait ended.
        pending: u64,
    },
    /// Answer to [`GangRequest::Resume`].
    Landed {
        /// What has become of the VM.
        word: Word,
        /// How long it took to make that durable, in microseconds.
        journal_us: u64,
    },
    /// Answer to [`GangRequest::WhoseIs`].
    Whose(Whose),
    /// Answer to [`GangRequest::Core`].
    Core(CoreState),
    /// It could not be done; what to tell the operator.
    Failed(String),
}
