//! `bench gang`: the same gang on the same lab, moved by Drover and by QEMU
//! itself, side by side in one run.
//!
//! Every variant starts from the same saved guests. A *quiet* repetition
//! measures bytes, time, stops and CPU. Further repetitions each carry one
//! tenant flow; in those with a request/response or a bulk flow all guest RAM is
//! compared at the switch, which would spoil what the others measure.

pub mod bound;
pub mod dirty_log;
pub mod drover_gang;
pub mod output;
pub mod qemu_gang;

use crate::cpu::CpuMeter;
use crate::qemu::Workload;
use crate::save;
use crate::tenant::{Flow, Kind, Samples};
use crate::topology::{CoreCounters, Host, Lab, Shape};
use anyhow::{Context, Result};
use bound::Bound;
use std::time::{Duration, Instant};

/// How a tenant's flow is measured before it has company.
const ALONE: Duration = Duration::from_secs(2);

/// How long it is measured during a migration at most. One that gives way to
/// a bulk flow, as a polite profile does, then has the link for itself.
const COMPANY: Duration = Duration::from_secs(20);

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// The lab.
    pub shape: Shape,
    /// Size of the gang.
    pub vms: u32,
    /// What the guests do.
    pub workload: Workload,
    /// Quiet repetitions of every variant; figures are medians over them.
    pub reps: u32,
    /// Which variants, in this order.
    pub variants: Vec<Variant>,
    /// Whether to run the repetitions with tenants.
    pub tenants: bool,
}

/// A way of moving the gang.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Drover as it comes.
    Drover,
    /// Drover with `--compress never`.
    DroverNoZstd,
    /// QEMU's own pre-copy over TCP, all VMs at once.
    QemuDefault,
    /// With two multifd channels a VM, zstd level 1.
    QemuMultifdZstd,
    /// With XBZRLE and a 64 MiB cache.
    QemuXbzrle,
}

impl Variant {
    /// All of them.
    pub const ALL: [Variant; 5] = [
        Variant::Drover,
        Variant::DroverNoZstd,
        Variant::QemuDefault,
        Variant::QemuMultifdZstd,
        Variant::QemuXbzrle,
    ];

    /// Its name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Variant::Drover => "drover",
            Variant::DroverNoZstd => "drover-nozstd",
            Variant::QemuDefault => "qemu-default",
            Variant::QemuMultifdZstd => "qemu-multifd-zstd",
            Variant::QemuXbzrle => "qemu-xbzrle",
        }
    }
}

impl std::str::FromStr for Variant {
    type Err = String;

    fn from_str(name: &str) -> Result<Variant, String> {
        let names = Variant::ALL.map(Variant::name).join(", ");
        Variant::ALL
            .into_iter()
            .find(|v| v.name() == name)
            .ok_or_else(|| format!("variants are {names}"))
    }
}

/// What the moving of a gang itself tells.
#[derive(Debug, Clone, Default)]
pub struct Moved {
    /// From STOP at the source to RESUME at the target, a VM each, in ms.
    pub stop_resume_ms: Vec<f64>,
    /// The downtime that was reported, a VM each, in ms.
    pub reported_ms: Vec<f64>,
    /// Whether all guest RAM was equal at the switch, if it was compared.
    pub ram_equal: Option<bool>,
}

/// One repetition.
#[derive(Debug, Clone)]
pub struct Rep {
    /// What crossed the core link.
    pub core: CoreCounters,
    /// From the command to the last VM's arrival, in ms.
    pub gang_ms: f64,
    /// CPU seconds of all VMMs and agents.
    pub cpu_s: f64,
    /// Stops and RAM.
    pub moved: Moved,
    /// The tenant's samples before and during, if there was one.
    pub flow: Option<(Samples, Samples)>,
}

/// Everything measured of one variant.
#[derive(Debug, Clone)]
pub struct VariantReport {
    /// Which.
    pub variant: Variant,
    /// The repetitions without tenants.
    pub quiet: Vec<Rep>,
    /// Request/response, if measured.
    pub rr: Option<Rep>,
    /// Bulk, if measured.
    pub bulk: Option<Rep>,
    /// 100 Mbit/s paced, if measured.
    pub paced: Option<Rep>,
}

/// A whole run of the benchmark.
#[derive(Debug, Clone)]
pub struct Report {
    /// What was asked.
    pub options: Options,
    /// What no way of moving these guests can undercut by deduplication.
    pub bound: Bound,
    /// Variant by variant.
    pub variants: Vec<VariantReport>,
}

