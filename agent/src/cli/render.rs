//! Everything the operator reads, as text made from state: no I/O here.
//! Lines are at most 80 columns, except where a name or an error is longer.

use crate::api::types::*;
use comfy_table::{CellAlignment, Table, presets};
use std::fmt::Write;
use std::time::{Duration, UNIX_EPOCH};

/// Columns of a terminal that everything fits in.
pub const WIDTH: usize = 80;

/// A number of bytes with a binary unit: `84.1 MiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 999.95 would be shown as 1000.0.
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A time: `870 ms`, `12.3 s`, `4 min 5 s`, `2 h 3 min`.
pub fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        60_000..3_600_000 => format!("{} min {} s", ms / 60_000, ms / 1000 % 60),
        _ => format!("{} h {} min", ms / 3_600_000, ms / 60_000 % 60),
    }
}

/// `text` in at most `width` columns, cut with an ellipsis; control characters
/// become spaces.
pub fn fit(text: &str, width: usize) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    if text.chars().count() <= width {
        return text.chars().map(clean).collect();
    }
    let kept = text.chars().take(width.saturating_sub(1)).map(clean);
    kept.chain(['…']).collect()
}

/// Head of the progress lines of VMs.
pub fn progress_head() -> String {
    let head = format!(
        "{:<14} {:<9} {:>3} {:<13} {:>4} {:>9} {:>11} {:>8}",
        "VM", "phase", "rnd", "", "done", "left", "dirty/s", "ETA"
    );
    head.trim_end().to_owned()
}

/// A VM's progress line.
pub fn vm_line(vm: &VmProgress) -> String {
    let name = fit(&vm.name, 14);
    let head = format!("{name:<14} {:<9}", vm.phase.as_str());
    let text = match vm.phase {
        VmPhase::Arrived => match vm.downtime_ms {
            Some(ms) => format!("on {} after {} rounds, stopped {ms:.0} ms", vm.to, vm.round),
            None => format!("on {}", vm.to),
        },
        VmPhase::Failed | VmPhase::Cancelled => {
            let why = vm.error.as_deref().unwrap_or("no reason given");
            format!("runs on at {}: {why}", vm.from)
        }
        VmPhase::InDoubt => {
            let why = vm.error.as_deref().unwrap_or("no reason given");
            format!("between {} and {}: {why}", vm.from, vm.to)
        }
        VmPhase::Waiting | VmPhase::Preparing => format!("{} → {}", vm.from, vm.to),
        _ => {
            let total = vm.total_bytes.max(1);
            let done = total.saturating_sub(vm.left_bytes) as f64 / total as f64;
            let eta = vm.eta_ms.map(duration).unwrap_or_else(|| "?".to_owned());
            format!(
                "{:>3} {} {:>3.0}% {:>9} {:>11} {:>8}",
                vm.round,
                bar(done, 11),
                done * 100.0,
                bytes(vm.left_bytes),
                bytes(vm.dirty_pages_per_s * 4096),
                eta
            )
        }
    };
    fit(&format!("{head} {text}"), WIDTH)
}

fn bar(done: f64, width: usize) -> String {
    let full = (done.clamp(0.0, 1.0) * width as f64).floor() as usize;
    format!("[{}{}]", "#".repeat(full), ".".repeat(width - full))
}

/// The core link's line.
pub fn core_line(core: &CoreLoad) -> String {
    let tenant = match core.source {
        LoadSource::Meter => format!("{:.0}", core.tenant_mbit),
        LoadSource::Lanes => "not metered".to_owned(),
    };
    let capacity = match core.capacity_mbit {
        Some(mbit) => format!("{mbit:.0} Mbit/s"),
        None => "unknown".to_owned(),
    };
    fit(
        &format!(
            "core link      tenant {tenant}, migration {:.0} Mbit/s, capacity {capacity}",
            core.migration_mbit
        ),
        WIDTH,
    )
}

/// One line for logs: where a gang stands.
pub fn gang_line(progress: &GangProgress) -> String {
    let mut counts: Vec<(VmPhase, usize)> = Vec::new();
    for vm in &progress.vms {
        match counts.iter_mut().find(|(phase, _)| *phase == vm.phase) {
            Some((_, n)) => *n += 1,
            None => counts.push((vm.phase, 1)),
        }
    }
    let phases = counts
        .iter()
        .map(|(phase, n)| format!("{n} {}", phase.as_str()));
    let left: u64 = progress.vms.iter().map(|vm| vm.left_bytes).sum();
    let cancelling = match progress.phase {
        GangPhase::Cancelling => " is being cancelled",
        _ => "",
    };
    format!(
        "{} {}{cancelling}: {}; left {}; core {:.0} Mbit/s",
        duration(progress.elapsed_ms),
        progress.gang,
        phases.collect::<Vec<_>>().join(", "),
        bytes(left),
        core_total(&progress.core),
    )
}

fn core_total(core: &CoreLoad) -> f64 {
    core.tenant_mbit + core.migration_mbit
}

