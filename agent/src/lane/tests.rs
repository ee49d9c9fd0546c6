//! Lanes over loopback TCP with real rings.

use super::testing::*;
use super::*;
use crate::types::{Class, Gfn};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(super) const LIMIT: Duration = Duration::from_secs(20);

/// Reads events until `done` says so.
pub(super) fn until(set: &LaneSet, mut done: impl FnMut(&LaneEvent) -> bool) {
    let end = Instant::now() + LIMIT;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let event = set
            .events()
            .recv_timeout(left)
            .expect("the event did not come in time");
        if done(&event) {
            return;
        }
    }
}

/// Reads events until `count` batches are placed.
pub(super) fn until_placed(set: &LaneSet, count: usize) {
    let mut placed = 0;
    until(set, |event| {
        match event {
            LaneEvent::Placed { batches, .. } => placed += batches.len(),
            LaneEvent::LaneUp { .. } => {}
            other => panic!("unexpected {other:?}"),
        }
        placed == count
    });
}

pub(super) fn assert_pages(ram: &Ram, gfns: impl Iterator<Item = u32>) {
    let pages = ram.pages.lock().unwrap();
    for gfn in gfns {
        let got = pages
            .get(&gfn)
            .unwrap_or_else(|| panic!("gfn {gfn} did not arrive"));
        assert!(**got == page(u64::from(gfn)), "gfn {gfn} differs");
    }
}

/// Over encrypted lanes, and over lanes that are not.
fn all_arrive(compress: Compress, check: impl Fn(&[LaneStats], usize)) {
    let (sealed, compressed) = all_arrive_at(compress, Target::start, sealed_to);
    check(&sealed, compressed);
    assert!(sealed.iter().any(|lane| lane.seal_us > 0));
    let (plain, compressed) = all_arrive_at(compress, Target::start_plain, plain_to);
    check(&plain, compressed);
    assert!(plain.iter().all(|lane| lane.seal_us == 0));
}

fn all_arrive_at(
    compress: Compress,
    start: fn(Arc<dyn BatchSink>) -> Target,
    to: fn(std::net::SocketAddr) -> Connector,
) -> (Vec<LaneStats>, usize) {
    let ram = Arc::new(Ram::default());
    let target = start(ram.clone());
    let pool = BufferPool::new(8).unwrap();
    let set = LaneSet::start(
        config(compress),
        &pool,
        Arc::new(Unpaced),
        to(target.address),
    )
    .unwrap();
    let counts = [128u32, 1, 0, 77, 128, 5, 128, 128, 64, 3];
    for (n, &count) in counts.iter().enumerate() {
        let n = n as u32;
        set.submit(
            batch(&pool, n.into(), n * 1000, count, Class::Precopy),
            LIMIT,
        )
        .unwrap();
    }
    until_placed(&set, counts.len());
    assert!(set.close(LIMIT));
    for (n, &count) in counts.iter().enumerate() {
        let first = n as u32 * 1000;
        assert_pages(&ram, first..first + count);
        let pages = ram.pages.lock().unwrap();
        for gfn in first + count..first + count + 5 {
            assert!(pages[&gfn].iter().all(|&b| b == 0));
        }
    }
    assert_eq!(ram.refs.lock().unwrap().len(), counts.len() * 3);
    assert_eq!(pool.available(), 8, "a buffer did not come back");
    for receiver in target.receivers.lock().unwrap().iter() {
        assert!(matches!(receiver.wait(LIMIT), Some(LaneEnd::Orderly)));
        assert!(receiver.stats().multishot);
    }
    (set.stats(), ram.compressed.load(Ordering::Relaxed))
}

#[test]
fn raw_batches_arrive_and_zero_copy_is_accounted_for() {
    all_arrive(Compress::Never, |stats, compressed| {
        assert_eq!(compressed, 0);
        let sum = |f: fn(&LaneStats) -> u64| stats.iter().map(f).sum::<u64>();
        assert_eq!(sum(|s| s.batches), 10);
        assert_eq!(sum(|s| s.pages), 662);
        // Loopback: the kernel must report copies, never a zero copy.
        assert_eq!(sum(|s| s.sends_zero_copied), 0);
        assert!(sum(|s| s.sends_copied) > 0);
        assert!(sum(|s| s.wire_bytes) > 662 * 4096);
    });
}

