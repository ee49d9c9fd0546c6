//! A VMM's process, held so that its number cannot come to mean another one.
#![allow(unsafe_code)]

use super::maps::{MapsError, MapsRow, parse_maps};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// What can go wrong when looking at or ending a process.
#[derive(Debug, Error)]
pub enum ProcessError {
    /// There is no such process (any more).
    #[error("process {pid} ({what}) is gone")]
    Gone {
        /// Its number.
        pid: i32,
        /// What it was to us.
        what: &'static str,
    },
    /// A file of `/proc/PID` could not be read.
    #[error(
        "cannot read /proc/{pid}/{file}; the agent needs root (CAP_SYS_PTRACE) in the VMM's pid namespace"
    )]
    Proc {
        /// Its number.
        pid: i32,
        /// File below `/proc/PID`.
        file: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A file of `/proc/PID` holds what we do not understand.
    #[error("/proc/{pid}/{file} cannot be understood: {what}")]
    Parse {
        /// Its number.
        pid: i32,
        /// File below `/proc/PID`.
        file: &'static str,
        /// What is wrong.
        what: String,
    },
    /// A pidfd call failed.
    #[error("{call} on process {pid} failed")]
    Pidfd {
        /// Its number.
        pid: i32,
        /// Name of the system call.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// It was killed and has not gone.
    #[error(
        "process {pid} did not end within {waited:?} of SIGKILL (state {state}); look for stuck storage under it"
    )]
    WillNotDie {
        /// Its number.
        pid: i32,
        /// How long we waited.
        waited: Duration,
        /// Its state letter.
        state: char,
    },
}

/// A running process, held by pidfd. Dropping it lets go of the process and
/// does nothing to it.
#[derive(Debug)]
pub struct VmProcess {
    pid: i32,
    pidfd: OwnedFd,
    start_ticks: u64,
}

impl VmProcess {
    /// Takes hold of process `pid`.
    pub fn open(pid: i32) -> Result<VmProcess, ProcessError> {
        // SAFETY: takes two integers; a result ≥ 0 is a descriptor nobody else owns.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            let source = io::Error::last_os_error();
            return Err(match source.raw_os_error() {
                Some(libc::ESRCH) => ProcessError::Gone { pid, what: "VMM" },
                _ => ProcessError::Pidfd {
                    pid,
                    call: "pidfd_open",
                    source,
                },
            });
        }
        // SAFETY: just created by the kernel for us.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mut process = VmProcess {
            pid,
            pidfd,
            start_ticks: 0,
        };
        process.start_ticks = process.stat()?.1;
        // What was read is of this very process only if it has not ended meanwhile.
        process.check_alive()?;
        Ok(process)
    }

    /// The process number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// When it started, in clock ticks since boot: with the pid it names a
    /// process uniquely until the next boot (for journals).
    pub fn start_ticks(&self) -> u64 {
        self.start_ticks
    }

    /// Whether it has not ended yet. A zombie has ended.
    pub fn is_alive(&self) -> bool {
        !self.wait_exit(Duration::ZERO)
    }

    /// Whether it has ended, or is sure to: a process that was killed takes a
    /// while to go (its memory is given back first), holds its sockets open
    /// meanwhile, and never runs a line of its own again. What is said to it
    /// after this is `true` has not been heard.
    pub fn is_ending(&self) -> bool {
        let killed = || {
            let pending = self.status("ShdPnd").ok().flatten();
            pending.is_some_and(|set| has_signal(&set, libc::SIGKILL))
        };
        // In this order: a process that has been reaped in between has no
        // signals pending any more.
        killed() || !self.is_alive()
    }

    /// [`Self::is_alive`] as a result.
    pub fn check_alive(&self) -> Result<(), ProcessError> {
        if self.is_alive() {
            Ok(())
        } else {
            Err(ProcessError::Gone {
                pid: self.pid,
                what: "VMM",
            })
        }
    }

    /// Waits (blocking) until it has ended; `false` if it lives on after `limit`.
    pub fn wait_exit(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut poll = libc::pollfd {
                fd: self.pidfd.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            let ms = left.as_millis().min(1 << 30) as libc::c_int;
            // SAFETY: one pollfd, ours, valid for the call.
            let n = unsafe { libc::poll(&mut poll, 1, ms) };
            if n > 0 {
                return true;
            }
            // Interrupted by a signal, or rounded down: only the clock says it is over.
            if left.is_zero() {
                return false;
            }
        }
    }

    /// Sends SIGKILL. A process that has ended already is fine.
    pub fn kill(&self) -> Result<(), ProcessError> {
        // SAFETY: integers and a null siginfo, which the call allows.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        let source = io::Error::last_os_error();
        if rc == 0 || source.raw_os_error() == Some(libc::ESRCH) {
            return Ok(());
        }
        Err(ProcessError::Pidfd {
            pid: self.pid,
            call: "pidfd_send_signal",
            source,
        })
    }

    /// SIGKILL, then waits (blocking) for the end.
    pub fn kill_and_wait(&self, limit: Duration) -> Result<(), ProcessError> {
        self.kill()?;
        if self.wait_exit(limit) {
            return Ok(());
        }
        let state = self.stat().map_or('?', |(state, _)| state);
        Err(ProcessError::WillNotDie {
            pid: self.pid,
            waited: limit,
            state,
        })
    }

    /// Its mappings.
    pub fn maps(&self) -> Result<Vec<MapsRow>, ProcessError> {
        let text = self.read("maps")?;
        parse_maps(&text).map_err(|e: MapsError| ProcessError::Parse {
            pid: self.pid,
            file: "maps",
            what: e.to_string(),
        })
    }

    /// Its command line, lossily as text.
    pub fn cmdline(&self) -> Result<Vec<String>, ProcessError> {
        let text = self.read("cmdline")?;
        Ok(text.split_terminator('\0').map(str::to_owned).collect())
    }

    /// The executable's path as the process sees it.
    pub fn exe(&self) -> Result<PathBuf, ProcessError> {
        fs::read_link(self.proc_path("exe")).map_err(|e| self.proc_error("exe", e))
    }

    /// The value of a line of `/proc/PID/status`, of the main thread.
    pub fn status(&self, key: &str) -> Result<Option<String>, ProcessError> {
        Ok(status_value(&self.read("status")?, key).map(str::to_owned))
    }

    /// Path below `/proc/PID`; means this process only while it lives.
    pub fn proc_path(&self, file: &str) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string()).join(file)
    }

    /// State letter and start time.
    fn stat(&self) -> Result<(char, u64), ProcessError> {
        let text = self.read("stat")?;
        parse_stat(&text).ok_or(ProcessError::Parse {
            pid: self.pid,
            file: "stat",
            what: text,
        })
    }

    fn read(&self, file: &'static str) -> Result<String, ProcessError> {
        let bytes = fs::read(self.proc_path(file)).map_err(|e| self.proc_error(file, e))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn proc_error(&self, file: &'static str, source: io::Error) -> ProcessError {
        match source.raw_os_error() {
            Some(libc::ESRCH | libc::ENOENT) => ProcessError::Gone {
                pid: self.pid,
                what: "VMM",
            },
            _ => ProcessError::Proc {
                pid: self.pid,
                file,
                source,
            },
        }
    }
}

