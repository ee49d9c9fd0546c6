//! The token bucket that lane threads draw from.
//!
//! One bucket paces everything an agent sends across the core link. Threads
//! wait in two lines: stop-and-copy, where a guest stands still, and pre-copy,
//! served only while the first line is empty. Each line is first come, first
//! served, and a grant is one chunk, so lanes take turns. Only the thread at
//! the head watches the clock; the others sleep until they are called.

use crate::types::Class;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// A waiting thread looks again after this long even if nobody calls it.
const LONGEST_SLEEP: Duration = Duration::from_millis(100);
/// What a thread that woke late may catch up with at once. Longer and tenants
/// queue behind it; shorter and what a busy CPU cost is lost for good. The
/// lanes' `SO_MAX_PACING_RATE` spreads it at the core link's own rate.
const BURST: Duration = Duration::from_millis(4);

/// Rates a bucket hands out, in bytes on the wire per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// For everything, while no stop-and-copy waits.
    pub precopy: f64,
    /// While stop-and-copy waits or is being paid for; at least `precopy`.
    pub stop_copy: f64,
}

/// What was drawn from a bucket since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drawn {
    /// Bytes granted to pre-copy.
    pub precopy_bytes: u64,
    /// Bytes granted to stop-and-copy.
    pub stop_copy_bytes: u64,
    /// Sum of the time threads waited.
    pub waited: Duration,
    /// How often a thread found the bucket empty, or others before it.
    pub held_back: u64,
}

/// A token bucket shared by threads. See the module's documentation.
#[derive(Debug)]
pub struct TokenBucket {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rates: Rates,
    /// Bytes that may be sent now; below zero while a grant is being paid off.
    tokens: f64,
    at: Instant,
    /// The last grant was stop-and-copy and is not paid off.
    owes_stop_copy: bool,
    /// Until then somebody who does not wait here asks again for stop-and-copy.
    stop_copy_asks: Option<Instant>,
    stop_copy: VecDeque<Ticket>,
    precopy: VecDeque<Ticket>,
    next_ticket: u64,
    drawn: Drawn,
    closed: bool,
}

#[derive(Debug)]
struct Ticket {
    number: u64,
    thread: Thread,
}

impl TokenBucket {
    /// A bucket that hands out `rates`, starting with a burst's worth.
    pub fn new(rates: Rates) -> Arc<Self> {
        Arc::new(TokenBucket {
            state: Mutex::new(State {
                rates,
                tokens: rates.precopy * BURST.as_secs_f64(),
                at: Instant::now(),
                owes_stop_copy: false,
                stop_copy_asks: None,
                stop_copy: VecDeque::new(),
                precopy: VecDeque::new(),
                next_ticket: 0,
                drawn: Drawn::default(),
                closed: false,
            }),
        })
    }

    /// Waits until `bytes` (on the wire) may be sent, and returns how long
    /// that took. Returns at once when the bucket is closed. The grant may be
    /// larger than the burst: it is paid off before the next one.
    pub fn acquire(&self, bytes: u64, class: Class) -> Duration {
        let begun = Instant::now();
        let mut state = self.lock();
        if state.closed || state.try_grant(begun, bytes, class) {
            return Duration::ZERO;
        }
        state.drawn.held_back += 1;
        let number = state.queue(class);
        loop {
            let now = Instant::now();
            if state.closed {
                state.leave(number, class);
                return now - begun;
            }
            let sleep = match state.head() {
                Some(head) if head == number => match state.until_ready(now) {
                    Duration::ZERO => {
                        state.leave(number, class);
                        state.grant(bytes, class);
                        state.drawn.waited += now - begun;
                        state.call_head();
                        return now - begun;
                    }
                    wait => wait.min(LONGEST_SLEEP),
                },
                _ => LONGEST_SLEEP,
            };
            drop(state);
            thread::park_timeout(sleep);
            state = self.lock();
        }
    }

    /// Takes `bytes` (on the wire) if they may be sent now and nobody waits
    /// for them; otherwise says how long to wait before asking again.
    pub fn try_acquire(&self, bytes: u64, class: Class) -> Result<(), Duration> {
        let now = Instant::now();
        let mut state = self.lock();
        if state.closed || state.try_grant(now, bytes, class) {
            return Ok(());
        }
        state.drawn.held_back += 1;
        if class == Class::StopCopy {
            state.stop_copy_asks = Some(now + LONGEST_SLEEP);
        }
        Err(state
            .until_ready(now)
            .clamp(Duration::from_micros(50), LONGEST_SLEEP))
    }

