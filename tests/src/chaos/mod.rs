//! The fault matrix: gangs move while processes die or hang, links fail,
//! disks fill up and clocks jump, at every moment of a handover; after each
//! everything is looked at. See `docs/reliability.md`.
//!
//! - [`cell`] says what the matrix is made of; [`run`] runs one cell of it on
//!   the [`stand`], a lab that serves many.
//! - [`inject`] brings faults about, by [`link`], [`fill`] and [`clock`].
//! - [`marks`] are the files by which agents show moments and wait;
//!   [`census`] counts what runs; [`invariants`] are what has to hold.
//! - [`soak`] moves gangs back and forth with faults at any time;
//!   [`report`] is what comes out, [`args`] the command line.
pub mod args;
pub mod cell;
pub mod census;
pub mod clock;
pub mod fill;
pub mod inject;
pub mod invariants;
pub mod link;
pub mod marks;
pub mod report;
pub mod run;
pub mod soak;
pub mod stand;

use anyhow::{Context, Result};
use cell::Cell;
use drover::gang::plant::Plant;
use report::{CellResult, Report};
use run::{Survived, When};
use stand::{Stand, ms_since};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Decides everything that is decided by chance.
    pub seed: u64,
    /// The cells, in order.
    pub cells: Vec<Cell>,
    /// Gangs to move back and forth after them, with faults at any time.
    pub soak: u32,
    /// A bug that the agents are to have.
    pub plant: Option<Plant>,
    /// Where agents' logs of failed cells are kept.
    pub logs: PathBuf,
}

/// A stand that is made when it is needed, and made anew when a cell failed on
/// it.
struct Stands<'o> {
    options: &'o Options,
    now: Option<Stand>,
}

impl Stands<'_> {
    fn get(&mut self) -> Result<&mut Stand> {
        let stand = match self.now.take() {
            Some(stand) => stand,
            None => Stand::new(self.options.plant).context("no stand")?,
        };
        Ok(self.now.insert(stand))
    }

    /// Runs one cell and makes the stand ready for the next.
    fn run(&mut self, cell: &Cell, seed: u64, when: When) -> Result<Result<Survived>> {
        let stand = self.get()?;
        let outcome = run::run(stand, cell, seed, when);
        Ok(outcome.and_then(|survived| {
            stand.repair()?;
            Ok(survived)
        }))
    }

    /// Keeps a failed stand's logs and takes it down.
    fn failed(&mut self, name: &str, why: &str) {
        let Some(stand) = self.now.take() else { return };
        let dir = self.options.logs.join(name.replace('/', "-"));
        let kept = stand
            .keep_logs(&dir)
            .and_then(|()| Ok(fs::write(dir.join("why"), why)?));
        if let Err(error) = kept {
            eprintln!("logs not kept: {error:#}");
        }
    }

    fn finish(mut self) -> Result<()> {
        self.now.take().map_or(Ok(()), Stand::finish)
    }
}

/// Runs cells, then the soak. `say` is told of each.
///
/// # Errors
/// When the lab cannot be had. Cells that fail are in the report.
pub fn run(options: &Options, say: &dyn Fn(&str)) -> Result<Report> {
    let mut report = Report::new(options);
    let mut stands = Stands { options, now: None };
    let total = options.cells.len();
    for (i, cell) in options.cells.iter().enumerate() {
        // The lab is not part of what is measured.
        stands.get()?;
        let begun = Instant::now();
        let survived = stands.run(cell, cell.seed(options.seed), When::Moment)?;
        let took_ms = ms_since(begun);
        let result = CellResult::new(cell, survived.map_err(|e| format!("{e:#}")), took_ms);
        say(&format!("{:>4}/{total} {}", i + 1, result.line()));
        if let Some(why) = &result.why {
            stands.failed(&cell.to_string(), why);
        }
        report.cells.push(result);
    }
    if options.soak > 0 {
        report.soak = Some(soak::run(&mut stands, say)?);
    }
    stands.finish()?;
    Ok(report)
}

/// Where logs of failed cells are kept unless told otherwise.
pub fn default_logs() -> PathBuf {
    crate::cache::target_dir().join("chaos")
}

/// A folder of logs without those of earlier runs.
///
/// # Errors
/// When it cannot be emptied.
pub fn empty_logs(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| dir.display().to_string())
        }
        _ => Ok(()),
    }
}