impl AsFd for VmProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// State letter and start time (ticks since boot) of a `/proc/PID/stat` line.
/// The command name in it may hold anything, spaces and brackets included.
pub fn parse_stat(text: &str) -> Option<(char, u64)> {
    let (_, rest) = text.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?.chars().next()?;
    // Field 22 counted from 1; the state is field 3.
    let start = fields.nth(18)?.trim_end().parse().ok()?;
    Some((state, start))
}

/// The value of `key` in text like `/proc/PID/status`.
pub fn status_value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (k, value) = line.split_once(':')?;
        (k == key).then(|| value.trim())
    })
}

/// Whether a signal is in a set as `/proc/PID/status` writes it: hexadecimal,
/// signal 1 the lowest bit.
fn has_signal(set: &str, signal: i32) -> bool {
    u64::from_str_radix(set, 16).is_ok_and(|bits| bits >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    #[test]
    fn holds_looks_and_kills() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = VmProcess::open(child.id() as i32).unwrap();
        assert!(process.is_alive() && process.start_ticks() > 0);
        assert!(!process.wait_exit(Duration::from_millis(20)));
        process.kill_and_wait(Duration::from_secs(5)).unwrap();
        // Not reaped yet: a zombie counts as ended, and killing it again is fine.
        assert!(!process.is_alive());
        process.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(process.maps(), Err(ProcessError::Gone { .. })));
        assert!(matches!(
            VmProcess::open(process.pid()),
            Err(ProcessError::Gone { .. })
        ));
    }

    #[test]
    fn who_was_killed_is_ending_from_that_moment_on() {
        for _ in 0..20 {
            let mut child = Command::new("sleep").arg("60").spawn().unwrap();
            let process = VmProcess::open(child.id() as i32).unwrap();
            assert!(!process.is_ending());
            process.kill().unwrap();
            while process.is_alive() {
                assert!(process.is_ending());
            }
            assert!(process.is_ending());
            child.wait().unwrap();
            assert!(process.is_ending());
        }
    }

    #[test]
    fn signals_are_counted_from_one() {
        let kill = "0000000000000100";
        assert!(has_signal(kill, libc::SIGKILL));
        assert!(!has_signal(kill, libc::SIGTERM));
        assert!(!has_signal("0000000000004000", libc::SIGKILL));
        assert!(!has_signal("no set", libc::SIGKILL));
    }

    #[test]
    fn own_process() {
        let me = VmProcess::open(std::process::id() as i32).unwrap();
        assert!(me.cmdline().unwrap()[0].contains("drover"));
        assert_eq!(me.exe().unwrap(), std::env::current_exe().unwrap());
        assert_eq!(me.status("TracerPid").unwrap().as_deref(), Some("0"));
        assert_eq!(me.status("NoSuchKey").unwrap(), None);
    }

    #[test]
    fn names_with_brackets_do_not_confuse() {
        let line = "7 (a) b (c) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4242 9 9\n";
        assert_eq!(parse_stat(line), Some(('S', 4242)));
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,200}", key in "[a-zA-Z]{1,8}") {
            let _ = parse_stat(&text);
            let _ = status_value(&text, &key);
        }
    }
}
