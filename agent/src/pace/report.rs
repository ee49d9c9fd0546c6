//! What the agents of a rack tell each other, and what each makes of it: the
//! load of the core link, and who needs how much of the migration budget.
//!
//! Reports come from other machines. Their numbers are bounded here, their
//! counters only ever used as differences, and an agent that falls silent is
//! first believed to go on as before and then forgotten.

use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::time::Duration;

/// Bytes across the core, in one direction, since the reporter's meter began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Between agents' data ports.
    pub migration: u64,
    /// Everything else.
    pub tenant: u64,
}

/// One agent's report, sent every `meter.report_ms` to the agents of its rack,
/// and to those that send to its rack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Name of the reporting host.
    pub host: String,
    /// Name of its rack.
    pub rack: String,
    /// Drawn when the agent started: counters of another start do not compare.
    pub boot: u64,
    /// Counts the reports of this start.
    pub seq: u64,
    /// The reporter's own clock when it read its counters, microseconds.
    pub at_us: u64,
    /// Whether the agent has a meter; without, the loads are zero.
    pub metered: bool,
    /// Out of the host's uplinks across the core.
    pub egress: Load,
    /// In through the host's uplinks across the core.
    pub ingress: Load,
    /// Migration rate the agent would use, bytes on the wire per second.
    pub wanted: u64,
    /// A guest of this agent stands still and its last pages are being sent.
    pub stop_copy: bool,
    /// Lanes that send now.
    pub lanes: u16,
}

/// Longest name in a report.
const MAX_NAME: usize = 255;
/// Most agents kept of one rack.
const MAX_AGENTS: usize = 1024;
/// Reports that came this much closer together than counters can be compared.
const MIN_INTERVAL_US: u64 = 1000;

/// Why a report was not used. The connection it came by is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// A name of no length or of too much.
    #[error("a load report with a host or rack name of 0 or more than {MAX_NAME} bytes")]
    Name,
    /// More agents than a rack can have.
    #[error("load reports from more than {MAX_AGENTS} agents of one rack")]
    TooMany,
}

/// Bytes per second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Flow {
    /// Between agents' data ports.
    pub migration: f64,
    /// Everything else.
    pub tenant: f64,
}

/// The other agents of one rack, by what they last reported.
#[derive(Debug, Default)]
pub struct RackLoad {
    agents: HashMap<String, Agent>,
}

#[derive(Debug)]
struct Agent {
    last: LoadReport,
    /// On our clock.
    received: Duration,
    egress: Flow,
    ingress: Flow,
}

/// What the agents of a rack do together, this one left out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RackSum {
    /// Out of the rack across the core.
    pub egress: Flow,
    /// Into the rack across the core.
    pub ingress: Flow,
    /// Migration rate each of them would use; those that are silent want none.
    pub wanted: Vec<f64>,
    /// Agents with a guest that stands still.
    pub stop_copy: usize,
    /// Agents counted here.
    pub agents: usize,
}

/// How long an agent is believed after its last report.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// After this its share of the migration budget is free for others.
    pub silent: Duration,
    /// After this its tenants' load, too, is no longer assumed.
    pub forgotten: Duration,
}

impl Patience {
    /// For reports sent every `interval`.
    pub fn for_interval(interval: Duration) -> Self {
        Patience {
            silent: interval * 5,
            forgotten: interval * 100,
        }
    }
}

impl RackLoad {
    /// Takes in a report that arrived `now`. One that is older than what is
    /// known is ignored. Returns whether a guest of that agent now stands
    /// still and did not before: others make room for it at once.
    ///
    /// # Errors
    /// See [`ReportError`].
    pub fn receive(&mut self, report: LoadReport, now: Duration) -> Result<bool, ReportError> {
        let named = |name: &str| !name.is_empty() && name.len() <= MAX_NAME;
        if !named(&report.host) || !named(&report.rack) {
            return Err(ReportError::Name);
        }
        let Some(agent) = self.agents.get_mut(&report.host) else {
            if self.agents.len() >= MAX_AGENTS {
                return Err(ReportError::TooMany);
            }
            let agent = Agent {
                received: now,
                egress: Flow::default(),
                ingress: Flow::default(),
                last: report,
            };
            let stands_still = agent.last.stop_copy;
            self.agents.insert(agent.last.host.clone(), agent);
            return Ok(stands_still);
        };
        if agent.last.boot == report.boot && report.seq <= agent.last.seq {
            return Ok(false);
        }
        let stands_still = report.stop_copy && !agent.last.stop_copy;
        if agent.last.boot == report.boot {
            let passed_us = report.at_us.saturating_sub(agent.last.at_us);
            if passed_us < MIN_INTERVAL_US {
                // Too short for a rate; what it says of itself counts.
                agent.last.seq = report.seq;
                agent.last.wanted = report.wanted;
                agent.last.stop_copy = report.stop_copy;
                return Ok(stands_still);
            }
            let seconds = passed_us as f64 / 1e6;
            agent.egress = flow(agent.last.egress, report.egress, seconds);
            agent.ingress = flow(agent.last.ingress, report.ingress, seconds);
        }
        agent.received = now;
        agent.last = report;
        Ok(stands_still)
    }

    /// Adds up what is believed `now`. No agent is believed to want or to
    /// carry more than `capacity`.
    pub fn sum(&mut self, now: Duration, patience: Patience, capacity: f64) -> RackSum {
        self.agents
            .retain(|_, agent| now.saturating_sub(agent.received) <= patience.forgotten);
        let mut sum = RackSum::default();
        for agent in self.agents.values() {
            let silent = now.saturating_sub(agent.received) > patience.silent;
            sum.egress.tenant += agent.egress.tenant.min(capacity);
            sum.ingress.tenant += agent.ingress.tenant.min(capacity);
            if silent {
                continue;
            }
            sum.agents += 1;
            sum.egress.migration += agent.egress.migration.min(capacity);
            sum.ingress.migration += agent.ingress.migration.min(capacity);
            sum.wanted.push((agent.last.wanted as f64).min(capacity));
            sum.stop_copy += usize::from(agent.last.stop_copy);
        }
        sum
    }
}

