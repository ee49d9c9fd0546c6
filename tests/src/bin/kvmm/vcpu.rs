//! The vCPU's thread: runs the guest, stands when told to, and can be had out
//! of the guest at any time.

use crate::serial::Serial;
use anyhow::{Context, Result, bail};
use drover_vmm::{DirtyRings, EXIT_RING_FULL};
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Interrupts KVM_RUN; nobody else uses it.
const KICK: Signal = Signal::SIGUSR1;
/// A signal that comes just before KVM_RUN interrupts nothing: it is sent again.
const AGAIN: Duration = Duration::from_micros(200);
/// A vCPU that cannot be had out of the guest by then never will.
const TRIES: u32 = 50_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// Not in the guest, every access to a device finished.
    Standing,
    /// The guest did something that this VMM has no device for.
    Failed,
}

struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
    /// Held by the thread while it runs the guest.
    fd: Mutex<VcpuFd>,
}

struct Control {
    wanted: State,
    is: State,
    /// How often the vCPU has left the guest.
    exits: u64,
    thread: Option<Pthread>,
}

/// The vCPU, for those who control it.
pub(crate) struct Vcpu(Arc<Shared>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

extern "C" fn interrupted(_: libc::c_int) {}

impl Vcpu {
    /// Starts its thread; the guest runs if `run`.
    #[allow(unsafe_code)]
    pub(crate) fn start(
        fd: VcpuFd,
        serial: Serial,
        rings: Option<DirtyRings>,
        run: bool,
    ) -> Result<Vcpu> {
        let action = SigAction::new(
            SigHandler::Handler(interrupted),
            SaFlags::empty(),
            SigSet::empty(),
        );
        // SAFETY: the handler does nothing.
        unsafe { sigaction(KICK, &action) }?;
        let shared = Arc::new(Shared {
            control: Mutex::new(Control {
                wanted: if run { State::Running } else { State::Standing },
                is: State::Standing,
                exits: 0,
                thread: None,
            }),
            changed: Condvar::new(),
            fd: Mutex::new(fd),
        });
        let thread = shared.clone();
        std::thread::Builder::new()
            .name("vcpu".into())
            .spawn(move || {
                if let Err(error) = thread.attend(&serial, rings.as_ref()) {
                    eprintln!("vCPU: {error:#}");
                    thread.set(State::Failed);
                }
            })?;
        Ok(Vcpu(shared))
    }

    /// Whether the guest runs.
    pub(crate) fn runs(&self) -> bool {
        lock(&self.0.control).wanted == State::Running
    }

    /// Has it stand; whether it was running.
    pub(crate) fn pause(&self) -> Result<bool> {
        let was_running = self.runs();
        lock(&self.0.control).wanted = State::Standing;
        match self.0.kick_until(|c| c.is != State::Running)? {
            State::Failed => bail!("the vCPU has failed"),
            _ => Ok(was_running),
        }
    }

    /// Lets it run.
    pub(crate) fn resume(&self) -> Result<()> {
        let mut control = lock(&self.0.control);
        if control.is == State::Failed {
            bail!("the vCPU has failed");
        }
        control.wanted = State::Running;
        self.0.changed.notify_all();
        Ok(())
    }

    /// Has it leave the guest once, if it is there.
    pub(crate) fn kick(&self) {
        let from = lock(&self.0.control).exits;
        let left = |c: &Control| c.exits != from || c.is != State::Running;
        if let Err(error) = self.0.kick_until(left) {
            eprintln!("vCPU: {error:#}");
        }
    }

    /// Its descriptor; to be had only while it stands.
    pub(crate) fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        lock(&self.0.fd)
    }
}

impl Shared {
    fn kick_until(&self, met: impl Fn(&Control) -> bool) -> Result<State> {
        let mut control = lock(&self.control);
        for _ in 0..TRIES {
            if met(&control) {
                return Ok(control.is);
            }
            if let Some(thread) = control.thread {
                pthread_kill(thread, KICK)?;
            }
            let waited = self.changed.wait_timeout(control, AGAIN);
            control = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        bail!("the vCPU does not leave the guest")
    }

    fn set(&self, state: State) {
        lock(&self.control).is = state;
        self.changed.notify_all();
    }

    /// The thread. The guest is entered with the descriptor locked and left
    /// before that is given back.
    fn attend(&self, serial: &Serial, rings: Option<&DirtyRings>) -> Result<()> {
        lock(&self.control).thread = Some(pthread_self());
        loop {
            let mut control = lock(&self.control);
            while control.wanted != State::Running {
                let woken = self.changed.wait(control);
                control = woken.unwrap_or_else(PoisonError::into_inner);
            }
            control.is = State::Running;
            drop(control);
            let mut fd = lock(&self.fd);
            while lock(&self.control).wanted == State::Running {
                step(&mut fd, serial, rings)?;
                lock(&self.control).exits += 1;
                self.changed.notify_all();
            }
            // What a device answered gets into registers by entering once more.
            fd.set_kvm_immediate_exit(1);
            let finished = fd.run().map(|exit| format!("{exit:?}"));
            fd.set_kvm_immediate_exit(0);
            match finished {
                Err(error) if error.errno() == libc::EINTR => {}
                Ok(exit) => bail!("left for {exit} when it was to stand"),
                Err(error) => return Err(error).context("finishing an access"),
            }
            drop(fd);
            self.set(State::Standing);
        }
    }
}

fn step(fd: &mut VcpuFd, serial: &Serial, rings: Option<&DirtyRings>) -> Result<()> {
    match fd.run() {
        Ok(VcpuExit::IoOut(port, bytes)) => Ok(serial.write(port, bytes)?),
        Ok(VcpuExit::IoIn(port, into)) => {
            serial.read(port, into);
            Ok(())
        }
        Ok(VcpuExit::Unsupported(EXIT_RING_FULL)) => {
            // The guest goes on; the next round says what failed.
            let _told_there = rings.context("a full ring, and none was made")?.drain();
            Ok(())
        }
        Ok(VcpuExit::Intr) => Ok(()),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(()),
        Ok(exit) => bail!("the guest did {exit:?}"),
        Err(error) => Err(error).context("KVM_RUN"),
    }
}
