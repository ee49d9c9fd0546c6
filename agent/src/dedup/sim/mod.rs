//! A whole gang, simulated: many hosts, no sockets, one thread, one seed.
//!
//! The code that decides is the real one ([`SourceDedup`], [`ClaimShard`],
//! [`TargetStore`]); the network, the guests and the clock are drawn from a random
//! number generator. Every message may be late, lost, doubled or overtaken; batches
//! are sent again or given up; shards die; holders are slow, without the content,
//! or lie; tags collide; caches and waiting lists have room for next to nothing;
//! VMs fail and are taken out; guests write all the time, on the target too once
//! they run there. Faults end after a while, as in life. Then every VM must arrive:
//! each page equal, and both digests the same.
//!
//! A failing schedule prints its seed. To run just that one:
//! `DROVER_SIM_SEED=<seed> cargo test --release -p drover dedup::sim`;
//! `DROVER_SIM_RUNS=<n>` sets how many are run.
//!
//! [`SourceDedup`]: super::source::SourceDedup
//! [`ClaimShard`]: super::claim::ClaimShard
//! [`TargetStore`]: super::resolve::TargetStore

mod network;
mod vm;
mod world;

use world::{Faults, World};

/// splitmix64: all a schedule needs, the same on every machine.
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xd134_2543_de82_ef95))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number in `0..below`.
    pub(super) fn below(&mut self, below: usize) -> usize {
        (self.next() % below.max(1) as u64) as usize
    }

    pub(super) fn percent(&mut self, chance: u64) -> bool {
        self.next() % 100 < chance
    }

    pub(super) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// Names the seed if the schedule it guards panics.
struct Report(&'static str, u64);

impl Drop for Report {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Report(test, seed) = self;
            eprintln!(
                "schedule failed; run it alone: DROVER_SIM_SEED={seed} \
                 cargo test --release -p drover dedup::sim::{test}"
            );
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{variable}={value} is not a number")),
    )
}

/// Runs one schedule a seed. Unoptimised builds run a tenth.
fn schedules(test: &'static str, runs: u64, mut run: impl FnMut(u64)) {
    let runs = number("DROVER_SIM_RUNS").unwrap_or(match cfg!(debug_assertions) {
        true => runs / 10,
        false => runs,
    });
    let seeds = match number("DROVER_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..runs,
    };
    for seed in seeds {
        let _report = Report(test, seed);
        run(seed);
    }
}

#[test]
fn every_page_is_right_whatever_happens() {
    let mut seen = world::Tally::default();
    let mut runs = 0;
    schedules("every_page_is_right_whatever_happens", 4000, |seed| {
        let mut world = World::new(seed, Faults::All);
        world.run();
        seen.add(&world.tally);
        runs += 1;
    });
    println!("{runs} schedules: {seen:?}");
    if runs >= 300 {
        // A simulation in which nothing goes wrong shows nothing.
        for (what, count) in seen.all() {
            assert!(
                count > 20,
                "{what} happened only {count} times in {runs} schedules"
            );
        }
    }
}

#[test]
fn without_faults_each_content_is_sent_once() {
    schedules("without_faults_each_content_is_sent_once", 1000, |seed| {
        let mut world = World::new(seed, Faults::None);
        world.run();
        assert_eq!(world.sent_in_full(), world.distinct_at_start());
        assert_eq!(
            world.tally.needs, 0,
            "references that could not be resolved"
        );
    });
}
