//! VMs that leave this host.

use super::gangs::LocalGang;
use super::pacing::LanePacing;
use super::registry::Vm;
use super::{Agent, AgentCaller};
use crate::dedup::claim::ShardMap;
use crate::dedup::fingerprint::FingerprintKey;
use crate::dedup::source::SourceDedup;
use crate::gang::claims::Claims;
use crate::gang::flight::{Flight, PrecopyRules};
use crate::gang::handover::care::Care;
use crate::gang::handover::leaving::Leaving;
use crate::gang::handover::manager::Managers;
use crate::gang::handover::{Decides, Handover, Live, chain};
use crate::gang::journal::{Record, Side, Step};
use crate::gang::message::{Compress, GangSpec, Phase, SourceFacts};
use crate::gang::moments::Moment;
use crate::gang::rounds::RoundLimits;
use crate::gang::scan::{Carrier, Scan, StreamScan};
use crate::gang::source::SourceGang;
use crate::gang::stage::StageShared;
use crate::lane::{self, Connector, EncodeConfig, LaneSetConfig, LaneStream};
use crate::net::{Kind, connect};
use crate::pace::policy::Then;
use crate::types::{Class, GangId, VmIndex};
use crate::vmm::PageRead;
use crate::vmm::kinds::{Pages, SourceVm};
use crate::vmm::managed;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Time to open a lane's connection.
const LANE_CONNECT: Duration = Duration::from_secs(2);

/// One VM on its way out.
pub(super) struct Departure {
    pub(super) flight: Arc<Flight>,
    turn: watch::Sender<bool>,
}

impl Departure {
    /// It is this VM's turn to switch over.
    pub(super) fn turn(&self) {
        self.turn.send_replace(true);
    }

    /// Stops the move, unless the point of no return has been passed. A VM
    /// that waits for its turn is woken.
    pub(super) fn cancel(&self) {
        self.flight.cancel();
    }

    /// Whether the guest stands still for the handover.
    pub(super) fn is_switching(&self) -> bool {
        self.flight.snapshot().phase == Phase::StopCopy
    }
}

/// A VM that a gang takes along.
enum Leaver {
    /// In this agent's charge.
    Registered(Box<Vm>),
    /// Its manager has brought it to the socket that it was offered.
    Offered(Arc<managed::SourceVm>),
}

impl Agent {
    /// Whether a VM of this host may be moved, and what its target must know.
    pub(super) async fn check_source(&self, name: &str) -> Result<SourceFacts, String> {
        if let Some(facts) = self.check_offered(name)? {
            return Ok(facts);
        }
        let vm = self.vms.get(name).ok_or_else(|| {
            format!("VM {name} is not in this agent's charge: `drover vm run` or `adopt` it first")
        })?;
        if let Some(gang) = vm.leaving {
            return Err(format!("VM {name} is being moved by gang {gang} already"));
        }
        self.journal.check().map_err(|e| e.to_string())?;
        self.settle_landing(name).await?;
        let (source, unfit) = SourceVm::choose(vm.vmm.clone(), vm.definition.kind)
            .await
            .map_err(|e| chain(&e))?;
        let data_bytes =
            data_bytes(&*source.ram()).map_err(|e| format!("RAM of VM {name}: {e}"))?;
        Ok(SourceFacts {
            vmm: source.facts(),
            unfit,
            data_bytes,
            definition: vm.definition.text.clone(),
        })
    }

    /// What the VMs of a gang that leave this host share.
    pub(super) fn source_gang(&self, spec: &GangSpec) -> Result<SourceGang, String> {
        let policy = self.policy();
        let members: Vec<String> = spec
            .claim_members(self.name())
            .into_iter()
            .map(str::to_owned)
            .collect();
        let my_place = members.iter().position(|m| m == self.name()).unwrap_or(0);
        let start_at = my_place as f64 / members.len().max(1) as f64;
        let ids: Vec<u64> = members.iter().map(|m| host_id(m)).collect();
        let mut shared = BTreeMap::new();
        for rack in spec.target_racks() {
            let space = spec
                .claim_space(rack)
                .ok_or("a target rack without a claim space")?;
            let opened = self.data.open_shard(space, spec, rack);
            opened.map_err(|e| e.to_string())?;
            let limit = policy.limits.claim_deadline;
            let dedup = SourceDedup::new(ShardMap::new(&ids), spec.hosts.len() as u16);
            let stage = StageShared {
                gang: spec.id,
                pool: self.pool.clone(),
                dedup: Arc::new(dedup),
                claims: Claims::new(self.rack.claims(), space, members.clone(), limit),
                next_batch: AtomicU64::new(1),
                claim_limit: limit,
                start_at,
                slots: self.scan_slots.clone(),
            };
            shared.insert(rack.to_owned(), Arc::new(stage));
        }
        let encode = EncodeConfig {
            compress: match spec.compress {
                Compress::Never => lane::Compress::Never,
                Compress::Auto => lane::Compress::Auto,
                Compress::Always => lane::Compress::Always,
            },
            level: policy.compress.level.clamp(1, 19),
            ..EncodeConfig::default()
        };
        let lanes = policy.limits.lanes_per_pair as usize;
        let config = move |target: &str| LaneSetConfig {
            lanes,
            encode,
            ..LaneSetConfig::new(target)
        };
        let (roster, gang) = (self.roster.clone(), spec.id);
        let connector = move |target: &str| -> Connector {
            let (roster, target) = (roster.clone(), target.to_owned());
            Arc::new(move || open_lane(&roster, &target, gang))
        };
        Ok(SourceGang::new(
            spec.clone(),
            shared,
            Arc::new(LanePacing(self.pacer.clone())),
            Box::new(config),
            Box::new(connector),
        ))
    }

