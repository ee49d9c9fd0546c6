//! The command line of `lab chaos`, which `cargo xtask chaos` runs.

use super::cell::{self, Cell};
use super::report::Report;
use super::{Options, empty_logs};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use drover::gang::plant::Plant;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Cells of a run that does not say how many.
const CELLS: usize = 360;

/// Run the fault matrix.
#[derive(Debug, Args)]
pub struct ChaosArgs {
    /// Decides which cells, in which order, and what is left to chance in them
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many cells, each pair of victim and fault about equally often
    #[arg(long, default_value_t = CELLS, conflicts_with_all = ["all", "short"])]
    cells: usize,
    /// Every cell there is
    #[arg(long, conflicts_with = "short")]
    all: bool,
    /// Each fault and each victim once: the short form that `cargo xtask test` runs
    #[arg(long)]
    short: bool,
    /// Of all cells only those whose VICTIM/FAULT/MOMENT begins with one of these
    #[arg(long, value_name = "PREFIX", value_delimiter = ',')]
    only: Vec<String>,
    /// Then move so many gangs back and forth, with faults at any time
    #[arg(long, value_name = "GANGS", default_value_t = 0)]
    soak: u32,
    /// Have the agents made with a bug; it is an error if no cell notices
    #[arg(long, value_name = "BUG")]
    plant: Option<Plant>,
    /// Write what was found as JSON, after each cell
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Go on with the run that the file of --json is of: what it has is not run
    /// again
    #[arg(long, requires = "json")]
    resume: bool,
    /// With --resume: run again what failed there. What was wrong stays in the
    /// report
    #[arg(long, requires = "resume")]
    again: bool,
    /// Begin no cell after so many seconds, and leave the rest to --resume
    #[arg(long, value_name = "SECONDS", requires = "json")]
    limit_s: Option<u64>,
    /// What the report calls the state of the code; git's word for the
    /// workspace's if it is not given
    #[arg(long, value_name = "NAME")]
    commit: Option<String>,
    /// Write the tables of docs/reliability.md
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Only print the tables of an earlier run's JSON
    #[arg(long, value_name = "JSON")]
    tables: Option<PathBuf>,
    /// Only print the names of the cells that would be run
    #[arg(long)]
    list: bool,
}

impl ChaosArgs {
    fn chosen(&self) -> Result<Vec<Cell>> {
        let cells = match (self.short, self.all, self.only.is_empty()) {
            (true, ..) => cell::short(self.seed),
            (_, true, _) => cell::sample(usize::MAX, self.seed),
            (.., false) => {
                let mut cells = cell::sample(usize::MAX, self.seed);
                cells.retain(|cell| {
                    let name = cell.to_string();
                    self.only
                        .iter()
                        .any(|prefix| name.starts_with(prefix.as_str()))
                });
                cells.truncate(self.cells);
                cells
            }
            _ => cell::sample(self.cells, self.seed),
        };
        ensure!(
            !cells.is_empty() || self.cells == 0,
            "no cell is called so: see --all --list"
        );
        Ok(cells)
    }

    /// Does what was asked for.
    ///
    /// # Errors
    /// When the lab cannot be had, or an invariant did not hold.
    pub fn run(&self) -> Result<()> {
        if let Some(path) = &self.tables {
            print!("{}", Report::read(path)?.markdown());
            return Ok(());
        }
        let cells = self.chosen()?;
        if self.list {
            cells.iter().for_each(|cell| println!("{cell}"));
            return Ok(());
        }
        let options = Options {
            soak: self.soak,
            commit: self.commit.clone().unwrap_or_else(super::commit),
            limit: self.limit_s.map(Duration::from_secs),
            again: self.again,
            ..Options::of(self.seed, cells, self.plant)
        };
        let earlier = self.json.as_deref().filter(|_| self.resume);
        let mut report = match earlier.filter(|path| path.exists()) {
            Some(path) => Report::read(path)?,
            None => {
                empty_logs(&options.logs)?;
                Report::new(&options)
            }
        };
        let say = |line: &str, report: &Report| {
            println!("{line}");
            self.json
                .as_deref()
                .map_or(Ok(()), |path| report.write(path))
        };
        let left = super::run(&options, &mut report, &say)?;
        if let Some(path) = &self.markdown {
            fs::write(path, report.markdown()).with_context(|| path.display().to_string())?;
        }
        println!("\n{}", report.markdown());
        if left > 0 {
            println!("{left} left: go on with --resume");
        }
        match (&self.plant, report.ok()) {
            (None, true) => Ok(()),
            (Some(_), false) => {
                println!("the planted bug was noticed");
                Ok(())
            }
            (Some(bug), true) => bail!("no cell noticed the planted bug {}", bug.name()),
            (None, false) => bail!(
                "invariants did not hold; the agents' logs are in {}",
                options.logs.display()
            ),
        }
    }
}
