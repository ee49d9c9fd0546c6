//! QEMUs whose guest RAM is theirs alone, as most are: no file, no `share=on`.

use crate::harness::*;
use drover::vmm::qmp::{MigrationStatus, Qmp, RunState};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A QEMU that ends with the value.
pub(crate) struct Private {
    child: Child,
    pub(crate) qmp: Qmp,
    memory: File,
    /// Where the guest's RAM begins in QEMU's address space.
    at: u64,
    ram_kib: u64,
}

/// What a QEMU is started for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Role {
    /// Its guest runs.
    Source,
    /// It waits for `migrate-incoming`, and does not run afterwards.
    Target,
    /// Its guest has not run yet; RAM of this size.
    Still { ram_kib: u64 },
}

/// RAM of guests that run. Under TCG, QEMU 7.2 loses dirty pages of its own
/// pre-copy when the size is a multiple of 256 KiB.
fn ram_kib(accel: Accel) -> u64 {
    match accel {
        Accel::Tcg => 65528,
        Accel::Kvm => 65536,
    }
}

impl Private {
    /// Starts VM `name`.
    pub(crate) async fn start(host: &Host, name: &str, accel: Accel, role: Role) -> Private {
        let (kind, machine) = match accel {
            Accel::Tcg => ("tcg", "q35"),
            Accel::Kvm => ("kvm", "pc"),
        };
        let socket = host.dir.join(format!("{name}.qmp"));
        let kib = match role {
            Role::Still { ram_kib } => ram_kib,
            Role::Source | Role::Target => ram_kib(accel),
        };
        let mut qemu = Command::new("/usr/bin/qemu-system-x86_64");
        qemu.args(["-accel", kind, "-machine", machine])
            .args(["-m", &format!("{kib}K"), "-kernel"])
            .arg(guest())
            .args(["-nodefaults", "-display", "none", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        if accel == Accel::Kvm {
            // The firmware uses kvmclock, and loading the vCPU's state makes the
            // target's KVM write its time page: RAM would not be equal.
            qemu.args(["-cpu", "qemu64,kvmclock=off"]);
        }
        match role {
            Role::Source => {}
            Role::Target => {
                qemu.args(["-S", "-incoming", "defer"]);
            }
            Role::Still { .. } => {
                qemu.arg("-S");
            }
        }
        let log = host.dir.join(format!("{name}.log"));
        qemu.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap());
        let mut child = Ended(Some(qemu.spawn().unwrap()));
        wait("QEMU has no QMP socket", || socket.exists());
        let until = Instant::now() + LIMIT;
        let qmp = loop {
            match Qmp::connect(&socket).await {
                Ok(qmp) => break qmp,
                Err(_) if Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(e) => panic!("{}: {}", full(&e), std::fs::read_to_string(&log).unwrap()),
            }
        };
        let text = qmp.human("gpa2hva 0").await.unwrap();
        let at = text.rsplit_once("0x").unwrap().1;
        let at = u64::from_str_radix(at.trim(), 16).unwrap();
        let child = child.0.take().unwrap();
        let memory = format!("/proc/{}/mem", child.id());
        let memory = OpenOptions::new().read(true).write(true).open(memory);
        Private {
            child,
            qmp,
            memory: memory.unwrap(),
            at,
            ram_kib: kib,
        }
    }

    pub(crate) fn word(&self, at: u64) -> u32 {
        let mut word = [0; 4];
        self.memory.read_exact_at(&mut word, self.at + at).unwrap();
        u32::from_le_bytes(word)
    }

    /// Writes past QEMU, whose dirty log does not see it: before a migration only.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, self.at + at).unwrap();
    }

    pub(crate) fn ram(&self) -> Vec<u8> {
        let mut bytes = vec![0; (self.ram_kib << 10) as usize];
        self.memory.read_exact_at(&mut bytes, self.at).unwrap();
        bytes
    }

    pub(crate) fn wait_ticking(&self) {
        let before = self.word(TICKS);
        wait("the guest does not tick", || self.word(TICKS) != before);
    }

    /// 2 MiB of noise, and 2 MiB that the guest writes over and over.
    pub(crate) fn at_work(&self) {
        self.wait_ticking();
        let noise: Vec<u8> = (0..2 << 20)
            .map(|i: u32| (i.wrapping_mul(2654435761) >> 13) as u8)
            .collect();
        self.write(0x180_0000, &noise);
        self.write(COMMAND + 16, &0x80_0000_u32.to_le_bytes());
        self.write(COMMAND + 20, &512_u32.to_le_bytes());
        wait("the guest is not busy", || self.word(0x80_0000) != 0);
    }

    pub(crate) fn torn_pages(&self) -> u32 {
        self.word(DONE + 4)
    }

    pub(crate) async fn capabilities(&self, names: &[&str]) {
        let all: Vec<(&str, bool)> = names.iter().map(|name| (*name, true)).collect();
        self.qmp.set_migration_capabilities(&all).await.unwrap();
    }

    pub(crate) async fn parameter(&self, name: &str, value: u64) {
        let value = json!({ name: value });
        self.qmp.set_migration_parameters(value).await.unwrap();
    }

    pub(crate) async fn listen(&self, at: &Path) {
        let uri = format!("unix:{}", at.display());
        self.qmp.migrate_incoming(&uri).await.unwrap();
    }

    /// Begins a migration to `at`.
    pub(crate) async fn leave(&self, at: &Path) {
        let uri = format!("unix:{}", at.display());
        self.qmp.migrate(&uri).await.unwrap();
    }

    /// Waits until the migration is over; how.
    pub(crate) async fn over(&self) -> MigrationStatus {
        let until = Instant::now() + LIMIT;
        loop {
            let status = self.qmp.migration().await.unwrap().status;
            if status.is_over() && status != MigrationStatus::None {
                return status;
            }
            assert!(Instant::now() < until, "still {status:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until it has sent some pages.
    pub(crate) async fn under_way(&self) {
        let until = Instant::now() + LIMIT;
        loop {
            let asked = self.qmp.execute("query-migrate", Value::Null).await;
            let info = asked.unwrap();
            if info["ram"]["transferred"].as_u64() > Some(300_000) {
                assert_eq!(info["status"], "active");
                return;
            }
            assert!(Instant::now() < until, "{info:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn is_running(&self) -> bool {
        self.qmp.status().await.unwrap() == RunState::Running
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until it has ended by itself.
    pub(crate) fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        wait("QEMU runs on", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A QEMU that nobody owns yet.
struct Ended(Option<Child>);

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