    /// Protects the VM's RAM and starts its pre-copy. On failure the VM runs
    /// as before.
    pub(super) async fn start_source(
        self: &Rc<Self>,
        gang: &Rc<LocalGang>,
        index: VmIndex,
    ) -> Result<(), String> {
        let plan = gang.spec.vm(index).filter(|vm| vm.from == self.name());
        let plan = plan.ok_or("that VM does not leave this host")?.clone();
        let side = gang
            .source
            .clone()
            .ok_or("no VM of the gang leaves this host")?;
        let vm = match self.offers.take(&plan.name, gang.spec.id)? {
            Some(source) => Leaver::Offered(source),
            None => Leaver::Registered(Box::new(self.registered(&plan.name)?)),
        };
        if self.landings.borrow().iter().any(|a| a.name == plan.name) {
            return Err(format!("VM {} has not landed for good yet", plan.name));
        }
        self.vms
            .update(&plan.name, |vm| vm.leaving = Some(gang.spec.id));
        let care = Care::new(gang.spec.id, &plan.name, Side::Source, &plan.to, "");
        let care = Rc::new(care);
        care.enter("moving");
        self.cares.borrow_mut().push(care.clone());
        let started = self.launch(gang, &side, index, vm, care.clone()).await;
        if started.is_err() {
            self.vms.update(&plan.name, |vm| vm.leaving = None);
            self.offers.remove(&plan.name);
            side.ended(index, false);
            self.settled(&care);
            if let Err(error) = self.journal.forget(&plan.name, gang.spec.id) {
                tracing::warn!(%error, "journal entry stays");
            }
        }
        started
    }

    fn registered(&self, name: &str) -> Result<Vm, String> {
        let vm = self.vms.get(name);
        let vm = vm.ok_or_else(|| format!("VM {name} is gone"))?;
        match vm.leaving {
            Some(_) => Err(format!("VM {name} is being moved already")),
            None => Ok(vm),
        }
    }

    async fn launch(
        self: &Rc<Self>,
        gang: &Rc<LocalGang>,
        side: &Arc<SourceGang>,
        index: VmIndex,
        vm: Leaver,
        care: Rc<Care>,
    ) -> Result<(), String> {
        let (name, target) = (care.vm.clone(), care.peer.clone());
        self.pacer.announce(Class::Precopy);
        let (source, domain) = match &vm {
            Leaver::Registered(vm) => {
                let source = SourceVm::open(vm.vmm.clone(), vm.definition.kind).await;
                (source.map_err(|e| chain(&e))?, &vm.definition.domain)
            }
            Leaver::Offered(vm) => (SourceVm::Managed(vm.clone()), &vm.facts().domain),
        };
        let flight = Flight::new(index, &name, &target, source.ram().pages());
        let key = Arc::new(FingerprintKey::derive(&self.secret, domain));
        let stager = side
            .depart(flight.clone(), key.clone())
            .map_err(|e| chain(&e))?;
        let (commands, orders) = std::sync::mpsc::channel();
        let (tell, steps) = mpsc::unbounded_channel();
        let live = {
            let (agent, side, of) = (self.clone(), side.clone(), flight.clone());
            let settled = move |arrived| agent.departed(&side, &of, arrived);
            Live::new(flight.clone(), commands.clone(), Box::new(settled))
        };
        let mut decides = self.decides(gang.spec.id, vm, &care, &live);
        // The guest may be stopped for a moment: whoever finds it so is to let
        // it run.
        let runs = source.is_running().await.map_err(|e| chain(&e))?;
        decides.moving(runs).await?;
        self.moments.reach(Moment::JournalMoving, &name).await;
        let pages = source.start().await.map_err(|e| chain(&e))?;
        decides.moving(false).await?;
        tracing::info!(vm = %name, %target, kind = %source.facts().kind(), "pre-copy begins");
        let rules = self.precopy_rules(gang);
        let carrier = Carrier::new(flight.clone(), rules, stager, orders, tell);
        let scan = move || match pages {
            Pages::Direct(pages) => Scan::new(carrier, pages).run(),
            Pages::Stream(pages) => StreamScan::new(carrier, pages).run(),
            Pages::KvmLog(pages) => Scan::new(carrier, pages).run(),
        };
        std::thread::Builder::new()
            .name(format!("scan-{name}"))
            .spawn(scan)
            .map_err(|e| format!("VM {name}: no scan thread: {e}"))?;
        let (turn, wait_for_turn) = watch::channel(false);
        let departure = Departure {
            flight: flight.clone(),
            turn,
        };
        gang.departures.borrow_mut().insert(index, departure);
        let handover = Handover {
            decides,
            live,
            roster: self.roster.clone(),
            spec: gang.spec.clone(),
            flight,
            source,
            key,
            socket: self.state_socket(&name),
            commands,
            steps,
            turn: wait_for_turn,
            hold: self.config.hold_at_switch.clone(),
        };
        let agent = self.clone();
        tokio::task::spawn_local(async move {
            handover.run().await;
            agent.settled(&care);
        });
        Ok(())
    }

