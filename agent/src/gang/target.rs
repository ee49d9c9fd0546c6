//! The target host's pipeline: what the lanes bring goes into guest RAM.
//!
//! Lane threads call [`LaneSink::batch`]; contents and zero runs are placed at
//! once, references that this host cannot settle itself are fetched from their
//! holder inside the rack, and what cannot be fetched in time is asked of the
//! source in full. A batch counts as placed when every entry is placed or
//! registered: from then on it is this side's business to get the page.

use super::message::GangSpec;
use crate::dedup::fingerprint::FingerprintKey;
use crate::dedup::resolve::{
    AddVmError, ArriveError, Fetched, Need, NotFetched, PageMemory, RefArrival, TargetConfig,
    TargetStore,
};
use crate::dedup::target_vm::TargetVm;
use crate::lane::frame::MAX_NEEDS;
use crate::lane::{BatchSink, DecodedBatch, LaneReceiver, Placement, ReceiverStats, SinkError};
use crate::net::listener::ConnectionPermit;
use crate::net::rack::{self, FetchClient, Wanted};
use crate::types::{Fingerprint, GangId, Gfn, HolderId, Page, VmIndex};
use crate::vmm::PageSink;
use ahash::AHashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long a lane gets to end in order when a gang is closed.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);
/// Pages that may wait for a lane to be asked for.
const MAX_UNASKED: usize = 1 << 16;
/// References to a host that may go unhonoured without it being named.
const NOTABLE: u64 = 64;

/// One gang's arrivals on this host.
pub struct TargetGang {
    /// The gang.
    pub spec: GangSpec,
    me: HolderId,
    /// Content and pages.
    pub store: Arc<TargetStore>,
    fetch: FetchClient,
    /// How long a holder has to deliver content.
    fetch_limit: Duration,
    /// Called when content has arrived that others may be waiting for.
    wake: Box<dyn Fn() + Send + Sync>,
    lanes: Mutex<AHashMap<String, Vec<OpenLane>>>,
    awaited: Mutex<Vec<(Instant, Fingerprint)>>,
    failures: Mutex<AHashMap<VmIndex, Arc<OnceLock<String>>>>,
    /// Pages to be asked for as soon as there is a lane to do it on.
    unasked: Mutex<Vec<(VmIndex, Gfn)>>,
    /// Contents that did not come from where they were said to be, by that host.
    broken: Mutex<AHashMap<HolderId, Broken>>,
}

/// References to one host that were not honoured.
#[derive(Debug, Clone, Copy, Default)]
struct Broken {
    /// It sent other content.
    wrong: u64,
    /// It did not have it.
    gone: u64,
    /// It did not answer in time.
    late: u64,
}

/// A lane, and its place among the connections of its source.
struct OpenLane {
    receiver: LaneReceiver,
    _place: ConnectionPermit,
}

impl OpenLane {
    fn has_ended(&self) -> bool {
        self.receiver.wait(Duration::ZERO).is_some()
    }
}

/// A target VM's memory as `dedup` sees it. Placing pages can fail (tmpfs is
/// full): then the VM must not run here, whatever the fingerprints say.
struct Memory {
    ram: Arc<dyn PageSink>,
    failed: Arc<OnceLock<String>>,
}

impl Memory {
    fn failed(&self, gfn: Gfn, doing: &str, error: &std::io::Error) {
        let place = self.ram.place();
        let why = format!("{doing} {gfn} of {place} failed: {error}; is the memory used up?");
        if self.failed.set(why.clone()).is_ok() {
            tracing::error!(%why, "VM cannot be received");
        }
    }
}

impl PageMemory for Memory {
    fn write(&self, gfn: Gfn, page: &Page) {
        if let Err(error) = self.ram.write_run(gfn, page) {
            self.failed(gfn, "writing", &error);
        }
    }
    fn read(&self, gfn: Gfn, page: &mut Page) {
        if let Err(error) = self.ram.read_run(gfn, page) {
            // Whoever asked finds the wrong fingerprint.
            page.fill(0xff);
            self.failed(gfn, "reading", &error);
        }
    }
    fn zero(&self, gfn: Gfn, count: u32) {
        if let Err(error) = self.ram.zero_run(gfn..Gfn(gfn.0 + count)) {
            self.failed(gfn, "zeroing", &error);
        }
    }
}

