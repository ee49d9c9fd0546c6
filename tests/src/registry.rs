//! What a lab has made on this machine, and how all of it goes again: after
//! success, panic, SIGINT and SIGTERM, and by `lab down` after a killed run.
//!
//! Everything of a lab is found from its id alone: namespaces by the prefix of
//! their names, processes by the namespace they are in, files by two folders.
#![allow(unsafe_code)]

use crate::netns::{self, Netns};
use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

const RUN: &str = "/run/drover-lab";
const PATIENCE: Duration = Duration::from_secs(5);

static LIVE: Mutex<Vec<String>> = Mutex::new(Vec::new());
static SIGNALS: Once = Once::new();
static SIGNAL_PIPE: AtomicI32 = AtomicI32::new(-1);
static NEXT: AtomicU32 = AtomicU32::new(0);

/// The identity of one lab. Dropping it takes the lab down.
#[derive(Debug)]
pub struct LabId {
    id: String,
    keep: bool,
}

impl LabId {
    /// A fresh id, unique on this machine, with its folders made.
    ///
    /// # Errors
    /// When the folders cannot be made: without root.
    pub fn create() -> Result<LabId> {
        watch_signals()?;
        let id = format!(
            "{:x}x{:x}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let lab = LabId {
            id: id.clone(),
            keep: false,
        };
        LIVE.lock().unwrap_or_else(|e| e.into_inner()).push(id);
        for folder in [lab.run_dir(), lab.shm_dir()] {
            fs::create_dir_all(&folder)
                .with_context(|| format!("cannot make {}; the lab needs root", folder.display()))?;
        }
        Ok(lab)
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.id
    }

    /// The name of a namespace of this lab.
    pub fn netns_name(&self, what: &str) -> String {
        format!("{}{what}", prefix(&self.id))
    }

    /// Sockets, logs and configurations of this lab.
    pub fn run_dir(&self) -> PathBuf {
        run_dir(&self.id)
    }

    /// Guest RAM files of this lab.
    pub fn shm_dir(&self) -> PathBuf {
        shm_dir(&self.id)
    }

    /// Leaves the lab standing when this value goes, for `lab down` to end.
    pub fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for LabId {
    fn drop(&mut self) {
        LIVE.lock()
            .unwrap_or_else(|e| e.into_inner())
            .retain(|id| *id != self.id);
        if !self.keep
            && let Err(e) = take_down(&self.id)
        {
            eprintln!("lab {}: {e:#}; `lab down` tries again", self.id);
        }
    }
}

fn prefix(id: &str) -> String {
    format!("dl{id}-")
}

fn run_dir(id: &str) -> PathBuf {
    Path::new(RUN).join(id)
}

fn shm_dir(id: &str) -> PathBuf {
    PathBuf::from(format!("/dev/shm/drover-lab-{id}"))
}

/// The ids of all labs that stand on this machine.
pub fn standing() -> Vec<String> {
    let Ok(entries) = fs::read_dir(RUN) else {
        return Vec::new();
    };
    let mut ids: Vec<String> = entries
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    ids.sort();
    ids
}

/// Whether the process that made this lab still runs: it is in use then. A
/// reused pid makes an abandoned lab look so, hence `lab down --all`.
pub fn in_use(id: &str) -> bool {
    let owner = id
        .split('x')
        .next()
        .and_then(|hex| u32::from_str_radix(hex, 16).ok());
    owner.is_some_and(|pid| Path::new(&format!("/proc/{pid}")).exists())
}

/// Ends every process of a lab and removes its namespaces and folders.
///
/// # Errors
/// When something of it stays.
pub fn take_down(id: &str) -> Result<()> {
    if id.is_empty() || id.contains('/') {
        bail!("{id:?} is no lab id");
    }
    let names = netns::names(&prefix(id));
    for name in &names {
        end_processes(&Netns::open(name)?)?;
    }
    for name in &names {
        netns::remove(name)?;
    }
    for folder in [shm_dir(id), run_dir(id)] {
        unmount_below(&folder)?;
        match fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("cannot remove {}", folder.display()));
            }
            _ => (),
        }
    }
    Ok(())
}