#[test]
fn zstd_batches_arrive_and_are_smaller() {
    all_arrive(Compress::Always, |stats, compressed| {
        assert!(compressed >= 8, "{compressed} of 10 compressed");
        let wire: u64 = stats.iter().map(|s| s.wire_bytes).sum();
        assert!(wire < 662 * 4096 * 6 / 10, "{wire} bytes on the wire");
    });
}

#[test]
fn auto_batches_arrive() {
    all_arrive(Compress::Auto, |_, _| ());
}

#[test]
fn a_lane_falls_back_to_plain_sends_where_the_kernel_copies() {
    let ram = Arc::new(Ram::default());
    let target = Target::start(ram.clone());
    let pool = BufferPool::new(8).unwrap();
    let mut config = config(Compress::Never);
    config.lanes = 1;
    let set = LaneSet::start(config, &pool, Arc::new(Unpaced), target.connector()).unwrap();
    for n in 0..40 {
        set.submit(batch(&pool, n, n as u32 * 200, 128, Class::Precopy), LIMIT)
            .unwrap();
    }
    until_placed(&set, 40);
    assert!(set.close(LIMIT));
    let stats = set.stats()[0];
    assert!(stats.fell_back_to_plain);
    assert!(
        stats.sends_copied >= 8 && stats.sends_plain > 0,
        "{stats:?}"
    );
    assert_pages(&ram, 0..128);
}

/// Grants what a gate allows.
#[derive(Default)]
pub(super) struct Gated {
    open: AtomicBool,
    asked: Mutex<HashMap<Class, usize>>,
    overdrawn: AtomicUsize,
}

impl Pacing for Gated {
    fn try_acquire(&self, bytes: usize, class: Class) -> Result<(), Duration> {
        *self.asked.lock().unwrap().entry(class).or_default() += bytes;
        if self.open.load(Ordering::Relaxed) {
            Ok(())
        } else {
            Err(Duration::from_millis(5))
        }
    }
    fn overdraw(&self, bytes: usize, _: Class) {
        self.overdrawn.fetch_add(bytes, Ordering::Relaxed);
    }
    fn max_rate(&self) -> Option<u64> {
        Some(10_000_000_000)
    }
}

#[test]
fn stop_and_copy_overtakes_precopy_in_the_queue() {
    let ram = Arc::new(Ram::default());
    let target = Target::start(ram.clone());
    let pool = BufferPool::new(12).unwrap();
    let gate = Arc::new(Gated::default());
    let mut config = config(Compress::Never);
    config.lanes = 1;
    config.queue_depth = 8;
    let set = LaneSet::start(config, &pool, gate.clone(), target.connector()).unwrap();
    for n in 0..8 {
        set.submit(batch(&pool, n, n as u32 * 200, 20, Class::Precopy), LIMIT)
            .unwrap();
    }
    set.submit(batch(&pool, 100, 100_000, 20, Class::StopCopy), LIMIT)
        .unwrap();
    std::thread::sleep(Duration::from_millis(50));
    gate.open.store(true, Ordering::Relaxed);
    until_placed(&set, 9);
    let order: Vec<u64> = ram
        .order
        .lock()
        .unwrap()
        .iter()
        .map(|(id, _)| id.0)
        .collect();
    let place = order.iter().position(|&id| id == 100).unwrap();
    // At most the frame being sent and the one being encoded go before it.
    assert!(
        place <= 2,
        "stop-and-copy came as number {place} in {order:?}"
    );
    // And while it waited, those before it asked in its name.
    assert!(gate.asked.lock().unwrap()[&Class::StopCopy] > 0);
}

