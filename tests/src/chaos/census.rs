//! Who runs where: every VMM process of the lab, asked for its state.

use crate::qmp::Qmp;
use crate::topology::Lab;
use anyhow::Result;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long a VMM has to say its state. One that was stopped says nothing.
const ANSWER: Duration = Duration::from_millis(500);
/// How often the watcher counts.
const PACE: Duration = Duration::from_millis(20);

/// A process that has a VM in it, or waits for one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmProcess {
    /// The VM's name.
    pub vm: String,
    /// Name of the host.
    pub host: String,
    /// The process.
    pub pid: i32,
    monitor: Option<PathBuf>,
}

impl VmmProcess {
    /// QEMU's run state, or `None` if it does not say.
    pub fn status(&self) -> Option<String> {
        let mut qmp = Qmp::connect_within(self.monitor.as_deref()?, ANSWER).ok()?;
        qmp.status().ok()
    }
}

/// Finds the VMM processes of a lab.
#[derive(Debug, Clone)]
pub struct Census {
    hosts: BTreeMap<u64, String>,
}

impl Census {
    /// For the hosts of this lab.
    ///
    /// # Errors
    /// When a namespace cannot be looked at.
    pub fn new(lab: &Lab) -> Result<Census> {
        let by_inode = |host: &crate::topology::Host| Ok((host.ns.inode()?, host.name.clone()));
        Ok(Census {
            hosts: lab.hosts.iter().map(by_inode).collect::<Result<_>>()?,
        })
    }

    /// Every process on the hosts: its id, its host, its arguments.
    fn processes(&self) -> Result<Vec<(i32, String, Vec<String>)>> {
        let own = std::process::id() as i32;
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(Ok(pid)) = entry.file_name().to_str().map(str::parse::<i32>) else {
                continue;
            };
            // Whatever cannot be read has ended meanwhile.
            let Ok(netns) = fs::metadata(entry.path().join("ns/net")) else {
                continue;
            };
            let (Some(host), Ok(cmdline)) = (
                self.hosts.get(&netns.ino()),
                fs::read(entry.path().join("cmdline")),
            ) else {
                continue;
            };
            let args: Vec<String> = cmdline
                .split(|byte| *byte == 0)
                .map(|arg| String::from_utf8_lossy(arg).into_owned())
                .collect();
            // Zombies have no arguments any more.
            if pid != own && !cmdline.is_empty() {
                found.push((pid, host.clone(), args));
            }
        }
        Ok(found)
    }

    /// Every VMM.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn vmms(&self) -> Result<Vec<VmmProcess>> {
        let vmm = |(pid, host, args): (i32, String, Vec<String>)| {
            args[0].ends_with("qemu-system-x86_64").then_some(())?;
            let after = |flag: &'static str| {
                args.windows(2)
                    .filter(move |pair| pair[0] == flag)
                    .map(|pair| pair[1].clone())
            };
            let mut monitors = after("-qmp").filter_map(|at| {
                let path = at.strip_prefix("unix:")?.split(',').next()?.to_owned();
                path.ends_with("/lab.sock").then(|| PathBuf::from(path))
            });
            Some(VmmProcess {
                vm: after("-name").next()?,
                host,
                pid,
                monitor: monitors.next_back(),
            })
        };
        Ok(self.processes()?.into_iter().filter_map(vmm).collect())
    }

    /// Processes that are neither VMMs nor agents, described.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn strangers(&self) -> Result<Vec<String>> {
        let stranger = |(pid, host, args): (i32, String, Vec<String>)| {
            let known = args[0].ends_with("qemu-system-x86_64")
                || args.get(1).is_some_and(|arg| arg == "agent");
            (!known).then(|| format!("process {pid} on {host}: {}", args.join(" ")))
        };
        Ok(self.processes()?.into_iter().filter_map(stranger).collect())
    }

    /// VMs that run more than once at this moment, described. A VM that has
    /// just moved may have been seen at both ends one after the other, so
    /// both are asked again.
    fn doubled(&self) -> Result<Vec<String>> {
        let mut by_vm: BTreeMap<String, Vec<VmmProcess>> = BTreeMap::new();
        for vmm in self.vmms()? {
            by_vm.entry(vmm.vm.clone()).or_default().push(vmm);
        }
        let runs = |vmm: &VmmProcess| vmm.status().is_some_and(|status| status == "running");
        let mut doubled = Vec::new();
        for (vm, vmms) in by_vm.into_iter().filter(|(_, vmms)| vmms.len() > 1) {
            let twice = |vmms: Vec<VmmProcess>| -> Vec<VmmProcess> {
                vmms.into_iter().filter(runs).collect()
            };
            let running = twice(twice(vmms));
            if running.len() > 1 {
                let at = running.iter().map(|v| format!("{} ({})", v.host, v.pid));
                doubled.push(format!(
                    "{vm} runs at {}",
                    at.collect::<Vec<_>>().join(" and ")
                ));
            }
        }
        Ok(doubled)
    }
}

/// Counts the running copies of each VM, over and over: that a VM never runs
/// twice has to hold at every moment, not at the end only.
#[derive(Debug)]
pub struct Watch {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Vec<String>>>>,
}

impl Watch {
    /// Begins to count.
    pub fn start(census: Census) -> Watch {
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let mut seen = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                for doubled in census.doubled()? {
                    if !seen.contains(&doubled) {
                        seen.push(doubled);
                    }
                }
                std::thread::sleep(PACE);
            }
            Ok(seen)
        });
        Watch {
            over,
            thread: Some(thread),
        }
    }

    /// What ran twice at any time, described.
    ///
    /// # Errors
    /// When /proc could not be read.
    pub fn finish(mut self) -> Result<Vec<String>> {
        self.over.store(true, Ordering::Relaxed);
        let thread = self.thread.take();
        let joined = thread.map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
        joined.unwrap_or_else(|| Ok(Vec::new()))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
