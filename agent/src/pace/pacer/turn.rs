//! The pacer's thread: one turn reads the meter and the lanes, has the control
//! law decide, and sets the rates.

use super::{BEGINS_SOON, LEARN_BYTES, STANDS_STILL_SOON, Shared, TICK, to_fixed};
use crate::pace::bucket::Drawn;
use crate::pace::control::{Inbound, Observed};
use crate::pace::meter::{Counters, Measure};
use crate::pace::report::{Flow, Load, Patience};
use drover_ebpf::Direction;
use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// What the thread remembers from one look to the next.
struct Last {
    at: Instant,
    counters: Counters,
    drawn: Drawn,
    /// Since the wire factor was last corrected.
    learn_from: (Drawn, u64),
    stood_still: Option<Instant>,
}

pub(super) fn run(shared: &Weak<Shared>, mut meter: Option<Box<dyn Measure>>) {
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
                let rate = |migration| {
                    let before = &previous.counters;
                    let out = Direction::Egress;
                    counters.bytes_since(before, out, false, migration) as f64 / seconds
                };
                Flow {
                    migration: rate(true),
                    tenant: rate(false),
                }
            }
            // The load is not known any more: reckon with a full link.
            None if lost_meter => Flow {
                migration: 0.0,
                tenant: capacity,
            },
            None => Flow::default(),
        };

        let now = at.saturating_duration_since(self.epoch);
        let recently = |announced: Option<Duration>, within: Duration| {
            announced.is_some_and(|then| now.saturating_sub(then) < within)
        };
        let stop_drawn = drawn.stop_copy_bytes - previous.drawn.stop_copy_bytes;
        if waiting.1 > 0 || stop_drawn > 0 {
            previous.stood_still = Some(at);
        }
        // A moment longer, so that others do not take the link between chunks.
        let stop_copy = previous
            .stood_still
            .is_some_and(|since| at - since < TICK * 2)
            || recently(inner.announced.stands_still, STANDS_STILL_SOON);
        let precopy_drawn = drawn.precopy_bytes - previous.drawn.precopy_bytes;
        let used = (precopy_drawn + stop_drawn) as f64 / seconds;
        let held_back = drawn.held_back > previous.drawn.held_back || waiting.0 + waiting.1 > 0;
        let wanted = if held_back || recently(inner.announced.begins, BEGINS_SOON) {
            capacity
        } else {
            (used * 1.25).min(capacity)
        };

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
