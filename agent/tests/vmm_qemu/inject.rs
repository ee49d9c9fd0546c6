//! A call made inside another process leaves no trace in it.
#![allow(unsafe_code)]

use crate::harness::*;
use drover::vmm::dirty::DirtyLog;
use drover::vmm::inject::{InjectError, userfaultfd_in};
use drover::vmm::process::VmProcess;
use drover::vmm::ram::find_layout;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

fn descriptors(process: &VmProcess) -> usize {
    std::fs::read_dir(process.proc_path("fd")).unwrap().count()
}

#[test]
fn a_busy_vm_is_not_hurt_by_twenty() {
    for (accel, more) in [
        (Accel::Tcg, &[][..]),
        (Accel::Kvm, &[]),
        // Seccomp is set aside for the one call and is there again after it.
        (
            Accel::Tcg,
            &["-sandbox", "on,obsolete=deny,resourcecontrol=deny"],
        ),
    ] {
        run(async {
            let host = Host::new();
            let vm = host.start(&define("vm", "64M", accel, RAM, more)).await;
            vm.guest.busy(drover::types::Gfn(0x800), 256);
            let process = vm.launched.vmm().process.clone();
            let before = descriptors(&process);
            let mut took = Vec::new();
            for _ in 0..20 {
                let begun = Instant::now();
                let fd = userfaultfd_in(&process).unwrap();
                took.push(begun.elapsed());
                drop(fd);
                vm.guest.wait_ticking();
                vm.launched.vmm().qmp().unwrap().status().await.unwrap();
            }
            took.sort();
            println!(
                "{accel:?} {more:?}: injection took {:?} median, {:?} most",
                took[10], took[19]
            );
            assert_eq!(descriptors(&process), before);
            assert_eq!(vm.guest.torn_pages(), 0);
            assert_eq!(process.status("TracerPid").unwrap().as_deref(), Some("0"));
            let seccomp = if more.is_empty() { "0" } else { "2" };
            assert_eq!(process.status("Seccomp").unwrap().as_deref(), Some(seccomp));
        });
    }
}

