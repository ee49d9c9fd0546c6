//! The pacer of one agent: a small thread that looks, decides and sets the
//! bucket's rates, and the handle that lanes, network and operator share.

mod turn;

use super::bucket::{Drawn, Rates, TokenBucket};
use super::control::{Controller, LaneSignal, Limit};
use super::meter::Measure;
use super::policy::{Policy, Profile, ProfileName};
use super::report::{Load, LoadReport, RackLoad, ReportError};
use super::tcp_info::TcpInfo;
use crate::types::Class;
use serde::Serialize;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

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
/// From its announcement to its first bytes a migration takes less than this,
const BEGINS_SOON: Duration = Duration::from_millis(400);
/// and a switchover to its guest's standing still.
const STANDS_STILL_SOON: Duration = Duration::from_millis(60);

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
    /// Wakes whoever sends this agent's reports.
    news: Notify,
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
    announced: Announced,
}

/// What was announced, and when, on this pacer's clock.
#[derive(Debug, Default)]
struct Announced {
    begins: Option<Duration>,
    stands_still: Option<Duration>,
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
            .spawn(move || turn::run(&shared, meter))?;
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
                    announced: Announced::default(),
                }),
                news: Notify::new(),
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
        let own_rack = report.rack == inner.identity.rack;
        let rack = inner.racks.entry(report.rack.clone()).or_default();
        let stands_still = rack.receive(report, now)?;
        if stands_still && own_rack && !inner.report.stop_copy {
            // The next turn reckons it properly; the guest does not wait for it.
            let rates = self.shared.bucket.rates();
            let floor = inner.control.profile().floor * inner.policy.capacity;
            self.shared.bucket.set_rates(Rates {
                precopy: rates.precopy.min(floor),
                ..rates
            });
        }
        Ok(())
    }

    /// Tells the other agents of the rack *before* it happens that this one
    /// begins to send, or that a guest of it is about to stand still, so that
    /// they make room in time and the link is not filled twice for as long as
    /// a report takes.
    pub fn announce(&self, class: Class) {
        let now = self.shared.epoch.elapsed();
        {
            let mut inner = self.shared.lock();
            match class {
                Class::Precopy => {
                    inner.announced.begins = Some(now);
                    inner.report.wanted = inner.policy.capacity as u64;
                }
                Class::StopCopy => {
                    inner.announced.stands_still = Some(now);
                    inner.report.stop_copy = true;
                }
            }
            inner.report.at_us = now.as_micros() as u64;
        }
        self.shared.news.notify_one();
    }

    /// Returns when there is something that other agents should know at once,
    /// and not only with the next regular report.
    pub async fn news(&self) {
        self.shared.news.notified().await;
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
