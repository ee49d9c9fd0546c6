//! The coordinator: the agent that the operator talks to runs the gang.
//!
//! It checks the plan, opens the gang at every agent, has the targets made,
//! starts the sources, gives each VM its turn to switch over, and reports.
//! Each VM's handover is between its source and its target agent alone, so
//! nothing that the coordinator does or fails to do can make a VM run twice.
//!
//! A coordinator that dies can be followed by any agent of the gang, which
//! takes up what the sources tell of their VMs ([`Gang::take_over`]).
//!
//! A VM that fails at any step fails alone: its target is told to clean up,
//! its source lets it run on, and the rest of the gang goes on.

mod attend;
mod lost;

use super::message::{
    CoreState, GangRequest, GangResponse, GangSpec, GangVm, LostAgent, Phase, SourceFacts, VmState,
};
use super::moments::{Moment, Moments};
use crate::types::VmIndex;
use crate::vmm::definition::Kind;
use crate::vmm::kinds::Unfit;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Limit of a check or another request that only looks.
const CHECK_LIMIT: Duration = Duration::from_secs(10);
/// Limit of starting an incoming VMM or protecting a VM's RAM.
const PREPARE_LIMIT: Duration = Duration::from_secs(60);
/// How often sources are asked for their progress.
const POLL: Duration = Duration::from_millis(20);
/// An agent that has not answered for this long is lost: noticed within the
/// two seconds that `docs/handover.md` promises.
const LOST_AFTER: Duration = Duration::from_millis(1800);

/// How the coordinator reaches the agents of a gang, itself included.
pub trait Caller: 'static {
    /// Sends a request and waits for the answer, for at most `limit`. The
    /// error names the agent and its address and says what to look at.
    fn call(
        &self,
        host: &str,
        request: GangRequest,
        limit: Duration,
    ) -> impl Future<Output = Result<GangResponse, String>>;
}

/// VMs of one gang in stop-and-copy at once, unless aligned: each has the link
/// to itself, which keeps each downtime short.
const SWITCH_AT_ONCE: usize = 1;

/// What is known of a gang while it moves, and its result at the end.
#[derive(Debug, Clone)]
pub struct GangState {
    /// The agreed specification.
    pub spec: GangSpec,
    /// One entry a VM, in the order of the plan.
    pub vms: Vec<VmState>,
    /// How each VM is moved, and the better kinds that were not possible, once
    /// its source has said so.
    pub kinds: BTreeMap<VmIndex, (Kind, Vec<Unfit>)>,
    /// The core link as the first source agent sees it.
    pub core: CoreState,
    /// Migration bytes that crossed the core link, both directions, as the
    /// source agents' meters counted them.
    pub core_bytes: u64,
    /// Time from the request until the last VM was where it stays, milliseconds.
    pub total_ms: f64,
    /// Whether the gang has ended.
    pub ended: bool,
    /// Whether an operator wants all of it to stay.
    pub cancelled: bool,
    /// Agents that were lost on the way, in the order in which that was seen.
    pub lost: Vec<LostAgent>,
}

/// One gang under way, owned by the coordinator's control thread.
pub struct Gang<C> {
    caller: Rc<C>,
    moments: Moments,
    state: RefCell<GangState>,
    cancel: RefCell<BTreeSet<VmIndex>>,
    started: Instant,
    core_before: Cell<u64>,
    clock_stopped: Cell<bool>,
    /// VMs whose source was lost: it may be handing them over at this moment,
    /// so nobody else may touch their targets.
    out_of_sight: RefCell<BTreeSet<VmIndex>>,
}

impl<C: Caller> Gang<C> {
    /// A gang that has not started yet.
    pub fn new(caller: Rc<C>, spec: GangSpec, moments: Moments) -> Rc<Self> {
        let vms = (0..spec.vms.len())
            .map(|i| VmState::new(VmIndex(i as u16)))
            .collect();
        Rc::new(Gang {
            caller,
            moments,
            state: RefCell::new(GangState {
                spec,
                vms,
                kinds: BTreeMap::new(),
                core: CoreState::default(),
                core_bytes: 0,
                total_ms: 0.0,
                ended: false,
                cancelled: false,
                lost: Vec::new(),
            }),
            cancel: RefCell::default(),
            started: Instant::now(),
            core_before: Cell::new(0),
            clock_stopped: Cell::new(false),
            out_of_sight: RefCell::default(),
        })
    }