    /// Who decides where the VM runs when its pages have moved.
    fn decides(
        self: &Rc<Self>,
        gang: GangId,
        vm: Leaver,
        care: &Rc<Care>,
        live: &Rc<Live>,
    ) -> Decides<AgentCaller> {
        let caller = Rc::new(AgentCaller(self.clone()));
        let moments = self.moments.clone();
        match vm {
            Leaver::Offered(source) => Decides::Manager(Managers {
                caller,
                moments,
                gang,
                vm: care.vm.clone(),
                peer: care.peer.clone(),
                source,
                care: care.clone(),
                live: live.clone(),
            }),
            Leaver::Registered(vm) => Decides::Agents(Box::new(Leaving {
                caller,
                journal: self.journal.clone(),
                moments,
                record: Record {
                    gang,
                    vm: care.vm.clone(),
                    side: Side::Source,
                    step: Step::Moving,
                    peer: care.peer.clone(),
                    run: false,
                },
                vmm: Some(vm.vmm),
                files: vm.files,
                fence: self.config.fencing.clone(),
                care: care.clone(),
                watcher: live.clone(),
                why: String::new(),
            })),
        }
    }

    /// Where a VM's VMM sends its device state.
    pub(super) fn state_socket(&self, vm: &str) -> PathBuf {
        self.config.run_dir.join(format!("{vm}.out.sock"))
    }

    /// It is clear where a VM is that was to leave.
    fn departed(&self, side: &SourceGang, flight: &Flight, arrived: bool) {
        let state = flight.snapshot();
        self.offers.remove(&flight.name);
        if arrived {
            tracing::info!(vm = %flight.name, target = %flight.target,
                downtime_ms = state.downtime_ms, journal_ms = state.journal_ms,
                "VM has arrived");
            self.vms.remove(&flight.name);
        } else {
            self.vms.update(&flight.name, |vm| {
                vm.leaving = None;
                vm.pages_scanned +=
                    state.pages.sent + state.pages.reference + state.pages.unchanged;
                let rate = state.dirty_pages_per_s * crate::types::PAGE_SIZE as f64;
                vm.dirty_bytes_per_s = Some(rate as u64);
            });
        }
        side.ended(flight.vm, arrived);
    }

    fn precopy_rules(&self, gang: &LocalGang) -> PrecopyRules {
        let rounds = self.policy().rounds;
        let pacer = self.pacer.clone();
        PrecopyRules {
            limits: RoundLimits {
                downtime_limit: Duration::from_millis(gang.spec.downtime_limit_ms),
                max_rounds: rounds.max_rounds,
                max_precopy: rounds.max_precopy,
                gain: f64::from(rounds.stuck_percent) / 100.0,
                stuck_rounds: rounds.stuck_rounds,
            },
            force_switch: rounds.then == Then::ForceSwitch,
            stop_copy_rate: Box::new(move || pacer.stop_copy_rate()),
        }
    }
}

/// A number for an agent that all agents agree on.
fn host_id(name: &str) -> u64 {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, name.as_bytes());
    digest
        .as_ref()
        .iter()
        .take(8)
        .fold(0, |id, byte| id << 8 | u64::from(*byte))
}

/// Opens a lane's connection, on the lane's own thread.
fn open_lane(
    roster: &Arc<crate::net::Roster>,
    target: &str,
    gang: GangId,
) -> io::Result<LaneStream> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let stream = connect(roster, target, Kind::Lane, gang, 0, LANE_CONNECT)
            .await
            .map_err(|e| io::Error::other(chain(&e)))?;
        let lane = stream.into_lane()?;
        LaneStream::new(lane.tcp, lane.secrets)
    })
}

pub(super) fn data_bytes(ram: &dyn PageRead) -> io::Result<u64> {
    let runs = ram.data_runs()?;
    let pages: u64 = runs.iter().map(|r| u64::from(r.end.0 - r.start.0)).sum();
    Ok(pages * crate::types::PAGE_SIZE as u64)
}
