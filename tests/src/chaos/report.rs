//! What runs of the matrix found: JSON for machines, which a later run can go
//! on with, and Markdown for the docs.

use super::Options;
use super::cell::Cell;
use super::run::Survived;
use super::soak::{self, GangResult};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// Everything that was found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// The seed, which gives the same run again.
    pub seed: u64,
    /// The bug the agents had, if one was planted.
    pub plant: Option<String>,
    /// The cells, in the order they were run in.
    pub cells: Vec<CellResult>,
    /// The gangs of the soak, likewise.
    #[serde(default)]
    pub soak: Vec<GangResult>,
}

/// What a cell, or a gang of the soak, came to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Found {
    /// Whether every invariant held.
    pub ok: bool,
    /// Milliseconds from the fault's end (its beginning, if it lasted as long
    /// as the gang) until all was as it should be.
    pub recovery_ms: Option<u64>,
    /// What the operator was told became of the VMs; the one hit first.
    pub outcome: Option<String>,
    /// What the operator had to decide, since the agents could not: `vm1 runs
    /// on r1h1`.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub decided: Vec<String>,
    /// Milliseconds that it took in all.
    pub took_ms: u64,
    /// What did not hold.
    pub why: Option<String>,
    /// Which state of the code it was.
    pub commit: String,
    /// What did not hold when it was run before, and of which state of the
    /// code that was. Nothing that was red once is forgotten.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub before: Vec<String>,
}

impl Found {
    /// From what has just been run.
    pub fn new(survived: Result<Survived>, took_ms: u64, commit: &str) -> Found {
        let (survived, why) = match survived {
            Ok(survived) => (Some(survived), None),
            Err(why) => (None, Some(format!("{why:#}"))),
        };
        let decided = survived.iter().flat_map(|s| &s.decided);
        Found {
            ok: why.is_none(),
            recovery_ms: survived.as_ref().map(|s| s.recovery_ms),
            decided: decided
                .map(|d| format!("{} runs on {}", d.vm, d.runs_on))
                .collect(),
            outcome: survived.map(|s| s.outcome),
            took_ms,
            why,
            commit: commit.to_owned(),
            before: Vec::new(),
        }
    }

    /// In place of an earlier one, which is not forgotten.
    fn again(mut self, earlier: &Found) -> Found {
        self.before.clone_from(&earlier.before);
        let why = earlier.why.as_deref().unwrap_or("nothing wrong");
        self.before.push(format!("{}: {why}", earlier.commit));
        self
    }

    /// What is said of the thing called `name`.
    pub fn line(&self, name: &str) -> String {
        let took = self.took_ms as f64 / 1000.0;
        match &self.why {
            Some(why) => format!("FAILED {name} ({took:.1} s): {why}"),
            None => {
                let decided = match &self.decided[..] {
                    [] => String::new(),
                    all => format!(", the operator decided: {}", all.join(", ")),
                };
                format!(
                    "ok     {name} ({took:.1} s): {}{decided}, at rest after {} ms",
                    self.outcome.as_deref().unwrap_or("-"),
                    self.recovery_ms.unwrap_or(0)
                )
            }
        }
    }
}

/// One cell.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CellResult {
    /// Who was hit.
    pub victim: String,
    /// By what.
    pub fault: String,
    /// When.
    pub moment: String,
    /// What came of it.
    #[serde(flatten)]
    pub found: Found,
}

impl CellResult {
    /// Of a cell that was run.
    pub fn new(cell: &Cell, found: Found) -> CellResult {
        CellResult {
            victim: cell.victim.to_string(),
            fault: cell.fault.to_string(),
            moment: cell.moment.name().to_owned(),
            found,
        }
    }

    /// The cell's name.
    pub fn name(&self) -> String {
        format!("{}/{}/{}", self.victim, self.fault, self.moment)
    }

    /// One line for whoever waits.
    pub fn line(&self) -> String {
        self.found.line(&self.name())
    }
}