    /// Takes `bytes` (on the wire) whether or not they may be sent now; they
    /// are paid off before the next grant.
    pub fn overdraw(&self, bytes: u64, class: Class) {
        let mut state = self.lock();
        state.accrue(Instant::now());
        state.grant(bytes, class);
    }

    /// Changes the rates from now on.
    pub fn set_rates(&self, rates: Rates) {
        let mut state = self.lock();
        state.accrue(Instant::now());
        state.rates = rates;
        state.call_head();
    }

    /// The rates in force.
    pub fn rates(&self) -> Rates {
        self.lock().rates
    }

    /// What was drawn so far.
    pub fn drawn(&self) -> Drawn {
        self.lock().drawn
    }

    /// Threads waiting: (pre-copy, stop-and-copy).
    pub fn waiting(&self) -> (usize, usize) {
        let state = self.lock();
        (state.precopy.len(), state.stop_copy.len())
    }

    /// Lets every thread through from now on, so that none is left waiting
    /// when the agent ends.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        for ticket in state.stop_copy.iter().chain(&state.precopy) {
            ticket.thread.unpark();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every update of the state is complete before the lock is given up,
        // so a thread that panicked elsewhere has left nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Grants without waiting, if nobody of the same or a higher class waits.
    fn try_grant(&mut self, now: Instant, bytes: u64, class: Class) -> bool {
        let ahead = match class {
            Class::StopCopy => !self.stop_copy.is_empty(),
            Class::Precopy => {
                !self.stop_copy.is_empty()
                    || !self.precopy.is_empty()
                    || self.stop_copy_asks.is_some_and(|until| now < until)
            }
        };
        self.accrue(now);
        if ahead || self.tokens < 0.0 {
            return false;
        }
        self.grant(bytes, class);
        true
    }

    fn grant(&mut self, bytes: u64, class: Class) {
        self.tokens -= bytes as f64;
        self.owes_stop_copy = class == Class::StopCopy;
        if class == Class::StopCopy {
            self.stop_copy_asks = None;
        }
        match class {
            Class::Precopy => self.drawn.precopy_bytes += bytes,
            Class::StopCopy => self.drawn.stop_copy_bytes += bytes,
        }
    }

    /// Bytes per second that tokens come in at.
    fn rate(&self) -> f64 {
        let asked = self.stop_copy_asks.is_some_and(|until| self.at < until);
        if self.owes_stop_copy || asked || !self.stop_copy.is_empty() {
            self.rates.stop_copy.max(self.rates.precopy)
        } else {
            self.rates.precopy
        }
    }

    fn accrue(&mut self, now: Instant) {
        let rate = self.rate();
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.tokens = (self.tokens + rate * passed).min(rate * BURST.as_secs_f64());
        if self.tokens >= 0.0 {
            self.owes_stop_copy = false;
        }
    }

    fn until_ready(&mut self, now: Instant) -> Duration {
        self.accrue(now);
        if self.tokens >= 0.0 {
            return Duration::ZERO;
        }
        let rate = self.rate();
        if rate < 1.0 {
            return LONGEST_SLEEP;
        }
        // Never zero: that would mean ready.
        Duration::from_secs_f64((-self.tokens / rate).min(1.0)).max(Duration::from_micros(1))
    }

    fn queue(&mut self, class: Class) -> u64 {
        // Tokens up to now came in at the rate of before.
        self.accrue(Instant::now());
        self.next_ticket += 1;
        let ticket = Ticket {
            number: self.next_ticket,
            thread: thread::current(),
        };
        self.line(class).push_back(ticket);
        self.next_ticket
    }

    fn leave(&mut self, number: u64, class: Class) {
        self.accrue(Instant::now());
        self.line(class).retain(|ticket| ticket.number != number);
    }

    fn line(&mut self, class: Class) -> &mut VecDeque<Ticket> {
        match class {
            Class::Precopy => &mut self.precopy,
            Class::StopCopy => &mut self.stop_copy,
        }
    }

    fn head(&self) -> Option<u64> {
        let first = self.stop_copy.front().or_else(|| self.precopy.front());
        first.map(|ticket| ticket.number)
    }

