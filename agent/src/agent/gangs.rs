//! This agent's part in gangs: who may ask what, and the dispatch of requests
//! to [`super::departures`] and [`super::arrivals`].

use super::Agent;
use super::arrival::Arrival;
use super::departures::Departure;
use crate::dedup::claim::MAX_HOLDERS;
use crate::gang::handover::machine::{Target, TargetEvent, Whose, whose_unrecorded};
use crate::gang::journal::Side;
use crate::gang::message::{GangRequest, GangResponse, GangSpec};
use crate::gang::plan::MAX_VMS;
use crate::gang::source::SourceGang;
use crate::gang::target::TargetGang;
use crate::net::listener::ConnectionPermit;
use crate::types::{Class, GangId, VmIndex};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A gang of which nothing was heard for this long is given up: half-made
/// targets are removed, sources that wait for their turn run on.
const ORPHANED_AFTER: Duration = Duration::from_secs(30);
/// A coordinator that has been silent for this long may be followed by another.
const SILENT_AFTER: Duration = Duration::from_secs(2);

/// One gang as this host takes part in it.
pub(super) struct LocalGang {
    pub(super) spec: GangSpec,
    pub(super) source: Option<Arc<SourceGang>>,
    pub(super) target: Option<Arc<TargetGang>>,
    pub(super) departures: RefCell<BTreeMap<VmIndex, Departure>>,
    pub(super) arrivals: RefCell<BTreeMap<VmIndex, Rc<Arrival>>>,
    /// Connections of this gang's lanes count towards the listener's limit for
    /// as long as the gang is open.
    pub(super) permits: RefCell<Vec<ConnectionPermit>>,
    heard: Cell<Instant>,
    /// Who drives it now, and when that one spoke last.
    coordinator: RefCell<String>,
    coordinator_heard: Cell<Instant>,
}

impl LocalGang {
    pub(super) fn tick(&self) {
        if let Some(target) = &self.target {
            target.tick();
        }
    }

    /// Somebody of the gang has spoken.
    pub(super) fn touch(&self) {
        self.heard.set(Instant::now());
    }

    /// Whether `host` drives this gang; if so, it has just shown that it lives.
    fn is_coordinator(&self, host: &str) -> bool {
        let is = *self.coordinator.borrow() == host;
        if is {
            self.coordinator_heard.set(Instant::now());
        }
        is
    }

    pub(super) fn has_departures(&self) -> bool {
        self.departures
            .borrow()
            .values()
            .any(|d| !d.flight.snapshot().phase.is_final())
    }

    pub(super) fn cancel_departures(&self) {
        for departure in self.departures.borrow().values() {
            departure.cancel();
        }
    }

    pub(super) fn arrival(&self, vm: VmIndex) -> Option<Rc<Arrival>> {
        self.arrivals.borrow().get(&vm).cloned()
    }

    fn is_orphaned(&self) -> bool {
        let alive = self
            .target
            .as_ref()
            .is_some_and(|target| target.has_open_lane());
        self.heard.get().elapsed() > ORPHANED_AFTER && !alive
    }
}

impl Agent {
    pub(super) fn open_gangs(&self) -> Vec<Rc<LocalGang>> {
        self.gangs.borrow().values().cloned().collect()
    }

    pub(super) fn gang(&self, id: GangId) -> Result<Rc<LocalGang>, String> {
        self.gangs
            .borrow()
            .get(&id)
            .cloned()
            .ok_or_else(|| format!("gang {id} is not open here (any more)"))
    }

    /// Answers one request of agent `from`.
    pub(super) async fn gang_request(
        self: Rc<Self>,
        from: &str,
        request: GangRequest,
    ) -> GangResponse {
        match self.dispatch(from, request).await {
            Ok(response) => response,
            Err(why) => GangResponse::Failed(why),
        }
    }