#[test]
fn a_paced_lane_stays_alive_without_permission() {
    let ram = Arc::new(Ram::default());
    let target = Target::start(ram.clone());
    let pool = BufferPool::new(4).unwrap();
    let gate = Arc::new(Gated::default());
    gate.open.store(true, Ordering::Relaxed);
    let mut config = config(Compress::Never);
    config.lanes = 1;
    config.max_chunk = 16 << 10;
    let set = LaneSet::start(config, &pool, gate.clone(), target.connector()).unwrap();
    until(&set, |event| matches!(event, LaneEvent::LaneUp { .. }));
    // Closed as soon as a frame has begun.
    set.submit(batch(&pool, 1, 0, 128, Class::Precopy), LIMIT)
        .unwrap();
    while set.stats()[0].wire_bytes == 0 {
        std::hint::spin_loop();
    }
    gate.open.store(false, Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(3500));
    let quiet = set.events().try_recv();
    assert!(
        matches!(quiet, Err(_) | Ok(LaneEvent::Placed { .. })),
        "the lane did not last: {quiet:?}"
    );
    gate.open.store(true, Ordering::Relaxed);
    if quiet.is_err() {
        assert!(gate.overdrawn.load(Ordering::Relaxed) > 0);
        until_placed(&set, 1);
    }
    assert_pages(&ram, 0..128);
}

#[test]
fn a_lane_that_may_not_begin_a_frame_stays_up() {
    let ram = Arc::new(Ram::default());
    let target = Target::start(ram.clone());
    let pool = BufferPool::new(4).unwrap();
    let gate = Arc::new(Gated::default());
    let set = LaneSet::start(
        config(Compress::Always),
        &pool,
        gate.clone(),
        target.connector(),
    )
    .unwrap();
    for _ in 0..2 {
        until(&set, |event| matches!(event, LaneEvent::LaneUp { .. }));
    }
    set.submit(batch(&pool, 1, 0, 128, Class::Precopy), LIMIT)
        .unwrap();
    let quiet = set.events().recv_timeout(Duration::from_millis(3000));
    assert!(quiet.is_err(), "{quiet:?}");
    assert_eq!(gate.overdrawn.load(Ordering::Relaxed), 0);
    gate.open.store(true, Ordering::Relaxed);
    until_placed(&set, 1);
}

#[test]
fn an_idle_lane_stays_up() {
    let target = Target::start(Arc::new(Ram::default()));
    let pool = BufferPool::new(4).unwrap();
    let set = LaneSet::start(
        config(Compress::Auto),
        &pool,
        Arc::new(Unpaced),
        target.connector(),
    )
    .unwrap();
    for _ in 0..2 {
        until(&set, |event| matches!(event, LaneEvent::LaneUp { .. }));
    }
    assert!(
        set.events()
            .recv_timeout(Duration::from_millis(3000))
            .is_err()
    );
    assert!(set.stats().iter().all(|s| s.up && s.tcp.rtt_us > 0));
    assert!(set.close(LIMIT));
}

#[test]
fn needs_and_late_acknowledgements_come_back() {
    struct Later(Ram);
    impl BatchSink for Later {
        fn ram_pages(&self, _: crate::types::GangId, _: crate::types::VmIndex) -> Option<u32> {
            Some(RAM_PAGES)
        }
        fn batch(&self, batch: &DecodedBatch<'_>) -> Result<Placement, SinkError> {
            self.0.batch(batch)?;
            Ok(Placement::Pending)
        }
    }
    let sink = Arc::new(Later(Ram::default()));
    let target = Target::start(sink.clone());
    let pool = BufferPool::new(2).unwrap();
    let mut config = config(Compress::Never);
    config.lanes = 1;
    let set = LaneSet::start(config, &pool, Arc::new(Unpaced), target.connector()).unwrap();
    set.submit(batch(&pool, 5, 0, 8, Class::Precopy), LIMIT)
        .unwrap();
    until(&set, |event| matches!(event, LaneEvent::LaneUp { .. }));
    assert!(
        set.events()
            .recv_timeout(Duration::from_millis(300))
            .is_err(),
        "acknowledged early"
    );
    target.await_receivers(1);
    let handle = target.receivers.lock().unwrap()[0].handle();
    let wanted: Vec<Gfn> = (0..10_000).map(Gfn).collect();
    handle.need(GANG, VM, &wanted).unwrap();
    let mut got = Vec::new();
    until(&set, |event| {
        if let LaneEvent::Need { gang, vm, gfns } = event {
            assert_eq!((*gang, *vm), (GANG, VM));
            got.extend_from_slice(gfns);
        }
        got.len() == wanted.len()
    });
    assert_eq!(got, wanted);
    handle.placed(BatchId(5)).unwrap();
    until_placed(&set, 1);
}

