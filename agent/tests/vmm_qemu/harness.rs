//! Real QEMUs with a tiny guest that does as it is told.

use drover::types::{Gfn, PAGE_SIZE};
use drover::vmm::definition::{Definition, VmPaths};
use drover::vmm::launch::{LaunchError, Launched, Role, Vmm};
use drover::vmm::process::VmProcess;
use drover::vmm::ram::GuestRam;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Runs a test on the runtime the agent uses.
pub(crate) fn run<T>(test: impl Future<Output = T>) -> T {
    tokio_uring::start(async { tokio::time::timeout(Duration::from_secs(120), test).await })
        .expect("test took more than two minutes")
}

/// Compiles a source of this folder once; panics with the compiler's words.
pub(crate) fn compile(
    cell: &'static OnceLock<PathBuf>,
    source: &str,
    flags: &[&str],
) -> &'static Path {
    cell.get_or_init(|| {
        let out = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(source)
            .with_extension("bin");
        // Renamed when whole: another run may be using the old one.
        let new = out.with_extension(std::process::id().to_string());
        let done = Command::new("cc")
            .args(flags)
            .arg(
                Path::new(env!("CARGO_MANIFEST_DIR"))
                    .join("tests/vmm_qemu")
                    .join(source),
            )
            .arg("-o")
            .arg(&new)
            .output()
            .expect("cc is needed (apt install gcc)");
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        std::fs::rename(&new, &out).unwrap();
        out
    })
}

pub(crate) fn guest() -> &'static Path {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    compile(
        &GUEST,
        "guest.S",
        &[
            "-nostdlib",
            "-static",
            "-no-pie",
            "-Wl,-Ttext=0x100000,--build-id=none",
        ],
    )
}

/// A host: its directories, removed with all that is in them at the end.
pub(crate) struct Host {
    pub(crate) dir: PathBuf,
    pub(crate) ram_dir: PathBuf,
    kept: Mutex<Vec<Arc<VmProcess>>>,
}

impl Host {
    pub(crate) fn new() -> Host {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests trace VMMs and need root"
        );
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!(
            "drover-vmm-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let host = Host {
            dir: Path::new("/tmp").join(&id),
            ram_dir: Path::new("/dev/shm").join(&id),
            kept: Mutex::default(),
        };
        std::fs::create_dir_all(&host.dir).unwrap();
        std::fs::create_dir_all(&host.ram_dir).unwrap();
        host
    }

    /// A VMM that is kept ends with the host at the latest, also after a panic.
    pub(crate) fn mind(&self, vmm: &Vmm) {
        self.kept.lock().unwrap().push(vmm.process.clone());
    }

    pub(crate) fn paths(&self, name: &str) -> VmPaths {
        VmPaths::new(&self.dir, &self.ram_dir, name)
    }

    pub(crate) fn placeholders(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("kernel".into(), guest().display().to_string())])
    }

    pub(crate) async fn launch(
        &self,
        vm: &Definition,
        role: Role,
    ) -> Result<Launched, LaunchError> {
        Launched::start(vm, &self.paths(&vm.name), &self.placeholders(), role).await
    }

    pub(crate) async fn start(&self, definition: &Definition) -> Vm {
        self.start_with(definition, &self.placeholders()).await
    }

    pub(crate) async fn start_with(
        &self,
        definition: &Definition,
        here: &BTreeMap<String, String>,
    ) -> Vm {
        let paths = self.paths(&definition.name);
        let launched = Launched::start(definition, &paths, here, Role::Run)
            .await
            .unwrap();
        let guest = Guest::of(&paths.ram);
        guest.wait_ticking();
        Vm {
            guest,
            launched,
            paths,
        }
    }

    /// Nothing of any VM is left in this host's directories.
    pub(crate) fn assert_empty(&self) {
        for dir in [&self.dir, &self.ram_dir] {
            let left: Vec<_> = std::fs::read_dir(dir)
                .unwrap()
                .map(|e| e.unwrap().path())
                .collect();
            assert!(left.is_empty(), "left behind: {left:?}");
        }
        let name = self.dir.file_name().unwrap().to_str().unwrap().to_owned();
        for entry in std::fs::read_dir("/proc").unwrap() {
            let cmdline = entry.unwrap().path().join("cmdline");
            let text = std::fs::read(cmdline).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            assert!(!text.contains(&name), "process left behind: {text}");
        }
    }
}

/// A file system mounted over a directory; unmounted with the value.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    pub(crate) fn new(kind: &str, options: &str, at: &Path) -> Mounted {
        let mut mount = Command::new("mount");
        mount.args(["-t", kind, "-o", options, "none"]).arg(at);
        assert!(mount.status().unwrap().success());
        Mounted(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let kept = self.kept.get_mut().unwrap_or_else(PoisonError::into_inner);
        for process in kept.drain(..) {
            let _gone = process.kill_and_wait(LIMIT);
        }
        let _ = std::fs::remove_dir_all(&self.dir);
        let _ = std::fs::remove_dir_all(&self.ram_dir);
    }
}

