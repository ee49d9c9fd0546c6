//! Drover's own run of the benchmark: the same saves, adopted by agents.

use super::{Moved, Rep, Variant, compares_ram, measured, route, vm_name};
use crate::agentcfg::AgentOptions;
use crate::check::HoldWatcher;
use crate::drover::Cluster;
use crate::gang::{Gang, Move};
use crate::save::Saved;
use crate::tenant::Kind;
use crate::topology::Lab;
use anyhow::{Context, Result, bail};
use drover::api::types::Outcome;

/// Starts agents and the gang, migrates it, checks it, and ends all of it.
/// With some tenants ([`compares_ram`]) all RAM is compared before the targets
/// run.
///
/// # Errors
/// When an agent does not come up, a VM does not arrive, or its guest finds
/// wrong data.
pub fn run(lab: &Lab, saves: &[Saved], variant: Variant, kind: Option<Kind>) -> Result<Rep> {
    let rep = with_agents(lab, saves, variant, kind);
    // The VMMs are no children of anybody; the next repetition starts afresh.
    let cleaned = lab.clear_hosts();
    rep.and_then(|rep| cleaned.map(|()| rep))
}

fn with_agents(lab: &Lab, saves: &[Saved], variant: Variant, kind: Option<Kind>) -> Result<Rep> {
    let hold = compares_ram(kind).then(|| lab.run_dir().join("hold"));
    let watcher = hold.as_deref().map(HoldWatcher::start).transpose()?;
    let cluster = Cluster::start(
        lab,
        AgentOptions {
            hold_at_switch: hold,
            ..AgentOptions::default()
        },
    )?;
    let mut gang = Gang::new(lab, &cluster);
    for (i, saved) in saves.iter().enumerate() {
        gang.adopt(&vm_name(i), saved, &route(lab, i).0.name)?;
    }
    let moves: Vec<Move> = (0..saves.len())
        .map(|i| (i, route(lab, i).1.name.as_str()))
        .collect();
    let args: &[&str] = if variant == Variant::DroverNoZstd {
        &["--compress", "never"]
    } else {
        &[]
    };
    let mut total_ms = 0.0;
    let mut rep = measured(lab, kind, || {
        let (migrated, stops) = gang.migrate("bench", &moves, args)?;
        if migrated.report.outcome != Outcome::Arrived {
            bail!(
                "the gang did not arrive: {:#?}\n{}",
                migrated.report,
                migrated.stderr
            );
        }
        total_ms = migrated.report.total_ms as f64;
        Ok(Moved {
            stop_resume_ms: stops,
            reported_ms: migrated.report.vms.iter().map(|v| v.downtime_ms).collect(),
            ram_equal: None,
        })
    })?;
    // The command asks its agent a few times a second whether it is over; the
    // agent's own time does not have that in it.
    rep.gang_ms = total_ms.min(rep.gang_ms);
    gang.check()?;
    if let Some(watcher) = watcher {
        let found = watcher.finish()?;
        for i in 0..saves.len() {
            found
                .get(&vm_name(i))
                .with_context(|| format!("{} was not held at its switch", vm_name(i)))?;
        }
        rep.moved.ram_equal = Some(found.values().all(Vec::is_empty));
    }
    drop(gang);
    cluster.stop()?;
    Ok(rep)
}