/// Counts of a row of the tables.
#[derive(Debug, Default)]
struct Row {
    cells: u32,
    ok: u32,
    recovery_ms: Vec<u64>,
}

impl Row {
    fn add(&mut self, found: &Found) {
        self.cells += 1;
        self.ok += u32::from(found.ok);
        self.recovery_ms.extend(found.recovery_ms);
    }

    fn write(mut self, name: &str, out: &mut String) {
        self.recovery_ms.sort_unstable();
        let times = match &self.recovery_ms[..] {
            [] => "– | –".to_owned(),
            all => format!("{} | {}", all[all.len() / 2], all[all.len() - 1]),
        };
        let _ = writeln!(out, "| {name} | {} | {} | {times} |", self.cells, self.ok);
    }
}

impl Report {
    /// An empty one.
    pub fn new(options: &Options) -> Report {
        Report {
            seed: options.seed,
            plant: options.plant.map(|bug| bug.name().to_owned()),
            cells: Vec::new(),
            soak: Vec::new(),
        }
    }

    /// One that was written before.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(path: &Path) -> Result<Report> {
        let text = fs::read(path).with_context(|| path.display().to_string())?;
        serde_json::from_slice(&text).with_context(|| path.display().to_string())
    }

    /// Writes it as JSON, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let new = path.with_extension("new");
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, path))
            .with_context(|| path.display().to_string())
    }

    /// Demands that it can be gone on with by such a run.
    ///
    /// # Errors
    /// When another seed, or another bug, made it.
    pub fn fits(&self, options: &Options) -> Result<()> {
        let plant = options.plant.map(|bug| bug.name().to_owned());
        ensure!(
            self.seed == options.seed && self.plant == plant,
            "it is of seed {} with {:?} planted, this run is of seed {} with {plant:?}",
            self.seed,
            self.plant,
            options.seed
        );
        Ok(())
    }

    /// What is known of a cell.
    pub fn cell(&self, cell: &Cell) -> Option<&Found> {
        let name = cell.to_string();
        let found = self.cells.iter().find(|result| result.name() == name);
        found.map(|result| &result.found)
    }

    /// What is known of a gang of the soak.
    pub fn gang(&self, n: u32) -> Option<&Found> {
        let found = self.soak.iter().find(|gang| gang.n == n);
        found.map(|gang| &gang.found)
    }

    /// Takes in a cell that was run, once more perhaps.
    pub fn add_cell(&mut self, mut result: CellResult) {
        match self.cells.iter_mut().find(|c| c.name() == result.name()) {
            Some(earlier) => {
                result.found = result.found.again(&earlier.found);
                *earlier = result;
            }
            None => self.cells.push(result),
        }
    }

    /// Takes in a gang of the soak, once more perhaps.
    pub fn add_gang(&mut self, mut result: GangResult) {
        match self.soak.iter_mut().find(|gang| gang.n == result.n) {
            Some(earlier) => {
                result.found = result.found.again(&earlier.found);
                *earlier = result;
            }
            None => self.soak.push(result),
        }
    }

    fn all(&self) -> impl Iterator<Item = &Found> {
        let cells = self.cells.iter().map(|cell| &cell.found);
        cells.chain(self.soak.iter().map(|gang| &gang.found))
    }

    /// Whether every invariant held everywhere.
    pub fn ok(&self) -> bool {
        self.all().all(|found| found.ok)
    }

    /// The tables of `docs/reliability.md`.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        let ok = self.cells.iter().filter(|cell| cell.found.ok).count();
        let mut commits: BTreeMap<&str, u32> = BTreeMap::new();
        for found in self.all() {
            *commits.entry(found.commit.as_str()).or_default() += 1;
        }
        let commits: Vec<String> = commits
            .iter()
            .map(|(commit, count)| format!("{commit} ({count})"))
            .collect();
        let _ = writeln!(
            out,
            "{ok} of {} cells kept every invariant (seed {}; code of commit {}).\n",
            self.cells.len(),
            self.seed,
            commits.join(", ")
        );
        self.table(&mut out, "victim and fault", |cell| {
            format!("{} {}", cell.victim, cell.fault)
        });
        out.push('\n');
        self.table(&mut out, "moment", |cell| cell.moment.clone());
        self.remarks(&mut out);
        if !self.soak.is_empty() {
            let _ = write!(out, "\n{}", soak::markdown(&self.soak));
        }
        out
    }

    /// Cells that tables do not tell all of.
    fn remarks(&self, out: &mut String) {
        for cell in self.cells.iter().filter(|cell| !cell.found.ok) {
            let _ = writeln!(out, "\n- {}", cell.line());
        }
        let decided: Vec<&CellResult> = self
            .cells
            .iter()
            .filter(|cell| !cell.found.decided.is_empty())
            .collect();
        if !decided.is_empty() {
            let _ = writeln!(
                out,
                "\nIn doubt until the operator decided, {}:",
                decided.len()
            );
            for cell in decided {
                let what = cell.found.decided.join(", ");
                let _ = writeln!(out, "\n- {}: {what}", cell.name());
            }
        }
        let again = |cell: &&CellResult| !cell.found.before.is_empty();
        for cell in self.cells.iter().filter(again) {
            let before = cell.found.before.join("; ");
            let _ = writeln!(out, "\n- {}, run before: {before}", cell.name());
        }
    }

    fn table(&self, out: &mut String, by: &str, key: impl Fn(&CellResult) -> String) {
        let mut rows: BTreeMap<String, Row> = BTreeMap::new();
        for cell in &self.cells {
            rows.entry(key(cell)).or_default().add(&cell.found);
        }
        let _ = writeln!(
            out,
            "| {by} | cells | ok | recovery, median ms | worst ms |\n|---|--:|--:|--:|--:|"
        );
        for (name, row) in rows {
            row.write(&name, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(moment: &str, ok: bool, recovery_ms: Option<u64>) -> CellResult {
        CellResult {
            victim: "source-agent".into(),
            fault: "kill".into(),
            moment: moment.into(),
            found: Found {
                ok,
                recovery_ms,
                outcome: None,
                decided: Vec::new(),
                took_ms: 10,
                why: (!ok).then(|| "it ran twice".into()),
                commit: "abc".into(),
                before: Vec::new(),
            },
        }
    }

    #[test]
    fn the_tables_count_and_name_what_failed() {
        let report = Report {
            seed: 7,
            plant: None,
            cells: vec![
                cell("paused", true, Some(30)),
                cell("sealed", true, Some(70)),
                cell("sealed", false, None),
            ],
            soak: Vec::new(),
        };
        assert!(!report.ok());
        let text = report.markdown();
        assert!(text.contains("2 of 3 cells"), "{text}");
        assert!(text.contains("abc (3)"), "{text}");
        assert!(
            text.contains("| source-agent kill | 3 | 2 | 70 | 70 |"),
            "{text}"
        );
        assert!(text.contains("| sealed | 2 | 1 | 70 | 70 |"), "{text}");
        assert!(text.contains("it ran twice"), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["cells"][0]["recovery_ms"], 30);
    }

    #[test]
    fn a_cell_that_is_run_again_keeps_what_was_wrong_before() {
        let mut report = Report {
            seed: 7,
            plant: None,
            cells: Vec::new(),
            soak: Vec::new(),
        };
        report.add_cell(cell("paused", false, None));
        report.add_cell(cell("paused", true, Some(5)));
        assert_eq!(report.cells.len(), 1);
        assert!(report.ok());
        let text = report.markdown();
        assert!(
            text.contains("source-agent/kill/paused, run before: abc: it ran twice"),
            "{text}"
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        report.write(&path).unwrap();
        assert_eq!(Report::read(&path).unwrap().markdown(), text);
    }
}
