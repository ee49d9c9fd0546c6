//! What agents' memory grows to.

use anyhow::{Context, Result, ensure};
use std::fs;

/// An agent's memory before it is attacked.
#[derive(Debug)]
pub struct Memory {
    name: String,
    pid: i32,
    before_mib: u64,
}

impl Memory {
    /// Of the agent `name`, process `pid`; the peak is counted from now on.
    ///
    /// # Errors
    /// When the process cannot be looked at.
    pub fn of(name: &str, pid: i32) -> Result<Memory> {
        fs::write(format!("/proc/{pid}/clear_refs"), "5").context("resetting the peak")?;
        Ok(Memory {
            name: name.to_owned(),
            pid,
            before_mib: status_mib(pid, "VmRSS")?,
        })
    }

    /// MiB that it has grown by at most since.
    ///
    /// # Errors
    /// When the process cannot be looked at.
    pub fn growth_mib(&self) -> Result<u64> {
        Ok(status_mib(self.pid, "VmHWM")?.saturating_sub(self.before_mib))
    }

    /// Demands that it has not grown by more than `most_mib`.
    ///
    /// # Errors
    /// When it has.
    pub fn within(&self, most_mib: u64) -> Result<()> {
        let grown = self.growth_mib()?;
        eprintln!(
            "memory of {}: {} MiB before, grown by {grown} MiB at most",
            self.name, self.before_mib
        );
        ensure!(
            grown <= most_mib,
            "{} has grown by {grown} MiB; docs/security.md allows {most_mib}",
            self.name
        );
        Ok(())
    }
}

fn status_mib(pid: i32, key: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix(key));
    let kib = line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok());
    Ok(kib.with_context(|| format!("no {key} of process {pid}"))? >> 10)
}
