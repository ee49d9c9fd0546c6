//! The control law: from what was seen to a rate. Pure, so that it can be
//! tried against simulated links (`sim.rs`).
//!
//! Two limits, and the lower one holds:
//! - the **budget**, from what is *known*: capacity less headroom less what
//!   tenants used lately, never below the floor, divided by need among the
//!   agents of the rack;
//! - the **cap**, from what is *felt*: the lanes' delay and retransmits tell
//!   of queues that no meter explains. It is cut by how much the delay is too
//!   long, and grows by a fixed amount in time while there is none.

use super::bucket::Rates;
use super::policy::Profile;
use serde::Serialize;
use std::collections::VecDeque;
use std::time::Duration;

/// Cuts of the cap are at least this far apart: a cut needs as long to be felt.
const BETWEEN_CUTS: Duration = Duration::from_millis(40);
/// Cuts no further apart are about the same queue.
const ONE_SERIES: Duration = Duration::from_millis(150);
/// One cut leaves at least this share of the rate.
const DEEPEST_CUT: f64 = 0.3;
/// The cap grows at most this much slower after repeated cuts, and the delay
/// is forgotten at this pace.
const MOST_CAUTION: f64 = 16.0;
const FORGET: Duration = Duration::from_millis(750);
/// Of segments, sent again: more is congestion.
const RETRANSMITS: f64 = 0.005;
/// Share of the capacity a migration begins with, and returns to after it has
/// sent nothing for [`RESTART`].
const START: f64 = 0.25;
const RESTART: Duration = Duration::from_secs(1);
/// Readings in a row above the target that make a queue. A busy CPU, where
/// acknowledgements or their reader come late, shows in one or two of them.
const STANDING: usize = 3;
/// The rate that a cut starts from is the highest of about this long: what a
/// busy CPU leaves of it for a moment is not what filled a queue.
const PEAK: Duration = Duration::from_millis(400);
/// Growth a second while it starts: no queue was felt yet.
const START_GROWTH: f64 = 16.0;

/// What an agent sees at one moment.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// Tenants' traffic out of this rack across the core, every agent's
    /// counted, bytes per second.
    pub tenant: f64,
    /// Migration rate this agent uses, bytes per second.
    pub used: f64,
    /// Migration rate this agent would use.
    pub wanted: f64,
    /// The same of the rack's other agents.
    pub others_wanted: Vec<f64>,
    /// A guest of this agent stands still.
    pub stop_copy: bool,
    /// Other agents of the rack with a guest that stands still.
    pub others_stop_copy: usize,
    /// What the lanes feel; `None` while none sends.
    pub lanes: Option<LaneSignal>,
    /// The target rack's side of the core, if its agents report.
    pub inbound: Option<Inbound>,
}

/// What the lanes feel.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LaneSignal {
    /// Time in queues.
    pub queue: Duration,
    /// Share of segments that were sent again since the last look.
    pub retransmits: f64,
}

/// Traffic into a target rack across the core, bytes per second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Inbound {
    /// Tenants'.
    pub tenant: f64,
    /// Migration, from everywhere.
    pub migration: f64,
}

/// What keeps the rate where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// The profile's share of the core link, or its headroom.
    Share,
    /// Tenants use the rest of the core link.
    Tenants,
    /// Other agents' migrations use the rest.
    Agents,
    /// Delay or loss that no meter explains.
    Queue,
    /// The target rack's side of the core.
    Inbound,
    /// The profile's floor: nothing else would be left.
    Floor,
}

/// A rate, and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    /// What the bucket hands out.
    pub rates: Rates,
    /// What all agents of the rack may use together.
    pub budget: f64,
    /// Tenants' load that was reckoned with.
    pub tenant: f64,
    /// What the rate hangs on.
    pub limit: Limit,
}

/// The law and what it remembers.
#[derive(Debug, Clone)]
pub struct Controller {
    capacity: f64,
    profile: Profile,
    cap: f64,
    starting: bool,
    last_tick: Option<Duration>,
    last_cut: Option<Duration>,
    /// How much slower than the profile says the cap grows: doubled by each
    /// cut, because somebody there wants the link, and forgotten with time.
    caution: f64,
    last_sent: Duration,
    /// The last readings, newest first.
    queues: [Duration; STANDING],
    felt: usize,
    /// Rate used lately, decaying.
    peak: f64,
    tenants: VecDeque<(Duration, f64)>,
}

impl Controller {
    /// For a core link of `capacity` wire bytes per second each way.
    pub fn new(capacity: f64, profile: Profile) -> Self {
        Controller {
            capacity,
            profile,
            cap: capacity * START,
            starting: true,
            last_tick: None,
            last_cut: None,
            caution: 1.0,
            last_sent: Duration::ZERO,
            queues: [Duration::ZERO; STANDING],
            felt: 0,
            peak: 0.0,
            tenants: VecDeque::new(),
        }
    }

