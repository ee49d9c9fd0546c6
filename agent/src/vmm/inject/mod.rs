//! One system call run inside the VMM: `userfaultfd`, brought out by
//! `pidfd_getfd`, and the VMM's own copy closed again.
//!
//! The VMM's main thread is stopped by ptrace for some 0.2 ms; vCPU threads
//! run on. **No byte of the VMM's memory is changed**: the two bytes of a
//! `syscall` instruction are looked up in code that the process has mapped
//! anyway (the vDSO), since writing them at the stopped thread's own address
//! could be executed by other threads that pass there. What changes is the
//! thread's registers and signal mask, and a guard puts them back on every
//! way out:
//!
//! - A thread stopped inside a system call carries the call's number in
//!   `orig_rax` and "restart me" in `rax`. The injected call runs with `orig_rax
//!   = -1`, so that the kernel does not restart anything into our registers;
//!   with the saved registers back, it restarts the interrupted call itself.
//! - While we work, all signals that can be blocked are, so they stay queued
//!   with all their details and arrive afterwards. SIGSTOP and signals that a
//!   fault can raise are handed on when we detach.
//! - A tracer that dies lets go of what it traces: all of this runs on a thread
//!   of its own, which ends with it.
#![allow(unsafe_code)]

mod tracee;

use super::process::{ProcessError, VmProcess};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;
use thiserror::Error;
use tracee::Tracee;

