//! The fault matrix: gangs move while processes die or hang, links fail,
//! disks fill up and clocks jump, at every moment of a handover; after each
//! everything is looked at. See `docs/reliability.md`.
//!
//! - [`cell`] says what the matrix is made of; [`run`] runs one cell of it on
//!   the [`stand`], a lab that serves many.
//! - [`inject`] brings faults about, by [`link`], [`fill`] and [`clock`].
//! - [`marks`] are the files by which agents show moments and wait;
//!   [`census`] counts what runs; [`invariants`] are what has to hold;
//!   [`operator`] decides what agents cannot.
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
pub mod operator;
pub mod report;
pub mod run;
pub mod soak;
pub mod stand;

use anyhow::{Context, Result};
use cell::Cell;
use drover::gang::plant::Plant;
use report::{CellResult, Found, Report};
use run::{Survived, When};
use soak::{GangResult, SoakGang};
use stand::{Stand, ms_since};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

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
    /// Which state of the code this is, for the report.
    pub commit: String,
    /// Nothing is begun after so long; what is left is for a later run.
    pub limit: Option<Duration>,
    /// Whether what failed in an earlier run is run again.
    pub again: bool,
}

impl Options {
    /// These cells, once, with nothing special about it.
    pub fn of(seed: u64, cells: Vec<Cell>, plant: Option<Plant>) -> Options {
        Options {
            seed,
            cells,
            soak: 0,
            plant,
            logs: default_logs(),
            commit: commit(),
            limit: None,
            again: false,
        }
    }

    /// Whether there is something to do about what was found so far, if it was.
    fn is_due(&self, found: Option<&Found>) -> bool {
        found.is_none_or(|found| self.again && !found.ok)
    }
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

    /// Runs one cell and makes the stand ready for the next. `name` is what
    /// the logs of a failed one are kept under.
    fn run(&mut self, name: &str, cell: &Cell, seed: u64, when: When) -> Result<Found> {
        // The lab is not part of what is measured.
        let stand = self.get()?;
        let begun = Instant::now();
        let survived = run::run(stand, cell, seed, when).and_then(|survived| {
            stand.repair()?;
            Ok(survived)
        });
        let found = self.found(survived, begun);
        if let Some(why) = &found.why {
            self.failed(name, why);
        }
        Ok(found)
    }

    fn found(&self, survived: Result<Survived>, begun: Instant) -> Found {
        Found::new(survived, ms_since(begun), &self.options.commit)
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

/// Who is told how it goes: a line for each thing, and the report so far.
pub type Say<'s> = &'s dyn Fn(&str, &Report) -> Result<()>;

/// Runs cells, then the soak, as far as `report` has not got them yet. Returns
/// how many are left.
///
/// # Errors
/// When the lab cannot be had. Cells that fail are in the report.
pub fn run(options: &Options, report: &mut Report, say: Say<'_>) -> Result<usize> {
    report.fits(options)?;
    let mut stands = Stands { options, now: None };
    let begun = Instant::now();
    let over = || options.limit.is_some_and(|limit| begun.elapsed() > limit);
    let mut left = 0;
    let total = options.cells.len();
    for (i, cell) in options.cells.iter().enumerate() {
        if !options.is_due(report.cell(cell)) {
            continue;
        }
        if over() {
            left += 1;
            continue;
        }
        let (name, seed) = (cell.to_string(), cell.seed(options.seed));
        let found = stands.run(&name, cell, seed, When::Moment)?;
        let result = CellResult::new(cell, found);
        let line = format!("{:>4}/{total} {}", i + 1, result.line());
        report.add_cell(result);
        say(&line, report)?;
    }
    for n in 1..=options.soak {
        if !options.is_due(report.gang(n)) {
            continue;
        }
        if over() {
            left += 1;
            continue;
        }
        let gang = SoakGang::new(n, options.seed);
        let when = When::After(gang.after);
        let found = stands.run(&format!("soak-{n}"), &gang.cell, gang.seed, when)?;
        let line = format!("{n:>4}/{} {}", options.soak, found.line(&gang.to_string()));
        report.add_gang(GangResult::new(&gang, found));
        say(&line, report)?;
    }
    stands.finish()?;
    Ok(left)
}

/// The workspace's commit, for reports: what runs is built from it.
pub fn commit() -> String {
    let asked = std::process::Command::new("git")
        .args([
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
            "--exclude=*",
        ])
        .current_dir(crate::cache::workspace())
        .output();
    match asked {
        Ok(said) if said.status.success() => String::from_utf8_lossy(&said.stdout).trim().into(),
        _ => "unknown".into(),
    }
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
