//! What a run of the matrix found: JSON for machines, Markdown for the docs.

use super::Options;
use super::cell::Cell;
use super::run::Survived;
use super::soak::SoakResult;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Everything a run found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// The seed, which gives the same run again.
    pub seed: u64,
    /// The bug the agents had, if one was planted.
    pub plant: Option<String>,
    /// The cells, in the order they were run in.
    pub cells: Vec<CellResult>,
    /// The soak, if it was asked for.
    pub soak: Option<SoakResult>,
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
    /// Whether every invariant held.
    pub ok: bool,
    /// Milliseconds from the fault's end (its beginning, if it lasted as long
    /// as the gang) until all was as it should be.
    pub recovery_ms: Option<u64>,
    /// What the operator was told became of the VMs; the one hit first.
    pub outcome: Option<String>,
    /// Milliseconds that the cell took in all.
    pub took_ms: u64,
    /// What did not hold.
    pub why: Option<String>,
}

impl CellResult {
    /// Of a cell that was run.
    pub fn new(cell: &Cell, survived: Result<Survived, String>, took_ms: u64) -> CellResult {
        let (survived, why) = match survived {
            Ok(survived) => (Some(survived), None),
            Err(why) => (None, Some(why)),
        };
        CellResult {
            victim: cell.victim.to_string(),
            fault: cell.fault.to_string(),
            moment: cell.moment.name().to_owned(),
            ok: why.is_none(),
            recovery_ms: survived.as_ref().map(|s| s.recovery_ms),
            outcome: survived.map(|s| s.outcome),
            took_ms,
            why,
        }
    }

    /// One line for whoever waits.
    pub fn line(&self) -> String {
        let CellResult {
            victim,
            fault,
            moment,
            took_ms,
            ..
        } = self;
        let took = *took_ms as f64 / 1000.0;
        let cell = format!("{victim}/{fault}/{moment}");
        match (&self.why, &self.outcome) {
            (Some(why), _) => format!("FAILED {cell} ({took:.1} s): {why}"),
            (None, outcome) => format!(
                "ok     {cell} ({took:.1} s): {}, at rest after {} ms",
                outcome.as_deref().unwrap_or("-"),
                self.recovery_ms.unwrap_or(0)
            ),
        }
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
    fn add(&mut self, cell: &CellResult) {
        self.cells += 1;
        self.ok += u32::from(cell.ok);
        self.recovery_ms.extend(cell.recovery_ms);
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
            soak: None,
        }
    }

    /// Whether every invariant held everywhere.
    pub fn ok(&self) -> bool {
        self.cells.iter().all(|cell| cell.ok) && self.soak.as_ref().is_none_or(SoakResult::ok)
    }

    /// The tables of `docs/reliability.md`.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        let ok = self.cells.iter().filter(|cell| cell.ok).count();
        let _ = writeln!(
            out,
            "{ok} of {} cells kept every invariant (seed {}).\n",
            self.cells.len(),
            self.seed
        );
        self.table(&mut out, "victim and fault", |cell| {
            format!("{} {}", cell.victim, cell.fault)
        });
        out.push('\n');
        self.table(&mut out, "moment", |cell| cell.moment.clone());
        for cell in self.cells.iter().filter(|cell| !cell.ok) {
            let _ = writeln!(out, "\n- {}", cell.line());
        }
        if let Some(soak) = &self.soak {
            let _ = write!(out, "\n{}", soak.markdown());
        }
        out
    }

    fn table(&self, out: &mut String, by: &str, key: impl Fn(&CellResult) -> String) {
        let mut rows: BTreeMap<String, Row> = BTreeMap::new();
        for cell in &self.cells {
            rows.entry(key(cell)).or_default().add(cell);
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

    #[test]
    fn the_tables_count_and_name_what_failed() {
        let cell = |moment: &str, ok, recovery_ms| CellResult {
            victim: "source-agent".into(),
            fault: "kill".into(),
            moment: moment.into(),
            ok,
            recovery_ms,
            outcome: None,
            took_ms: 10,
            why: (!ok).then(|| "it ran twice".into()),
        };
        let report = Report {
            seed: 7,
            plant: None,
            cells: vec![
                cell("paused", true, Some(30)),
                cell("sealed", true, Some(70)),
                cell("sealed", false, None),
            ],
            soak: None,
        };
        assert!(!report.ok());
        let text = report.markdown();
        assert!(text.contains("2 of 3 cells"), "{text}");
        assert!(
            text.contains("| source-agent kill | 3 | 2 | 70 | 70 |"),
            "{text}"
        );
        assert!(text.contains("| sealed | 2 | 1 | 70 | 70 |"), "{text}");
        assert!(text.contains("it ran twice"), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["cells"][0]["recovery_ms"], 30);
    }
}
