//! The control law against a simulated core link: a shaper with one queue,
//! tenants of several kinds, agents that see what real ones see (reports 50 ms
//! old, a look every 25 ms). Time goes in steps of a millisecond.

use super::control::{Controller, LaneSignal, Observed};
use super::policy::{ProfileName, parse};
use std::time::Duration;

const CAPACITY: f64 = 50e6;
const QUEUE_BYTES: f64 = 1e6;
const STEP: f64 = 0.001;
const TICK_MS: u64 = 25;
const REPORT_MS: u64 = 50;

/// A tenant's demand.
#[derive(Clone, Copy)]
enum Tenant {
    /// This rate from one time to another, seconds.
    Steady { rate: f64, from: f64, to: f64 },
    /// As much as it gets: grows until the queue overflows, then backs off.
    Greedy { rate: f64, from: f64 },
}

struct Agent {
    control: Controller,
    /// Needs at most this.
    demand: f64,
    /// Ends, seconds.
    until: f64,
    rate: f64,
    /// What the others know of it.
    told_wanted: f64,
}

struct Sim {
    tenants: Vec<Tenant>,
    /// Whether agents' meters see the tenants.
    metered: bool,
    agents: Vec<Agent>,
    queue: f64,
}

/// One millisecond of it.
struct Step {
    at: f64,
    tenant: f64,
    migration: Vec<f64>,
    queue_ms: f64,
}

impl Sim {
    fn new(profile: ProfileName, tenants: &[Tenant], metered: bool, demands: &[(f64, f64)]) -> Sim {
        let policy = parse("[core_link]\ncapacity_mbit = 400\n").unwrap();
        let agents = demands.iter().map(|&(demand, until)| Agent {
            control: Controller::new(CAPACITY, *policy.profile(profile)),
            demand,
            until,
            rate: 0.0,
            told_wanted: 0.0,
        });
        Sim {
            tenants: tenants.to_vec(),
            metered,
            agents: agents.collect(),
            queue: 0.0,
        }
    }

    fn run(mut self, seconds: f64) -> Vec<Step> {
        let mut steps: Vec<Step> = Vec::new();
        for ms in 0..(seconds / STEP) as u64 {
            let at = ms as f64 * STEP;
            if ms % REPORT_MS == 0 {
                for agent in &mut self.agents {
                    agent.told_wanted = wanted(agent, at);
                }
            }
            if ms % TICK_MS == 0 {
                self.look(at, &steps);
            }
            steps.push(self.step(at));
        }
        steps
    }

    fn look(&mut self, at: f64, steps: &[Step]) {
        let recent = &steps[steps.len().saturating_sub(TICK_MS as usize)..];
        let tenant = recent.iter().map(|s| s.tenant).sum::<f64>() / TICK_MS as f64;
        // The kernel's smoothed time lags a little.
        let queue_ms = recent.iter().map(|s| s.queue_ms).sum::<f64>() / TICK_MS as f64;
        let told: Vec<f64> = self.agents.iter().map(|agent| agent.told_wanted).collect();
        for (i, agent) in self.agents.iter_mut().enumerate() {
            let mut others = told.clone();
            others.remove(i);
            let used = agent.rate.min(wanted(agent, at));
            let decision = agent.control.tick(
                Duration::from_secs_f64(at),
                &Observed {
                    tenant: if self.metered { tenant } else { 0.0 },
                    used,
                    wanted: wanted(agent, at),
                    others_wanted: others,
                    lanes: (used > 0.0).then(|| LaneSignal {
                        queue: Duration::from_secs_f64(queue_ms / 1e3),
                        retransmits: 0.0,
                    }),
                    ..Observed::default()
                },
            );
            agent.rate = decision.rates.precopy;
        }
    }

    fn step(&mut self, at: f64) -> Step {
        let full = self.queue >= QUEUE_BYTES;
        let mut tenant = 0.0;
        for demand in &mut self.tenants {
            tenant += match demand {
                Tenant::Steady { rate, from, to } if (*from..*to).contains(&at) => *rate,
                Tenant::Greedy { rate, from } if at >= *from => {
                    *rate = if full {
                        *rate * 0.7
                    } else {
                        *rate + CAPACITY * STEP
                    };
                    // Its window, not the link, is what a queue slows down.
                    *rate = rate.min(CAPACITY * 1.05);
                    *rate
                }
                _ => 0.0,
            };
        }
        let migration: Vec<f64> = self
            .agents
            .iter()
            .map(|agent| agent.rate.min(wanted(agent, at)))
            .collect();
        let offered = tenant + migration.iter().sum::<f64>();
        self.queue = (self.queue + (offered - CAPACITY) * STEP).clamp(0.0, QUEUE_BYTES);
        Step {
            at,
            tenant,
            migration,
            queue_ms: self.queue / CAPACITY * 1e3,
        }
    }
}