/// Unmounts what a test mounted in one of the lab's folders.
fn unmount_below(folder: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts
        .lines()
        .filter_map(|l| l.split(' ').nth(4))
        .map(Path::new);
    for point in points.filter(|p| p.starts_with(folder)) {
        umount2(point, MntFlags::MNT_DETACH)
            .with_context(|| format!("cannot unmount {}", point.display()))?;
    }
    Ok(())
}

/// The processes inside a namespace, this one left out.
///
/// # Errors
/// When /proc cannot be read.
pub fn processes(netns: &Netns) -> Result<Vec<i32>> {
    let inode = netns.inode()?;
    let own = std::process::id() as i32;
    let inside =
        |pid: &i32| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| m.ino() == inode);
    let pids = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok());
    Ok(pids.filter(|pid| *pid != own && inside(pid)).collect())
}

/// Ends all processes of a namespace. New ones may be born while others die,
/// so it looks again until there is none.
///
/// # Errors
/// When one does not end.
pub fn end_processes(netns: &Netns) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        let pids = processes(netns)?;
        if pids.is_empty() {
            return Ok(());
        }
        if Instant::now() > until {
            bail!("processes {pids:?} in {} do not end", netns.name());
        }
        for pid in pids {
            let Ok(fd) = pidfd(pid) else { continue };
            // The pid may have been reused before the pidfd was made: look again.
            if processes(netns)?.contains(&pid) {
                kill(&fd);
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A handle on a process that never means another one.
///
/// # Errors
/// When there is no such process.
pub fn pidfd(pid: i32) -> std::io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and returns a new fd or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the fd was just returned by the kernel and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends SIGKILL by handle; a process that is gone already is as good.
pub fn kill(pidfd: &OwnedFd) {
    send_signal(pidfd, libc::SIGKILL);
}

/// Sends any signal by handle; a process that is gone already is as good.
pub fn send_signal(pidfd: &OwnedFd, signal: i32) {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: an open pidfd, a signal number and no siginfo.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            none,
            0,
        )
    };
}

extern "C" fn on_signal(signal: i32) {
    let byte = [signal as u8];
    // SAFETY: write is async-signal-safe; the pipe is never closed.
    unsafe { libc::write(SIGNAL_PIPE.load(Ordering::Relaxed), byte.as_ptr().cast(), 1) };
}

/// SIGINT and SIGTERM take down the labs of this process before it ends.
fn watch_signals() -> Result<()> {
    let mut outcome = Ok(());
    SIGNALS.call_once(|| outcome = install());
    outcome
}

fn install() -> Result<()> {
    let (mut read, write) = std::io::pipe()?;
    SIGNAL_PIPE.store(OwnedFd::from(write).into_raw_fd(), Ordering::Relaxed);
    let action = SigAction::new(
        SigHandler::Handler(on_signal),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler does nothing but an async-signal-safe write.
        unsafe { sigaction(signal, &action)? };
    }
    std::thread::spawn(move || {
        let mut signal = [0];
        if read.read_exact(&mut signal).is_ok() {
            let live = LIVE.lock().unwrap_or_else(|e| e.into_inner()).clone();
            for id in live {
                // The lab's own threads still run and may start things meanwhile.
                if take_down(&id).or_else(|_| take_down(&id)).is_err() {
                    eprintln!("lab {id} could not be taken down; `lab down` tries again");
                }
            }
            std::process::exit(128 + i32::from(signal[0]));
        }
    });
    Ok(())
}

/// What is left of a lab that should be gone, one line a thing.
pub fn leftovers(id: &str) -> Vec<String> {
    let mut left: Vec<String> = netns::names(&prefix(id))
        .iter()
        .map(|n| format!("namespace {n}"))
        .collect();
    for folder in [shm_dir(id), run_dir(id)] {
        if folder.exists() {
            left.push(format!("folder {}", folder.display()));
        }
    }
    left
}
