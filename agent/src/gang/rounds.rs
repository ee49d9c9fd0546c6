//! When to go round again and when to switch over: pure decisions of the
//! pre-copy loop, and which pages a round leaves for later.

use crate::types::Gfn;
use crate::vmm::PageSet;
use std::time::Duration;

/// What the pre-copy loop of one VM aims at and what bounds it.
#[derive(Debug, Clone, Copy)]
pub struct RoundLimits {
    /// The rest must be sendable within this time before the VM is paused.
    pub downtime_limit: Duration,
    /// Rounds after which the policy's "no convergence" rule decides.
    pub max_rounds: u32,
    /// Time of pre-copy after which that rule decides.
    pub max_precopy: Duration,
    /// A round gains something if its rest is below this share of the best so
    /// far, 0 to 1.
    pub gain: f64,
    /// So many rounds in a row that gain nothing use pre-copy up as well.
    pub stuck_rounds: u32,
}

/// What one finished round leaves, as far as the source can tell.
#[derive(Debug, Clone, Copy)]
pub struct Rest {
    /// Pages that would have to be sent if the VM were paused now: dirtied
    /// since they were read, held back, or asked for by the target.
    pub pages: u64,
    /// Mean encoded bytes of a page that had to be sent, from recent rounds.
    pub bytes_per_page: f64,
    /// Bytes per second that stop-and-copy may expect of its lanes.
    pub bytes_per_s: f64,
}

impl Rest {
    /// Bytes that remain to be sent.
    pub fn bytes(&self) -> f64 {
        self.pages as f64 * self.bytes_per_page
    }

    /// Time the rest would keep the VM stopped, without device state.
    pub fn send_time(&self) -> Duration {
        Duration::from_secs_f64((self.bytes() / self.bytes_per_s.max(1.0)).min(1e6))
    }
}

/// Verdict on one round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Another round lessens the rest.
    Another,
    /// The rest fits: the VM may be switched over.
    Ready,
    /// The limits are used up and the rest does not fit.
    NoConvergence,
}

/// Time that pause, digest, device state and resume take on top of the pages;
/// measured 15–30 ms with QEMU. Part of every estimate of the downtime.
pub const SWITCH_OVERHEAD: Duration = Duration::from_millis(25);

/// Below this there is nothing to be gained by another round: a scan and the
/// pages of one more round would take as long.
const NEGLIGIBLE: Duration = Duration::from_millis(12);

/// Judges rounds of one VM. Feed it every round's [`Rest`] in turn.
#[derive(Debug)]
pub struct Convergence {
    limits: RoundLimits,
    best: Option<Duration>,
    stale: u32,
}

impl Convergence {
    /// Starts with nothing judged.
    pub fn new(limits: RoundLimits) -> Self {
        Convergence {
            limits,
            best: None,
            stale: 0,
        }
    }

    /// Whether the rest could be sent within the downtime limit.
    pub fn fits(&self, rest: Rest) -> bool {
        rest.send_time() + SWITCH_OVERHEAD <= self.limits.downtime_limit
    }

    /// Judges the state after `round` rounds and `elapsed` of pre-copy.
    ///
    /// A rest that fits is not enough while rounds still shrink it: a shorter
    /// downtime is worth a short round. Two rounds in a row without a gain end
    /// that.
    pub fn judge(&mut self, round: u32, elapsed: Duration, rest: Rest) -> Verdict {
        let send = rest.send_time();
        let fits = self.fits(rest);
        if send <= NEGLIGIBLE && fits {
            return Verdict::Ready;
        }
        let improves = self
            .best
            .is_none_or(|b| send.as_secs_f64() < self.limits.gain * b.as_secs_f64());
        self.best = Some(self.best.map_or(send, |b| b.min(send)));
        self.stale = if improves { 0 } else { self.stale + 1 };
        let used_up = round >= self.limits.max_rounds
            || elapsed >= self.limits.max_precopy
            || self.stale >= self.limits.stuck_rounds;
        match (fits, used_up) {
            (true, true) => Verdict::Ready,
            (true, false) if self.stale >= 2 => Verdict::Ready,
            (false, true) => Verdict::NoConvergence,
            _ => Verdict::Another,
        }
    }
}

/// Holds back pages that are dirtied in every round: sending them again and
/// again fills the link and helps nobody, since the last round sends them
/// anyway.
#[derive(Debug)]
pub struct HeldBack {
    previous: PageSet,
    held: PageSet,
}