/// Counters that went down tell nothing.
fn flow(before: Load, after: Load, seconds: f64) -> Flow {
    let rate = |before: u64, after: u64| after.saturating_sub(before) as f64 / seconds;
    Flow {
        migration: rate(before.migration, after.migration),
        tenant: rate(before.tenant, after.tenant),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PATIENCE: Patience = Patience {
        silent: Duration::from_millis(250),
        forgotten: Duration::from_secs(5),
    };

    fn report(host: &str, seq: u64, at_ms: u64, tenant: u64) -> LoadReport {
        LoadReport {
            host: host.into(),
            rack: "a".into(),
            boot: 1,
            seq,
            at_us: at_ms * 1000,
            metered: true,
            egress: Load {
                migration: 0,
                tenant,
            },
            ingress: Load::default(),
            wanted: 1000,
            stop_copy: true,
            lanes: 1,
        }
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_guest_that_begins_to_stand_still_is_news_once() {
        let mut rack = RackLoad::default();
        let at = Duration::from_millis(1);
        let mut next = report("h", 1, 10, 0);
        next.stop_copy = false;
        assert_eq!(rack.receive(next.clone(), at), Ok(false));
        // The same moment: too short for a rate, not for the news.
        (next.seq, next.stop_copy) = (2, true);
        assert_eq!(rack.receive(next.clone(), at), Ok(true));
        assert_eq!(rack.sum(at, PATIENCE, 1e9).stop_copy, 1);
        (next.seq, next.at_us) = (3, 60_000);
        assert_eq!(rack.receive(next.clone(), at), Ok(false));
        assert_eq!(rack.receive(next, at), Ok(false));
    }

    #[test]
    fn rates_come_from_the_reporters_own_clock() {
        let mut rack = RackLoad::default();
        rack.receive(report("h", 1, 7000, 100), ms(0)).unwrap();
        // Late on the way: only the sender's clock counts.
        rack.receive(report("h", 2, 7050, 5100), ms(90)).unwrap();
        let sum = rack.sum(ms(100), PATIENCE, 1e9);
        assert_eq!(sum.egress.tenant, 100_000.0);
        assert_eq!(
            (sum.wanted.as_slice(), sum.stop_copy),
            ([1000.0].as_slice(), 1)
        );
    }

    #[test]
    fn a_silent_agent_frees_its_share_and_keeps_its_tenants_for_a_while() {
        let mut rack = RackLoad::default();
        rack.receive(report("h", 1, 0, 0), ms(0)).unwrap();
        rack.receive(report("h", 2, 50, 5000), ms(50)).unwrap();
        let sum = rack.sum(ms(400), PATIENCE, 1e9);
        assert_eq!((sum.agents, sum.wanted.len(), sum.stop_copy), (0, 0, 0));
        assert_eq!(sum.egress.tenant, 100_000.0);
        assert_eq!(rack.sum(ms(6000), PATIENCE, 1e9), RackSum::default());
    }

    #[test]
    fn old_repeated_and_restarted_reports_do_not_disturb() {
        let mut rack = RackLoad::default();
        rack.receive(report("h", 5, 0, 0), ms(0)).unwrap();
        rack.receive(report("h", 6, 50, 5000), ms(50)).unwrap();
        rack.receive(report("h", 6, 50, 9999), ms(51)).unwrap();
        rack.receive(report("h", 4, 900, 77), ms(52)).unwrap();
        let mut restarted = report("h", 1, 3, 0);
        restarted.boot = 2;
        rack.receive(restarted, ms(60)).unwrap();
        assert_eq!(
            rack.sum(ms(60), PATIENCE, 1e9).egress.tenant,
            100_000.0,
            "the load of before is assumed until there are two reports to compare"
        );
    }

    #[test]
    fn what_cannot_be_is_refused_or_bounded() {
        let mut rack = RackLoad::default();
        assert_eq!(
            rack.receive(report("", 1, 0, 0), ms(0)),
            Err(ReportError::Name)
        );
        for i in 0..MAX_AGENTS {
            rack.receive(report(&i.to_string(), 1, 0, 0), ms(0))
                .unwrap();
        }
        assert_eq!(
            rack.receive(report("one more", 1, 0, 0), ms(0)),
            Err(ReportError::TooMany)
        );
        let mut rack = RackLoad::default();
        let mut greedy = report("h", 1, 0, 0);
        greedy.wanted = u64::MAX;
        rack.receive(greedy, ms(0)).unwrap();
        assert_eq!(rack.sum(ms(0), PATIENCE, 1000.0).wanted, [1000.0]);
    }

    proptest! {
        #[test]
        fn any_series_of_reports_sums_up_to_something_finite(
            series in prop::collection::vec((0u64..3, any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()), 0..40)
        ) {
            let mut rack = RackLoad::default();
            for (i, (boot, seq, at_us, tenant, wanted)) in series.into_iter().enumerate() {
                let mut report = report("h", seq, 0, tenant);
                (report.boot, report.at_us, report.wanted) = (boot, at_us, wanted);
                rack.receive(report, ms(i as u64)).unwrap();
                let sum = rack.sum(ms(i as u64), PATIENCE, 50e6);
                prop_assert!((0.0..=50e6).contains(&sum.egress.tenant));
                prop_assert!(sum.wanted.iter().all(|w| (0.0..=50e6).contains(w)));
            }
        }
    }
}
