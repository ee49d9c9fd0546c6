//! The benchmark's figures as a table, as JSON and as a chart.

use super::{Rep, Report, Variant, VariantReport, kind_name, median};
use crate::qemu::Workload;
use crate::tenant::{Kind, Samples};
use serde_json::{Value, json};
use std::fmt::Write;

/// One repetition in a line.
pub fn line(variant: Variant, kind: Option<Kind>, rep: &Rep) -> String {
    let stops: Vec<String> = rep
        .moved
        .stop_resume_ms
        .iter()
        .map(|ms| format!("{ms:.0}"))
        .collect();
    let equal = match rep.moved.ram_equal {
        None => "",
        Some(true) => ", RAM equal",
        Some(false) => ", RAM DIFFERS",
    };
    let flow = rep.flow.as_ref().map(|(alone, during)| {
        let show = |s: &Samples| match kind {
            Some(Kind::RequestResponse) => format!(
                "p50 {} p99 {} ms",
                num(s.quantile(0.5), 2),
                num(s.quantile(0.99), 2)
            ),
            Some(Kind::Bulk) => format!("{} Mbit/s", num(s.mean(), 0)),
            _ => format!("slowest tenth {} Mbit/s", num(s.slowest_tenth(), 1)),
        };
        format!("; tenant alone {}, during {}", show(alone), show(during))
    });
    format!(
        "{:18} {:17} core {:6.1} MB, {:5.1} s, stopped {} ms, cpu {:.1} s{equal}{}",
        variant.name(),
        kind_name(kind),
        rep.core.total() as f64 / 1e6,
        rep.gang_ms / 1000.0,
        stops.join("/"),
        rep.cpu_s,
        flow.unwrap_or_default()
    )
}

fn num(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".into(), |v| format!("{v:.digits$}"))
}

impl VariantReport {
    fn core_bytes(&self) -> Option<f64> {
        median(self.quiet.iter().map(|r| r.core.total() as f64))
    }

    fn gang_ms(&self) -> Option<f64> {
        median(self.quiet.iter().map(|r| r.gang_ms))
    }

    fn cpu_s(&self) -> Option<f64> {
        median(self.quiet.iter().map(|r| r.cpu_s))
    }

    /// Stops of all VMs in all quiet repetitions.
    fn stops(&self) -> Vec<f64> {
        self.quiet
            .iter()
            .flat_map(|r| r.moved.stop_resume_ms.iter().copied())
            .collect()
    }

    /// Whether RAM was equal wherever it was compared; `None` if nowhere.
    fn ram_equal(&self) -> Option<bool> {
        let all = self
            .quiet
            .iter()
            .chain(&self.rr)
            .chain(&self.bulk)
            .chain(&self.paced);
        let compared: Vec<bool> = all.filter_map(|r| r.moved.ram_equal).collect();
        (!compared.is_empty()).then(|| compared.iter().all(|e| *e))
    }

    fn during(rep: &Option<Rep>) -> Option<&Samples> {
        rep.as_ref()?.flow.as_ref().map(|f| &f.1)
    }

    fn alone(rep: &Option<Rep>) -> Option<&Samples> {
        rep.as_ref()?.flow.as_ref().map(|f| &f.0)
    }
}

fn workload_name(workload: Workload) -> &'static str {
    match workload {
        Workload::Idle => "idle",
        Workload::Busy(_) => "busy",
        Workload::Dma => "dma",
    }
}

/// A table of at most 80 columns.
pub fn table(report: &Report) -> String {
    let mut out = String::new();
    let o = &report.options;
    let _ = writeln!(
        out,
        "{} VMs, {}, core {} Mbit/s, {} + {} hosts, TCP {}; medians of {}",
        o.vms,
        workload_name(o.workload),
        o.shape.rate_mbit,
        o.shape.hosts,
        o.shape.hosts,
        o.shape.congestion,
        o.reps
    );
    let _ = writeln!(
        out,
        "bound: {:.0} MB distinct, {:.0} MB as zstd-1 batches of 64\n",
        report.bound.distinct_bytes as f64 / 1e6,
        report.bound.zstd1_bytes as f64 / 1e6
    );
    let _ = writeln!(
        out,
        "{:17} {:>6} {:>5} {:>12} {:>6} {:>4} {:>11} {:>5} {:>5}",
        "variant", "core", "gang", "stopped ms", "CPU s", "RAM", "r/r ms", "bulk", "paced"
    );
    let _ = writeln!(
        out,
        "{:17} {:>6} {:>5} {:>12} {:>6} {:>4} {:>11} {:>5} {:>5}",
        "", "MB", "s", "med (max)", "", "", "p50/p99", "Mb/s", "Mb/s"
    );
    for v in &report.variants {
        let stops = v.stops();
        let longest = stops.iter().copied().fold(0.0, f64::max);
        let rr = VariantReport::during(&v.rr);
        let equal = match v.ram_equal() {
            None => "-",
            Some(true) => "same",
            Some(false) => "DIFF",
        };
        let _ = writeln!(
            out,
            "{:17} {:>6} {:>5} {:>12} {:>6} {:>4} {:>11} {:>5} {:>5}",
            v.variant.name(),
            num(v.core_bytes().map(|b| b / 1e6), 1),
            num(v.gang_ms().map(|ms| ms / 1000.0), 1),
            format!("{} ({longest:.0})", num(median(stops), 0)),
            num(v.cpu_s(), 1),
            equal,
            format!(
                "{}/{}",
                num(rr.and_then(|s| s.quantile(0.5)), 2),
                num(rr.and_then(|s| s.quantile(0.99)), 1)
            ),
            num(VariantReport::during(&v.bulk).and_then(Samples::mean), 0),
            num(
                VariantReport::during(&v.paced).and_then(Samples::slowest_tenth),
                0
            ),
        );
    }
    if let Some(v) = report.variants.iter().find(|v| v.rr.is_some()) {
        let rr = VariantReport::alone(&v.rr);
        let _ = writeln!(
            out,
            "{:17} {:>6} {:>5} {:>12} {:>6} {:>4} {:>11} {:>5} {:>5}",
            "tenant alone",
            "",
            "",
            "",
            "",
            "",
            format!(
                "{}/{}",
                num(rr.and_then(|s| s.quantile(0.5)), 2),
                num(rr.and_then(|s| s.quantile(0.99)), 1)
            ),
            num(VariantReport::alone(&v.bulk).and_then(Samples::mean), 0),
            num(
                VariantReport::alone(&v.paced).and_then(Samples::slowest_tenth),
                0
            ),
        );
    }
    out
}