impl TargetGang {
    /// An empty store for the VMs that `me` takes in.
    pub fn new(
        spec: GangSpec,
        me: HolderId,
        config: TargetConfig,
        fetch: FetchClient,
        fetch_limit: Duration,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Arc<Self> {
        Arc::new(TargetGang {
            spec,
            me,
            // Whoever waits for content here is woken after every batch.
            store: Arc::new(TargetStore::new(me, config, Box::new(|_, _| {}))),
            fetch,
            fetch_limit,
            wake,
            lanes: Mutex::default(),
            awaited: Mutex::default(),
            failures: Mutex::default(),
            unasked: Mutex::default(),
            broken: Mutex::default(),
        })
    }

    /// Takes in a VM whose RAM is fresh: all zero.
    pub fn add_vm(
        &self,
        vm: VmIndex,
        ram: Arc<dyn PageSink>,
        key: Arc<FingerprintKey>,
    ) -> Result<Arc<TargetVm>, AddVmError> {
        let pages = ram.pages();
        let failed = Arc::new(OnceLock::new());
        let memory = Memory {
            ram,
            failed: failed.clone(),
        };
        let added = self.store.add_vm(vm, pages, Box::new(memory), key)?;
        self.failures
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(vm, failed);
        Ok(added)
    }

    /// Why a VM's memory could not be written, if so: it must not run here.
    pub fn failure(&self, vm: VmIndex) -> Option<String> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.get(&vm).and_then(|failed| failed.get().cloned())
    }

    /// A lane from agent `source` has been accepted; its way back carries
    /// requests for pages. `place` is given back when the lane has ended.
    pub fn lane_opened(&self, source: &str, receiver: LaneReceiver, place: ConnectionPermit) {
        let mut lanes = self.lock_lanes();
        lanes.entry(source.to_owned()).or_default().push(OpenLane {
            receiver,
            _place: place,
        });
    }

    fn lock_lanes(&self) -> MutexGuard<'_, AHashMap<String, Vec<OpenLane>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counters of the lanes that are open.
    pub fn lane_stats(&self) -> Vec<ReceiverStats> {
        self.lock_lanes()
            .values()
            .flatten()
            .map(|lane| lane.receiver.stats())
            .collect()
    }

    /// Whether a lane of this gang is open.
    pub fn has_open_lane(&self) -> bool {
        self.lock_lanes()
            .values()
            .flatten()
            .any(|lane| !lane.has_ended())
    }

    /// Asks again for everything that a VM still waits for: requests may have
    /// been lost with their lane.
    pub fn ask_again(&self, vm: VmIndex, placed: &TargetVm) {
        let pages = placed.pending_pages(MAX_NEEDS).into_iter();
        self.ask(pages.map(|gfn| (vm, gfn)));
    }