    /// Follows another profile or capacity from the next tick on.
    pub fn set(&mut self, capacity: f64, profile: Profile) {
        self.capacity = capacity;
        self.profile = profile;
    }

    /// The profile in force.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Decides, some tens of milliseconds after the last time. `now` may
    /// count from anywhere, but only forward.
    pub fn tick(&mut self, now: Duration, seen: &Observed) -> Decision {
        let passed = now.saturating_sub(self.last_tick.unwrap_or(now));
        self.last_tick = Some(now);

        let Profile {
            share,
            floor,
            headroom,
            stop_copy,
            ..
        } = self.profile;
        let floor = floor * self.capacity;
        let share = (share * self.capacity).max(floor);

        let tenant = self.reckon_tenants(now, seen.tenant);
        let left = self.capacity * (1.0 - headroom) - tenant;
        let budget = left.clamp(floor, share);
        let part = if seen.others_stop_copy > 0 && !seen.stop_copy {
            // A guest elsewhere stands still: its pages go first.
            own_part(floor, seen.wanted, &seen.others_wanted)
        } else {
            own_part(budget, seen.wanted, &seen.others_wanted)
        };
        let inbound = seen
            .inbound
            .map_or(f64::INFINITY, |inbound| self.inbound(inbound, seen.used));
        self.feel(now, passed, seen, floor, share);

        // Every agent keeps its part of the floor, whatever the signals say.
        let own_floor = own_part(floor, seen.wanted, &seen.others_wanted).min(part);
        let rate = part.min(self.cap).min(inbound).max(own_floor);
        let limit = if rate <= own_floor && own_floor < share {
            Limit::Floor
        } else if self.cap < part.min(inbound) {
            Limit::Queue
        } else if inbound < part {
            Limit::Inbound
        } else if part < budget * 0.99 {
            Limit::Agents
        } else if budget < share && tenant > 0.01 * self.capacity {
            Limit::Tenants
        } else {
            Limit::Share
        };
        // Guests that stand still get all that tenants leave, and where that
        // is little, what the profile grants them against tenants.
        let standing = seen.others_stop_copy + usize::from(seen.stop_copy);
        let for_standing = left.max(stop_copy * self.capacity) / standing.max(1) as f64;
        Decision {
            rates: Rates {
                precopy: rate,
                stop_copy: rate.max(for_standing),
            },
            budget,
            tenant,
            limit,
        }
    }

    /// The most that tenants used within the reaction time, and as much more
    /// as they grew since the last look: a flow that speeds up goes on.
    fn reckon_tenants(&mut self, now: Duration, tenant: f64) -> f64 {
        let before = self.tenants.back().map_or(tenant, |&(_, rate)| rate);
        let growth = (tenant - before).max(0.0);
        self.tenants.push_back((now, tenant));
        let oldest = now.saturating_sub(self.profile.reaction);
        while self.tenants.front().is_some_and(|&(at, _)| at < oldest) {
            self.tenants.pop_front();
        }
        let most = self
            .tenants
            .iter()
            .fold(0.0, |most, &(_, rate)| rate.max(most));
        most.max(tenant + growth).min(self.capacity)
    }

    /// The rate that brings all migration into the target rack to its budget:
    /// others' lanes go there too, so go half the way each time.
    fn inbound(&self, inbound: Inbound, used: f64) -> f64 {
        let budget = self.capacity * (1.0 - self.profile.headroom) - inbound.tenant;
        let room = budget - inbound.migration;
        (used + 0.5 * room).max(self.profile.floor * self.capacity)
    }