/// The figures as one JSON object.
pub fn json(report: &Report) -> Value {
    let variants: Vec<Value> = report
        .variants
        .iter()
        .map(|v| {
            let rr = VariantReport::during(&v.rr);
            json!({
                "name": v.variant.name(),
                "core_bytes": v.core_bytes().map(|b| b as u64),
                "gang_ms": v.gang_ms().map(f64::round),
                "stop_resume_ms": v.stops(),
                "cpu_s": v.cpu_s(),
                "ram_equal": v.ram_equal(),
                "tenant": {
                    "rr_p50_ms": rr.and_then(|s| s.quantile(0.5)),
                    "rr_p99_ms": rr.and_then(|s| s.quantile(0.99)),
                    "bulk_mbit": VariantReport::during(&v.bulk).and_then(Samples::mean),
                    "bulk_alone_mbit": VariantReport::alone(&v.bulk).and_then(Samples::mean),
                },
            })
        })
        .collect();
    json!({
        "rate_mbit": report.options.shape.rate_mbit,
        "workload": workload_name(report.options.workload),
        "bound": {
            "distinct_bytes": report.bound.distinct_bytes,
            "zstd1_bytes": report.bound.zstd1_bytes,
        },
        "variants": variants,
    })
}

/// Core bytes and gang time as bars, with the bounds as lines.
pub fn svg(report: &Report) -> String {
    const WIDTH: f64 = 760.0;
    const LEFT: f64 = 150.0;
    const ROW: f64 = 46.0;
    let most = report
        .variants
        .iter()
        .filter_map(VariantReport::core_bytes)
        .fold(1.0, f64::max);
    let longest = report
        .variants
        .iter()
        .filter_map(VariantReport::gang_ms)
        .fold(1.0, f64::max);
    let room = WIDTH - LEFT - 110.0;
    let height = 90.0 + ROW * report.variants.len() as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"12\" y=\"24\" font-size=\"16\">{} VMs, {}, core {} Mbit/s</text>\n\
         <text x=\"12\" y=\"44\" fill=\"#555\">dark: bytes over the core link; light: time of the gang; \
         dashes: distinct bytes, and as zstd-1 batches</text>\n",
        report.options.vms,
        workload_name(report.options.workload),
        report.options.shape.rate_mbit
    );
    for (i, v) in report.variants.iter().enumerate() {
        let y = 60.0 + ROW * i as f64;
        let bytes = v.core_bytes().unwrap_or(0.0);
        let ms = v.gang_ms().unwrap_or(0.0);
        let colour = if v.variant.name().starts_with("drover") {
            "#0a6e5c"
        } else {
            "#5b6577"
        };
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LEFT}\" y=\"{y}\" width=\"{:.1}\" height=\"18\" fill=\"{colour}\"/>\n\
             <text x=\"{:.1}\" y=\"{}\">{:.0} MB</text>\n\
             <rect x=\"{LEFT}\" y=\"{}\" width=\"{:.1}\" height=\"12\" fill=\"{colour}\" opacity=\"0.4\"/>\n\
             <text x=\"{:.1}\" y=\"{}\" fill=\"#555\">{:.1} s</text>",
            LEFT - 8.0,
            y + 20.0,
            v.variant.name(),
            bytes / most * room,
            LEFT + bytes / most * room + 6.0,
            y + 14.0,
            bytes / 1e6,
            y + 20.0,
            ms / longest * room,
            LEFT + ms / longest * room + 6.0,
            y + 31.0,
            ms / 1000.0
        );
    }
    for bytes in [report.bound.distinct_bytes, report.bound.zstd1_bytes] {
        let x = LEFT + bytes as f64 / most * room;
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"54\" y2=\"{}\" stroke=\"#b3261e\" stroke-dasharray=\"4 3\"/>\n\
             <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"#b3261e\">{:.0} MB</text>",
            height - 26.0,
            height - 10.0,
            bytes as f64 / 1e6
        );
    }
    out.push_str("</svg>\n");
    out
}
