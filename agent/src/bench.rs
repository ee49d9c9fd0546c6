//! The row every `drover bench` prints: a figure beside the references it was
//! measured with, in the same run on the same machine.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One measured figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BenchRow {
    /// What was measured, e.g. `fingerprint.page`.
    pub name: String,
    /// The figure, in `unit`.
    pub value: f64,
    /// Unit of `value` and of every reference that does not name its own, e.g. `GB/s`.
    pub unit: String,
    /// Figures measured side by side, by name.
    pub reference: BTreeMap<String, f64>,
}

impl BenchRow {
    /// A row without references.
    pub fn new(name: &str, value: f64, unit: &str) -> Self {
        Self {
            name: name.to_owned(),
            value,
            unit: unit.to_owned(),
            reference: BTreeMap::new(),
        }
    }

    /// Adds a reference figure.
    #[must_use]
    pub fn against(mut self, name: &str, value: f64) -> Self {
        self.reference.insert(name.to_owned(), value);
        self
    }
}