/// Ends with the value.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Running {
        Running(command.stdin(Stdio::null()).spawn().unwrap())
    }
    fn process(&self) -> VmProcess {
        VmProcess::open(self.0.id() as i32).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn no_signal_is_lost_changed_or_reordered() {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let program = compile(&PROGRAM, "signals.c", &["-O1", "-Wall", "-Werror"]);
    let mut child = Running::start(Command::new(program).stdout(Stdio::piped()));
    let mut out = BufReader::new(child.0.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let process = child.process();
    let pid = process.pid();
    let stop = Arc::new(AtomicBool::new(false));
    let sender = std::thread::spawn({
        let stop = stop.clone();
        move || {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                let value = libc::sigval {
                    sival_ptr: sent as *mut libc::c_void,
                };
                // SAFETY: sends a signal to a child of ours that is not reaped yet.
                let rc = unsafe { libc::sigqueue(pid, libc::SIGRTMIN(), value) };
                sent += usize::from(rc == 0);
                if sent % 8 == 0 {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
            sent
        }
    });
    let before = descriptors(&process);
    for _ in 0..500 {
        userfaultfd_in(&process).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let sent = sender.join().unwrap();
    assert_eq!(descriptors(&process), before);
    wait("signals do not arrive", || {
        let pending = process.status("SigQ").unwrap().unwrap();
        let mask = process.status("ShdPnd").unwrap().unwrap();
        mask.chars().all(|c| c == '0') && !pending.is_empty()
    });
    // SAFETY: as above.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    println!("{sent} signals sent during 500 injections");
    assert_eq!(rest, format!("{sent} signals, 0 wrong\n"));
    assert!(sent > 100);
    assert!(child.0.wait().unwrap().success());
}

#[test]
fn a_vmm_without_privileges_can_be_watched_too() {
    let mut command = Command::new("/bin/busybox");
    command.args(["sleep", "60"]).uid(65534).gid(65534);
    let child = Running::start(&mut command);
    let process = child.process();
    wait("no exec", || {
        process.exe().is_ok_and(|e| e.ends_with("busybox"))
    });
    userfaultfd_in(&process).unwrap();
    assert!(process.is_alive());
}

#[test]
fn a_traced_process_is_left_alone() {
    let child = Running::start(Command::new("/bin/busybox").args(["sleep", "60"]));
    let process = child.process();
    let pid = nix::unistd::Pid::from_raw(process.pid());
    let (seized, wait_for_it) = std::sync::mpsc::channel();
    let (done, until) = std::sync::mpsc::channel::<()>();
    let tracer = std::thread::spawn(move || {
        nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty()).unwrap();
        seized.send(()).unwrap();
        let _ = until.recv();
    });
    wait_for_it.recv().unwrap();
    let error = userfaultfd_in(&process).unwrap_err();
    assert!(matches!(error, InjectError::Traced { .. }), "{error}");
    drop(done);
    tracer.join().unwrap();
    wait("the tracer has ended", || userfaultfd_in(&process).is_ok());
}

#[test]
fn a_stopped_process_is_left_alone_and_stays_stopped() {
    let child = Running::start(Command::new("/bin/busybox").args(["sleep", "60"]));
    let process = child.process();
    // SAFETY: signals to a child of ours that is not reaped yet, here and below.
    unsafe { libc::kill(process.pid(), libc::SIGSTOP) };
    let state = || process.status("State").unwrap().unwrap();
    wait("not stopped", || state().starts_with('T'));
    let error = userfaultfd_in(&process).unwrap_err();
    assert!(
        matches!(error, InjectError::SignalStopped { .. }),
        "{error}"
    );
    wait("not stopped again", || state().starts_with("T (stopped)"));
    // SAFETY: see above.
    unsafe { libc::kill(process.pid(), libc::SIGCONT) };
    wait("does not go on", || state().starts_with('S'));
    userfaultfd_in(&process).unwrap();
}

#[test]
fn a_32_bit_program_is_refused() {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let flags = ["-m32", "-nostdlib", "-static", "-no-pie"];
    let program = compile(&PROGRAM, "spin32.S", &flags);
    let child = Running::start(&mut Command::new(program));
    let process = child.process();
    wait("no exec", || process.exe().is_ok_and(|e| e == program));
    let error = userfaultfd_in(&process).unwrap_err();
    assert!(matches!(error, InjectError::NotX86_64 { .. }), "{error}");
    assert!(process.is_alive());
}

#[test]
fn a_process_that_is_gone_is_an_error() {
    let mut child = Running::start(Command::new("/bin/busybox").args(["sleep", "60"]));
    let process = child.process();
    child.0.kill().unwrap();
    // A zombie first, then nobody.
    assert!(userfaultfd_in(&process).is_err());
    child.0.wait().unwrap();
    assert!(userfaultfd_in(&process).is_err());
}

#[test]
fn a_program_in_user_mode_all_the_time_is_watched_too() {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let program = compile(&PROGRAM, "spin64.S", &["-nostdlib", "-static", "-no-pie"]);
    let child = Running::start(&mut Command::new(program));
    let process = child.process();
    wait("no exec", || process.exe().is_ok_and(|e| e == program));
    userfaultfd_in(&process).unwrap();
    assert!(process.is_alive());
}

/// Killed at any moment of it, the process is gone and we have an error or a
/// log that says so; never a hang.
#[test]
fn dying_meanwhile_is_an_error() {
    for delay_us in [0, 50, 100, 200, 400, 800] {
        run(async {
            let host = Host::new();
            let vm = host.start(&tcg("vm")).await;
            let process = vm.launched.vmm().process.clone();
            let layout = Arc::new(find_layout(&process, &vm.paths.ram).unwrap());
            let killer = std::thread::spawn({
                let process = process.clone();
                move || {
                    std::thread::sleep(Duration::from_micros(delay_us));
                    process.kill_and_wait(LIMIT).unwrap();
                }
            });
            let begun = Instant::now();
            if let Ok(mut log) = DirtyLog::attach(process, layout) {
                killer.join().unwrap();
                assert!(log.scan(|_| ()).is_err());
            } else {
                killer.join().unwrap();
            }
            assert!(begun.elapsed() < Duration::from_secs(5));
        });
    }
}