    fn call_head(&self) {
        if let Some(ticket) = self.stop_copy.front().or_else(|| self.precopy.front()) {
            ticket.thread.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    const MBIT: f64 = 125_000.0;

    fn rates(precopy_mbit: f64, stop_copy_mbit: f64) -> Rates {
        Rates {
            precopy: precopy_mbit * MBIT,
            stop_copy: stop_copy_mbit * MBIT,
        }
    }

    /// Draws chunks for `time` in a thread, and returns the bytes drawn.
    fn draw(bucket: &Arc<TokenBucket>, class: Class, time: Duration) -> thread::JoinHandle<u64> {
        let bucket = Arc::clone(bucket);
        thread::spawn(move || {
            let begun = Instant::now();
            let mut bytes = 0;
            while begun.elapsed() < time {
                bucket.acquire(16_384, class);
                bytes += 16_384;
            }
            bytes
        })
    }

    #[test]
    fn holds_the_rate_over_many_chunks() {
        let bucket = TokenBucket::new(rates(400.0, 400.0));
        let bytes = draw(&bucket, Class::Precopy, Duration::from_millis(400))
            .join()
            .unwrap();
        let allowed = 400.0 * MBIT * 0.4;
        // Never more than the rate, a burst and a chunk; less only if the
        // machine is too busy to wake the thread.
        assert!((bytes as f64) < allowed * 1.05 + 2.0 * 16_384.0, "{bytes}");
        assert!((bytes as f64) > allowed * 0.5, "{bytes}");
    }

    #[test]
    fn lanes_take_turns() {
        let bucket = TokenBucket::new(rates(200.0, 200.0));
        let time = Duration::from_millis(300);
        let lanes: Vec<_> = (0..4)
            .map(|_| draw(&bucket, Class::Precopy, time))
            .collect();
        let bytes: Vec<u64> = lanes.into_iter().map(|lane| lane.join().unwrap()).collect();
        let (least, most) = (bytes.iter().min().unwrap(), bytes.iter().max().unwrap());
        assert!(most - least <= most / 4 + 2 * 16_384, "{bytes:?}");
    }

    #[test]
    fn stop_and_copy_goes_first_and_at_its_own_rate() {
        let bucket = TokenBucket::new(rates(8.0, 400.0));
        let stop = Arc::new(AtomicU64::new(0));
        let lanes: Vec<_> = (0..4)
            .map(|_| draw(&bucket, Class::Precopy, Duration::from_millis(500)))
            .collect();
        thread::sleep(Duration::from_millis(50));
        // 2 MB: 42 ms at 400 Mbit/s, 2 s at 8.
        let begun = Instant::now();
        while stop.load(Ordering::Relaxed) < 2_000_000 {
            bucket.acquire(16_384, Class::StopCopy);
            stop.fetch_add(16_384, Ordering::Relaxed);
        }
        let took = begun.elapsed();
        bucket.close();
        lanes.into_iter().for_each(|lane| {
            lane.join().unwrap();
        });
        assert!(took < Duration::from_millis(1900), "{took:?}");
        assert!(took > Duration::from_millis(38), "{took:?}");
    }

    #[test]
    fn a_new_rate_reaches_a_thread_that_waits() {
        let bucket = TokenBucket::new(rates(0.0, 0.0));
        bucket.acquire(1, Class::Precopy);
        let waiter = {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || bucket.acquire(1000, Class::Precopy))
        };
        while bucket.waiting() != (1, 0) {
            thread::yield_now();
        }
        bucket.set_rates(rates(100.0, 100.0));
        waiter.join().unwrap();
        assert_eq!(bucket.drawn().precopy_bytes, 1001);
        assert_eq!(bucket.drawn().held_back, 1);
    }

    #[test]
    fn asking_without_waiting_says_when_to_come_back() {
        let bucket = TokenBucket::new(rates(80.0, 80.0));
        assert_eq!(bucket.try_acquire(100_000, Class::Precopy), Ok(()));
        let wait = bucket.try_acquire(1, Class::Precopy).unwrap_err();
        // 100 kB less the burst of 40, at 10 MB/s.
        assert!(wait > Duration::from_millis(2), "{wait:?}");
        assert!(wait <= Duration::from_millis(6), "{wait:?}");
    }
}