    async fn dispatch(
        self: &Rc<Self>,
        from: &str,
        request: GangRequest,
    ) -> Result<GangResponse, String> {
        use GangRequest as R;
        match request {
            R::Core => Ok(GangResponse::Core(self.core_state())),
            R::CheckSource { vm } => self.check_source(&vm).await.map(GangResponse::Source),
            R::CheckTarget { vm, facts } => self.check_target(&vm, &facts).map(done),
            R::Open(spec) => self.open_gang(from, spec).map(done),
            R::PrepareTarget { gang, vm, facts } => {
                let gang = self.coordinated(from, gang)?;
                self.prepare_target(&gang, vm, facts).await.map(done)
            }
            R::StartSource { gang, vm } => {
                let gang = self.coordinated(from, gang)?;
                self.start_source(&gang, vm).await.map(done)
            }
            R::Progress { gang } => {
                let gang = self.coordinated(from, gang)?;
                let departures = gang.departures.borrow();
                let states = departures.values().map(|d| d.flight.snapshot()).collect();
                Ok(GangResponse::Progress(states))
            }
            R::Switch { gang, vm } => {
                let gang = self.coordinated(from, gang)?;
                let departures = gang.departures.borrow();
                let departure = departures
                    .get(&vm)
                    .ok_or("that VM does not leave this host")?;
                self.pacer.announce(Class::StopCopy);
                departure.turn();
                Ok(GangResponse::Done)
            }
            R::Cancel { gang, vm } => {
                let gang = self.coordinated(from, gang)?;
                if let Some(departure) = gang.departures.borrow().get(&vm) {
                    departure.cancel();
                }
                Ok(GangResponse::Done)
            }
            R::Close { gang } => {
                if self.gang(gang).is_ok() {
                    self.coordinated(from, gang)?;
                    self.close_gang(gang).await;
                }
                Ok(GangResponse::Done)
            }
            R::Seal {
                gang,
                vm,
                digest,
                full,
                wait_ms,
            } => {
                let gang = self.admitted(from, gang, |spec| is_source(spec, vm, from))?;
                self.seal(&gang, vm, digest, full, Duration::from_millis(wait_ms))
                    .await
            }
            R::ExpectDevice { gang, vm } => {
                let gang = self.admitted(from, gang, |spec| is_source(spec, vm, from))?;
                self.expect_device(&gang, vm).await
            }
            R::AwaitDevice { gang, vm, wait_ms } => {
                let gang = self.admitted(from, gang, |spec| is_source(spec, vm, from))?;
                self.await_device(&gang, vm, Duration::from_millis(wait_ms))
                    .await
                    .map(done)
            }
            R::Resume { gang, vm, run } => self.resume(from, gang, &vm, run).await,
            R::Settled { gang, vm } => self.release(from, gang, &vm).await.map(done),
            R::WhoseIs { gang, vm } => Ok(GangResponse::Whose(self.whose(gang, &vm))),
            R::Abort { gang, vm, why } => {
                let event = self.may_abort(from, gang, &vm)?;
                self.abort(gang, &vm, event, &why).await.map(done)
            }
            R::TakeOver { gang } => self.take_over(from, gang).map(done),
        }
    }

    /// As what `from` may end a VM that lands here.
    fn may_abort(&self, from: &str, gang: GangId, vm: &str) -> Result<TargetEvent, String> {
        if self
            .landing(gang, vm)
            .is_none_or(|arrival| arrival.from == from)
        {
            return Ok(TargetEvent::Abort);
        }
        match self.gang(gang) {
            Ok(gang) if gang.is_coordinator(from) => Ok(TargetEvent::GiveUp),
            _ => Err(format!("{from} has no say in VM {vm} of this gang")),
        }
    }

    /// Whose a VM is that this host moves, or moved, away.
    fn whose(&self, gang: GangId, vm: &str) -> Whose {
        let cares = self.cares.borrow();
        let care = cares
            .iter()
            .find(|c| c.side == Side::Source && c.gang == gang && c.vm == vm);
        match care {
            Some(care) => care.whose(),
            None => whose_unrecorded(self.vms.get(vm).is_some()),
        }
    }

    /// Another agent drives a gang from now on, since its coordinator is gone.
    fn take_over(&self, from: &str, id: GangId) -> Result<(), String> {
        let gang = self.gang(id)?;
        if !gang.spec.hosts.iter().any(|host| host.name == from) {
            return Err(format!("{from} is not in gang {}", gang.spec.name));
        }
        let silent = gang.coordinator_heard.get().elapsed();
        if !gang.is_coordinator(from) {
            if silent < SILENT_AFTER {
                return Err(format!(
                    "{} coordinates gang {} and spoke to {} {} ms ago",
                    gang.coordinator.borrow(),
                    gang.spec.name,
                    self.name(),
                    silent.as_millis()
                ));
            }
            tracing::warn!(gang = %gang.spec.name, was = %gang.coordinator.borrow(), by = %from,
                "gang taken over");
            *gang.coordinator.borrow_mut() = from.to_owned();
            gang.coordinator_heard.set(Instant::now());
        }
        gang.touch();
        Ok(())
    }

    /// The gang, if `from` coordinates it.
    fn coordinated(&self, from: &str, gang: GangId) -> Result<Rc<LocalGang>, String> {
        let gang = self.gang(gang)?;
        if !gang.is_coordinator(from) {
            return Err(format!(
                "{from} does not coordinate gang {}, {} does",
                gang.spec.name,
                gang.coordinator.borrow()
            ));
        }
        gang.touch();
        Ok(gang)
    }