/// What is said of an agent that is lost, or was.
pub fn lost_line(lost: &LostAgent) -> String {
    let state = match lost.found_again {
        true => "was lost and came back",
        false => "is lost",
    };
    format!(
        "agent {} {state}: noticed at {} after {} of silence ({})",
        lost.agent,
        duration(lost.at_ms),
        duration(lost.silent_ms),
        fit(&lost.why, usize::MAX)
    )
}

/// The end of a migration.
pub fn report(report: &GangReport) -> String {
    let mut table = table([
        "VM",
        "from → to",
        "outcome",
        "stopped",
        "rounds",
        "verified",
    ]);
    right(&mut table, &[3, 4]);
    for vm in &report.vms {
        table.add_row([
            fit(&vm.name, 20),
            fit(&format!("{} → {}", vm.from, vm.to), 22),
            outcome(vm.outcome).to_owned(),
            format!("{:.0} ms", vm.downtime_ms),
            vm.rounds.to_string(),
            if vm.verified { "yes" } else { "no" }.to_owned(),
        ]);
    }
    let mut text = lines(&table);
    let sum = |count: fn(&PageCounts) -> u64| report.vms.iter().map(|vm| count(&vm.pages)).sum();
    let (sent, reference): (u64, u64) = (sum(|p| p.sent), sum(|p| p.reference));
    let (zero, unchanged): (u64, u64) = (sum(|p| p.zero), sum(|p| p.unchanged));
    let arrived = report.vms.iter();
    let arrived = arrived
        .filter(|vm| vm.outcome == VmOutcome::Arrived)
        .count();
    let _ = write!(
        text,
        "\n{}: {arrived} of {} VMs arrived in {}; {} crossed the core link\n\
         pages: {sent} sent, {reference} by reference, {zero} zero, {unchanged} unchanged\n",
        report.gang,
        report.vms.len(),
        duration(report.total_ms),
        bytes(report.core_bytes),
    );
    let journal = report.vms.iter().map(|vm| vm.journal_ms);
    let journal = journal.fold(0.0, f64::max);
    if journal > 0.0 {
        let _ = writeln!(text, "journals: at most {journal:.1} ms of a VM's stop");
    }
    text.push_str(&stops(report));
    for lost in &report.lost {
        let _ = writeln!(text, "{}", lost_line(lost));
    }
    for vm in &report.vms {
        for KindInfo { kind, why_not } in &vm.not {
            let why = why_not.as_deref().unwrap_or_default();
            let _ = writeln!(text, "{} went as {}, not {kind}: {why}", vm.name, vm.kind);
        }
        if let Some(error) = &vm.error {
            let _ = writeln!(text, "{}: {error}", vm.name);
        }
    }
    if let Some(error) = &report.error {
        let _ = writeln!(text, "{}: {error}", report.gang);
    }
    text.push_str(&warnings(&report.warnings));
    text
}

/// Where the time of each VM's stop went, as the source agents measured it;
/// empty if no VM was stopped.
pub fn stops(report: &GangReport) -> String {
    let mut table = table([
        "stop, ms",
        "pause",
        "last pages",
        "digests",
        "device state",
        "commit",
        "resume",
    ]);
    right(&mut table, &[1, 2, 3, 4, 5, 6]);
    let stops = report.vms.iter().filter_map(|vm| Some((vm, vm.stop?)));
    for (vm, stop) in stops {
        let ms = |ms: f64| format!("{ms:.1}");
        table.add_row([
            fit(&vm.name, 20),
            ms(stop.pause_ms),
            ms(stop.last_pages_ms),
            ms(stop.seal_ms),
            ms(stop.device_ms),
            ms(stop.commit_ms),
            ms(stop.resume_ms),
        ]);
    }
    match table.is_empty() {
        true => String::new(),
        false => lines(&table),
    }
}

fn outcome(outcome: VmOutcome) -> &'static str {
    match outcome {
        VmOutcome::Arrived => "arrived",
        VmOutcome::Failed => "failed",
        VmOutcome::Cancelled => "cancelled",
        VmOutcome::InDoubt => "in doubt",
    }
}

/// What a dry run found.
pub fn checks(started: &MigrationStarted) -> String {
    let mut text = String::new();
    for check in &started.checks {
        let mark = if check.ok { "ok  " } else { "FAIL" };
        let about = check.vm.as_deref().unwrap_or(&started.gang);
        let _ = writeln!(text, "{mark}  {about}: {}: {}", check.what, check.detail);
    }
    let failed = started.checks.iter().filter(|c| !c.ok).count();
    let _ = match failed {
        0 => writeln!(text, "{}: ready to migrate", started.gang),
        1 => writeln!(text, "{}: 1 check failed", started.gang),
        n => writeln!(text, "{}: {n} checks failed", started.gang),
    };
    text
}

