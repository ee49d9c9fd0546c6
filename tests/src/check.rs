//! Is the guest on the target the guest that was on the source?

use crate::topology::Lab;
use crate::{cache, registry};
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;

/// A page whose content differs, and where it begins to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DifferingPage {
    /// Its frame number.
    pub gfn: u64,
    /// Offset of the first byte that differs.
    pub at: usize,
    /// Bytes that differ.
    pub bytes: usize,
    /// Up to 16 bytes from there on at the source.
    pub source: Vec<u8>,
    /// The same at the target.
    pub target: Vec<u8>,
}

impl DifferingPage {
    fn of(gfn: u64, source: &[u8], target: &[u8]) -> Option<DifferingPage> {
        let differs = |i: &usize| source[*i] != target[*i];
        let at = (0..source.len()).find(differs)?;
        let end = source.len().min(at + 16);
        Some(DifferingPage {
            gfn,
            at,
            bytes: (0..source.len()).filter(differs).count(),
            source: source[at..end].to_vec(),
            target: target[at..end].to_vec(),
        })
    }
}

impl fmt::Display for DifferingPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DifferingPage {
            gfn,
            at,
            bytes,
            source,
            target,
        } = self;
        write!(
            f,
            "gfn {gfn:#x}: {bytes} bytes, from {at:#x} on source {source:02x?} target {target:02x?}"
        )
    }
}

/// The pages whose content differs between two RAM files. It reads
/// instead of mapping: a read leaves the holes of a tmpfs file alone.
///
/// # Errors
/// When a file cannot be read or the sizes differ.
pub fn differing_pages(source: &Path, target: &Path) -> Result<Vec<DifferingPage>> {
    differing(&Ram::file(source)?, &Ram::file(target)?)
}

/// A VM's RAM: a file, or a stretch of a VMM's memory.
#[derive(Debug)]
struct Ram {
    file: File,
    at: u64,
    len: u64,
}

impl Ram {
    fn open(path: &Path) -> Result<File> {
        File::open(path).with_context(|| format!("RAM in {}", path.display()))
    }

    fn file(path: &Path) -> Result<Ram> {
        let file = Self::open(path)?;
        let len = file.metadata()?.len();
        Ok(Ram { file, at: 0, len })
    }

    /// What an agent says: the path of a file, or `/proc/PID/mem@AT+LENGTH`.
    fn place(place: &str) -> Result<Ram> {
        let memory = || {
            let (file, stretch) = place.rsplit_once('@')?;
            let (at, len) = stretch.split_once('+')?;
            let hex = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
            Some((file, hex(at)?, hex(len)?))
        };
        match memory() {
            Some((file, at, len)) => Ok(Ram {
                file: Self::open(Path::new(file))?,
                at,
                len,
            }),
            None => Self::file(Path::new(place)),
        }
    }

    fn read(&self, out: &mut [u8], at: u64) -> std::io::Result<()> {
        self.file.read_exact_at(out, self.at + at)
    }
}

fn differing(a: &Ram, b: &Ram) -> Result<Vec<DifferingPage>> {
    let (len_a, len_b) = (a.len, b.len);
    if len_a != len_b {
        bail!("the source has {len_a} bytes of RAM, the target {len_b}");
    }
    let mut differing = Vec::new();
    let (mut buf_a, mut buf_b) = (vec![0; 256 * PAGE], vec![0; 256 * PAGE]);
    let mut at = 0;
    while at < len_a {
        let want = buf_a.len().min((len_a - at) as usize);
        a.read(&mut buf_a[..want], at)?;
        b.read(&mut buf_b[..want], at)?;
        if buf_a[..want] != buf_b[..want] {
            let pages = buf_a[..want]
                .chunks(PAGE)
                .zip(buf_b[..want].chunks(PAGE))
                .enumerate();
            differing
                .extend(pages.filter_map(|(i, (x, y))| {
                    DifferingPage::of(at / PAGE as u64 + i as u64, x, y)
                }));
        }
        at += want as u64;
    }
    Ok(differing)
}

/// What an agent with `[debug] hold_at_switch` writes when a VM stands still
/// on both sides and its target is complete.
#[derive(Debug, Deserialize)]
struct Ready {
    source_ram: String,
    target_ram: String,
}

/// The differing pages of each VM that was compared.
pub type Differing = BTreeMap<String, Vec<DifferingPage>>;

/// Compares both sides' RAM at the switch of every VM. Agents configured with
/// `hold_at_switch` wait for it there.
#[derive(Debug)]
pub struct HoldWatcher {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Differing>>>,
}

impl HoldWatcher {
    /// Watches `dir`, which it makes if need be.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn start(dir: &Path) -> Result<HoldWatcher> {
        fs::create_dir_all(dir)?;
        for entry in fs::read_dir(dir)? {
            fs::remove_file(entry?.path())?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (dir, stopped) = (dir.to_path_buf(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut found = Differing::new();
            while !stopped.load(Ordering::Relaxed) {
                look(&dir, &mut found)?;
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(found)
        });
        Ok(HoldWatcher {
            stop,
            thread: Some(thread),
        })
    }

    /// The differing pages of every VM that came to its switch.
    ///
    /// # Errors
    /// When a comparison could not be made.
    pub fn finish(mut self) -> Result<Differing> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            None => bail!("the watcher ran already"),
        }
    }
}

