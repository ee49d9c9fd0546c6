//! `kvmm`, the small VMM of this package, as tests and benchmarks run it; agents
//! start theirs from [`crate::agentcfg`]'s definitions.

use crate::guest::kvm::{self, KvmWork};
use crate::netns::Netns;
use crate::serial::Serial;
use crate::{cache, qemu, registry};
use anyhow::{Context, Result, bail};
use drover::types::Gfn;
use drover::vmm::dirty::DirtyLog;
use drover::vmm::kvm_log::{KvmLogSource, LinkClient};
use drover::vmm::process::VmProcess;
use drover::vmm::ram::find_layout;
use drover::vmm::{PageSet, PageSource};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);
/// Pages below this are the writer's own image, and what lies beneath.
pub const FIRST_FREE_PAGE: u32 = (2 << 20) / 4096;

/// The program: `KVMM_BIN`, or the release build of this workspace.
///
/// # Errors
/// When it is not there, with what to run.
pub fn binary() -> Result<PathBuf> {
    let path = std::env::var_os("KVMM_BIN")
        .map_or_else(|| cache::target_dir().join("release/kvmm"), PathBuf::from);
    if !path.is_file() {
        bail!(
            "{} is missing: run `cargo build --release -p tests --bins`, or set KVMM_BIN",
            path.display()
        );
    }
    Ok(path)
}

/// What runs in it.
#[derive(Debug, Clone, Copy)]
pub enum Inside {
    /// The guest that checks itself.
    Checker(KvmWork),
    /// The guest that writes what it is told to.
    Writer,
    /// Nothing yet: it waits for a VM.
    Incoming,
}

/// How one is started.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// MiB of RAM.
    pub ram_mib: u32,
    /// Entries of a dirty ring, in place of bitmaps.
    pub ring: Option<usize>,
    /// What runs in it.
    pub inside: Inside,
}

/// A running one. Dropping it ends the process and removes its files; it ends
/// with the thread that started it, too.
#[derive(Debug)]
pub struct Kvmm {
    child: Child,
    pidfd: OwnedFd,
    /// Where it listens for an agent.
    pub link: PathBuf,
    /// Where its guest takes commands.
    pub commands: PathBuf,
    /// Guest RAM.
    pub ram: PathBuf,
    /// What the guest says.
    pub serial: Serial,
    log: PathBuf,
    told: u32,
    _dir: tempfile::TempDir,
}

impl Kvmm {
    /// Starts one, and waits until it listens for an agent.
    ///
    /// # Errors
    /// When it does not come up; the message holds what it said.
    pub fn start(setup: &Setup) -> Result<Kvmm> {
        Self::start_in(None, "kvmm", setup)
    }