/// The VMs of an agent.
pub fn vm_table(vms: &[VmInfo]) -> String {
    if vms.is_empty() {
        return "no VMs; start one with `drover vm run NAME`".to_owned();
    }
    let heads = ["VM", "kind", "status", "RAM", "scanned", "dirty/s", "pid"];
    let mut table = table(heads);
    right(&mut table, &[3, 4, 5, 6]);
    for vm in vms {
        let dirty = vm.dirty_bytes_per_s.map(bytes);
        table.add_row([
            fit(&vm.name, 16),
            fit(&vm.kind, 12),
            fit(&vm.status, 10),
            bytes(vm.ram_bytes),
            bytes(vm.pages_scanned * 4096),
            dirty.unwrap_or_else(|| "-".to_owned()),
            vm.pid.to_string(),
        ]);
    }
    let mut text = lines(&table).trim_end().to_owned();
    for vm in vms.iter().filter(|vm| !vm.kinds.is_empty()) {
        let _ = write!(text, "\n{}: {}", vm.name, kinds(vm));
    }
    text
}

/// Which way of moving a VM is chosen, which others are possible, and why the
/// rest are not.
fn kinds(vm: &VmInfo) -> String {
    let mut words = vec![match vm.kind.as_str() {
        "none" => "cannot be moved".to_owned(),
        kind => format!("moved as {kind}"),
    }];
    for info in vm.kinds.iter().filter(|info| info.kind != vm.kind) {
        words.push(match &info.why_not {
            None => format!("{} is possible too", info.kind),
            Some(why) => format!("not {}: {why}", info.kind),
        });
    }
    words.join("; ")
}

/// The agent's state.
pub fn status(status: &StatusInfo) -> String {
    let mut text = String::new();
    let up = duration(status.uptime_s * 1000);
    let meter = match status.metered_uplinks.as_slice() {
        [] => "none is metered".to_owned(),
        uplinks => format!("metered: {}", uplinks.join(", ")),
    };
    let _ = writeln!(
        text,
        "agent {} in rack {}, drover {}, up {up}, {} VMs",
        status.agent, status.rack, status.version, status.vms
    );
    text.push_str(&warnings(&status.warnings));
    let _ = writeln!(text, "{}", core_line(&status.core));
    let _ = writeln!(text, "uplinks        {meter}");
    let _ = writeln!(text, "connections    {}", tls(&status.tls));
    let lanes = &status.lanes;
    let _ = writeln!(
        text,
        "lanes          {} sent, {} sends zero-copied, {} copied, {} reopened",
        bytes(lanes.sent_bytes),
        lanes.zero_copied,
        lanes.copied,
        lanes.reopened
    );
    if !status.peers.is_empty() {
        let mut table = table(["peer", "rack", "address", "state"]);
        for peer in &status.peers {
            table.add_row([
                fit(&peer.name, 16),
                fit(&peer.rack, 10),
                peer.address.clone(),
                fit(&peer.state, 28),
            ]);
        }
        let _ = write!(text, "\n{}", lines(&table));
    }
    for handover in &status.handovers {
        text.push_str(&self::handover(handover));
    }
    for progress in &status.migrations {
        let _ = writeln!(text, "\n{}\nrun {}", gang_line(progress), progress.id);
        for lost in &progress.lost {
            let _ = writeln!(text, "{}", lost_line(lost));
        }
        if progress.phase != GangPhase::Done {
            let _ = writeln!(text, "{}", progress_head());
        }
        for vm in &progress.vms {
            let _ = writeln!(text, "{}", vm_line(vm));
        }
    }
    text
}

/// How connections are protected.
fn tls(tls: &TlsStatus) -> String {
    if !tls.encrypted {
        return "NOT encrypted".to_owned();
    }
    let fingerprint = tls.fingerprint.as_deref().unwrap_or("?");
    let until = match tls.expires_s {
        Some(s) => crate::pki::date(UNIX_EPOCH + Duration::from_secs(s.min(1 << 37))),
        None => "?".to_owned(),
    };
    format!(
        "TLS 1.3, certificate {:.16} until {until}",
        fit(fingerprint, 64)
    )
}

/// What nobody should overlook; not cut to the width of a terminal.
fn warnings(warnings: &[String]) -> String {
    warnings.iter().fold(String::new(), |mut text, warning| {
        let _ = writeln!(text, "WARNING        {}", fit(warning, usize::MAX));
        text
    })
}

fn handover(handover: &HandoverInfo) -> String {
    let way = match handover.side.as_str() {
        "source" => "to",
        _ => "from",
    };
    let mut text = format!(
        "\nhandover of {} {way} {} (gang {}): {}\n",
        handover.vm, handover.peer, handover.gang, handover.state
    );
    if !handover.why.is_empty() {
        let _ = writeln!(text, "    {}", handover.why);
    }
    if let Some(doubt) = &handover.in_doubt {
        let _ = writeln!(text, "    IN DOUBT: {doubt}");
    }
    for remedy in &handover.remedies {
        let _ = writeln!(text, "    {remedy}");
    }
    text
}

fn table<const N: usize>(head: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(head);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

fn right(table: &mut Table, columns: &[usize]) {
    for index in columns {
        if let Some(column) = table.column_mut(*index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

fn lines(table: &Table) -> String {
    table.lines().fold(String::new(), |mut text, line| {
        text.push_str(line.trim_end());
        text.push('\n');
        text
    })
}

#[cfg(test)]
#[path = "render_tests.rs"]
mod tests;