    /// The gang, if `from` may ask this of it.
    fn admitted(
        &self,
        from: &str,
        gang: GangId,
        may: impl FnOnce(&GangSpec) -> bool,
    ) -> Result<Rc<LocalGang>, String> {
        let gang = self.gang(gang)?;
        if !may(&gang.spec) {
            return Err(format!(
                "{from} has no say in this of gang {}",
                gang.spec.name
            ));
        }
        gang.touch();
        Ok(gang)
    }

    fn open_gang(self: &Rc<Self>, from: &str, spec: GangSpec) -> Result<(), String> {
        if spec.coordinator != from {
            return Err(format!(
                "{from} opens a gang that {} coordinates",
                spec.coordinator
            ));
        }
        if spec.vms.len() > MAX_VMS || spec.hosts.len() > usize::from(MAX_HOLDERS) {
            return Err(format!(
                "gang {} has {} VMs on {} hosts; {MAX_VMS} and {MAX_HOLDERS} are possible",
                spec.name,
                spec.vms.len(),
                spec.hosts.len()
            ));
        }
        for host in &spec.hosts {
            let Some(member) = self.roster.member(&host.name) else {
                return Err(format!("{} is not among the peers here", host.name));
            };
            if member.rack != host.rack {
                return Err(format!(
                    "{} is in rack {} by this agent's configuration, in {} by {from}'s",
                    host.name, member.rack, host.rack
                ));
            }
        }
        if self.gang(spec.id).is_ok() {
            return Ok(());
        }
        let profile = spec.profile.parse().map_err(|e| format!("profile: {e}"))?;
        let source = match spec.leaving(self.name()).next() {
            Some(_) => Some(Arc::new(self.source_gang(&spec)?)),
            None => None,
        };
        let target = match spec.arriving(self.name()).next() {
            Some(_) => Some(self.target_gang(&spec)?),
            None => None,
        };
        if source.is_some() {
            self.pacer.set_profile(profile);
        }
        if let Some(target) = &target {
            self.data.open_target(spec.id, target.clone());
        }
        let gang = LocalGang {
            source,
            target,
            departures: RefCell::default(),
            arrivals: RefCell::default(),
            permits: RefCell::default(),
            heard: Cell::new(Instant::now()),
            coordinator: RefCell::new(spec.coordinator.clone()),
            coordinator_heard: Cell::new(Instant::now()),
            spec,
        };
        tracing::info!(gang = %gang.spec.name, id = %gang.spec.id, by = %from, "gang opened");
        self.gangs.borrow_mut().insert(gang.spec.id, Rc::new(gang));
        Ok(())
    }

    /// Ends everything of a gang here. VMs that are still on their way out
    /// stay; half-made targets go.
    pub(super) async fn close_gang(&self, id: GangId) {
        let Some(gang) = self.gangs.borrow_mut().remove(&id) else {
            return;
        };
        gang.cancel_departures();
        let arrivals: Vec<_> = gang.arrivals.borrow().values().cloned().collect();
        for arrival in arrivals {
            // What has all its state stays, until its source has spoken.
            if arrival.state() == Target::Waiting {
                arrival.care.because("the gang was closed");
            }
            self.land(&arrival, TargetEvent::GiveUp).await;
        }
        self.data.close_target(id);
        for rack in gang.spec.target_racks() {
            if let Some(space) = gang.spec.claim_space(rack) {
                self.data.close_shard(space);
            }
        }
        if let Some(source) = &gang.source {
            self.keep_lane_totals(source);
        }
        let (source, target) = (gang.source.clone(), gang.target.clone());
        let closing = tokio::task::spawn_blocking(move || {
            if let Some(source) = source {
                source.close();
            }
            if let Some(target) = target {
                target.close();
            }
        });
        if let Err(panic) = closing.await {
            tracing::error!(%panic, "closing a gang's lanes panicked");
        }
        gang.permits.borrow_mut().clear();
        if self.gangs.borrow().values().all(|g| g.source.is_none()) {
            self.pacer.set_profile(self.policy().profile);
        }
        tracing::info!(gang = %gang.spec.name, id = %gang.spec.id, "gang closed");
    }

    /// Closes gangs whose coordinator and lanes are gone.
    pub(super) async fn reap(&self) {
        for gang in self.open_gangs() {
            if gang.is_orphaned()
                && !gang
                    .departures
                    .borrow()
                    .values()
                    .any(Departure::is_switching)
            {
                tracing::warn!(gang = %gang.spec.name, coordinator = %gang.spec.coordinator,
                    "nothing was heard of this gang for {} s: given up here",
                    ORPHANED_AFTER.as_secs());
                self.close_gang(gang.spec.id).await;
            }
        }
    }
}

fn done((): ()) -> GangResponse {
    GangResponse::Done
}

fn is_source(spec: &GangSpec, vm: VmIndex, host: &str) -> bool {
    spec.vm(vm).is_some_and(|v| v.from == host)
}