    /// Moves the cap.
    fn feel(&mut self, now: Duration, passed: Duration, seen: &Observed, floor: f64, share: f64) {
        let Some(target) = self.profile.queue else {
            self.cap = share;
            return;
        };
        if seen.used > floor * 0.1 {
            self.last_sent = now;
        } else if now.saturating_sub(self.last_sent) > RESTART {
            self.cap = (self.capacity * START).clamp(floor, share);
            self.starting = true;
            self.caution = 1.0;
            self.felt = 0;
            return;
        }
        let signal = seen.lanes.unwrap_or_default();
        let late = signal.queue > target;
        let lost = signal.retransmits > RETRANSMITS;
        self.felt = if late || lost { self.felt + 1 } else { 0 };
        // A queue is what all of them have in common.
        self.queues.rotate_right(1);
        self.queues[0] = signal.queue;
        let queue = self.queues.into_iter().min().unwrap_or_default();
        let fade = passed.as_secs_f64() / PEAK.as_secs_f64();
        self.peak = seen.used.max(self.peak * (1.0 - fade.min(1.0)));
        let since_cut = self.last_cut.map(|at| now.saturating_sub(at));
        if self.felt >= STANDING {
            self.starting = false;
            if since_cut.is_none_or(|since| since >= BETWEEN_CUTS) {
                let keep = (target.as_secs_f64() / queue.as_secs_f64().max(1e-6))
                    .clamp(DEEPEST_CUT, if lost { 0.7 } else { 0.9 });
                // The first of a series goes half the way: it may be chance.
                let keep = if since_cut.is_none_or(|since| since > ONE_SERIES) {
                    (1.0 + keep) / 2.0
                } else {
                    keep
                };
                self.cap = self.cap.min(self.peak.max(floor)) * keep;
                tracing::debug!(?queue, lost, rate = self.cap, "migration gives way");
                self.last_cut = Some(now);
                self.caution = (self.caution * 2.0).min(MOST_CAUTION);
            }
        } else if self.felt == 0 {
            let passed = passed.as_secs_f64();
            self.cap += if self.starting {
                self.cap * START_GROWTH * passed
            } else {
                self.capacity * passed / (self.profile.probe.as_secs_f64() * self.caution)
            };
            self.caution = (self.caution * (1.0 - passed / FORGET.as_secs_f64())).max(1.0);
        }
        self.cap = self.cap.clamp(floor, share);
        self.starting &= self.cap < share;
    }
}

/// Divides `budget` so that nobody gets more than needed, and those who need
/// more get the same: the level to which the needs are filled.
pub fn fill_level(budget: f64, needs: &[f64]) -> f64 {
    let mut sorted: Vec<f64> = needs.iter().map(|need| need.max(0.0)).collect();
    sorted.sort_by(f64::total_cmp);
    let mut left = budget;
    for (i, need) in sorted.iter().enumerate() {
        let even = left / (sorted.len() - i) as f64;
        if *need >= even {
            return even;
        }
        left -= need;
    }
    f64::INFINITY
}