/// Why a userfaultfd could not be made inside a VMM. The VMM runs on unharmed.
#[derive(Debug, Error)]
pub enum InjectError {
    /// Somebody else traces it.
    #[error("process {pid} is traced by process {tracer} (a debugger?): end that first")]
    Traced {
        /// The VMM.
        pid: i32,
        /// Who traces it.
        tracer: String,
    },
    /// It may not make this call and seccomp cannot be set aside.
    #[error(
        "process {pid} runs under seccomp (QEMU's -sandbox on) and this kernel cannot set that aside for one call (needs CONFIG_CHECKPOINT_RESTORE and CAP_SYS_ADMIN): start the VM without -sandbox, or use stream mode"
    )]
    Seccomp {
        /// The VMM.
        pid: i32,
        /// The kernel's answer to `PTRACE_O_SUSPEND_SECCOMP`.
        #[source]
        source: io::Error,
    },
    /// It is no 64-bit x86 program.
    #[error(
        "process {pid} is not a 64-bit x86 program: direct mode cannot make calls in it, use stream mode"
    )]
    NotX86_64 {
        /// The VMM.
        pid: i32,
    },
    /// It is stopped by a signal.
    #[error("process {pid} is stopped by {signal}: let it run (kill -CONT {pid}) and try again")]
    SignalStopped {
        /// The VMM.
        pid: i32,
        /// The signal.
        signal: &'static str,
    },
    /// Its main thread did not come to a stop where it can be borrowed.
    #[error(
        "the main thread of process {pid} could not be stopped within {waited:?} (state {state}); it may wait for storage that is stuck"
    )]
    Busy {
        /// The VMM.
        pid: i32,
        /// How long we waited.
        waited: Duration,
        /// Its state letter.
        state: String,
    },
    /// A ptrace request failed.
    #[error(
        "{request} on process {pid} failed; the agent needs root (CAP_SYS_PTRACE), and no security module may forbid ptrace"
    )]
    Ptrace {
        /// The VMM.
        pid: i32,
        /// Name of the request.
        request: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// No `syscall` instruction was found.
    #[error("process {pid} has no vDSO with a syscall instruction; use stream mode")]
    NoSyscallInstruction {
        /// The VMM.
        pid: i32,
    },
    /// Something else happened in the VMM than the call.
    #[error(
        "the call made in process {pid} was cut short by {signal}; the VMM was put back as it was: try again"
    )]
    Interrupted {
        /// The VMM.
        pid: i32,
        /// What came between.
        signal: String,
    },
    /// The VMM ended meanwhile.
    #[error("process {pid} ended while a call was made in it")]
    Died {
        /// The VMM.
        pid: i32,
    },
    /// The call was made and refused.
    #[error("{call} made inside process {pid} failed")]
    Call {
        /// The VMM.
        pid: i32,
        /// Name of the system call.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Its `/proc` entries could not be read.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// No thread for it.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// `UFFD_USER_MODE_ONLY`.
const UFFD_USER_MODE_ONLY: i64 = 1;

/// Makes a userfaultfd that acts on `process`'s memory. Blocking, ≈ 0.2 ms, at
/// most a few seconds. After success and after failure the process is as it
/// was, with no descriptor more.
pub fn userfaultfd_in(process: &VmProcess) -> Result<OwnedFd, InjectError> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name(format!("inject-{}", process.pid()))
            .spawn_scoped(scope, || inject(process))
            .map_err(InjectError::Thread)?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn inject(process: &VmProcess) -> Result<OwnedFd, InjectError> {
    let pid = process.pid();
    check_program(process)?;
    let seccomp = process.status("Seccomp")?.is_some_and(|mode| mode != "0");
    let syscall_at = find_syscall(process)?;

    let mut tracee = Tracee::seize(pid, seccomp)?;
    // Under ptrace the pid cannot be reused: now it is certain whom we hold.
    process.check_alive()?;
    tracee.stop()?;
    let mut call = |name, nr, args: [i64; 3]| -> Result<i64, InjectError> {
        let result = tracee.syscall(syscall_at, nr, args)?;
        if (-4095..0).contains(&result) {
            let source = io::Error::from_raw_os_error(-result as i32);
            return Err(InjectError::Call {
                pid,
                call: name,
                source,
            });
        }
        Ok(result)
    };
    let flags = i64::from(libc::O_CLOEXEC | libc::O_NONBLOCK);
    let remote = match call("userfaultfd", libc::SYS_userfaultfd, [flags, 0, 0]) {
        // A VMM without CAP_SYS_PTRACE, under vm.unprivileged_userfaultfd=0, may
        // have one for faults in user mode only. That limit is about faults that
        // somebody has to handle; the asynchronous log has none.
        Err(InjectError::Call { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {
            call(
                "userfaultfd",
                libc::SYS_userfaultfd,
                [flags | UFFD_USER_MODE_ONLY, 0, 0],
            )?
        }
        other => other?,
    };
    let local = pidfd_getfd(process, remote);
    // Close the VMM's copy whether or not ours was had.
    call("close", libc::SYS_close, [remote, 0, 0])?;
    tracee.release()?;
    local
}

fn pidfd_getfd(process: &VmProcess, remote: i64) -> Result<OwnedFd, InjectError> {
    // SAFETY: integers only; a result ≥ 0 is a new descriptor (close-on-exec) of ours.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_pidfd_getfd,
            process.as_fd().as_raw_fd(),
            remote as i32,
            0,
        )
    };
    if fd < 0 {
        let source = io::Error::last_os_error();
        return Err(InjectError::Call {
            pid: process.pid(),
            call: "pidfd_getfd",
            source,
        });
    }
    // SAFETY: see above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Refuses what is not a 64-bit x86 program, by its ELF header.
fn check_program(process: &VmProcess) -> Result<(), InjectError> {
    let mut head = [0; 20];
    let read = File::open(process.proc_path("exe")).and_then(|mut f| f.read_exact(&mut head));
    if let Err(source) = read {
        process.check_alive()?;
        return Err(ProcessError::Proc {
            pid: process.pid(),
            file: "exe",
            source,
        }
        .into());
    }
    const EM_X86_64: u8 = 62;
    if head[..5] != *b"\x7fELF\x02" || head[18] != EM_X86_64 || head[19] != 0 {
        return Err(InjectError::NotX86_64 { pid: process.pid() });
    }
    Ok(())
}

/// Address of two bytes `0f 05` in the process's vDSO. What the bytes around
/// them mean does not matter: the thread is stepped over this one instruction.
fn find_syscall(process: &VmProcess) -> Result<u64, InjectError> {
    let none = || InjectError::NoSyscallInstruction { pid: process.pid() };
    let rows = process.maps()?;
    let vdso = rows
        .iter()
        .find(|r| r.path == "[vdso]" && r.perms[2])
        .ok_or_else(none)?;
    if vdso.len() > 1 << 20 {
        return Err(none());
    }
    let mut code = vec![0; vdso.len() as usize];
    File::open(process.proc_path("mem"))
        .and_then(|mem| mem.read_exact_at(&mut code, vdso.start))
        .map_err(|source| ProcessError::Proc {
            pid: process.pid(),
            file: "mem",
            source,
        })?;
    find_syscall_bytes(&code)
        .map(|at| vdso.start + at as u64)
        .ok_or_else(none)
}

fn find_syscall_bytes(code: &[u8]) -> Option<usize> {
    code.windows(2).position(|w| w == [0x0f, 0x05])
}

#[cfg(test)]
mod tests;
