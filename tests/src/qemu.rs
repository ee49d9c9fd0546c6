//! VMMs as the lab starts them itself: for saving guests, for restoring them,
//! and for the baselines. Agents start theirs from [`crate::agentcfg`]'s
//! definitions, which use the same arguments.

use crate::guest::kvm::{self, KvmWork};
use crate::guest::{LINUX_RAM_KIB, LinuxFiles};
use crate::netns::Netns;
use crate::qmp::Qmp;
use crate::registry;
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// The QEMU of every VMM in the lab.
pub const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// What a Linux guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Workload {
    /// Ticks only.
    Idle,
    /// Dirties its working set at this rate, in KB (1000 bytes) a second.
    Busy(u32),
    /// Reads two disks with O_DIRECT into buffers it keeps.
    Dma,
}

impl Workload {
    /// The command on the guest's second serial port that starts this work.
    pub fn command(self) -> String {
        match self {
            Workload::Idle => "idle".into(),
            Workload::Busy(kb) => format!("busy {kb}"),
            Workload::Dma => "dma".into(),
        }
    }
}

/// What runs in a VM.
#[derive(Debug, Clone)]
pub enum Guest {
    /// Debian's Linux under TCG.
    Linux {
        /// What it boots from.
        files: LinuxFiles,
        /// Decides its own content.
        seed: u32,
        /// What it does from the start.
        workload: Workload,
    },
    /// The freestanding guest under real KVM.
    Kvm {
        /// Its ELF file.
        elf: PathBuf,
        /// RAM in MiB.
        ram_mib: u32,
        /// What it does.
        work: KvmWork,
    },
}

/// Where a VM has its files; placeholders in a VM definition, paths otherwise.
#[derive(Debug, Clone)]
pub struct Places {
    /// The RAM file.
    pub ram: String,
    /// Guest RAM is the VMM's own; it begins as a copy of what `ram` holds, or
    /// empty if that is.
    pub private: bool,
    /// The file the first serial port is written to.
    pub serial: String,
    /// The socket of the second serial port.
    pub control: String,
    /// The QMP socket.
    pub qmp: String,
}

impl Places {
    /// The places of VM `name` below a run and a RAM folder.
    pub fn of(name: &str, run_dir: &Path, shm_dir: &Path) -> Places {
        let at = |kind: &str| run_dir.join(format!("{name}.{kind}")).display().to_string();
        let ram = shm_dir.join(format!("{name}.ram")).display().to_string();
        Places {
            ram,
            private: false,
            serial: at("serial"),
            control: at("ctl"),
            qmp: at("qmp"),
        }
    }
}

impl Guest {
    /// A small KVM guest: 32 MiB of RAM.
    ///
    /// # Errors
    /// When it cannot be built.
    pub fn small_kvm(seed: u32) -> Result<Guest> {
        Ok(Guest::Kvm {
            elf: kvm::ensure()?,
            ram_mib: 32,
            work: KvmWork::small(seed),
        })
    }

    /// One with less to write and to check: what is common is that of
    /// [`Guest::small_kvm`].
    ///
    /// # Errors
    /// When it cannot be built.
    pub fn least_kvm(seed: u32) -> Result<Guest> {
        Ok(Guest::Kvm {
            elf: kvm::ensure()?,
            ram_mib: 32,
            work: KvmWork {
                common_mib: 2,
                own_mib: 0,
                ws_mib: 1,
                rate_kb: 1000,
                ..KvmWork::small(seed)
            },
        })
    }

    /// RAM in bytes.
    pub fn ram_bytes(&self) -> u64 {
        match self {
            Guest::Linux { .. } => LINUX_RAM_KIB << 10,
            Guest::Kvm { ram_mib, .. } => u64::from(*ram_mib) << 20,
        }
    }