impl HeldBack {
    /// Nothing held yet, for a VM of `pages` pages.
    pub fn new(pages: u32) -> Self {
        HeldBack {
            previous: PageSet::new(pages),
            held: PageSet::new(pages),
        }
    }

    /// Pages held now: part of the rest that stop-and-copy must send.
    pub fn held(&self) -> &PageSet {
        &self.held
    }

    /// Splits what a scan found into what this round sends (returned) and
    /// what is held back. A page is held when it was dirty in this scan and
    /// in the one before; it is let go as soon as a scan finds it clean. At
    /// most `room` pages are held, so that the rest still fits the downtime.
    pub fn select(&mut self, dirty: PageSet, room: u64) -> PageSet {
        let mut send = dirty.clone();
        let mut cooled = self.held.clone();
        cooled.subtract(&dirty);
        send.extend(&cooled);
        let mut hot = dirty.intersection(&self.previous);
        if hot.len() > room {
            let keep: Vec<_> = hot.iter().skip(room as usize).collect();
            for gfn in keep {
                hot.remove(gfn..Gfn(gfn.0 + 1));
            }
        }
        send.subtract(&hot);
        self.held = hot;
        self.previous = dirty;
        send
    }

    /// Gives up everything held, for the last round.
    pub fn release(&mut self) -> PageSet {
        self.held.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(downtime_ms: u64) -> RoundLimits {
        RoundLimits {
            downtime_limit: Duration::from_millis(downtime_ms),
            max_rounds: 20,
            max_precopy: Duration::from_secs(60),
            gain: 0.9,
            stuck_rounds: 30,
        }
    }

    fn rest(pages: u64) -> Rest {
        // 4096 B a page at 40.96 MB/s: 10 000 pages a second.
        Rest {
            pages,
            bytes_per_page: 4096.0,
            bytes_per_s: 40.96e6,
        }
    }

    #[test]
    fn nothing_left_is_ready_at_once() {
        let mut c = Convergence::new(limits(300));
        assert_eq!(c.judge(1, Duration::from_secs(1), rest(0)), Verdict::Ready);
    }

    #[test]
    fn goes_on_while_rounds_shrink_the_rest_even_if_it_fits() {
        let mut c = Convergence::new(limits(300));
        let t = Duration::from_secs(1);
        assert_eq!(c.judge(1, t, rest(20_000)), Verdict::Another);
        assert_eq!(
            c.judge(2, t, rest(2_500)),
            Verdict::Another,
            "250 ms fits but may shrink"
        );
        assert_eq!(c.judge(3, t, rest(600)), Verdict::Another);
        assert_eq!(c.judge(4, t, rest(550)), Verdict::Another);
        assert_eq!(
            c.judge(5, t, rest(560)),
            Verdict::Ready,
            "no longer shrinks"
        );
    }

    #[test]
    fn a_rest_that_never_fits_ends_by_the_limits() {
        let mut c = Convergence::new(limits(300));
        for round in 1..20 {
            assert_eq!(
                c.judge(round, Duration::from_secs(1), rest(90_000)),
                Verdict::Another
            );
        }
        assert_eq!(
            c.judge(20, Duration::from_secs(1), rest(90_000)),
            Verdict::NoConvergence
        );
        let mut c = Convergence::new(limits(300));
        assert_eq!(
            c.judge(2, Duration::from_secs(61), rest(90_000)),
            Verdict::NoConvergence
        );
        assert_eq!(
            c.judge(3, Duration::from_secs(61), rest(1_000)),
            Verdict::Ready
        );
    }

    #[test]
    fn a_page_dirty_twice_is_held_until_it_cools() {
        let set = |gfns: &[u32]| {
            let mut s = PageSet::new(64);
            gfns.iter().for_each(|&g| s.insert(Gfn(g)..Gfn(g + 1)));
            s
        };
        let list = |s: &PageSet| s.iter().map(|g| g.0).collect::<Vec<_>>();
        let mut h = HeldBack::new(64);
        assert_eq!(list(&h.select(set(&[1, 2, 3]), 10)), [1, 2, 3]);
        assert_eq!(list(&h.select(set(&[2, 3, 4]), 10)), [4]);
        assert_eq!(list(h.held()), [2, 3]);
        assert_eq!(
            list(&h.select(set(&[3]), 10)),
            [2],
            "2 has cooled, 3 stays held"
        );
        assert_eq!(
            list(&h.select(set(&[3]), 0)),
            [3],
            "no room: sent every round"
        );
        assert_eq!(list(&h.select(set(&[3]), 10)), [0u32; 0]);
        assert_eq!(list(&h.release()), [3]);
        assert!(h.held().is_empty());
    }
}