    /// Gives up content that this host itself was to receive and that has not
    /// come in time, and lanes that have ended. To be called every few tens of
    /// milliseconds.
    pub fn tick(&self) {
        for lanes in self.lock_lanes().values_mut() {
            lanes.retain(|lane| !lane.has_ended());
        }
        let unasked = {
            let mut unasked = self.unasked.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *unasked)
        };
        self.ask(unasked);
        let now = Instant::now();
        let mut late = Vec::new();
        self.awaited
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(until, fp)| {
                let keep = *until > now;
                if !keep {
                    late.push(*fp);
                }
                keep
            });
        for fp in late {
            self.broken(self.me, |b| b.late += 1);
            self.ask_instead(self.store.not_fetched(fp, NotFetched::Late));
        }
    }

    /// Counts a reference that the host `holder` did not honour.
    fn broken(&self, holder: HolderId, count: impl FnOnce(&mut Broken)) {
        let mut all = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        count(all.entry(holder).or_default());
    }

    /// Names the hosts that did not have what references said they have. A few
    /// is what losses and dirty pages bring about.
    fn name_the_broken(&self) {
        let all = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        for (&holder, broken) in all.iter() {
            let Broken { wrong, gone, late } = *broken;
            if wrong == 0 && gone + late < NOTABLE {
                continue;
            }
            let gang = &self.spec.name;
            let host = self.spec.host(holder).map_or("?", |host| &host.name);
            if holder == self.me {
                // Who claimed them, the claim shards know.
                tracing::warn!(%gang, %host, late, gone,
                    "contents that were to come to this host did not; had from the sources in full");
            } else {
                tracing::warn!(%gang, %host, wrong, gone, late,
                    "did not serve what it was said to hold; had from the sources in full");
            }
        }
    }

    /// Closes every lane and stops taking part.
    pub fn close(&self) {
        self.name_the_broken();
        for vm in 0..self.spec.vms.len() {
            self.store.remove_vm(VmIndex(vm as u16));
        }
        for lane in self.lock_lanes().drain().flat_map(|(_, lanes)| lanes) {
            lane.receiver.close(CLOSE_LIMIT);
        }
    }

    fn start_fetches(self: &Arc<Self>, by_holder: AHashMap<HolderId, Vec<Fingerprint>>) {
        for (holder, fps) in by_holder {
            let Some(host) = self.server(holder) else {
                for fp in fps {
                    self.broken(holder, |b| b.gone += 1);
                    self.ask_instead(self.store.not_fetched(fp, NotFetched::Gone));
                }
                continue;
            };
            let gang = self.clone();
            let wanted = fps.iter().map(|&fp| Wanted { fp, domain: 0 }).collect();
            self.fetch.fetch(
                &host,
                self.spec.id,
                wanted,
                self.fetch_limit,
                Box::new(move |index, answer| gang.fetched(fps[index], holder, answer)),
            );
        }
    }

    /// The agent to fetch from, if VMs of this gang arrive there, inside this
    /// rack: nobody else has a part in serving its pages, whatever a reference
    /// says.
    fn server(&self, holder: HolderId) -> Option<String> {
        let host = self.spec.host(holder)?;
        let here = self.spec.host(self.me)?;
        let serves = host.rack == here.rack && self.spec.arriving(&host.name).next().is_some();
        serves.then(|| host.name.clone())
    }

    fn fetched(&self, fp: Fingerprint, holder: HolderId, answer: rack::Fetched<'_>) {
        let needs = match answer {
            rack::Fetched::Page(page) => match self.store.fetched(fp, holder, page) {
                Fetched::Placed(_) | Fetched::Unwanted => return,
                Fetched::Wrong { holder, needs } => {
                    self.served_wrong(holder);
                    needs
                }
            },
            rack::Fetched::Gone => {
                self.broken(holder, |b| b.gone += 1);
                self.store.not_fetched(fp, NotFetched::Gone)
            }
            rack::Fetched::NotInTime => {
                self.broken(holder, |b| b.late += 1);
                self.store.not_fetched(fp, NotFetched::Late)
            }
        };
        self.ask_instead(needs);
    }

    /// Named at once, and at the end with how often.
    fn served_wrong(&self, holder: HolderId) {
        let mut first = false;
        self.broken(holder, |broken| {
            broken.wrong += 1;
            first = broken.wrong == 1;
        });
        if first {
            let host = self.spec.host(holder).map_or("?", |host| &host.name);
            tracing::error!(gang = %self.spec.name, %host,
                "served content that does not match its fingerprint; had from the source in full");
        }
    }

    /// Asks the sources for pages whose content did not come as it should have.
    fn ask_instead(&self, needs: Vec<Need>) {
        self.ask(needs.into_iter().map(|need| (need.vm, need.gfn)));
    }

    /// Asks the sources for pages in full.
    fn ask(&self, pages: impl IntoIterator<Item = (VmIndex, Gfn)>) {
        let mut by_vm: AHashMap<VmIndex, Vec<Gfn>> = AHashMap::new();
        for (vm, gfn) in pages {
            by_vm.entry(vm).or_default().push(gfn);
        }
        for (vm, gfns) in by_vm {
            let Some(source) = self.spec.vm(vm).map(|v| v.from.as_str()) else {
                continue;
            };
            let asked = self.lock_lanes().get(source).is_some_and(|lanes| {
                lanes
                    .iter()
                    .any(|lane| lane.receiver.handle().need(self.spec.id, vm, &gfns).is_ok())
            });
            if asked {
                continue;
            }
            // A lane's first batches may be placed before it is registered here;
            // or all have broken. Pages stay pending, so the switch cannot happen
            // without them, and asks again.
            let mut unasked = self.unasked.lock().unwrap_or_else(PoisonError::into_inner);
            if unasked.len() + gfns.len() <= MAX_UNASKED {
                unasked.extend(gfns.into_iter().map(|gfn| (vm, gfn)));
            } else {
                tracing::warn!(gang = %self.spec.name, %source, pages = gfns.len(),
                    "no open lane to ask the source for pages");
            }
        }
    }
}

