//! Compression that pays: which level a lane uses, judged by what it waits
//! for.
//!
//! A lane whose thread hardly ever waits, while batches queue up behind it, is
//! limited by its CPU: less compression carries more pages. A lane that mostly
//! waits for the pacer or the socket is limited by the link: more compression
//! carries more pages. The steps are raw, level 1 and the configured level.

use std::time::Duration;

/// What a lane did in a stretch of time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Window {
    /// How long it is.
    pub elapsed: Duration,
    /// Time spent compressing.
    pub encoding: Duration,
    /// Time spent waiting for pacer or socket, with nothing to compress.
    pub blocked: Duration,
    /// The part of `blocked` that was the pacer's doing.
    pub pacer: Duration,
    /// Time spent with nothing to do at all.
    pub idle: Duration,
    /// Time the thread had a core.
    pub on_cpu: Duration,
    /// Bytes before encoding that were sent.
    pub plain_bytes: u64,
    /// Bytes given to the socket.
    pub wire_bytes: u64,
}

/// A judgement needs this much to go by.
const MIN_TIME: Duration = Duration::from_millis(200);
const MIN_BYTES: u64 = 4 << 20;
/// zstd level 1, as long as nothing was measured, in bytes per second.
const FAST_GUESS: f64 = 250e6;
/// Judgements in a row it takes to go down.
const PATIENCE: u32 = 3;
/// Judgements to sit out after a step down before a step up is tried.
const FIRST_HOLD: u32 = 10;
const MAX_HOLD: u32 = 160;

/// Chooses the level of one lane.
#[derive(Debug)]
pub struct Adapter {
    /// Levels from raw to best: raw, 1, and the configured one if it is higher.
    steps: Vec<i32>,
    at: usize,
    hold: u32,
    next_hold: u32,
    /// Judgements in a row that found the CPU to be the limit.
    cpu_bound: u32,
    /// Measured speed of level 1, in plain bytes per second of CPU.
    fast_speed: f64,
    /// Plain bytes per second before the last step to raw.
    before_raw: f64,
    window: Window,
}

impl Adapter {
    /// Starts at `level`, the best.
    pub fn new(level: i32) -> Adapter {
        Adapter {
            at: if level > 1 { 2 } else { 1 },
            steps: if level > 1 {
                vec![0, 1, level]
            } else {
                vec![0, level]
            },
            hold: 0,
            next_hold: FIRST_HOLD,
            cpu_bound: 0,
            fast_speed: FAST_GUESS,
            before_raw: 0.0,
            window: Window::default(),
        }
    }

    /// The level to use.
    pub fn level(&self) -> i32 {
        self.steps[self.at]
    }

    /// Adds what happened since the last call; `max_rate` is what the link may
    /// carry at most, in bytes per second. Returns the level to use.
    pub fn observe(&mut self, seen: Window, max_rate: Option<u64>) -> i32 {
        let window = &mut self.window;
        window.elapsed += seen.elapsed;
        window.encoding += seen.encoding;
        window.blocked += seen.blocked;
        window.pacer += seen.pacer;
        window.idle += seen.idle;
        window.on_cpu += seen.on_cpu;
        window.wire_bytes += seen.wire_bytes;
        window.plain_bytes += seen.plain_bytes;
        if window.elapsed >= MIN_TIME && window.plain_bytes >= MIN_BYTES {
            let window = std::mem::take(&mut self.window);
            self.judge(&window, max_rate);
        } else if window.elapsed > 10 * MIN_TIME {
            self.window = Window::default();
        }
        self.level()
    }

    fn judge(&mut self, window: &Window, max_rate: Option<u64>) {
        let seconds = window.elapsed.as_secs_f64();
        let rate = window.plain_bytes as f64 / seconds;
        let encoding = window.encoding.as_secs_f64() / seconds;
        let blocked = window.blocked.as_secs_f64() / seconds;
        let idle = window.idle.as_secs_f64() / seconds;
        if self.at == 1 && encoding > 0.05 {
            self.fast_speed = rate / encoding;
        }
        if self.at == 0 && self.before_raw > 0.0 {
            // Raw must show that it carries clearly more.
            if rate < 1.2 * self.before_raw && idle < 0.1 {
                self.at = 1;
                self.hold_longer();
            }
            self.before_raw = 0.0;
            return;
        }
        // A new level begins a new history: not for a passing moment.
        let short_of_cpu = encoding > 0.5 && blocked < 0.1 && idle < 0.1;
        self.cpu_bound = if short_of_cpu { self.cpu_bound + 1 } else { 0 };
        let cpu_bound = self.cpu_bound >= PATIENCE;
        let link_bound = blocked > 0.5;
        if cpu_bound && self.at == 2 {
            self.at = 1;
            self.hold_longer();
        } else if cpu_bound && self.at == 1 && self.hold == 0 {
            if max_rate.is_none_or(|max| max as f64 > 1.3 * rate) {
                self.at = 0;
                self.before_raw = rate;
            }
            self.hold_longer();
        } else if self.hold > 0 {
            self.hold -= 1;
        } else if link_bound && self.at == 1 && self.steps.len() > 2 && encoding < 0.4 {
            self.at = 2;
        } else if link_bound && self.at == 0 && rate < 0.8 * self.fast_speed {
            self.at = 1;
        }
    }

    fn hold_longer(&mut self) {
        self.hold = self.next_hold;
        self.next_hold = (self.next_hold * 2).min(MAX_HOLD);
    }
}

/// Whether a lane carries what it is allowed to, so that opening a second
/// compression history on another lane would gain nothing.
#[derive(Debug)]
pub struct Saturation {
    /// Part of the time, averaged, in which the lane waited for permission,
    /// for work or for a core: where there is none left, another lane's thread
    /// would only wait for one as well.
    share: f64,
}