    /// QEMU's arguments for this guest, name and QMP left out.
    ///
    /// # Panics
    /// When a KVM guest's work does not fit its RAM: it would write nowhere.
    pub fn args(&self, at: &Places) -> Vec<String> {
        let mut args = Args::default();
        let kib = self.ram_bytes() >> 10;
        args.add(
            "-accel",
            if matches!(self, Guest::Kvm { .. }) {
                "kvm"
            } else {
                "tcg"
            },
        );
        args.add("-machine", "pc,memory-backend=ram");
        args.add("-m", &format!("{kib}K"));
        let file = format!("memory-backend-file,id=ram,size={kib}K,mem-path={}", at.ram);
        let backend = match (at.private, at.ram.is_empty()) {
            (false, _) => format!("{file},share=on"),
            (true, false) => format!("{file},share=off"),
            (true, true) => format!("memory-backend-ram,id=ram,size={kib}K"),
        };
        args.add("-object", &backend);
        args.flag("-nodefaults");
        args.flag("-no-user-config");
        args.add("-display", "none");
        args.add(
            "-chardev",
            &format!("file,id=con,path={},append=on", at.serial),
        );
        args.add("-serial", "chardev:con");
        args.add(
            "-chardev",
            &format!("socket,id=ctl,path={},server=on,wait=off", at.control),
        );
        args.add("-serial", "chardev:ctl");
        match self {
            Guest::Linux {
                files,
                seed,
                workload,
            } => {
                args.disk("common", &files.common, "");
                if *workload == Workload::Dma {
                    args.disk("native", &files.stamped[0], ",cache=none,aio=native");
                    args.disk("uring", &files.stamped[1], ",cache=none,aio=io_uring");
                }
                args.add("-kernel", &files.kernel.display().to_string());
                args.add("-initrd", &files.initrd.display().to_string());
                args.add("-append", &linux_cmdline(*seed, *workload));
            }
            Guest::Kvm { elf, work, ram_mib } => {
                assert!(work.needs_mib() <= *ram_mib, "{work:?} in {ram_mib} MiB");
                // With kvmclock, loading the vCPU's state makes the target's KVM
                // write its time page: RAM would not be equal at the switch.
                args.add("-cpu", "qemu64,kvmclock=off");
                args.add("-kernel", &elf.display().to_string());
                args.add("-append", &work.cmdline());
            }
        }
        args.0
    }
}

fn linux_cmdline(seed: u32, workload: Workload) -> String {
    let work = match workload {
        Workload::Idle => "lab.workload=idle".to_string(),
        Workload::Busy(kb) => format!("lab.workload=busy lab.rate={kb}"),
        Workload::Dma => "lab.workload=dma".to_string(),
    };
    format!("console=ttyS0 loglevel=3 lab.seed={seed} {work}")
}

#[derive(Default)]
struct Args(Vec<String>);

impl Args {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.to_string());
    }

    fn add(&mut self, flag: &str, value: &str) {
        self.0.extend([flag.to_string(), value.to_string()]);
    }

    fn disk(&mut self, id: &str, file: &Path, options: &str) {
        self.add(
            "-drive",
            &format!(
                "if=none,id={id},file={},format=raw,readonly=on{options}",
                file.display()
            ),
        );
        self.add("-device", &format!("virtio-blk-pci,drive={id}"));
    }
}

/// A running VMM. Dropping it ends the process.
#[derive(Debug)]
pub struct Vmm {
    /// The VM's name.
    pub name: String,
    /// Where its files are.
    pub at: Places,
    /// The connection to it.
    pub qmp: Qmp,
    child: Child,
    pidfd: OwnedFd,
}