/// A [`TargetGang`] as one lane's thread sees it: a source's lanes write the
/// VMs that leave that source, and no others.
pub struct LaneSink {
    gang: Arc<TargetGang>,
    source: String,
}

impl LaneSink {
    /// For the lanes of agent `source`.
    pub fn new(gang: Arc<TargetGang>, source: &str) -> Self {
        LaneSink {
            gang,
            source: source.to_owned(),
        }
    }

    fn may_write(&self, gang: GangId, vm: VmIndex) -> bool {
        let spec = &self.gang.spec;
        gang == spec.id && spec.vm(vm).is_some_and(|vm| vm.from == self.source)
    }
}

impl BatchSink for LaneSink {
    fn ram_pages(&self, gang: GangId, vm: VmIndex) -> Option<u32> {
        if !self.may_write(gang, vm) {
            return None;
        }
        self.gang.store.vm(vm).ok().map(|vm| vm.pages())
    }

    fn batch(&self, batch: &DecodedBatch<'_>) -> Result<Placement, SinkError> {
        let gang = &self.gang;
        if !self.may_write(batch.head.gang, batch.head.vm) {
            return Err(SinkError::UnknownVm {
                gang: batch.head.gang,
                vm: batch.head.vm,
            });
        }
        let store = &gang.store;
        let refused = |e: ArriveError| SinkError::Failed(e.to_string());
        let vm = store.vm(batch.head.vm).map_err(refused)?;
        if gang.failure(batch.head.vm).is_some() {
            // The source hears of it at the switch at the latest; other VMs of
            // this lane are not to suffer.
            return Ok(Placement::Placed);
        }
        let round = batch.head.round;
        for run in &batch.entries.zeros {
            store
                .arrive_zero(&vm, run.first, run.count, round)
                .map_err(refused)?;
        }
        for (gfn, page) in batch.pages() {
            store.arrive_page(&vm, gfn, round, page).map_err(refused)?;
        }
        let mut fetches: AHashMap<HolderId, Vec<Fingerprint>> = AHashMap::new();
        let mut unsettled = Vec::new();
        let mut awaits = Vec::new();
        for r in &batch.entries.refs {
            let arrival = store
                .arrive_ref(&vm, r.gfn, round, r.fingerprint, r.holder)
                .map_err(refused)?;
            match arrival {
                RefArrival::Placed | RefArrival::Stale | RefArrival::Joined => {}
                RefArrival::Fetch => fetches.entry(r.holder).or_default().push(r.fingerprint),
                RefArrival::Await => {
                    awaits.push((Instant::now() + gang.fetch_limit, r.fingerprint))
                }
                RefArrival::Need => unsettled.push((batch.head.vm, r.gfn)),
            }
        }
        if !awaits.is_empty() {
            gang.awaited
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .append(&mut awaits);
        }
        (gang.wake)();
        gang.start_fetches(fetches);
        gang.ask(unsettled);
        Ok(Placement::Placed)
    }
}
