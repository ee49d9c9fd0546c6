//! Network namespaces: made, entered and removed.
#![allow(unsafe_code)]

use crate::cache;
use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

const FOLDER: &str = "/run/netns";

/// A named network namespace. It stays when the value goes: the lab's
/// [`crate::registry`] removes it, so that it goes after a panic as well.
#[derive(Debug, Clone)]
pub struct Netns {
    name: String,
    file: Arc<File>,
}

impl Netns {
    /// Makes the namespace with its loopback up.
    ///
    /// # Errors
    /// When `ip` fails: without root, or when the name is taken.
    pub fn create(name: &str) -> Result<Netns> {
        cache::run(Command::new("ip").args(["netns", "add", name]))
            .context("cannot make a network namespace; the lab needs root")?;
        let netns = Netns::open(name)?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Opens an existing namespace.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn open(name: &str) -> Result<Netns> {
        let path = Path::new(FOLDER).join(name);
        let file = File::open(&path).with_context(|| format!("no network namespace {name}"))?;
        Ok(Netns {
            name: name.to_string(),
            file: Arc::new(file),
        })
    }

    /// The name as `ip netns` lists it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` batch lines inside.
    ///
    /// # Errors
    /// At the first line that fails.
    pub fn ip(&self, lines: &str) -> Result<()> {
        self.batch("ip", lines)
    }

    /// Runs `tc` batch lines inside.
    ///
    /// # Errors
    /// At the first line that fails.
    pub fn tc(&self, lines: &str) -> Result<()> {
        self.batch("tc", lines)
    }

    fn batch(&self, tool: &str, lines: &str) -> Result<()> {
        for line in lines.lines().map(str::trim).filter(|l| !l.is_empty()) {
            cache::run(
                Command::new(tool)
                    .arg("-n")
                    .arg(&self.name)
                    .args(line.split_whitespace()),
            )?;
        }
        Ok(())
    }

    /// Runs `work` on a thread of its own inside the namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or what `work` returns.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|s| {
            let thread = s.spawn(|| {
                self.enter()?;
                work()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into the namespace, for good.
    ///
    /// # Errors
    /// When the kernel refuses: without root.
    pub fn enter(&self) -> Result<()> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter network namespace {}", self.name))
    }

    /// Sets a sysctl of this namespace, `net.ipv4.ip_forward` for one.
    ///
    /// # Errors
    /// When there is no such key or the value is refused.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        // /proc/sys/net shows the namespace of the thread that opens it.
        self.inside(|| {
            fs::write(&path, value).with_context(|| format!("cannot set {key} to {value}"))
        })
    }

    /// Reads a sysctl of this namespace.
    ///
    /// # Errors
    /// When there is no such key.
    pub fn read_sysctl(&self, key: &str) -> Result<String> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        self.inside(|| {
            Ok(fs::read_to_string(&path)
                .with_context(|| format!("cannot read {key}"))?
                .trim()
                .to_string())
        })
    }

    /// A command that will run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = Arc::clone(&self.file);
        // SAFETY: setns is async-signal-safe, and the fd stays open as long as
        // the command because the closure owns a reference to it.
        unsafe {
            command.pre_exec(move || Ok(setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?));
        }
        command
    }

    /// The namespace's inode, which processes inside show in `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn inode(&self) -> Result<u64> {
        Ok(self.file.metadata()?.ino())
    }
}

/// The names of all namespaces that start with `prefix`.
pub fn names(prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(FOLDER) else {
        return Vec::new();
    };
    let names = entries
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|n| n.starts_with(prefix)).collect();
    names.sort();
    names
}

/// Removes the namespace `name`, if it is there.
///
/// # Errors
/// When `ip` fails.
pub fn remove(name: &str) -> Result<()> {
    if !PathBuf::from(FOLDER).join(name).exists() {
        return Ok(());
    }
    cache::run(Command::new("ip").args(["netns", "del", name])).map(drop)
}