fn wanted(agent: &Agent, at: f64) -> f64 {
    if at < agent.until { agent.demand } else { 0.0 }
}

fn between(steps: &[Step], from: f64, to: f64) -> impl Iterator<Item = &Step> {
    steps
        .iter()
        .filter(move |step| (from..to).contains(&step.at))
}

/// Mean of an agent's rate, as a share of the capacity.
fn share(steps: &[Step], agent: usize, from: f64, to: f64) -> f64 {
    let (sum, n) = between(steps, from, to).fold((0.0, 0), |(sum, n), step| {
        (sum + step.migration[agent], n + 1)
    });
    sum / n as f64 / CAPACITY
}

const ALWAYS: (f64, f64) = (CAPACITY, f64::INFINITY);

#[test]
fn an_idle_link_is_full_after_a_moment_and_has_no_queue() {
    let steps = Sim::new(ProfileName::Normal, &[], true, &[ALWAYS]).run(3.0);
    assert!(share(&steps, 0, 0.3, 3.0) >= 0.92);
    assert!(steps.iter().all(|step| step.queue_ms < 0.1));
}

#[test]
fn a_tenant_that_begins_has_its_rate_within_the_reaction_time() {
    for metered in [true, false] {
        let tenant = Tenant::Steady {
            rate: 0.5 * CAPACITY,
            from: 2.0,
            to: 4.0,
        };
        let steps = Sim::new(ProfileName::Normal, &[tenant], metered, &[ALWAYS]).run(8.0);
        assert!(
            between(&steps, 2.4, 4.0).all(|s| s.queue_ms < 8.0),
            "metered {metered}"
        );
        let mean = between(&steps, 2.4, 4.0).map(|s| s.queue_ms).sum::<f64>() / 1600.0;
        assert!(
            mean < 1.0,
            "metered {metered}: {mean} ms of queue on the mean"
        );
        assert!(share(&steps, 0, 2.5, 4.0) > 0.25, "and migration the rest");
        assert!(
            share(&steps, 0, 7.0, 8.0) > 0.92,
            "and all of it afterwards"
        );
    }
}

#[test]
fn a_greedy_tenant_leaves_the_floor_and_nothing_swings() {
    for metered in [true, false] {
        let tenant = Tenant::Greedy {
            rate: 0.01 * CAPACITY,
            from: 1.0,
        };
        let steps = Sim::new(ProfileName::Normal, &[tenant], metered, &[ALWAYS]).run(8.0);
        let migration = share(&steps, 0, 3.0, 8.0);
        assert!(
            (0.039..0.08).contains(&migration),
            "metered {metered}: {migration}"
        );
        let most = between(&steps, 3.0, 8.0)
            .map(|s| s.migration[0])
            .fold(0.0, f64::max);
        assert!(
            most < 0.2 * CAPACITY,
            "metered {metered}: swings up to {most}"
        );
    }
}

#[test]
fn background_gives_way_further_than_urgent() {
    let tenant = Tenant::Steady {
        rate: 0.8 * CAPACITY,
        from: 1.0,
        to: 9.0,
    };
    let shares = [
        ProfileName::Background,
        ProfileName::Normal,
        ProfileName::Urgent,
    ]
    .map(|name| {
        share(
            &Sim::new(name, &[tenant], true, &[ALWAYS]).run(5.0),
            0,
            2.0,
            5.0,
        )
    });
    assert!(shares[0] < shares[1] && shares[1] < shares[2], "{shares:?}");
}

#[test]
fn two_agents_divide_the_budget_by_need() {
    let demands = [(0.2 * CAPACITY, 4.0), ALWAYS];
    let steps = Sim::new(ProfileName::Normal, &[], true, &demands).run(6.0);
    assert!((share(&steps, 0, 1.0, 4.0) - 0.2).abs() < 0.01);
    assert!((share(&steps, 1, 1.0, 4.0) - 0.76).abs() < 0.02);
    assert!(
        share(&steps, 1, 4.5, 6.0) > 0.92,
        "what the other leaves is used"
    );
    let steps = Sim::new(ProfileName::Normal, &[], true, &[ALWAYS, ALWAYS]).run(3.0);
    let both = [share(&steps, 0, 1.0, 3.0), share(&steps, 1, 1.0, 3.0)];
    assert!(
        (both[0] - 0.48).abs() < 0.02 && (both[1] - 0.48).abs() < 0.02,
        "{both:?}"
    );
}
