//! The pacer of one agent: a small thread that looks, decides and sets the
//! bucket's rates, and the handle that lanes, network and operator share.

use super::bucket::{Drawn, Rates, TokenBucket};
use super::control::{Controller, Inbound, LaneSignal, Limit, Observed};
use super::meter::{Counters, Measure};
use super::policy::{Policy, Profile, ProfileName};
use super::report::{Flow, Load, LoadReport, Patience, RackLoad, ReportError};
use super::tcp_info::TcpInfo;
use crate::types::Class;
use drover_ebpf::Direction;
use serde::Serialize;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

/// How often the pacer looks.
pub const TICK: Duration = Duration::from_millis(25);
/// Payload to bytes on the wire with 1448 bytes in a frame of 1514.
const FULL_FRAMES: f64 = 1514.0 / 1448.0;
/// Payload after which the factor is corrected by what the meter counted.
const LEARN_BYTES: u64 = 4 << 20;
/// A lane that sent nothing for so long feels nothing.
const LANE_IDLE: Duration = Duration::from_millis(100);
/// Most racks whose reports are kept.
const MAX_RACKS: usize = 64;

/// Who this agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Name of this host.
    pub host: String,
    /// Name of its rack.
    pub rack: String,
    /// Drawn at random when the agent starts.
    pub boot: u64,
}

/// Paces an agent. Clones are handles to the same pacer; when the last one is
/// dropped its thread ends and the meter is detached.
#[derive(Debug, Clone)]
pub struct Pacer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    bucket: Arc<TokenBucket>,
    /// Bytes on the wire for 65 536 bytes of payload.
    wire_factor: AtomicU32,
    epoch: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    identity: Identity,
    policy: Policy,
    profile: ProfileName,
    control: Controller,
    racks: HashMap<String, RackLoad>,
    lanes: Vec<Lane>,
    next_lane: u64,
    seq: u64,
    report: LoadReport,
    status: PacerStatus,
}

#[derive(Debug)]
struct Lane {
    id: u64,
    socket: OwnedFd,
    last: TcpInfo,
}

/// What the pacer does, for progress, metrics and `drover status`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PacerStatus {
    /// Profile in force.
    pub profile: ProfileName,
    /// Core link of this rack, wire bytes per second each way.
    pub capacity: f64,
    /// Tenants out of this rack across the core, as far as it is counted.
    pub tenant: f64,
    /// Migration out of this rack across the core.
    pub migration: f64,
    /// What this agent may send.
    pub rate: f64,
    /// What this agent sends.
    pub used: f64,
    /// Why not more.
    pub limit: Limit,
    /// Delay in queues that lanes feel.
    pub queue: Duration,
    /// Other agents of this rack that report.
    pub agents: usize,
    /// Why the uplinks are not counted, if they are not.
    pub unmetered: Option<String>,
}

/// Keeps a lane's socket under observation; drop it when the lane closes.
#[derive(Debug)]
pub struct LaneWatch {
    id: u64,
    shared: Weak<Shared>,
}

impl Drop for LaneWatch {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.lock().lanes.retain(|lane| lane.id != self.id);
        }
    }
}

