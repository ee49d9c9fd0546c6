//! One gang's departures from this host: what the scan threads share, the
//! lanes to each target host, and the pump that carries the lanes' news back.

use super::flight::Flight;
use super::message::GangSpec;
use super::plant::{self, Plant};
use super::stage::{StageShared, Stager};
use crate::dedup::fingerprint::FingerprintKey;
use crate::dedup::source::{SourceError, Verdict};
use crate::lane::{Connector, LaneEvent, LaneSet, LaneSetConfig, LaneSetError, LaneStats, Pacing};
use crate::types::VmIndex;
use ahash::AHashMap;
use crossbeam_channel::Receiver;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

/// How long lanes get to end in order when a gang is closed.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

/// Who is on the way; shared with the pumps, which outlive no gang.
#[derive(Default)]
struct Departures(RwLock<AHashMap<VmIndex, Arc<Flight>>>);

/// Why a VM cannot start.
#[derive(Debug, thiserror::Error)]
pub enum DepartError {
    /// The plan's target is not in the roster.
    #[error("VM {vm}: its target {target} is not in the gang's roster")]
    NoTarget {
        /// The VM.
        vm: String,
        /// The agent named.
        target: String,
    },
    /// No lanes.
    #[error(transparent)]
    Lanes(#[from] LaneSetError),
    /// Not with `dedup`.
    #[error(transparent)]
    Dedup(#[from] SourceError),
}

/// See the module.
pub struct SourceGang {
    /// The gang.
    pub spec: GangSpec,
    /// By target rack: contents are claimed for one rack at a time.
    shared: BTreeMap<String, Arc<StageShared>>,
    departures: Arc<Departures>,
    lanes: Mutex<BTreeMap<String, Arc<LaneSet>>>,
    config: Box<dyn Fn(&str) -> LaneSetConfig + Send + Sync>,
    connector: Box<dyn Fn(&str) -> Connector + Send + Sync>,
    pacing: Arc<dyn Pacing>,
}

impl SourceGang {
    /// A gang that nothing has been sent for, with what its stagers share for
    /// each target rack. `config` and `connector` say how lanes to a target
    /// agent are set up and connected.
    pub fn new(
        spec: GangSpec,
        shared: BTreeMap<String, Arc<StageShared>>,
        pacing: Arc<dyn Pacing>,
        config: Box<dyn Fn(&str) -> LaneSetConfig + Send + Sync>,
        connector: Box<dyn Fn(&str) -> Connector + Send + Sync>,
    ) -> Self {
        SourceGang {
            spec,
            shared,
            departures: Arc::default(),
            lanes: Mutex::default(),
            config,
            connector,
            pacing,
        }
    }

    /// Takes a VM on: starts the lanes to its target if there are none yet,
    /// and gives it a stager.
    pub fn depart(
        &self,
        flight: Arc<Flight>,
        key: Arc<FingerprintKey>,
    ) -> Result<Stager, DepartError> {
        let no_target = || DepartError::NoTarget {
            vm: flight.name.clone(),
            target: flight.target.clone(),
        };
        let holder = self.spec.holder(&flight.target).ok_or_else(no_target)?;
        let shared = self
            .shared_for(&flight.target)
            .ok_or_else(no_target)?
            .clone();
        let lanes = self.lanes_to(&flight.target, &shared)?;
        shared
            .dedup
            .add_vm(flight.vm, flight.pages, holder, key.clone())?;
        self.departures.write().insert(flight.vm, flight.clone());
        Ok(Stager::new(shared, flight, holder, key, lanes))
    }

    fn shared_for(&self, target: &str) -> Option<&Arc<StageShared>> {
        self.shared.get(self.spec.rack_of(target)?)
    }

    /// Bytes that the decisions and fingerprints of this host's VMs take.
    pub fn memory_bytes(&self) -> usize {
        self.shared
            .values()
            .map(|shared| shared.dedup.memory_bytes())
            .sum()
    }

    /// A VM's migration has ended, one way or the other. What its pages taught
    /// about contents at the target stays known if it `arrived`.
    pub fn ended(&self, vm: VmIndex, arrived: bool) {
        self.departures.write().remove(&vm);
        let target = self.spec.vm(vm).map(|v| v.to.as_str());
        if let (false, Some(shared)) = (arrived, target.and_then(|t| self.shared_for(t))) {
            shared.dedup.remove_vm(vm);
        }
    }

    /// Counters of every lane, by target agent.
    pub fn lane_stats(&self) -> Vec<(String, Vec<LaneStats>)> {
        self.lock_lanes()
            .iter()
            .map(|(target, set)| (target.clone(), set.stats()))
            .collect()
    }

    /// Ends the lanes. Blocks for up to half a second a target.
    pub fn close(&self) {
        for (_, set) in std::mem::take(&mut *self.lock_lanes()) {
            set.close(CLOSE_LIMIT);
        }
    }

    fn lock_lanes(&self) -> MutexGuard<'_, BTreeMap<String, Arc<LaneSet>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lanes_to(
        &self,
        target: &str,
        shared: &Arc<StageShared>,
    ) -> Result<Arc<LaneSet>, LaneSetError> {
        let mut lanes = self.lock_lanes();
        if let Some(set) = lanes.get(target) {
            return Ok(set.clone());
        }
        let set = Arc::new(LaneSet::start(
            (self.config)(target),
            &shared.pool,
            self.pacing.clone(),
            (self.connector)(target),
        )?);
        let pump = Pump {
            target: target.to_owned(),
            gang: self.spec.name.clone(),
            shared: shared.clone(),
            departures: self.departures.clone(),
        };
        let events = set.events().clone();
        std::thread::Builder::new()
            .name("lane-news".into())
            .spawn(move || pump.run(&events))
            .map_err(|source| LaneSetError::Resources {
                peer: target.to_owned(),
                source,
            })?;
        lanes.insert(target.to_owned(), set.clone());
        Ok(set)
    }
}

impl Departures {
    fn write(&self) -> std::sync::RwLockWriteGuard<'_, AHashMap<VmIndex, Arc<Flight>>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn with(&self, vm: VmIndex, f: impl FnOnce(&Flight)) {
        if let Some(flight) = self
            .0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&vm)
        {
            f(flight);
        }
    }
}