/// Weight of the newest observation.
const NEWEST: f64 = 0.1;
/// Share of waiting below which another lane is worth it.
const LITTLE: f64 = 0.2;

impl Default for Saturation {
    /// Assumed until the lane has found out otherwise.
    fn default() -> Self {
        Saturation { share: 1.0 }
    }
}

impl Saturation {
    /// Adds what happened since the last call.
    pub fn observe(&mut self, seen: &Window, max_rate: Option<u64>) -> bool {
        let seconds = seen.elapsed.as_secs_f64().max(1e-9);
        // The kernel spaces packets by the same limit, so waiting for it may
        // look like waiting for the socket.
        let at_limit =
            max_rate.is_some_and(|max| seen.wire_bytes as f64 / seconds > 0.5 * max as f64);
        let ran = seen.elapsed.saturating_sub(seen.blocked + seen.idle);
        let no_core = ran.saturating_sub(seen.on_cpu);
        let waited = if at_limit { seen.blocked } else { seen.pacer } + seen.idle + no_core;
        let share = (waited.as_secs_f64() / seconds).min(1.0);
        self.share += (share - self.share) * NEWEST;
        self.share > LITTLE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(encoding: u64, blocked: u64, mb: u64) -> Window {
        Window {
            elapsed: Duration::from_millis(1000),
            encoding: Duration::from_millis(encoding),
            blocked: Duration::from_millis(blocked),
            idle: Duration::from_millis(1000 - encoding - blocked),
            on_cpu: Duration::from_millis(encoding),
            plain_bytes: mb << 20,
            ..Window::default()
        }
    }

    #[test]
    fn a_slow_link_gets_the_best_level() {
        let mut adapter = Adapter::new(3);
        for _ in 0..100 {
            assert_eq!(adapter.observe(window(300, 690, 100), Some(50_000_000)), 3);
        }
    }

    #[test]
    fn a_busy_cpu_goes_down_to_raw_where_the_link_would_carry_it() {
        let mut adapter = Adapter::new(3);
        assert_eq!(adapter.observe(window(960, 0, 200), None), 3);
        let down = (0..40).any(|_| adapter.observe(window(960, 0, 300), None) == 0);
        assert!(down, "never went raw");
        // Raw carries three times as much, and goes on being raw.
        for _ in 0..20 {
            assert_eq!(adapter.observe(window(0, 200, 1000), None), 0);
        }
    }

    #[test]
    fn with_level_one_at_best_there_is_only_raw_below() {
        let mut adapter = Adapter::new(1);
        assert_eq!(adapter.observe(window(300, 690, 100), None), 1);
        assert!((0..40).any(|_| adapter.observe(window(960, 0, 300), None) == 0));
        assert!((0..400).any(|_| adapter.observe(window(0, 900, 50), None) == 1));
        for _ in 0..100 {
            assert_eq!(adapter.observe(window(300, 690, 100), None), 1);
        }
    }

    #[test]
    fn raw_is_not_tried_where_the_link_could_not_carry_it() {
        let mut adapter = Adapter::new(3);
        for _ in 0..100 {
            // 80 MB/s of pages as 40 MB/s on a link of 50.
            assert_ne!(adapter.observe(window(960, 10, 80), Some(50_000_000)), 0);
        }
    }

    #[test]
    fn raw_that_carries_no_more_is_taken_back() {
        let mut adapter = Adapter::new(3);
        while adapter.observe(window(960, 0, 300), None) != 0 {}
        assert_eq!(adapter.observe(window(0, 950, 300), None), 1);
    }

    #[test]
    fn the_level_comes_back_when_the_link_is_the_limit() {
        let mut adapter = Adapter::new(3);
        while adapter.observe(window(960, 0, 200), None) != 1 {}
        let up = (0..40).any(|_| adapter.observe(window(300, 690, 100), None) == 3);
        assert!(up);
    }

    #[test]
    fn an_idle_lane_is_left_alone() {
        let mut adapter = Adapter::new(3);
        for _ in 0..50 {
            assert_eq!(adapter.observe(window(600, 0, 100), None), 3);
        }
    }

    #[test]
    fn another_lane_is_used_only_when_one_alone_is_too_slow() {
        let tick = |pacer, socket, wire_bytes| Window {
            elapsed: Duration::from_millis(50),
            encoding: Duration::from_millis(50 - pacer - socket),
            blocked: Duration::from_millis(pacer + socket),
            pacer: Duration::from_millis(pacer),
            on_cpu: Duration::from_millis(50 - pacer - socket),
            wire_bytes,
            ..Window::default()
        };
        let mut saturation = Saturation::default();
        for n in 0..1000 {
            // Some ticks without any wait do not make it hasty.
            let pacer = if n % 3 == 0 { 40 } else { 0 };
            assert!(saturation.observe(&tick(pacer, 0, 1 << 20), Some(40 << 20)));
        }
        // The kernel's spacing counts like the pacer's.
        for _ in 0..1000 {
            assert!(saturation.observe(&tick(0, 40, 2 << 20), Some(40 << 20)));
        }
        // Nor is one that is to share its core with others.
        for _ in 0..1000 {
            let starved = Window {
                on_cpu: Duration::from_millis(30),
                ..tick(0, 2, 1 << 20)
            };
            assert!(saturation.observe(&starved, Some(400 << 20)));
        }
        // A lane that only compresses asks for help, within a second.
        let needed = (0..20).find(|_| !saturation.observe(&tick(0, 2, 1 << 20), Some(400 << 20)));
        assert!(needed.is_some());
    }
}