impl Pacer {
    /// Starts pacing. Without a meter the pacer goes by delay alone; whether
    /// that is allowed is the policy's business (`policy::check_meter`).
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        identity: Identity,
        policy: &Policy,
        meter: Option<Box<dyn Measure>>,
    ) -> io::Result<Pacer> {
        let pacer = Pacer::new(identity, policy);
        let shared = Arc::downgrade(&pacer.shared);
        thread::Builder::new()
            .name("pacer".into())
            .spawn(move || run(&shared, meter))?;
        Ok(pacer)
    }

    /// A pacer without its thread.
    fn new(identity: Identity, policy: &Policy) -> Pacer {
        let name = policy.profile;
        let profile = *policy.profile(name);
        // Until the first look: what the floor allows.
        let rates = Rates {
            precopy: profile.floor * policy.capacity,
            stop_copy: profile.stop_copy * policy.capacity,
        };
        let report = LoadReport {
            host: identity.host.clone(),
            rack: identity.rack.clone(),
            boot: identity.boot,
            seq: 0,
            at_us: 0,
            metered: false,
            egress: Load::default(),
            ingress: Load::default(),
            wanted: 0,
            stop_copy: false,
            lanes: 0,
        };
        let status = PacerStatus {
            profile: name,
            capacity: policy.capacity,
            tenant: 0.0,
            migration: 0.0,
            rate: rates.precopy,
            used: 0.0,
            limit: Limit::Floor,
            queue: Duration::ZERO,
            agents: 0,
            unmetered: None,
        };
        Pacer {
            shared: Arc::new(Shared {
                bucket: TokenBucket::new(rates),
                wire_factor: AtomicU32::new(to_fixed(FULL_FRAMES)),
                epoch: Instant::now(),
                inner: Mutex::new(Inner {
                    control: Controller::new(policy.capacity, profile),
                    identity,
                    policy: policy.clone(),
                    profile: name,
                    racks: HashMap::new(),
                    lanes: Vec::new(),
                    next_lane: 0,
                    seq: 0,
                    report,
                    status,
                }),
            }),
        }
    }

    /// Waits until `payload` bytes may be sent on a lane, and returns how long
    /// that took. Ask for at most [`Pacer::chunk`] bytes at a time: what is
    /// granted at once is sent at once, and tenants queue behind it.
    pub fn acquire(&self, payload: usize, class: Class) -> Duration {
        self.shared.bucket.acquire(self.on_wire(payload), class)
    }

    /// Like [`Pacer::acquire`] for threads that have something else to do
    /// meanwhile.
    ///
    /// # Errors
    /// How long to wait before asking again.
    pub fn try_acquire(&self, payload: usize, class: Class) -> Result<(), Duration> {
        self.shared.bucket.try_acquire(self.on_wire(payload), class)
    }

    /// Takes the budget for `payload` bytes that are sent in any case, as a debt.
    pub fn overdraw(&self, payload: usize, class: Class) {
        self.shared.bucket.overdraw(self.on_wire(payload), class);
    }

    /// Payload to ask for, and to hand to the socket, at once: a third of a
    /// millisecond's worth, so that a tenant's packet waits no longer for it.
    pub fn chunk(&self, class: Class) -> usize {
        let rates = self.shared.bucket.rates();
        let rate = match class {
            Class::Precopy => rates.precopy,
            Class::StopCopy => rates.stop_copy,
        };
        ((rate / 3000.0) as usize).clamp(8 << 10, 256 << 10) & !4095
    }

    /// What stop-and-copy may send now, payload bytes per second.
    pub fn stop_copy_rate(&self) -> f64 {
        let rates = self.shared.bucket.rates();
        rates.stop_copy.max(rates.precopy) / FULL_FRAMES
    }

    /// For `SO_MAX_PACING_RATE` on every lane, bytes per second: what the core
    /// link carries, so that TCP itself never sends a burst faster than that.
    pub fn max_rate(&self) -> u64 {
        self.shared.lock().policy.capacity as u64
    }

    /// Watches a lane's socket (its own descriptor is made for this) until the
    /// returned guard is dropped. The connection closes only after that.
    ///
    /// # Errors
    /// `socket` is no TCP socket, or there are no descriptors left.
    pub fn watch_lane(&self, socket: BorrowedFd<'_>) -> io::Result<LaneWatch> {
        let last = TcpInfo::read(socket)?;
        let socket = socket.try_clone_to_owned()?;
        let mut inner = self.shared.lock();
        inner.next_lane += 1;
        let id = inner.next_lane;
        inner.lanes.push(Lane { id, socket, last });
        Ok(LaneWatch {
            id,
            shared: Arc::downgrade(&self.shared),
        })
    }

    /// Follows another profile.
    pub fn set_profile(&self, profile: ProfileName) {
        let mut inner = self.shared.lock();
        inner.profile = profile;
        inner.follow();
    }

    /// Follows a changed policy; the profile in force keeps its name.
    pub fn set_policy(&self, policy: &Policy) {
        let mut inner = self.shared.lock();
        inner.policy = policy.clone();
        inner.follow();
    }

    /// This agent's report, for the agents of its rack and for those that send
    /// to its rack; to be sent every [`Pacer::report_interval`].
    pub fn load_report(&self) -> LoadReport {
        let mut inner = self.shared.lock();
        inner.seq += 1;
        LoadReport {
            seq: inner.seq,
            ..inner.report.clone()
        }
    }

    /// How often to send it.
    pub fn report_interval(&self) -> Duration {
        self.shared.lock().policy.meter.report
    }

    /// Takes in another agent's report. This agent's own is ignored.
    ///
    /// # Errors
    /// The report cannot be: close the connection it came by.
    pub fn receive(&self, report: LoadReport) -> Result<(), ReportError> {
        let now = self.shared.epoch.elapsed();
        let mut inner = self.shared.lock();
        if report.host == inner.identity.host && report.rack == inner.identity.rack {
            return Ok(());
        }
        if !inner.racks.contains_key(&report.rack) && inner.racks.len() >= MAX_RACKS {
            return Err(ReportError::TooMany);
        }
        let rack = inner.racks.entry(report.rack.clone()).or_default();
        rack.receive(report, now)
    }

    /// What the pacer does now.
    pub fn status(&self) -> PacerStatus {
        self.shared.lock().status.clone()
    }

    /// What was granted so far, in bytes on the wire.
    pub fn drawn(&self) -> Drawn {
        self.shared.bucket.drawn()
    }

    /// Lets everything through from now on; for the agent's end.
    pub fn close(&self) {
        self.shared.bucket.close();
    }

    fn on_wire(&self, payload: usize) -> u64 {
        let factor = self.shared.wire_factor.load(Ordering::Relaxed);
        ((payload as u128 * u128::from(factor)) >> 16) as u64
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here is left half changed by a panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn to_fixed(factor: f64) -> u32 {
    (factor * 65_536.0).round() as u32
}

impl Inner {
    fn follow(&mut self) {
        let profile: Profile = *self.policy.profile(self.profile);
        self.control.set(self.policy.capacity, profile);
        self.status.profile = self.profile;
        self.status.capacity = self.policy.capacity;
    }

    /// What the lanes feel, since the last time.
    fn feel(&mut self) -> Option<LaneSignal> {
        let (mut queue, mut again, mut sent) = (None::<Duration>, 0, 0);
        for lane in &mut self.lanes {
            // A socket that is gone tells nothing; its lane drops the watch.
            let Ok(info) = TcpInfo::read(lane.socket.as_fd()) else {
                continue;
            };
            again += info.retransmits.saturating_sub(lane.last.retransmits);
            sent += info.data_segments.saturating_sub(lane.last.data_segments);
            lane.last = info;
            if info.idle < LANE_IDLE {
                // All leave by the same core link, so what only one of them
                // feels is not its queue.
                queue = Some(queue.map_or(info.queue(), |least| least.min(info.queue())));
            }
        }
        queue.map(|queue| LaneSignal {
            queue,
            retransmits: f64::from(again) / f64::from(sent.max(20)),
        })
    }
}

/// What the thread remembers from one look to the next.
struct Last {
    at: Instant,
    counters: Counters,
    drawn: Drawn,
    /// Since the wire factor was last corrected.
    learn_from: (Drawn, u64),
    stood_still: Option<Instant>,
}

fn run(shared: &Weak<Shared>, mut meter: Option<Box<dyn Measure>>) {
    let mut last: Option<Last> = None;
    loop {
        let Some(strong) = shared.upgrade() else {
            return;
        };
        strong.look(&mut meter, &mut last);
        drop(strong);
        thread::sleep(TICK);
    }
}

impl Shared {
    /// One turn: read, decide, set.
    fn look(&self, meter: &mut Option<Box<dyn Measure>>, last: &mut Option<Last>) {
        let at = Instant::now();
        let counted = meter.as_mut().map(|meter| meter.counters());
        let drawn = self.bucket.drawn();
        let waiting = self.bucket.waiting();
        let mut inner = self.lock();
        let counters = match counted {
            Some(Ok(counters)) => Some(counters),
            Some(Err(error)) => {
                if inner.status.unmetered.is_none() {
                    tracing::error!(%error, "the meter cannot be read: only the floor is sent");
                }
                inner.status.unmetered = Some(error.to_string());
                None
            }
            None => {
                inner.status.unmetered = Some("no meter is attached".into());
                None
            }
        };
        let lost_meter = meter.is_some() && counters.is_none();
        if counters.is_some() {
            inner.status.unmetered = None;
        }
        let previous = last.get_or_insert_with(|| Last {
            at,
            counters: counters.unwrap_or_default(),
            drawn,
            learn_from: (drawn, migration_bytes(&counters.unwrap_or_default())),
            stood_still: None,
        });
        let seconds = (at - previous.at).as_secs_f64().max(1e-3);
        let capacity = inner.policy.capacity;
        let own = match counters {
            Some(counters) => {
                self.learn(previous, &counters, drawn);
                let tenant = |c: &Counters| c.get(Direction::Egress, false, false).bytes;
                let since = |of: &dyn Fn(&Counters) -> u64| {
                    of(&counters).saturating_sub(of(&previous.counters)) as f64 / seconds
                };
                Flow {
                    migration: since(&migration_bytes),
                    tenant: since(&tenant),
                }
            }
            // The load is not known any more: reckon with a full link.
            None if lost_meter => Flow {
                migration: 0.0,
                tenant: capacity,
            },
            None => Flow::default(),
        };

        let stop_drawn = drawn.stop_copy_bytes - previous.drawn.stop_copy_bytes;
        if waiting.1 > 0 || stop_drawn > 0 {
            previous.stood_still = Some(at);
        }
        // A moment longer, so that others do not take the link between chunks.
        let stop_copy = previous
            .stood_still
            .is_some_and(|since| at - since < TICK * 2);
        let precopy_drawn = drawn.precopy_bytes - previous.drawn.precopy_bytes;
        let used = (precopy_drawn + stop_drawn) as f64 / seconds;
        let held_back = drawn.held_back > previous.drawn.held_back || waiting.0 + waiting.1 > 0;
        let wanted = if held_back {
            capacity
        } else {
            (used * 1.25).min(capacity)
        };

        let now = at.saturating_duration_since(self.epoch);
        let patience = Patience::for_interval(inner.policy.meter.report);
        let lanes = inner.feel();
        let (mut inbound, mut ours) = (None::<Inbound>, Default::default());
        let own_rack = inner.identity.rack.clone();
        inner.racks.retain(|name, rack| {
            let sum = rack.sum(now, patience, capacity);
            if *name == own_rack {
                ours = sum;
                return true;
            }
            if sum.agents > 0 {
                let flow = sum.ingress;
                let fuller =
                    |other: Inbound| flow.migration + flow.tenant > other.migration + other.tenant;
                if inbound.is_none_or(fuller) {
                    inbound = Some(Inbound {
                        tenant: flow.tenant,
                        migration: flow.migration,
                    });
                }
            }
            sum != Default::default()
        });
        let decision = inner.control.tick(
            now,
            &Observed {
                tenant: own.tenant + ours.egress.tenant,
                used,
                wanted,
                others_wanted: ours.wanted.clone(),
                stop_copy,
                others_stop_copy: ours.stop_copy,
                lanes,
                inbound,
            },
        );
        self.bucket.set_rates(decision.rates);

        inner.status.tenant = own.tenant + ours.egress.tenant;
        inner.status.migration = own.migration.max(used) + ours.egress.migration;
        inner.status.rate = decision.rates.precopy;
        inner.status.used = used;
        inner.status.limit = decision.limit;
        inner.status.queue = lanes.unwrap_or_default().queue;
        inner.status.agents = ours.agents;

        let load = |direction| {
            let counters = counters.unwrap_or_default();
            Load {
                migration: counters.get(direction, false, true).bytes,
                tenant: counters.get(direction, false, false).bytes,
            }
        };
        inner.report.at_us = now.as_micros() as u64;
        inner.report.metered = counters.is_some();
        if counters.is_some() {
            inner.report.egress = load(Direction::Egress);
            inner.report.ingress = load(Direction::Ingress);
        }
        inner.report.wanted = wanted as u64;
        inner.report.stop_copy = stop_copy;
        inner.report.lanes = inner.lanes.len().min(u16::MAX.into()) as u16;

        previous.at = at;
        previous.drawn = drawn;
        if let Some(counters) = counters {
            previous.counters = counters;
        }
    }

    /// Corrects the factor from payload to bytes on the wire.
    fn learn(&self, last: &mut Last, counters: &Counters, drawn: Drawn) {
        let (from, migration_from) = last.learn_from;
        let granted =
            drawn.precopy_bytes + drawn.stop_copy_bytes - from.precopy_bytes - from.stop_copy_bytes;
        if granted < LEARN_BYTES {
            return;
        }
        let counted = migration_bytes(counters).saturating_sub(migration_from);
        last.learn_from = (drawn, migration_bytes(counters));
        let old = f64::from(self.wire_factor.load(Ordering::Relaxed)) / 65_536.0;
        // Outside this something else is counted too, or not everything is.
        let seen = (old * counted as f64 / granted as f64).clamp(1.0, 1.25);
        let new = old + 0.25 * (seen - old);
        self.wire_factor.store(to_fixed(new), Ordering::Relaxed);
    }
}

/// Migration's bytes out of this host across the core.
fn migration_bytes(counters: &Counters) -> u64 {
    counters.get(Direction::Egress, false, true).bytes
}