    /// A copy of what is known now.
    pub fn snapshot(&self) -> GangState {
        let mut state = self.state.borrow().clone();
        if !self.clock_stopped.get() {
            state.total_ms = self.started.elapsed().as_secs_f64() * 1e3;
        }
        state
    }

    /// Asks for one VM, or all, to stay where they are. VMs that have passed
    /// the point of no return arrive all the same.
    pub fn cancel(&self, vm: Option<VmIndex>) {
        let all = 0..self.state.borrow().vms.len() as u16;
        let mut cancel = self.cancel.borrow_mut();
        match vm {
            Some(vm) => drop(cancel.insert(vm)),
            None => {
                cancel.extend(all.map(VmIndex));
                self.state.borrow_mut().cancelled = true;
            }
        }
    }

    /// Only checks: what would fail, by VM. Touches nothing.
    pub async fn dry_run(self: &Rc<Self>) -> GangState {
        self.check_all().await;
        self.finish();
        self.snapshot()
    }

    /// Runs the gang to its end. Every VM is `Arrived`, `Failed` or
    /// `Cancelled` afterwards, and no agent holds anything of the gang.
    pub async fn run(self: &Rc<Self>) -> GangState {
        let facts = self.check_all().await;
        tracing::debug!(after = ?self.started.elapsed(), "gang checked");
        self.moments.reach_gang(Moment::Checked).await;
        self.open_all().await;
        tracing::debug!(after = ?self.started.elapsed(), "gang opened");
        self.moments.reach_gang(Moment::Opened).await;
        self.core_before.set(self.core_bytes().await);
        self.start_all(facts).await;
        tracing::debug!(after = ?self.started.elapsed(), "gang started");
        self.moments.reach_gang(Moment::Started).await;
        self.drive().await;
        self.end_gang().await
    }

    /// Every VM is where it stays; what follows is tidying up.
    async fn end_gang(self: &Rc<Self>) -> GangState {
        self.ask_fates().await;
        self.stop_clock();
        let after = self.core_bytes().await;
        self.state.borrow_mut().core_bytes = after.saturating_sub(self.core_before.get());
        self.moments.reach_gang(Moment::Closing).await;
        self.close_all().await;
        self.finish();
        self.snapshot()
    }

    fn stop_clock(&self) {
        self.state.borrow_mut().total_ms = self.started.elapsed().as_secs_f64() * 1e3;
        self.clock_stopped.set(true);
    }

    fn finish(&self) {
        if !self.clock_stopped.get() {
            self.stop_clock();
        }
        self.state.borrow_mut().ended = true;
    }

    fn live(&self) -> Vec<(VmIndex, GangVm)> {
        let state = self.state.borrow();
        let live = state.vms.iter().filter(|v| !v.phase.is_final());
        live.map(|v| (v.vm, state.spec.vms[v.vm.0 as usize].clone()))
            .collect()
    }

    fn phase(&self, vm: VmIndex) -> Phase {
        self.state.borrow().vms[vm.0 as usize].phase
    }

    fn spec(&self) -> GangSpec {
        self.state.borrow().spec.clone()
    }

    fn fail(&self, vm: VmIndex, why: String) {
        let mut state = self.state.borrow_mut();
        let name = state.spec.vms[vm.0 as usize].name.clone();
        let vm = &mut state.vms[vm.0 as usize];
        if !vm.phase.is_final() {
            tracing::warn!(vm = %name, %why, "VM stays at its source");
            vm.phase = Phase::Failed;
            vm.error = Some(why);
        }
    }