/// This agent's part of the budget: what it needs, filled up like everyone's,
/// and an even part of what nobody needs, so that it can begin at once.
fn own_part(budget: f64, wanted: f64, others: &[f64]) -> f64 {
    let mut needs = vec![wanted];
    needs.extend_from_slice(others);
    let level = fill_level(budget, &needs);
    let given: f64 = needs.iter().map(|need| need.min(level)).sum();
    let spare = (budget - given).max(0.0) / needs.len() as f64;
    wanted.min(level) + spare
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pace::policy::{ProfileName, parse};
    use proptest::prelude::*;

    const CAPACITY: f64 = 50e6;

    fn profile(name: ProfileName) -> Profile {
        *parse("[core_link]\ncapacity_mbit = 400\n")
            .unwrap()
            .profile(name)
    }

    fn settle(name: ProfileName, seen: &Observed) -> Decision {
        let mut control = Controller::new(CAPACITY, profile(name));
        let mut last = control.tick(Duration::ZERO, seen);
        for i in 1..200 {
            last = control.tick(Duration::from_millis(i * 25), seen);
        }
        last
    }

    #[test]
    fn an_idle_link_is_used_but_for_the_headroom() {
        let seen = Observed {
            wanted: CAPACITY,
            used: CAPACITY * 0.9,
            ..Observed::default()
        };
        let normal = settle(ProfileName::Normal, &seen);
        assert!((normal.rates.precopy / CAPACITY - 0.96).abs() < 1e-9);
        let evacuate = settle(ProfileName::Evacuate, &seen);
        assert_eq!(evacuate.rates.precopy, CAPACITY);
        assert_eq!(evacuate.limit, Limit::Share);
    }

    #[test]
    fn tenants_have_their_rate_and_the_headroom() {
        let seen = Observed {
            tenant: 0.5 * CAPACITY,
            wanted: CAPACITY,
            used: 0.4 * CAPACITY,
            ..Observed::default()
        };
        let decision = settle(ProfileName::Normal, &seen);
        assert!((decision.rates.precopy / CAPACITY - 0.46).abs() < 1e-9);
        assert_eq!(decision.limit, Limit::Tenants);
    }

    #[test]
    fn the_floor_holds_against_tenants_and_queues() {
        let seen = Observed {
            tenant: CAPACITY,
            wanted: CAPACITY,
            used: 0.04 * CAPACITY,
            lanes: Some(LaneSignal {
                queue: Duration::from_millis(20),
                retransmits: 0.1,
            }),
            ..Observed::default()
        };
        for name in ProfileName::ALL {
            let decision = settle(name, &seen);
            let floor = profile(name).floor * CAPACITY;
            assert!((decision.rates.precopy - floor).abs() < 1.0, "{name}");
        }
    }

    #[test]
    fn standing_guests_share_the_stop_and_copy_rate() {
        let seen = Observed {
            tenant: CAPACITY,
            wanted: CAPACITY,
            stop_copy: true,
            others_stop_copy: 1,
            ..Observed::default()
        };
        let decision = settle(ProfileName::Normal, &seen);
        assert!((decision.rates.stop_copy / CAPACITY - 0.30).abs() < 1e-9);
    }

    #[test]
    fn a_guest_that_stands_still_elsewhere_goes_first() {
        let seen = Observed {
            wanted: CAPACITY,
            used: 0.4 * CAPACITY,
            others_wanted: vec![CAPACITY],
            others_stop_copy: 1,
            ..Observed::default()
        };
        let decision = settle(ProfileName::Normal, &seen);
        assert!((decision.rates.precopy / CAPACITY - 0.02).abs() < 1e-9);
    }

    #[test]
    fn a_standing_guest_has_all_that_tenants_leave() {
        let seen = Observed {
            tenant: 0.25 * CAPACITY,
            wanted: CAPACITY,
            used: 0.1 * CAPACITY,
            lanes: Some(LaneSignal {
                queue: Duration::from_millis(20),
                retransmits: 0.0,
            }),
            stop_copy: true,
            ..Observed::default()
        };
        let decision = settle(ProfileName::Normal, &seen);
        assert!(decision.rates.precopy < 0.1 * CAPACITY);
        assert!((decision.rates.stop_copy / CAPACITY - 0.71).abs() < 1e-9);
    }

    #[test]
    fn a_queue_nobody_explains_brings_the_rate_down_in_time() {
        let mut control = Controller::new(CAPACITY, profile(ProfileName::Normal));
        let mut seen = Observed {
            wanted: CAPACITY,
            used: CAPACITY * 0.9,
            ..Observed::default()
        };
        for i in 0..40 {
            control.tick(Duration::from_millis(i * 25), &seen);
        }
        seen.lanes = Some(LaneSignal {
            queue: Duration::from_millis(15),
            retransmits: 0.0,
        });
        let mut rate = CAPACITY;
        for i in 40..50 {
            rate = control
                .tick(Duration::from_millis(i * 25), &seen)
                .rates
                .precopy;
            seen.used = rate;
        }
        assert!(rate <= 0.05 * CAPACITY, "after 250 ms: {rate}");
        seen.lanes = Some(LaneSignal::default());
        let back = control.tick(Duration::from_millis(50 * 25), &seen);
        assert!(back.rates.precopy < 0.08 * CAPACITY, "comes back slowly");
    }

    #[test]
    fn a_part_that_is_not_needed_goes_to_those_who_need_it() {
        assert_eq!(fill_level(90.0, &[10.0, 100.0, 100.0]), 40.0);
        assert_eq!(own_part(90.0, 100.0, &[10.0, 100.0]), 40.0);
        assert_eq!(own_part(90.0, 10.0, &[100.0, 100.0]), 10.0);
        // One that begins need not wait for others to hear of it.
        assert_eq!(own_part(90.0, 0.0, &[10.0]), 40.0);
    }

    proptest! {
        #[test]
        fn parts_never_add_up_to_more_than_the_budget(
            budget in 0.0..1e9f64, needs in prop::collection::vec(0.0..1e9f64, 1..20)
        ) {
            let parts: f64 = (0..needs.len()).map(|i| {
                let mut others = needs.clone();
                let own = others.remove(i);
                own_part(budget, own, &others)
            }).sum();
            prop_assert!(parts <= budget * (1.0 + 1e-9) + 1e-6);
            prop_assert!(parts >= budget * (1.0 - 1e-9) - 1e-6, "nothing is left unused");
        }

        #[test]
        fn every_rate_lies_between_floor_and_share(
            tenant in 0.0..2.0f64, used in 0.0..1.0f64, queue_us in 0u64..50_000,
            retransmits in 0.0..1.0f64, gaps in prop::collection::vec(0u64..500, 1..60)
        ) {
            for name in ProfileName::ALL {
                let limits = profile(name);
                let mut control = Controller::new(CAPACITY, limits);
                let mut now = Duration::ZERO;
                for gap in &gaps {
                    now += Duration::from_millis(*gap);
                    let decision = control.tick(now, &Observed {
                        tenant: tenant * CAPACITY, used: used * CAPACITY, wanted: CAPACITY,
                        lanes: Some(LaneSignal { queue: Duration::from_micros(queue_us), retransmits }),
                        ..Observed::default()
                    });
                    let rate = decision.rates.precopy / CAPACITY;
                    prop_assert!(rate >= limits.floor - 1e-9 && rate <= limits.share + 1e-9);
                    prop_assert!(decision.rates.stop_copy >= decision.rates.precopy);
                }
            }
        }
    }
}