/// A VM started on a [`Host`]; ends with the value.
pub(crate) struct Vm {
    pub(crate) guest: Guest,
    pub(crate) launched: Launched,
    pub(crate) paths: VmPaths,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Accel {
    Tcg,
    Kvm,
}

pub(crate) const RAM: &str = "memory-backend-file,id=ram,size={ram_size},mem-path={ram},share=on";

/// A definition with `ram` and more arguments.
pub(crate) fn define(
    name: &str,
    ram: &str,
    accel: Accel,
    backend: &str,
    more: &[&str],
) -> Definition {
    let (accel, machine) = match accel {
        Accel::Tcg => ("tcg", "q35"),
        Accel::Kvm => ("kvm", "pc"),
    };
    let machine = format!("{machine},memory-backend=ram");
    let mut args = vec![
        "-accel",
        accel,
        "-machine",
        &machine,
        "-m",
        "{ram_size}",
        "-object",
        backend,
        "-nodefaults",
        "-display",
        "none",
        "-kernel",
        "{kernel}",
    ];
    args.extend(more);
    let text = format!(
        "name = {name:?}\ndomain = \"test\"\nram = {ram:?}\n[qemu]\nbinary = \"/usr/bin/qemu-system-x86_64\"\nargs = {args:?}\n"
    );
    Definition::parse("test", &text).unwrap()
}

pub(crate) fn tcg(name: &str) -> Definition {
    define(name, "64M", Accel::Tcg, RAM, &[])
}

/// The test's hand in the guest's RAM.
pub(crate) struct Guest {
    file: File,
    ram: GuestRam,
}

pub(crate) const TICKS: u64 = 0x20_0000;
pub(crate) const COMMAND: u64 = 0x20_1000;
pub(crate) const DONE: u64 = 0x20_2000;

impl Guest {
    pub(crate) fn of(path: &Path) -> Guest {
        let open = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .unwrap()
        };
        let file = open();
        let len = file.metadata().unwrap().len();
        Guest {
            ram: GuestRam::from_file(open(), path, len, true).unwrap(),
            file,
        }
    }

    pub(crate) fn word(&self, at: u64) -> u32 {
        let mut word = [0; 4];
        self.file.read_exact_at(&mut word, at).unwrap();
        u32::from_le_bytes(word)
    }

    pub(crate) fn set(&self, at: u64, word: u32) {
        self.write(at, &word.to_le_bytes());
    }

    /// Writes within pages that the guest itself only reads.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        let (page, offset) = (at / PAGE_SIZE as u64, at as usize % PAGE_SIZE);
        let mut pages = vec![0; (offset + bytes.len()).next_multiple_of(PAGE_SIZE)];
        let start = Gfn(page as u32);
        self.ram.read_run(start, &mut pages).unwrap();
        pages[offset..][..bytes.len()].copy_from_slice(bytes);
        self.ram.write_run(start, &pages).unwrap();
    }

    /// Waits until the guest has counted on.
    pub(crate) fn wait_ticking(&self) {
        let before = self.word(TICKS);
        wait("the guest does not tick", || self.word(TICKS) != before);
    }

    pub(crate) fn is_still(&self) -> bool {
        let before = self.word(TICKS);
        std::thread::sleep(Duration::from_millis(50));
        self.word(TICKS) == before
    }

    /// Has the guest write `number` to `count` addresses.
    pub(crate) fn order(&self, number: u32, first: u64, count: u32, stride: u32) {
        self.set(COMMAND + 4, first as u32);
        self.set(COMMAND + 8, count);
        self.set(COMMAND + 12, stride);
        self.set(COMMAND, number);
        wait("the guest does not obey", || self.word(DONE) == number);
    }

    /// Has the guest write a set of pages over and over.
    pub(crate) fn busy(&self, first: Gfn, pages: u32) {
        self.set(COMMAND + 16, first.offset() as u32);
        self.set(COMMAND + 20, pages);
        let at = first.offset() as u64;
        wait("the guest is not busy", || pages == 0 || self.word(at) != 0);
    }

    pub(crate) fn torn_pages(&self) -> u32 {
        self.word(DONE + 4)
    }

    pub(crate) fn all(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.file.metadata().unwrap().len() as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

pub(crate) fn wait(what: &str, mut until: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !until() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Pages that differ between two memories.
pub(crate) fn differing(a: &[u8], b: &[u8]) -> Vec<usize> {
    assert_eq!(a.len(), b.len());
    let pages = a.chunks(PAGE_SIZE).zip(b.chunks(PAGE_SIZE)).enumerate();
    pages.filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect()
}

/// An error with all its sources, as operators see it.
pub(crate) fn full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(source) = at {
        text += &format!(": {source}");
        at = source.source();
    }
    text
}
