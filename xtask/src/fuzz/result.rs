//! What a run of a target came to, from libFuzzer's own words.

use std::path::PathBuf;
use std::time::Duration;

/// How a target ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) target: String,
    /// Inputs run.
    executions: u64,
    /// Edges of the instrumented code that were reached.
    coverage: u64,
    /// Edges that were there when only the corpus had been run.
    coverage_begun: u64,
    /// Inputs that reached something new.
    new_units: u64,
    peak_mib: u64,
    took: Duration,
    succeeded: bool,
    /// Files that hold what broke it.
    artifacts: Vec<String>,
    log: PathBuf,
}

impl Outcome {
    pub(super) fn read(
        target: &str,
        log_text: &str,
        succeeded: bool,
        took: Duration,
        log: PathBuf,
    ) -> Outcome {
        let stat = |name: &str| {
            let line = log_text.lines().find_map(|line| {
                line.strip_prefix("stat::")?
                    .strip_prefix(name)?
                    .strip_prefix(':')
            });
            line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
        };
        let covered = |line: &str| {
            let (_, rest) = line.split_once(" cov: ")?;
            rest.split_whitespace().next()?.parse().ok()
        };
        let begun = log_text
            .lines()
            .find(|line| line.contains("\tINITED "))
            .and_then(covered);
        let artifact = |line: &str| {
            let (_, path) = line.split_once("Test unit written to ")?;
            Some(path.trim().to_owned())
        };
        Outcome {
            target: target.to_owned(),
            executions: stat("number_of_executed_units"),
            coverage: log_text.lines().rev().find_map(covered).unwrap_or(0),
            coverage_begun: begun.unwrap_or(0),
            new_units: stat("new_units_added"),
            peak_mib: stat("peak_rss_mb"),
            took,
            succeeded,
            artifacts: log_text.lines().filter_map(artifact).collect(),
            log,
        }
    }

    /// Why this is not a run without a finding, if it is none.
    pub(super) fn problem(&self) -> Option<String> {
        let (target, log) = (&self.target, self.log.display());
        if !self.succeeded {
            let artifacts = self.artifacts.join(", ");
            return Some(format!("{target}: found {artifacts}; see {log}"));
        }
        // Without counters libFuzzer runs, finds nothing, and is content.
        (self.coverage == 0 || self.executions == 0)
            .then(|| format!("{target}: it was not instrumented, or did not run; see {log}"))
    }

    pub(super) fn row(&self) -> String {
        format!(
            "| `{}` | {} | {} → {} | {} | {} | {:.1} | {} |",
            self.target,
            grouped(self.executions),
            self.coverage_begun,
            self.coverage,
            self.new_units,
            self.peak_mib,
            self.took.as_secs_f64() / 60.0,
            match (self.succeeded, self.artifacts.len()) {
                (true, _) => "none".to_owned(),
                (false, n) => n.max(1).to_string(),
            }
        )
    }
}

/// As docs/fuzzing.md has it.
pub(super) fn table(outcomes: &[Outcome]) -> String {
    let mut out = "| target | executions | edges: corpus → end | new inputs | MiB at most | minutes | findings |\n\
                   |---|---|---|---|---|---|---|\n"
        .to_owned();
    for outcome in outcomes {
        out += &outcome.row();
        out.push('\n');
    }
    out
}

/// `1234567` as `1 234 567`.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "INFO: seed corpus: files: 5\n#6\tINITED cov: 120 ft: 130 corp: 5/1Kb\n\
        #64\tNEW    cov: 121 ft: 140 corp: 6/1Kb L: 3/3 MS: 1\n\
        #1234567\tDONE   cov: 345 ft: 900 corp: 80/9Kb\n\
        stat::number_of_executed_units: 1234567\nstat::new_units_added:          75\n\
        stat::peak_rss_mb:              401\n";

    fn read(log: &str, succeeded: bool) -> Outcome {
        let took = Duration::from_secs(600);
        Outcome::read("rpc", log, succeeded, took, "rpc.log".into())
    }

    #[test]
    fn figures_are_libfuzzers() {
        let outcome = read(LOG, true);
        assert_eq!(
            outcome.row(),
            "| `rpc` | 1 234 567 | 120 → 345 | 75 | 401 | 10.0 | none |"
        );
        assert_eq!(outcome.problem(), None);
    }

    #[test]
    fn findings_and_runs_without_counters_are_problems() {
        let log = format!("{LOG}artifact_prefix='a/'; Test unit written to a/crash-1\n");
        let problem = read(&log, false).problem().expect("a finding");
        assert!(problem.contains("a/crash-1") && problem.contains("rpc.log"));
        let blind = LOG.replace("cov:", "cut:");
        let problem = read(&blind, true).problem().expect("nothing counted");
        assert!(problem.contains("not instrumented"));
    }
}