impl Vmm {
    /// Starts QEMU in `ns` (or where the caller is) and connects to it.
    ///
    /// # Errors
    /// When it does not come up; the message holds what it printed.
    pub fn start(
        ns: Option<&Netns>,
        name: &str,
        guest: &Guest,
        at: &Places,
        more: &[&str],
    ) -> Result<Vmm> {
        let log = PathBuf::from(format!("{}.log", at.qmp));
        let mut command =
            ns.map_or_else(|| std::process::Command::new(QEMU), |ns| ns.command(QEMU));
        command
            .args(["-name", name])
            .args(guest.args(at))
            .args(more);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", at.qmp)]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {QEMU}: install qemu-system-x86"))?;
        let qmp =
            connect(&mut child, Path::new(&at.qmp), &log).with_context(|| format!("VM {name}"));
        let qmp = match qmp {
            Ok(qmp) => qmp,
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(e);
            }
        };
        let pidfd = registry::pidfd(child.id() as i32)?;
        Ok(Vmm {
            name: name.to_string(),
            at: at.clone(),
            qmp,
            child,
            pidfd,
        })
    }

    /// The process.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Sends a line to the guest's second serial port.
    ///
    /// # Errors
    /// When the port's socket is gone.
    pub fn tell_guest(&self, line: &str) -> Result<()> {
        tell_guest(Path::new(&self.at.control), line)
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    /// When it runs on longer than `patience`.
    pub fn ended(&mut self, patience: Duration) -> Result<()> {
        let until = Instant::now() + patience;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > until {
                bail!(
                    "the VMM of {} (process {}) still runs",
                    self.name,
                    self.child.id()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Saves RAM and device state into `dir` and ends the VM.
    ///
    /// # Errors
    /// When QEMU cannot save.
    pub fn save(mut self, dir: &Path) -> Result<()> {
        self.qmp.execute("stop", json!({}))?;
        self.qmp
            .capabilities(&[("x-ignore-shared", true), ("events", true)])?;
        // Without a limit; the default would take longer than the boot did.
        self.qmp.execute(
            "migrate-set-parameters",
            json!({"max-bandwidth": 1u64 << 40}),
        )?;
        let device = dir.join("device");
        self.qmp.execute(
            "migrate",
            json!({"uri": format!("exec:cat > '{}'", device.display())}),
        )?;
        self.qmp.migration_completed(Duration::from_secs(30))?;
        copy_sparse(Path::new(&self.at.ram), &dir.join("ram"))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        registry::kill(&self.pidfd);
        let _ = self.child.wait();
        // What private RAM began with is a save.
        let ram = (!self.at.private).then_some(&self.at.ram);
        for file in [&self.at.control, &self.at.qmp].into_iter().chain(ram) {
            let _ = fs::remove_file(file);
        }
    }
}

fn connect(child: &mut Child, socket: &Path, log: &Path) -> Result<Qmp> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        if let Ok(qmp) = Qmp::connect(socket) {
            return Ok(qmp);
        }
        if let Some(status) = child.try_wait()? {
            bail!(
                "QEMU ended ({status}): {}",
                fs::read_to_string(log).unwrap_or_default().trim()
            );
        }
        if Instant::now() > until {
            bail!(
                "no QMP at {}: {}",
                socket.display(),
                fs::read_to_string(log).unwrap_or_default().trim()
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a line to a guest through the socket of its second serial port.
///
/// # Errors
/// When nothing listens there.
pub fn tell_guest(control: &Path, line: &str) -> Result<()> {
    let _open = say_to_guest(control, line)?;
    // On a machine that is busy with builds this takes a while.
    std::thread::sleep(Duration::from_millis(1500));
    Ok(())
}

/// As [`tell_guest`], and returns the connection: what QEMU has not read of it
/// when it closes is lost, so whoever waits for an answer keeps it.
///
/// # Errors
/// As [`tell_guest`].
pub fn say_to_guest(control: &Path, line: &str) -> Result<UnixStream> {
    let mut socket = UnixStream::connect(control)
        .with_context(|| format!("control port at {}", control.display()))?;
    // A serial FIFO holds 16 bytes; QEMU stops reading when it is full.
    for piece in format!("{line}\n").as_bytes().chunks(8) {
        socket.write_all(piece)?;
        std::thread::sleep(Duration::from_millis(30));
    }
    Ok(socket)
}

/// Copies a file extent by extent, so that holes stay holes.
///
/// # Errors
/// When reading or writing fails: no space left, for one.
pub fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    use nix::unistd::{Whence, lseek};
    use std::os::unix::fs::FileExt;
    let context = || format!("copying {} to {}", from.display(), to.display());
    let source = File::open(from).with_context(context)?;
    let target = File::create(to).with_context(context)?;
    let len = source.metadata()?.len();
    target.set_len(len)?;
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let Ok(data) = lseek(&source, at as i64, Whence::SeekData) else {
            break;
        };
        let hole = lseek(&source, data, Whence::SeekHole)? as u64;
        at = data as u64;
        while at < hole {
            let want = buf.len().min((hole - at) as usize);
            source
                .read_exact_at(&mut buf[..want], at)
                .with_context(context)?;
            target
                .write_all_at(&buf[..want], at)
                .with_context(context)?;
            at += want as u64;
        }
    }
    Ok(())
}