/// Carries the news of one lane set to the VMs concerned. Ends with the set.
struct Pump {
    target: String,
    gang: String,
    shared: Arc<StageShared>,
    departures: Arc<Departures>,
}

impl Pump {
    fn run(self, events: &Receiver<LaneEvent>) {
        while let Ok(event) = events.recv() {
            self.handle(event);
        }
    }

    fn handle(&self, event: LaneEvent) {
        let (gang, target) = (&self.gang, &self.target);
        match event {
            LaneEvent::Placed {
                vm,
                batches,
                compressed,
                ..
            } => self.departures.with(vm, |flight| {
                for batch in batches {
                    if let Some(sent) = flight.inbox.look_up(batch) {
                        let notes = self.shared.dedup.placed(&sent);
                        self.shared.claims.tell(notes, sent.holder);
                        if compressed.contains(&batch) {
                            let sent = sent.pages.iter().filter(|p| p.verdict == Verdict::Send);
                            let count = sent.count() as u64;
                            flight.count(|pages| pages.compressed += count);
                        }
                        flight.inbox.arrived(batch);
                    }
                }
            }),
            LaneEvent::Need { gang: of, vm, gfns } => self.departures.with(vm, |flight| {
                if of != self.shared.gang || flight.target != *target {
                    tracing::warn!(%gang, %target, vm = %flight.name,
                        "request for pages of a VM that does not go there ignored");
                    return;
                }
                tracing::debug!(%gang, vm = %flight.name, pages = gfns.len(),
                    "target asks for pages in full");
                for gfn in &gfns {
                    let dedup = &self.shared.dedup;
                    let needed = dedup
                        .last_sent(vm, *gfn)
                        .and_then(|fp| dedup.needed(vm, *gfn, fp));
                    if let Err(error) = needed {
                        tracing::warn!(%gang, %target, %error, "request for a page ignored");
                    }
                }
                flight.count(|pages| pages.resent += gfns.len() as u64);
                flight.inbox.again(None);
            }),
            LaneEvent::Lost { batches } => {
                for lost in batches {
                    self.departures.with(lost.head.vm, |flight| {
                        if plant::has(Plant::SkipResend) {
                            return flight.inbox.arrived(lost.head.batch);
                        }
                        // First forget that these pages were sent, then ring:
                        // else they would be found unchanged.
                        if let Some(sent) = flight.inbox.look_up(lost.head.batch) {
                            self.shared.dedup.lost(&sent);
                            flight.count(|pages| pages.resent += lost.entries.page_count());
                            flight.inbox.again(Some(lost.head.batch));
                        }
                    });
                }
            }
            LaneEvent::LaneUp { lane } => tracing::debug!(%gang, %target, lane, "lane up"),
            LaneEvent::LaneDown { lane, why } => {
                tracing::warn!(%gang, %target, lane, %why, "lane broke; it is being reopened");
            }
            LaneEvent::PeerFailed { why } => {
                tracing::warn!(%gang, %target, %why, "lanes given up");
                let all = self
                    .departures
                    .0
                    .read()
                    .unwrap_or_else(PoisonError::into_inner);
                for flight in all.values().filter(|flight| flight.target == *target) {
                    flight.inbox.fail(&why);
                }
            }
        }
    }
}
