//! `drover bench`: prints what the parts measure of themselves.

use super::args::BenchCommand;
use super::{CliError, ExitCode};
use crate::bench::BenchRow;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use std::path::Path;

/// Measures, prints a table, and writes the rows to `json`.
pub(super) fn run(command: &BenchCommand, json: Option<&Path>) -> Result<ExitCode, CliError> {
    let rows = measure(command)?;
    println!("{}", table(&rows));
    if let Some(file) = json {
        let text = serde_json::to_string_pretty(&rows).map_err(std::io::Error::from);
        let written = text.and_then(|text| std::fs::write(file, text + "\n"));
        written.map_err(|e| {
            CliError::failed(
                format!("cannot write {}: {e}", file.display()),
                "name a writable file with --json",
            )
        })?;
    }
    Ok(ExitCode::Ok)
}

/// Each part brings its own measurement.
fn measure(command: &BenchCommand) -> Result<Vec<BenchRow>, CliError> {
    match command {
        BenchCommand::Fingerprint { .. } => Ok(crate::dedup::bench::bench_fingerprint()),
        BenchCommand::Claims { .. } => Ok(crate::dedup::bench::bench_claims()),
        BenchCommand::Lane { .. } => crate::lane::bench::bench_lane().map_err(|e| {
            CliError::failed(
                format!("cannot measure a lane: {e}"),
                "lanes need io_uring: see `sysctl kernel.io_uring_disabled`",
            )
        }),
    }
}

/// The rows as a table.
fn table(rows: &[BenchRow]) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(80)
        .set_header(["measured", "value", "unit", "compare with"]);
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for row in rows {
        let reference = row.reference.iter();
        let reference: Vec<String> = reference.map(|(k, v)| format!("{k} {v:.2}")).collect();
        table.add_row([
            row.name.clone(),
            format!("{:.2}", row.value),
            row.unit.clone(),
            reference.join(", "),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_fit_and_have_the_documented_shape() {
        let row = BenchRow {
            name: "fingerprint, 4 KiB pages".into(),
            value: 9.7,
            unit: "GB/s".into(),
            reference: [("read".to_owned(), 12.8)].into(),
        };
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!(json["reference"]["read"], 12.8);
        let text = table(&[row]);
        assert!(
            text.contains("9.70") && text.contains("read 12.80"),
            "{text}"
        );
        assert!(text.lines().all(|l| l.chars().count() <= 80), "{text}");
    }
}
