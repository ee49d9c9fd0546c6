//! The command line of `lab chaos`, which `cargo xtask chaos` runs.

use super::cell::{self, Cell};
use super::report::Report;
use super::{Options, default_logs, empty_logs};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use drover::gang::plant::Plant;
use std::fs;
use std::path::PathBuf;

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
    /// Write what was found as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
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
            let text = fs::read(path).with_context(|| path.display().to_string())?;
            print!("{}", serde_json::from_slice::<Report>(&text)?.markdown());
            return Ok(());
        }
        let cells = self.chosen()?;
        if self.list {
            cells.iter().for_each(|cell| println!("{cell}"));
            return Ok(());
        }
        let options = Options {
            seed: self.seed,
            cells,
            soak: self.soak,
            plant: self.plant,
            logs: default_logs(),
        };
        empty_logs(&options.logs)?;
        let report = super::run(&options, &|line| println!("{line}"))?;
        let write = |file: &Option<PathBuf>, text: String| match file {
            Some(path) => fs::write(path, text).with_context(|| path.display().to_string()),
            None => Ok(()),
        };
        write(&self.json, serde_json::to_string_pretty(&report)? + "\n")?;
        write(&self.markdown, report.markdown())?;
        println!("\n{}", report.markdown());
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