    /// Runs one step for every VM that waits to be started, all at once; a VM
    /// whose step fails leaves the game.
    async fn each<T: 'static, F>(
        self: &Rc<Self>,
        step: impl Fn(Rc<C>, VmIndex, GangVm) -> F,
    ) -> BTreeMap<VmIndex, T>
    where
        F: Future<Output = Result<T, String>> + 'static,
    {
        let mut tasks = JoinSet::new();
        for (vm, plan) in self.live() {
            if self.phase(vm) != Phase::Preparing {
                continue;
            }
            if self.cancel.borrow().contains(&vm) {
                self.state.borrow_mut().vms[vm.0 as usize].phase = Phase::Cancelled;
                continue;
            }
            let step = step(self.caller.clone(), vm, plan);
            tasks.spawn_local(async move { (vm, step.await) });
        }
        let mut done = BTreeMap::new();
        while let Some(result) = tasks.join_next().await {
            match result {
                Ok((vm, Ok(value))) => drop(done.insert(vm, value)),
                Ok((vm, Err(why))) => self.fail(vm, why),
                Err(panic) => tracing::error!(%panic, "a step of the gang panicked"),
            }
        }
        done
    }

    async fn check_all(self: &Rc<Self>) -> BTreeMap<VmIndex, SourceFacts> {
        let facts = self.each(|caller, _, plan| async move {
            let request = GangRequest::CheckSource {
                vm: plan.name.clone(),
            };
            let facts = match caller.call(&plan.from, request, CHECK_LIMIT).await? {
                GangResponse::Source(facts) => facts,
                other => return Err(unexpected(&plan.from, other)),
            };
            let request = GangRequest::CheckTarget {
                vm: plan.name.clone(),
                facts: facts.clone(),
            };
            done(&plan.to, caller.call(&plan.to, request, CHECK_LIMIT).await?)?;
            Ok(facts)
        });
        let facts: BTreeMap<VmIndex, SourceFacts> = facts.await;
        let kinds = facts
            .iter()
            .map(|(vm, facts)| (*vm, (facts.vmm.kind(), facts.unfit.clone())));
        self.state.borrow_mut().kinds.extend(kinds);
        facts
    }

    /// Opens the gang at every agent. VMs whose agents refuse fail.
    async fn open_all(self: &Rc<Self>) {
        let spec = self.spec();
        let needed: BTreeSet<String> = self
            .live()
            .into_iter()
            .flat_map(|(_, v)| [v.from, v.to])
            .collect();
        let mut refused = BTreeMap::new();
        for host in needed {
            let open = self
                .caller
                .call(&host, GangRequest::Open(spec.clone()), CHECK_LIMIT)
                .await;
            if let Err(why) = open.and_then(|response| done(&host, response)) {
                refused.insert(host, why);
            }
        }
        for (vm, plan) in self.live() {
            if let Some(why) = refused.get(&plan.from).or_else(|| refused.get(&plan.to)) {
                self.fail(vm, why.clone());
            }
        }
    }

    /// Makes each VM's target and, as soon as it waits, starts its source.
    async fn start_all(self: &Rc<Self>, facts: BTreeMap<VmIndex, SourceFacts>) {
        let gang = self.spec().id;
        let started = self
            .each(|caller, vm, plan| {
                let facts = facts.get(&vm).cloned();
                async move {
                    let facts = facts.ok_or("its source told nothing about it")?;
                    let request = GangRequest::PrepareTarget { gang, vm, facts };
                    done(
                        &plan.to,
                        caller.call(&plan.to, request, PREPARE_LIMIT).await?,
                    )?;
                    let request = GangRequest::StartSource { gang, vm };
                    done(
                        &plan.from,
                        caller.call(&plan.from, request, PREPARE_LIMIT).await?,
                    )
                }
            })
            .await;
        for vm in started.keys() {
            self.state.borrow_mut().vms[vm.0 as usize].phase = Phase::Precopy;
        }
    }

    /// Listens to the agents and hands out turns until every VM is final.
    async fn drive(self: &Rc<Self>) {
        let gang = self.spec().id;
        let _attended = self.attend();
        let mut granted = BTreeSet::new();
        let mut told_to_cancel = BTreeSet::new();
        while !self.live().is_empty() {
            self.deliver_cancels(&mut told_to_cancel).await;
            for vm in self.turns(&granted) {
                granted.insert(vm);
                let GangVm { name, from, .. } = self.spec().vms[vm.0 as usize].clone();
                self.moments.reach(Moment::SwitchGranted, &name).await;
                let request = GangRequest::Switch { gang, vm };
                let answer = self.caller.call(&from, request, CHECK_LIMIT).await;
                if let Err(why) = answer.and_then(|response| done(&from, response)) {
                    self.fail(vm, why);
                }
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn deliver_cancels(&self, told: &mut BTreeSet<VmIndex>) {
        let gang = self.spec().id;
        let wanted: Vec<VmIndex> = self.cancel.borrow().difference(told).copied().collect();
        for vm in wanted {
            told.insert(vm);
            let from = self.spec().vms[vm.0 as usize].from.clone();
            let request = GangRequest::Cancel { gang, vm };
            if let Err(why) = self.caller.call(&from, request, CHECK_LIMIT).await {
                tracing::warn!(%why, "cancel did not reach the source");
            }
        }
    }

    /// Whose turn it is to switch over.
    fn turns(&self, granted: &BTreeSet<VmIndex>) -> Vec<VmIndex> {
        let state = self.state.borrow();
        let live: Vec<&VmState> = state.vms.iter().filter(|v| !v.phase.is_final()).collect();
        let waiting = live
            .iter()
            .filter(|v| v.phase == Phase::Ready && !granted.contains(&v.vm));
        if state.spec.align {
            let all_ready = live.iter().all(|v| v.phase == Phase::Ready);
            return if all_ready {
                waiting.map(|v| v.vm).collect()
            } else {
                Vec::new()
            };
        }
        let switching = live.iter().filter(|v| granted.contains(&v.vm)).count();
        waiting
            .take(SWITCH_AT_ONCE.saturating_sub(switching))
            .map(|v| v.vm)
            .collect()
    }

    /// Migration bytes on the core link, both directions, as the agents of the
    /// source racks count them: every byte of the gang passes one of them.
    async fn core_bytes(&self) -> u64 {
        let sources: BTreeSet<String> = self.spec().vms.iter().map(|v| v.from.clone()).collect();
        let mut bytes = 0;
        for host in sources {
            if let Ok(GangResponse::Core(core)) = self
                .caller
                .call(&host, GangRequest::Core, CHECK_LIMIT)
                .await
            {
                bytes += core.core_bytes;
            }
        }
        bytes
    }

    /// Has the targets of VMs that did not arrive cleaned up, and the gang
    /// forgotten everywhere. Agents that cannot be reached do both themselves
    /// when they miss the coordinator.
    async fn close_all(&self) {
        let (spec, vms) = {
            let state = self.state.borrow();
            (state.spec.clone(), state.vms.clone())
        };
        let out_of_sight = self.out_of_sight.borrow().clone();
        // A target that has all of a VM listens to the VM's source alone.
        let stayed = |v: &&VmState| {
            !matches!(v.phase, Phase::Arrived | Phase::InDoubt) && !out_of_sight.contains(&v.vm)
        };
        for vm in vms.iter().filter(stayed) {
            let GangVm { name, to, .. } = &spec.vms[vm.vm.0 as usize];
            let why = vm.error.clone().unwrap_or_else(|| "cancelled".into());
            let request = GangRequest::Abort {
                gang: spec.id,
                vm: name.clone(),
                why,
            };
            if let Err(why) = self.caller.call(to, request, CHECK_LIMIT).await {
                tracing::warn!(%why, "the target will clean up by itself");
            }
        }
        // Targets of VMs out of sight close the gang themselves, when neither
        // lanes nor requests come any more.
        let waits = |host: &str| {
            out_of_sight
                .iter()
                .any(|vm| spec.vm(*vm).is_some_and(|v| v.to == host))
        };
        // Lanes are ended by their sources, in order; a target that closed
        // first would break them.
        let mut hosts: Vec<_> = spec.hosts.iter().filter(|h| !waits(&h.name)).collect();
        hosts.sort_by_key(|host| spec.leaving(&host.name).next().is_none());
        for host in hosts {
            let close = GangRequest::Close { gang: spec.id };
            if let Err(why) = self.caller.call(&host.name, close, CHECK_LIMIT).await {
                tracing::warn!(%why, "gang not closed there");
            }
        }
    }
}

fn done(host: &str, response: GangResponse) -> Result<(), String> {
    match response {
        GangResponse::Done => Ok(()),
        other => Err(unexpected(host, other)),
    }
}

fn unexpected(host: &str, response: GangResponse) -> String {
    match response {
        GangResponse::Failed(why) => format!("{host}: {why}"),
        _ => format!("{host}: answered something else than asked; are all agents of one version?"),
    }
}
