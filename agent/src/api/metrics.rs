//! Prometheus' text exposition format.

use std::fmt::{Display, Write};

/// Metrics as text, in the order they are added.
#[derive(Debug, Default)]
pub struct MetricsText {
    text: String,
}

impl MetricsText {
    /// No metrics yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a counter with its samples: labels (name, value) and number.
    pub fn counter<'a, V: Display>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<(&'a str, &'a str)>, V)>,
    ) -> &mut Self {
        self.family("counter", name, help, samples)
    }

    /// Adds a gauge with its samples.
    pub fn gauge<'a, V: Display>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<(&'a str, &'a str)>, V)>,
    ) -> &mut Self {
        self.family("gauge", name, help, samples)
    }

    /// The text to answer a scrape with.
    pub fn finish(self) -> String {
        self.text
    }

    fn family<'a, V: Display>(
        &mut self,
        kind: &str,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<(&'a str, &'a str)>, V)>,
    ) -> &mut Self {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {}", escape(help, false));
        let _ = writeln!(self.text, "# TYPE {name} {kind}");
        for (labels, value) in samples {
            self.text.push_str(name);
            for (i, (label, text)) in labels.iter().enumerate() {
                let before = if i == 0 { '{' } else { ',' };
                let _ = write!(self.text, "{before}{label}=\"{}\"", escape(text, true));
            }
            if !labels.is_empty() {
                self.text.push('}');
            }
            let _ = writeln!(self.text, " {value}");
        }
        self
    }
}

fn escape(text: &str, quotes: bool) -> String {
    let text = text.replace('\\', r"\\").replace('\n', r"\n");
    if quotes {
        text.replace('"', "\\\"")
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_families_have_their_heads() {
        let mut metrics = MetricsText::new();
        metrics.gauge("drover_up", "Is 1.", [(vec![], 1)]).counter(
            "drover_b_total",
            "Bytes.",
            [(vec![("vm", "a\"b"), ("h", "x")], 2.5)],
        );
        assert_eq!(
            metrics.finish(),
            "# HELP drover_up Is 1.\n# TYPE drover_up gauge\ndrover_up 1\n\
             # HELP drover_b_total Bytes.\n# TYPE drover_b_total counter\n\
             drover_b_total{vm=\"a\\\"b\",h=\"x\"} 2.5\n"
        );
    }
}
