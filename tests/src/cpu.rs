//! CPU time of everything that runs in a lab.
#![allow(unsafe_code)]

use crate::registry;
use crate::topology::Lab;
use anyhow::{Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const PERIOD: Duration = Duration::from_millis(100);

/// Adds up the CPU time of all processes in the lab's hosts. It samples,
/// because a VMM that ends takes its counters along; what a process uses in
/// its last 100 ms may be missed.
#[derive(Debug)]
pub struct CpuMeter {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<f64>>,
}

impl CpuMeter {
    /// Starts counting.
    pub fn start(lab: &Lab) -> CpuMeter {
        let hosts: Vec<_> = lab.hosts.iter().map(|h| h.ns.clone()).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let find = move || -> BTreeSet<i32> {
            hosts
                .iter()
                .flat_map(|ns| registry::processes(ns).unwrap_or_default())
                .collect()
        };
        let mut pids = find();
        let first = sample(&pids);
        let thread = std::thread::spawn(move || {
            let mut last = first.clone();
            for round in 1u32.. {
                let over = stopped.load(Ordering::Relaxed);
                // Looking for new processes costs more than asking the known ones.
                if over || round.is_multiple_of(5) {
                    pids.extend(find());
                }
                last.extend(sample(&pids));
                if over {
                    break;
                }
                std::thread::sleep(PERIOD);
            }
            let used: u64 = last
                .iter()
                .map(|(pid, t)| t - first.get(pid).unwrap_or(&0))
                .sum();
            used as f64 / clock_ticks() as f64
        });
        CpuMeter {
            stop,
            thread: Some(thread),
        }
    }

    /// CPU seconds since the start, user and system.
    ///
    /// # Errors
    /// When the sampling thread died.
    pub fn finish(mut self) -> Result<f64> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(seconds)) => Ok(seconds),
            _ => bail!("the CPU meter's thread died"),
        }
    }
}

impl Drop for CpuMeter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn sample(pids: &BTreeSet<i32>) -> BTreeMap<i32, u64> {
    pids.iter()
        .filter_map(|pid| Some((*pid, ticks(*pid)?)))
        .collect()
}

/// User and system time of a process in clock ticks.
fn ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command may hold spaces and brackets; the last ')' ends it.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

fn clock_ticks() -> i64 {
    // SAFETY: sysconf reads a constant.
    unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1)
}