#[test]
fn a_full_set_makes_the_submitter_wait_and_memory_stays_bounded() {
    let ram = Arc::new(Ram::default());
    *ram.delay.lock().unwrap() = Duration::from_millis(150);
    let target = Target::start(ram.clone());
    let pool = BufferPool::new(16).unwrap();
    let mut config = config(Compress::Never);
    config.lanes = 1;
    config.queue_depth = 2;
    config.max_unacked = 1;
    let set = LaneSet::start(config, &pool, Arc::new(Unpaced), target.connector()).unwrap();
    until(&set, |event| matches!(event, LaneEvent::LaneUp { .. }));
    let mut accepted = 0;
    let refusal = loop {
        match set.submit(
            batch(&pool, accepted, accepted as u32 * 200, 128, Class::Precopy),
            Duration::ZERO,
        ) {
            Ok(()) => accepted += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(refusal.why, Refusal::TimedOut(Duration::ZERO));
    assert!(accepted <= 4, "{accepted} batches accepted by a queue of 2");
    set.submit(*refusal.batch, LIMIT).unwrap();
    until_placed(&set, accepted as usize + 1);
    let stats = target.receivers.lock().unwrap()[0].stats();
    assert!(stats.memory_bytes as usize <= ReceiveConfig::new("").bytes());
}

/// A token bucket, as a pacer has one.
struct Bucket {
    rate: f64,
    filled: Mutex<(f64, Instant)>,
}

impl Pacing for Bucket {
    fn try_acquire(&self, bytes: usize, _: Class) -> Result<(), Duration> {
        let mut filled = self.filled.lock().unwrap();
        let now = Instant::now();
        let (tokens, since) = *filled;
        let tokens = tokens + now.duration_since(since).as_secs_f64() * self.rate;
        let tokens = tokens.min(self.rate * 0.005);
        let left = if tokens > 0.0 {
            tokens - bytes as f64
        } else {
            tokens
        };
        *filled = (left, now);
        if tokens > 0.0 {
            Ok(())
        } else {
            Err(Duration::from_secs_f64(-tokens / self.rate + 1e-5))
        }
    }
    fn overdraw(&self, bytes: usize, _: Class) {
        self.filled.lock().unwrap().0 -= bytes as f64;
    }
    fn max_rate(&self) -> Option<u64> {
        Some(self.rate as u64)
    }
}

#[test]
fn a_paced_lane_compresses_fills_its_budget_and_keeps_to_one_history() {
    let ram = Arc::new(Ram::default());
    let target = Target::start(ram.clone());
    let pool = BufferPool::new(12).unwrap();
    // Slow enough that a busy machine does not become the limit.
    let rate = 2e6;
    let bucket = Bucket {
        rate,
        filled: Mutex::new((0.0, Instant::now())),
    };
    let set = LaneSet::start(
        config(Compress::Auto),
        &pool,
        Arc::new(bucket),
        target.connector(),
    )
    .unwrap();
    for _ in 0..2 {
        until(&set, |event| matches!(event, LaneEvent::LaneUp { .. }));
    }
    let start = Instant::now();
    let count = 14u32;
    for n in 0..count {
        set.submit(batch(&pool, n.into(), n * 200, 128, Class::Precopy), LIMIT)
            .unwrap();
    }
    until_placed(&set, count as usize);
    let seconds = start.elapsed().as_secs_f64();
    let stats = set.stats();
    let wire = stats.iter().map(|s| s.wire_bytes).sum::<u64>() as f64;
    assert!(wire < f64::from(count) * 128.0 * 4096.0 * 0.6, "{stats:?}");
    let reached = wire / seconds;
    assert!(reached < 1.05 * rate, "{reached} bytes a second");
    assert!(reached > 0.3 * rate, "{reached} bytes a second: {stats:?}");
    assert_eq!(stats[0].level, 1);
    assert!(stats[1].batches == 0, "{stats:?}");
    assert_pages(&ram, 0..128);
}
