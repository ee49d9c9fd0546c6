//! A thread under ptrace: stopped, borrowed for calls, put back, let go.
#![allow(unsafe_code)]

use super::InjectError;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_O_SUSPEND_SECCOMP: libc::c_int = 1 << 21;
const PTRACE_EVENT_STOP: i32 = 128;

/// How long a stop or a step may take.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// How often a thread that is outside of any system call is let go again first.
const TRIES: u32 = 5;

/// Signals that the processor raises; blocking one while it is raised would
/// reset the program's handler for it.
const SYNCHRONOUS: [i32; 6] = [
    libc::SIGTRAP,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGSYS,
];

/// What the borrowed thread must get back.
struct Saved {
    regs: libc::user_regs_struct,
    mask: u64,
}

/// A seized thread. On drop it gets back what was saved and is let go.
pub(super) struct Tracee {
    pid: i32,
    /// In a ptrace stop (so that requests are allowed), as far as we know.
    stopped: bool,
    saved: Option<Saved>,
    /// A signal met on the way that is to be delivered when we let go.
    signal: i32,
    gone: bool,
}

impl Tracee {
    /// Seizes the main thread of `pid`; it runs on. `seccomp`: set its filters
    /// aside while we hold it.
    pub(super) fn seize(pid: i32, seccomp: bool) -> Result<Tracee, InjectError> {
        let options = if seccomp { PTRACE_O_SUSPEND_SECCOMP } else { 0 };
        match ptrace(libc::PTRACE_SEIZE, pid, 0, options as usize) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {
                return Err(InjectError::Died { pid });
            }
            Err(source) => {
                let tracer = status_field(pid, "TracerPid").unwrap_or_default();
                return Err(if !matches!(tracer.as_str(), "" | "0") {
                    InjectError::Traced { pid, tracer }
                } else if seccomp {
                    InjectError::Seccomp { pid, source }
                } else {
                    InjectError::Ptrace {
                        pid,
                        request: "PTRACE_SEIZE",
                        source,
                    }
                });
            }
        }
        Ok(Tracee {
            pid,
            stopped: false,
            saved: None,
            signal: 0,
            gone: false,
        })
    }

    /// Stops the thread, preferably inside a system call, saves what is to be
    /// restored and blocks signals.
    pub(super) fn stop(&mut self) -> Result<(), InjectError> {
        let pid = self.pid;
        let mut regs;
        let mut tries = 0;
        loop {
            self.interrupt()?;
            regs = self.get_regs()?;
            // In a main loop's poll nearly always. Elsewhere it may be inside a
            // restartable sequence, which must not be continued after a detour.
            if regs.orig_rax as i64 >= 0 {
                break;
            }
            tries += 1;
            if tries >= TRIES && !self.in_rseq()? {
                break;
            }
            if tries >= 100 * TRIES {
                return Err(self.busy());
            }
            self.request("PTRACE_CONT", libc::PTRACE_CONT, 0, self.signal as usize)?;
            self.signal = 0;
            self.stopped = false;
            thread::sleep(Duration::from_millis(1));
        }
        const USER_CS_64: u64 = 0x33;
        if regs.cs != USER_CS_64 {
            return Err(InjectError::NotX86_64 { pid });
        }
        let mut mask = 0u64;
        self.request(
            "PTRACE_GETSIGMASK",
            PTRACE_GETSIGMASK,
            8,
            &raw mut mask as usize,
        )?;
        self.saved = Some(Saved { regs, mask });
        let mut all = SYNCHRONOUS.iter().fold(!0u64, |m, s| m & !(1 << (s - 1)));
        self.request(
            "PTRACE_SETSIGMASK",
            PTRACE_SETSIGMASK,
            8,
            &raw mut all as usize,
        )
    }

    /// Runs system call `nr` in the stopped thread by the instruction at
    /// `syscall_at`; the value it left in `rax`.
    pub(super) fn syscall(
        &mut self,
        syscall_at: u64,
        nr: i64,
        args: [i64; 3],
    ) -> Result<i64, InjectError> {
        let pid = self.pid;
        let Some(saved) = &self.saved else {
            return Err(self.busy());
        };
        let mut regs = saved.regs;
        regs.rip = syscall_at;
        regs.rax = nr as u64;
        // Not in a system call: nothing for the kernel to restart on our way there.
        regs.orig_rax = u64::MAX;
        [regs.rdi, regs.rsi, regs.rdx] = args.map(|a| a as u64);
        self.set_regs(&regs)?;
        loop {
            self.request("PTRACE_SINGLESTEP", libc::PTRACE_SINGLESTEP, 0, 0)?;
            self.stopped = false;
            let status = self.wait()?;
            let signal = libc::WSTOPSIG(status);
            if status >> 16 == PTRACE_EVENT_STOP {
                continue; // a group stop or another interrupt was waiting; the step is still to come
            }
            let now = self.get_regs()?;
            if signal == libc::SIGTRAP && now.rip == syscall_at + 2 {
                return Ok(now.rax as i64);
            }
            if now.rip != syscall_at {
                return Err(InjectError::Interrupted {
                    pid,
                    signal: format!("signal {signal}"),
                });
            }
            // Sent to the process, not raised by our step: it gets it when we let go.
            let own = SYNCHRONOUS.contains(&signal) && self.signal_code()? > 0;
            if own {
                return Err(InjectError::Interrupted {
                    pid,
                    signal: format!("signal {signal}"),
                });
            }
            self.signal = signal;
        }
    }

    /// Puts everything back and lets go.
    pub(super) fn release(mut self) -> Result<(), InjectError> {
        self.put_back()
    }

    fn put_back(&mut self) -> Result<(), InjectError> {
        if self.gone {
            return Ok(());
        }
        if !self.stopped {
            self.interrupt()?;
        }
        if let Some(saved) = self.saved.take() {
            self.set_regs(&saved.regs)?;
            let mut mask = saved.mask;
            self.request(
                "PTRACE_SETSIGMASK",
                PTRACE_SETSIGMASK,
                8,
                &raw mut mask as usize,
            )?;
        }
        self.request(
            "PTRACE_DETACH",
            libc::PTRACE_DETACH,
            0,
            self.signal as usize,
        )?;
        self.gone = true;
        Ok(())
    }

    /// Brings the thread into a stop.
    fn interrupt(&mut self) -> Result<(), InjectError> {
        self.request("PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, 0, 0)?;
        loop {
            let status = self.wait()?;
            let signal = libc::WSTOPSIG(status);
            if status >> 16 != PTRACE_EVENT_STOP {
                // A signal on its way came first: deliver it as if we were not here.
                self.request("PTRACE_CONT", libc::PTRACE_CONT, 0, signal as usize)?;
                self.stopped = false;
                continue;
            }
            let name = match signal {
                libc::SIGSTOP => "SIGSTOP",
                libc::SIGTSTP => "SIGTSTP",
                libc::SIGTTIN => "SIGTTIN",
                libc::SIGTTOU => "SIGTTOU",
                _ => return Ok(()),
            };
            return Err(InjectError::SignalStopped {
                pid: self.pid,
                signal: name,
            });
        }
    }

    /// Waits until the thread has stopped; its wait status.
    fn wait(&mut self) -> Result<i32, InjectError> {
        let end = Instant::now() + STOP_LIMIT;
        loop {
            let mut status = 0;
            // SAFETY: waits for one thread that this thread traces; `status` is ours.
            let got = unsafe { libc::waitpid(self.pid, &mut status, libc::__WALL | libc::WNOHANG) };
            if got < 0 || got == self.pid && !libc::WIFSTOPPED(status) {
                self.gone = true;
                return Err(InjectError::Died { pid: self.pid });
            }
            if got == self.pid {
                self.stopped = true;
                return Ok(status);
            }
            if Instant::now() >= end {
                return Err(self.busy());
            }
            thread::sleep(Duration::from_micros(20));
        }
    }

    /// Whether the stopped thread is inside a restartable sequence: its rseq
    /// area names one.
    fn in_rseq(&self) -> Result<bool, InjectError> {
        const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
        #[repr(C)]
        #[derive(Default)]
        struct Config {
            pointer: u64,
            size: u32,
            signature: u32,
            flags: u32,
            pad: u32,
        }
        let mut config = Config::default();
        let got = ptrace(
            PTRACE_GET_RSEQ_CONFIGURATION,
            self.pid,
            size_of::<Config>(),
            &raw mut config as usize,
        );
        // Kernels without the request (before 5.13) are too old for direct mode anyway.
        if got.is_err() || config.pointer == 0 {
            return Ok(false);
        }
        let mut cs = [0; 8];
        let read = std::fs::File::open(format!("/proc/{}/mem", self.pid)).and_then(|mem| {
            std::os::unix::fs::FileExt::read_exact_at(&mem, &mut cs, config.pointer + 8)
        });
        Ok(read.is_ok() && cs != [0; 8])
    }

    fn signal_code(&self) -> Result<i32, InjectError> {
        // SAFETY: all bytes zero is a valid siginfo_t.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        self.request(
            "PTRACE_GETSIGINFO",
            libc::PTRACE_GETSIGINFO,
            0,
            &raw mut info as usize,
        )?;
        Ok(info.si_code)
    }

    fn get_regs(&self) -> Result<libc::user_regs_struct, InjectError> {
        // SAFETY: all bytes zero is a valid user_regs_struct.
        let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        self.request(
            "PTRACE_GETREGS",
            libc::PTRACE_GETREGS,
            0,
            &raw mut regs as usize,
        )?;
        Ok(regs)
    }

    fn set_regs(&self, regs: &libc::user_regs_struct) -> Result<(), InjectError> {
        let regs = std::ptr::from_ref(regs) as usize;
        self.request("PTRACE_SETREGS", libc::PTRACE_SETREGS, 0, regs)
    }

    fn request(
        &self,
        name: &'static str,
        request: libc::c_uint,
        addr: usize,
        data: usize,
    ) -> Result<(), InjectError> {
        ptrace(request, self.pid, addr, data).map_err(|source| match source.raw_os_error() {
            Some(libc::ESRCH) => InjectError::Died { pid: self.pid },
            _ => InjectError::Ptrace {
                pid: self.pid,
                request: name,
                source,
            },
        })
    }

    fn busy(&self) -> InjectError {
        let state = status_field(self.pid, "State").unwrap_or_else(|| "gone".into());
        InjectError::Busy {
            pid: self.pid,
            waited: STOP_LIMIT,
            state,
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        match self.put_back() {
            Ok(()) | Err(InjectError::Died { .. }) => {}
            // Our thread ends now, and with it the tracing.
            Err(error) => {
                tracing::error!(pid = self.pid, %error, "VMM could not be put back as it was");
            }
        }
    }
}

fn status_field(pid: i32, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    crate::vmm::process::status_value(&text, key).map(str::to_owned)
}

/// One ptrace request whose answer, if any, goes to the memory at `data`.
fn ptrace(request: libc::c_uint, pid: i32, addr: usize, data: usize) -> io::Result<()> {
    // SAFETY: the callers in this file pass, for requests that read or write our
    // memory, the address of a live local of the type and size the request
    // takes; requests that change the tracee are the purpose of this module.
    let rc = unsafe { libc::ptrace(request, pid, addr, data) };
    if rc < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