impl Drop for HoldWatcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn look(dir: &Path, found: &mut Differing) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let vm = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let go = path.with_extension("go");
        if path.extension().is_none_or(|e| e != "ready") || go.exists() {
            continue;
        }
        // A file that is being written is read again a moment later.
        let Ok(ready) = serde_json::from_slice::<Ready>(&fs::read(&path)?) else {
            continue;
        };
        let differing = Ram::place(&ready.source_ram)
            .and_then(|source| differing(&source, &Ram::place(&ready.target_ram)?));
        // The agent goes on whatever was found; the finding is told at the end.
        fs::write(&go, b"")?;
        found.insert(
            vm.clone(),
            differing.with_context(|| format!("comparing the RAM of {vm}"))?,
        );
    }
    Ok(())
}

/// The pids of all VMMs of the lab, QEMU or `kvmm`, that run the VM `name`.
///
/// # Errors
/// When /proc cannot be read.
pub fn vmms_of(lab: &Lab, name: &str) -> Result<Vec<i32>> {
    let mut pids = Vec::new();
    for host in &lab.hosts {
        for pid in registry::processes(&host.ns)? {
            let Ok(cmdline) = fs::read(format!("/proc/{pid}/cmdline")) else {
                continue;
            };
            let mut args = cmdline.split(|b| *b == 0);
            let program = args.next().unwrap_or_default();
            let flag: &[u8] = match program.rsplit(|b| *b == b'/').next() {
                Some(b"qemu-system-x86_64") => b"-name",
                Some(b"kvmm") => b"--name",
                _ => continue,
            };
            let named = args.skip_while(|a| *a != flag).nth(1);
            let named = String::from_utf8_lossy(named.unwrap_or_default());
            // "name", "guest=name,…" and "name,process=…" all mean the VM.
            let first = named.split(',').next().unwrap_or_default();
            if first.strip_prefix("guest=").unwrap_or(first) == name {
                pids.push(pid);
            }
        }
    }
    Ok(pids)
}

/// Waits until exactly one VMM runs `name` in the lab.
///
/// # Errors
/// When that does not become so within 5 s.
pub fn exactly_one_vmm(lab: &Lab, name: &str) -> Result<i32> {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let pids = vmms_of(lab, name)?;
        if let [pid] = pids[..] {
            return Ok(pid);
        }
        if Instant::now() > until {
            bail!(
                "{} processes run VM {name} instead of one: {pids:?}",
                pids.len()
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The files below `dirs` whose names or folders mention the VM.
///
/// # Errors
/// When a folder cannot be read.
pub fn files_of(dirs: &[&Path], vm: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = dirs.iter().map(|d| d.to_path_buf()).collect();
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let mentions = name == vm
                || name
                    .strip_prefix(vm)
                    .is_some_and(|rest| rest.starts_with('.'));
            if mentions {
                found.push(path);
            } else if path.is_dir() {
                folders.push(path);
            }
        }
    }
    Ok(found)
}

/// Fails unless nothing of the lab `id` is left on the machine.
///
/// # Errors
/// With the list of what is left.
pub fn nothing_left(id: &str) -> Result<()> {
    let left = registry::leftovers(id);
    if !left.is_empty() {
        bail!("left behind: {}", left.join(", "));
    }
    Ok(())
}

/// Free bytes of the file system that holds `path`.
///
/// # Errors
/// When it cannot be asked.
pub fn free_bytes(path: &Path) -> Result<u64> {
    let out = cache::run(
        std::process::Command::new("df")
            .args(["--output=avail", "-B1"])
            .arg(path),
    )?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.lines()
        .nth(1)
        .and_then(|l| l.trim().parse().ok())
        .with_context(|| format!("df said {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_one_page_that_differs() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut ram = vec![7u8; 600 * PAGE];
        fs::write(&a, &ram)?;
        ram[513 * PAGE + 99] ^= 1;
        fs::write(&b, &ram)?;
        let found = differing_pages(&a, &b)?;
        assert_eq!(
            (found.len(), found[0].gfn, found[0].at, found[0].bytes),
            (1, 513, 99, 1)
        );
        assert_eq!(differing_pages(&a, &a)?, []);
        fs::write(&b, &ram[PAGE..])?;
        assert!(differing_pages(&a, &b).is_err(), "another size");
        Ok(())
    }

    #[test]
    fn ram_is_also_found_in_the_memory_of_a_process() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("ram");
        let ram = vec![5u8; 3 * PAGE];
        fs::write(&path, &ram)?;
        let mine = format!(
            "/proc/{}/mem@{:#x}+{:#x}",
            std::process::id(),
            ram.as_ptr() as usize,
            ram.len()
        );
        assert_eq!(differing(&Ram::place(&mine)?, &Ram::file(&path)?)?, []);
        Ok(())
    }

    #[test]
    fn watcher_answers_and_tells_what_differs() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (a, b, hold) = (
            dir.path().join("a"),
            dir.path().join("b"),
            dir.path().join("hold"),
        );
        fs::write(&a, vec![1; 2 * PAGE])?;
        fs::write(&b, [vec![1; PAGE], vec![2; PAGE]].concat())?;
        let watcher = HoldWatcher::start(&hold)?;
        let ready = serde_json::json!({"source_ram": a, "target_ram": b});
        fs::write(hold.join("v1.ready"), ready.to_string())?;
        let until = Instant::now() + Duration::from_secs(5);
        while !hold.join("v1.go").exists() {
            assert!(Instant::now() < until, "no answer");
        }
        // The answer is written before the finding is kept.
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(watcher.finish()?["v1"][0].gfn, 1);
        Ok(())
    }
}