/// Where the VM number `index` (from 0) of a gang goes: from a host of rack 1
/// to the host of rack 2 with the same number.
pub fn route(lab: &Lab, index: usize) -> (&Host, &Host) {
    let host = (index % usize::from(lab.shape.hosts)) as u8 + 1;
    (lab.host(1, host), lab.host(2, host))
}

/// The name of the VM number `index` (from 0).
pub fn vm_name(index: usize) -> String {
    format!("vm{}", index + 1)
}

/// Runs `migrate` with everything measured around it, and a tenant's flow if
/// one is asked for. `migrate` returns when the last VM has arrived.
///
/// # Errors
/// What `migrate` returns, or when a figure cannot be read.
pub fn measured(
    lab: &Lab,
    kind: Option<Kind>,
    migrate: impl FnOnce() -> Result<Moved>,
) -> Result<Rep> {
    let flow = kind
        .map(|kind| Flow::start(kind, lab.host(1, 1), lab.host(2, 1), ALONE + COMPANY))
        .transpose()?;
    let flow_from = Instant::now();
    if flow.is_some() {
        std::thread::sleep(ALONE);
    }
    let cpu = CpuMeter::start(lab);
    let core = lab.core()?;
    let from = Instant::now();
    let moved = migrate()?;
    let to = Instant::now();
    let core = lab.core()?.since(&core);
    let cpu_s = cpu.finish()?;
    let flow = match flow {
        // A flow's first quarter of a second is its slow start.
        Some(flow) => {
            let alone = flow.window(flow_from + ALONE / 8, from);
            let during = flow.window(from, to);
            flow.stop()?;
            Some((alone, during))
        }
        None => None,
    };
    Ok(Rep {
        core,
        gang_ms: (to - from).as_secs_f64() * 1000.0,
        cpu_s,
        moved,
        flow,
    })
}

/// Measures everything that `options` ask for. `tell` gets a line for each
/// step.
///
/// # Errors
/// When a variant fails: a figure of a failed run is none.
pub fn run(options: &Options, tell: &dyn Fn(&str)) -> Result<Report> {
    tell("booting the guests that are not saved yet");
    let saves = save::linux(options.vms, options.workload)?;
    let bound = bound::of(&saves)?;
    tell(&format!(
        "bound: {:.0} MB distinct, {:.0} MB as zstd-1 batches of 64 pages",
        bound.distinct_bytes as f64 / 1e6,
        bound.zstd1_bytes as f64 / 1e6
    ));
    let lab = Lab::up(options.shape.clone())?;
    let mut variants = Vec::new();
    for &variant in &options.variants {
        let once = |kind: Option<Kind>| -> Result<Rep> {
            let rep = match variant {
                Variant::Drover | Variant::DroverNoZstd => {
                    drover_gang::run(&lab, &saves, variant, kind)
                }
                _ => qemu_gang::run(&lab, &saves, variant, kind),
            };
            let rep =
                rep.with_context(|| format!("{} with {}", variant.name(), kind_name(kind)))?;
            tell(&output::line(variant, kind, &rep));
            Ok(rep)
        };
        let quiet = (0..options.reps)
            .map(|_| once(None))
            .collect::<Result<Vec<_>>>()?;
        let with = |kind| options.tenants.then(|| once(Some(kind))).transpose();
        variants.push(VariantReport {
            variant,
            quiet,
            rr: with(Kind::RequestResponse)?,
            bulk: with(Kind::Bulk)?,
            paced: with(Kind::Paced(100))?,
        });
    }
    Ok(Report {
        options: options.clone(),
        bound,
        variants,
    })
}

/// How a repetition is called in messages.
pub fn kind_name(kind: Option<Kind>) -> &'static str {
    match kind {
        None => "no tenant",
        Some(Kind::RequestResponse) => "request/response",
        Some(Kind::Bulk) => "bulk",
        Some(Kind::Paced(_)) => "paced flow",
    }
}

/// Whether a repetition compares all guest RAM at the switch. Reading eight
/// times a guest's RAM keeps both processors busy for a moment: that would
/// spoil the times of a quiet repetition, and the intervals of a paced flow.
pub fn compares_ram(kind: Option<Kind>) -> bool {
    matches!(kind, Some(Kind::RequestResponse | Kind::Bulk))
}

/// The median, or `None` of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => None,
        _ if n % 2 == 1 => Some(values[n / 2]),
        _ => Some((values[n / 2 - 1] + values[n / 2]) / 2.0),
    }
}