    /// The same for the VM `name` on a host of the lab.
    ///
    /// # Errors
    /// As [`Kvmm::start`].
    pub fn start_in(ns: Option<&Netns>, name: &str, setup: &Setup) -> Result<Kvmm> {
        let dir = tempfile::Builder::new()
            .prefix("drover-kvmm-")
            .tempdir_in("/dev/shm")?;
        let at = |name: &str| dir.path().join(name);
        let log = at("log");
        let program = binary()?;
        let mut command = ns.map_or_else(|| Command::new(&program), |ns| ns.command(&program));
        command.args(["--name", name, "--end-with-parent"]);
        for (flag, file) in [
            ("--ram", "ram"),
            ("--serial", "serial"),
            ("--commands", "commands"),
            ("--link", "link"),
        ] {
            command.arg(flag).arg(at(file));
        }
        command.args(["--ram-mib", &setup.ram_mib.to_string()]);
        if let Some(entries) = setup.ring {
            command.args(["--ring", &entries.to_string()]);
        }
        match setup.inside {
            Inside::Checker(work) => {
                command.args(["--cmdline", &work.cmdline()]);
                command.arg("--kernel").arg(kvm::ensure()?);
            }
            Inside::Writer => {
                command.arg("--kernel").arg(kvm::writer()?);
            }
            Inside::Incoming => {
                command.arg("--incoming");
            }
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        let child = command.spawn().context("kvmm")?;
        let mut kvmm = Kvmm {
            pidfd: registry::pidfd(child.id() as i32)?,
            child,
            link: at("link"),
            commands: at("commands"),
            ram: at("ram"),
            serial: Serial::new(at("serial")),
            log,
            told: 0,
            _dir: dir,
        };
        kvmm.listening()?;
        if !matches!(setup.inside, Inside::Incoming) {
            let ready = |text: &str| text.contains("READY");
            kvmm.serial
                .wait("READY", LIMIT, ready)
                .with_context(|| kvmm.said())?;
        }
        Ok(kvmm)
    }

    fn listening(&mut self) -> Result<()> {
        let until = Instant::now() + LIMIT;
        while UnixStream::connect(&self.link).is_err() {
            if let Some(status) = self.child.try_wait()? {
                bail!("kvmm ended ({status}): {}", self.said());
            }
            if Instant::now() > until {
                bail!("kvmm does not listen: {}", self.said());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// What it has logged.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Connects as an agent does.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn connect(&self) -> Result<Arc<LinkClient>> {
        let link = LinkClient::connect("kvmm", &self.link).with_context(|| self.said())?;
        Ok(Arc::new(link))
    }

    /// Sends the guest a line.
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn tell(&self, line: &str) -> Result<UnixStream> {
        qemu::say_to_guest(&self.commands, line)
    }

    /// Has the writer write `count` pages from `first` on, every `stride`th; how
    /// long it took.
    ///
    /// # Errors
    /// When it does not come to an end.
    pub fn write(&mut self, first: u32, count: u32, stride: u32) -> Result<Duration> {
        use std::io::Write;
        self.told += 1;
        let done = format!("DONE {}\n", self.told);
        let mut port = UnixStream::connect(&self.commands)?;
        let begun = Instant::now();
        port.write_all(format!("{first} {count} {stride}\n").as_bytes())?;
        // Not `Serial::wait`, which looks 50 times a second: this is timed.
        while !self.serial.text()?.contains(&done) {
            if begun.elapsed() > LIMIT {
                bail!("the guest does not write: {}", self.said());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(begun.elapsed())
    }

    /// The dirty log of direct mode, for the same process: seen from outside.
    ///
    /// # Errors
    /// When the kernel cannot.
    pub fn outside_log(&self) -> Result<DirtyLog> {
        let process = Arc::new(VmProcess::open(self.child.id() as i32)?);
        let layout = Arc::new(find_layout(&process, &self.ram)?);
        Ok(DirtyLog::attach(process, layout)?)
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    /// When it does not.
    pub fn ended(&mut self) -> Result<()> {
        let until = Instant::now() + LIMIT;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > until {
                bail!("kvmm still runs: {}", self.said());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Its RAM file.
    pub fn ram(&self) -> &Path {
        &self.ram
    }
}

impl Drop for Kvmm {
    fn drop(&mut self) {
        registry::kill(&self.pidfd);
        let _reaped = self.child.wait();
    }
}

/// The pages of a round by KVM's log.
///
/// # Errors
/// When the VMM does not answer it.
pub fn round(source: &mut KvmLogSource) -> Result<PageSet> {
    let mut found = PageSet::new(source.pages());
    source.next_round(&mut |run| found.insert(run))?;
    Ok(found)
}

/// The pages of a round by the log from outside.
///
/// # Errors
/// When the kernel does not answer it.
pub fn outside_round(log: &mut DirtyLog) -> Result<PageSet> {
    let mut found = PageSet::new(log.layout().pages());
    log.scan(|run| found.insert(run))?;
    Ok(found)
}

/// Every `stride`th of `count` pages from `first` on.
pub fn every(pages: u32, first: u32, count: u32, stride: u32) -> PageSet {
    let mut set = PageSet::new(pages);
    for page in (0..count).map(|i| first + i * stride) {
        set.insert(Gfn(page)..Gfn(page + 1));
    }
    set
}
