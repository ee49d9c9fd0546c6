//! Who breaks the rules: named in the log and in `drover status`, in so few
//! lines that nobody can fill a disk by breaking them often.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines about one peer in [`LOG_WINDOW`]; further ones are counted.
const LOG_LINES: u32 = 8;
const LOG_WINDOW: Duration = Duration::from_secs(1);
/// How long status tells of an offence.
const TOLD_FOR: Duration = Duration::from_secs(3600);
/// Offenders kept: agents of the cluster, and callers of none.
const MAX_OFFENDERS: usize = 1024;

/// What peers did that no honest agent of this version does, and refusals.
#[derive(Debug, Default)]
pub struct Offences(Mutex<HashMap<String, Offender>>);

#[derive(Debug)]
struct Offender {
    /// Offences, without refusals.
    count: u64,
    why: String,
    last: Instant,
    window: Instant,
    lines: u32,
    unlogged: u64,
}

impl Offences {
    /// `who` did what it may not.
    pub fn note(&self, who: &str, why: &str) {
        if let Some(more) = self.enter(who, Some(why)) {
            tracing::warn!(peer = %who, %why, more, "broke the rules between agents");
        }
    }

    /// `who` was refused a connection: it may be honest and late.
    pub fn refused(&self, who: &str, why: &str) {
        if let Some(more) = self.enter(who, None) {
            tracing::warn!(peer = %who, %why, more, "connection turned away");
        }
    }

    /// Whether to log it, and how many before it were not logged.
    fn enter(&self, who: &str, offence: Option<&str>) -> Option<u64> {
        let now = Instant::now();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !all.contains_key(who) {
            if all.len() >= MAX_OFFENDERS {
                all.retain(|_, offender| now.duration_since(offender.last) < TOLD_FOR);
            }
            if all.len() >= MAX_OFFENDERS {
                return None;
            }
        }
        let offender = all.entry(who.to_owned()).or_insert_with(|| Offender {
            count: 0,
            why: String::new(),
            last: now,
            window: now,
            lines: 0,
            unlogged: 0,
        });
        offender.last = now;
        if let Some(why) = offence {
            offender.count += 1;
            why.clone_into(&mut offender.why);
        }
        if now.duration_since(offender.window) >= LOG_WINDOW {
            offender.window = now;
            offender.lines = 0;
        }
        if offender.lines >= LOG_LINES {
            offender.unlogged += 1;
            return None;
        }
        offender.lines += 1;
        Some(std::mem::take(&mut offender.unlogged))
    }

    /// For `drover status`: one line for each offender of the last hour.
    pub fn warnings(&self) -> Vec<String> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = all
            .iter()
            .filter(|(_, o)| o.count > 0 && o.last.elapsed() < TOLD_FOR);
        let mut lines: Vec<String> = recent
            .map(|(who, offender)| {
                let times = match offender.count {
                    1 => "once".to_owned(),
                    n => format!("{n} times"),
                };
                format!(
                    "{who} broke the rules between agents {times}, last: {}; look at that host, \
                     and if it is not to be trusted take it out of the [[peer]] lists",
                    offender.why
                )
            })
            .collect();
        lines.sort_unstable();
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offenders_are_named_with_what_they_did_last_and_how_often() {
        let offences = Offences::default();
        assert!(offences.warnings().is_empty());
        offences.note("a2", "sent rubbish");
        offences.note("a1", "was rude");
        offences.note("a2", "sent more rubbish");
        offences.refused("a3", "its gang has ended");
        let [a1, a2] = &offences.warnings()[..] else {
            panic!("{:?}", offences.warnings());
        };
        assert!(a1.contains("a1 ") && a1.contains("once, last: was rude"));
        assert!(a2.contains("2 times, last: sent more rubbish"), "{a2}");
    }

    #[test]
    fn the_log_gets_some_lines_and_then_a_count() {
        let offences = Offences::default();
        let logged = (0..100).filter(|_| offences.enter("a1", None).is_some());
        // A test that is held up for a second sees the next window as well.
        assert!((LOG_LINES as usize..50).contains(&logged.count()));
    }

    #[test]
    fn offenders_without_end_take_bounded_memory() {
        let offences = Offences::default();
        for n in 0..3 * MAX_OFFENDERS {
            offences.note(&n.to_string(), "calls from everywhere");
        }
        assert_eq!(offences.warnings().len(), MAX_OFFENDERS);
    }
}
