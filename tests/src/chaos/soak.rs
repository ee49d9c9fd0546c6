//! The soak: gangs go back and forth, and something happens at any time.

use super::Stands;
use super::cell::{Cell, Fault, Random, pairs};
use super::run::When;
use super::stand::ms_since;
use anyhow::Result;
use drover::gang::moments::Moment;
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// A gang of two small guests is over by then if nothing happens.
const GANG_MS: u64 = 2_000;

/// What the soak found.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SoakResult {
    /// Gangs that were moved.
    pub gangs: u32,
    /// Of these, gangs all of whose VMs arrived.
    pub arrived: u32,
    /// Of these, gangs after which every invariant held.
    pub ok: u32,
    /// The longest recovery, milliseconds.
    pub worst_recovery_ms: u64,
    /// Seconds in all.
    pub took_s: u64,
    /// Gangs after which something did not hold: which, and what.
    pub failed: Vec<String>,
}

impl SoakResult {
    /// Whether everything held.
    pub fn ok(&self) -> bool {
        self.failed.is_empty()
    }

    /// A paragraph for `docs/reliability.md`.
    pub fn markdown(&self) -> String {
        let mut out = format!(
            "Soak: {} gangs back and forth in {} s, each hit at any time: after {} every invariant \
             held, {} arrived whole; longest recovery {} ms.\n",
            self.gangs, self.took_s, self.ok, self.arrived, self.worst_recovery_ms
        );
        for failed in &self.failed {
            let _ = writeln!(out, "\n- {failed}");
        }
        out
    }
}

/// Moves gangs back and forth, as many as the options say.
///
/// # Errors
/// When the lab cannot be had.
pub(super) fn run(stands: &mut Stands<'_>, say: &dyn Fn(&str)) -> Result<SoakResult> {
    let (seed, total) = (stands.options.seed, stands.options.soak);
    let mut random = Random::new(seed ^ 0x50_4b);
    let mut pairs = pairs();
    // Nine gangs in ten would stand and wait for it.
    pairs.retain(|(_, fault)| *fault != Fault::LongCut);
    let begun = Instant::now();
    let mut result = SoakResult::default();
    for n in 1..=total {
        let (victim, fault) = pairs[random.below(pairs.len() as u64) as usize];
        let cell = Cell {
            victim,
            fault,
            // Not looked at: what holds at any time has to hold.
            moment: Moment::Started,
        };
        let after = Duration::from_millis(random.below(GANG_MS));
        let name = format!("gang {n}, {victim} {fault} after {} ms", after.as_millis());
        let survived = stands.run(&cell, random.number(), When::After(after))?;
        result.gangs += 1;
        match survived {
            Ok(survived) => {
                result.ok += 1;
                result.arrived += u32::from(survived.outcome == "arrived, arrived");
                result.worst_recovery_ms = result.worst_recovery_ms.max(survived.recovery_ms);
                say(&format!(
                    "{n:>4}/{total} ok     {name}: {}, at rest after {} ms",
                    survived.outcome, survived.recovery_ms
                ));
            }
            Err(error) => {
                let why = format!("{name}: {error:#}");
                say(&format!("{n:>4}/{total} FAILED {why}"));
                stands.failed(&format!("soak-{n}"), &why);
                result.failed.push(why);
            }
        }
    }
    result.took_s = ms_since(begun) / 1000;
    Ok(result)
}
