//! The soak: gangs go back and forth, and something happens at any time.

use super::cell::{Cell, Fault, Random, pairs};
use super::report::Found;
use drover::gang::moments::Moment;
use serde::{Deserialize, Serialize};
use std::fmt::{self, Write};
use std::time::Duration;

/// A gang of two small guests is over by then if nothing happens.
const GANG_MS: u64 = 2_000;

/// One gang of the soak: what hits it, and when.
#[derive(Debug, Clone, Copy)]
pub struct SoakGang {
    /// Which of them, from 1.
    pub n: u32,
    /// What happens. Its moment is not looked at: what holds at any time has
    /// to hold.
    pub cell: Cell,
    /// So long after the gang's start.
    pub after: Duration,
    /// Decides the rest.
    pub seed: u64,
}

impl SoakGang {
    /// The `n`-th of a run with this seed, whatever was run before it.
    pub fn new(n: u32, run: u64) -> SoakGang {
        let mut random = Random::new(run ^ 0x50_4b ^ u64::from(n) << 32);
        let mut pairs = pairs();
        // Nine gangs in ten would stand and wait for it.
        pairs.retain(|(_, fault)| *fault != Fault::LongCut);
        let (victim, fault) = pairs[random.below(pairs.len() as u64) as usize];
        SoakGang {
            n,
            cell: Cell {
                victim,
                fault,
                moment: Moment::Started,
            },
            after: Duration::from_millis(random.below(GANG_MS)),
            seed: random.number(),
        }
    }
}

impl fmt::Display for SoakGang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cell { victim, fault, .. } = self.cell;
        let after = self.after.as_millis();
        write!(f, "gang {}, {victim} {fault} after {after} ms", self.n)
    }
}

/// What one gang came to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GangResult {
    /// Which of them, from 1.
    pub n: u32,
    /// Who was hit.
    pub victim: String,
    /// By what.
    pub fault: String,
    /// Milliseconds after the gang's start.
    pub after_ms: u64,
    /// What came of it.
    #[serde(flatten)]
    pub found: Found,
}

impl GangResult {
    /// Of a gang that was run.
    pub fn new(gang: &SoakGang, found: Found) -> GangResult {
        GangResult {
            n: gang.n,
            victim: gang.cell.victim.to_string(),
            fault: gang.cell.fault.to_string(),
            after_ms: gang.after.as_millis() as u64,
            found,
        }
    }
}

/// A paragraph for `docs/reliability.md`.
pub fn markdown(gangs: &[GangResult]) -> String {
    let count = |is: &dyn Fn(&Found) -> bool| gangs.iter().filter(|gang| is(&gang.found)).count();
    let took_ms: u64 = gangs.iter().map(|gang| gang.found.took_ms).sum();
    let mut recovery: Vec<u64> = gangs.iter().filter_map(|g| g.found.recovery_ms).collect();
    recovery.sort_unstable();
    let mut out = format!(
        "Soak: {} gangs back and forth in {} s, each hit at any time: after {} every invariant \
         held, {} arrived whole, {} needed the operator; recovery {} ms in the median, {} ms at \
         the longest.\n",
        gangs.len(),
        took_ms / 1000,
        count(&|found| found.ok),
        count(&|found| found.outcome.as_deref() == Some("arrived, arrived")),
        count(&|found| !found.decided.is_empty()),
        recovery.get(recovery.len() / 2).unwrap_or(&0),
        recovery.last().unwrap_or(&0),
    );
    for gang in gangs {
        let name = format!(
            "gang {}, {} {} after {} ms",
            gang.n, gang.victim, gang.fault, gang.after_ms
        );
        if !gang.found.ok {
            let _ = writeln!(out, "\n- {}", gang.found.line(&name));
        }
        if !gang.found.before.is_empty() {
            let _ = writeln!(
                out,
                "\n- {name}, run before: {}",
                gang.found.before.join("; ")
            );
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gang_of_the_soak_is_the_seeds_alone_whatever_ran_before() {
        let named = |n, seed| SoakGang::new(n, seed).to_string();
        assert_eq!(named(17, 3), named(17, 3));
        assert_ne!(named(17, 3), named(17, 4));
        let hit: std::collections::BTreeSet<_> = (1..=200)
            .map(|n| SoakGang::new(n, 3).cell)
            .map(|cell| (cell.victim, cell.fault.to_string()))
            .collect();
        // 200 draws of 49: nearly all of them.
        assert!(hit.len() > 40, "{} kinds in 200 gangs", hit.len());
    }
}
