//! `lab bench dirty-log`: what a round of each dirty log costs, and what each
//! costs the guest, on one VM with one guest. Nothing is read of the pages.

use crate::kvmm::{FIRST_FREE_PAGE, Inside, Kvmm, Setup};
use anyhow::{Result, ensure};
use drover::vmm::PageSource;
use drover::vmm::dirty::DirtyLog;
use drover::vmm::kvm_log::KvmLogSource;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Shares of RAM dirtied between two rounds, in percent.
const SHARES: [u32; 3] = [0, 1, 10];
/// Entries of the ring: 1 MiB, enough for the largest share of 1 GiB. A KVM that
/// emulates its guests overflows a ring that is too small for a round.
const RING: usize = 65_536;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    None,
    KvmBitmap,
    KvmRing,
    Userfaultfd,
}

impl Which {
    const ALL: [Which; 4] = [
        Which::None,
        Which::KvmBitmap,
        Which::KvmRing,
        Which::Userfaultfd,
    ];

    fn name(self) -> &'static str {
        match self {
            Which::None => "no log",
            Which::KvmBitmap => "KVM bitmap",
            Which::KvmRing => "KVM dirty ring",
            Which::Userfaultfd => "userfaultfd",
        }
    }
}

enum Log {
    None,
    Kvm(KvmLogSource),
    Outside(DirtyLog),
}

impl Log {
    /// A round: pages and time.
    fn round(&mut self) -> Result<(u64, Duration)> {
        let mut pages = 0;
        let mut count = |run: std::ops::Range<drover::types::Gfn>| {
            pages += u64::from(run.end.0 - run.start.0);
        };
        let begun = Instant::now();
        match self {
            Log::None => {}
            Log::Kvm(source) => drop(source.next_round(&mut count)?),
            Log::Outside(log) => drop(log.scan(&mut count)?),
        }
        let took = begun.elapsed();
        Ok((pages, took))
    }
}

/// Figures of one log at one share.
struct Row {
    which: Which,
    share: u32,
    pages: u32,
    /// Medians.
    round: Duration,
    guest: Duration,
}

/// Measures with a VM of `ram_mib`, `reps` rounds each; returns a table.
///
/// # Errors
/// When the VM does not start, or a log reports too few pages.
pub fn run(ram_mib: u32, reps: u32) -> Result<String> {
    let mut rows = Vec::new();
    for which in Which::ALL {
        measure(which, ram_mib, reps, &mut rows)?;
    }
    Ok(table(ram_mib, reps, &rows))
}

fn measure(which: Which, ram_mib: u32, reps: u32, rows: &mut Vec<Row>) -> Result<()> {
    let mut vm = Kvmm::start(&Setup {
        ram_mib,
        ring: (which == Which::KvmRing).then_some(RING),
        inside: Inside::Writer,
    })?;
    let all = ram_mib * 256;
    // What the guest has never touched costs it more, with any log.
    vm.write(FIRST_FREE_PAGE, all - FIRST_FREE_PAGE, 1)?;
    let link = vm.connect()?;
    let mut log = match which {
        Which::None => Log::None,
        Which::KvmBitmap | Which::KvmRing => Log::Kvm(KvmLogSource::start(link)?),
        Which::Userfaultfd => {
            let mut log = vm.outside_log()?;
            log.restart()?;
            Log::Outside(log)
        }
    };
    log.round()?;
    for share in SHARES {
        let pages = all / 100 * share;
        // Scattered as far as they go.
        let stride = 100u32.checked_div(share).unwrap_or(1);
        let (mut rounds, mut guest) = (Vec::new(), Vec::new());
        for _ in 0..reps {
            guest.push(vm.write(
                FIRST_FREE_PAGE,
                pages.min((all - FIRST_FREE_PAGE) / stride),
                stride,
            )?);
            let (found, took) = log.round()?;
            ensure!(
                which == Which::None || found >= u64::from(pages) * 9 / 10,
                "{}: {found} pages of {pages}",
                which.name()
            );
            rounds.push(took);
        }
        rows.push(Row {
            which,
            share,
            pages,
            round: median(rounds),
            guest: median(guest),
        });
    }
    Ok(())
}

fn median(mut of: Vec<Duration>) -> Duration {
    of.sort();
    of.get(of.len() / 2).copied().unwrap_or_default()
}

fn table(ram_mib: u32, reps: u32, rows: &[Row]) -> String {
    let mut out = format!(
        "{ram_mib} MiB, medians of {reps}\n{:<16}{:>10}{:>12}{:>14}{:>16}{:>18}\n",
        "log", "dirty %", "round ms", "ns a page", "guest ms", "log ns a write"
    );
    for row in rows {
        let unlogged = rows
            .iter()
            .find(|r| r.which == Which::None && r.share == row.share);
        let more = unlogged.map_or(0.0, |r| row.guest.as_secs_f64() - r.guest.as_secs_f64());
        let a_page = |seconds: f64| match row.pages {
            0 => "-".to_owned(),
            pages => format!("{:.0}", seconds * 1e9 / f64::from(pages)),
        };
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "{:<16}{:>10}{:>12.2}{:>14}{:>16.1}{:>18}",
            row.which.name(),
            row.share,
            row.round.as_secs_f64() * 1e3,
            a_page(row.round.as_secs_f64()),
            row.guest.as_secs_f64() * 1e3,
            if row.which == Which::None {
                "-".to_owned()
            } else {
                a_page(more)
            }
        );
    }
    out
}
