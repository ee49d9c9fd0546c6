//! PID 1 of the lab's Linux guest, built statically with a plain `rustc`.
//!
//! It loads the virtio modules, takes the common disk into the page cache,
//! fills random data of its own, and then works and checks itself for ever.
//! It speaks on the first serial port, a line each:
//!
//! - `READY …` once everything is in place;
//! - `TICK n ok mode=… w=… r=…` about every 200 ms: a part of the data was
//!   found right, `w` pages were written and `r` disk reads done so far;
//! - `VERIFIED n pages=…` when the whole data was checked at request `n`;
//! - `CORRUPT …` when any of it is wrong, repeated with every tick.
//!
//! Commands come as lines on the second serial port: `idle`, `busy KB_PER_S`,
//! `dma`, `verify`.
#![deny(clippy::undocumented_unsafe_blocks)]

#[path = "../../src/pattern.rs"]
#[allow(dead_code, reason = "the lab's half of the file is not used in the guest")]
mod pattern;

use pattern::{SECTOR, check_sectors, checksum, fill, mix, weight};
use std::ffi::{CString, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PAGE_WORDS: usize = 512;
const OWN_PAGES: usize = 20 << 8;
const WORKING_PAGES: usize = 24 << 8;
const TICK: Duration = Duration::from_millis(200);
const STEP: Duration = Duration::from_millis(20);
/// Pages of each kind of data that a tick looks at.
const CHECK_PER_TICK: usize = 256;
const O_DIRECT: c_int = 0o40000;
const O_NONBLOCK: c_int = 0o4000;
const SYS_FINIT_MODULE: c_long = 313;

unsafe extern "C" {
    fn mount(src: *const c_char, dst: *const c_char, fs: *const c_char, flags: c_ulong, data: *const c_void) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn mmap(addr: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, off: i64) -> *mut c_void;
}

/// Ends the guest with a line the lab looks for; PID 1 must not return.
fn die(what: &str) -> ! {
    say(&format!("CORRUPT guest init failed: {what}"));
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn say(line: &str) {
    // The console may not exist yet; then stderr (the kernel's) has to do.
    match OpenOptions::new().write(true).open("/dev/ttyS0") {
        Ok(mut tty) => drop(tty.write_all(format!("{line}\n").as_bytes())),
        Err(_) => eprintln!("{line}"),
    }
}

fn mount_fs(fs: &str, at: &str) {
    let (src, dst) = (CString::new(fs).unwrap(), CString::new(at).unwrap());
    let _ = std::fs::create_dir_all(at);
    // SAFETY: three NUL-terminated strings that live across the call; no data.
    let rc = unsafe { mount(src.as_ptr(), dst.as_ptr(), src.as_ptr(), 0, std::ptr::null()) };
    // The kernel may have mounted devtmpfs itself, which is just as well.
    if rc != 0 && std::io::Error::last_os_error().raw_os_error() != Some(16) {
        die(&format!("mount {fs} at {at}: {}", std::io::Error::last_os_error()));
    }
}

fn load_modules() {
    let mut names: Vec<_> = std::fs::read_dir("/mod")
        .unwrap_or_else(|e| die(&format!("/mod: {e}")))
        .map(|e| e.unwrap().path())
        .collect();
    names.sort();
    for path in names {
        let file = File::open(&path).unwrap_or_else(|e| die(&format!("{path:?}: {e}")));
        // SAFETY: finit_module reads the open fd and the empty parameter string.
        let rc = unsafe { syscall(SYS_FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) };
        if rc != 0 {
            die(&format!("module {path:?}: {}", std::io::Error::last_os_error()));
        }
    }
}

/// Maps `pages` pages: of `file` from its start, shared and read-only, or
/// anonymous and writable.
fn map(pages: usize, file: Option<&File>) -> &'static mut [u64] {
    let (prot, flags, fd) = match file {
        Some(f) => (1, 0x01 | 0x8000, f.as_raw_fd()),
        None => (3, 0x02 | 0x20, -1),
    };
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let at = unsafe { mmap(std::ptr::null_mut(), pages * 4096, prot, flags, fd, 0) };
    if at as isize == -1 {
        die(&format!("mmap of {pages} pages: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: the mapping has that size, is page-aligned, is never unmapped,
    // and this is the only reference made from it. File mappings are only read.
    unsafe { std::slice::from_raw_parts_mut(at.cast::<u64>(), pages * PAGE_WORDS) }
}

fn page(words: &[u64], index: usize) -> &[u64] {
    &words[index * PAGE_WORDS..(index + 1) * PAGE_WORDS]
}

fn open_wait(path: &str, flags: c_int, write: bool) -> File {
    let since = Instant::now();
    loop {
        match OpenOptions::new().read(true).write(write).custom_flags(flags).open(path) {
            Ok(f) => return f,
            Err(e) if since.elapsed() > Duration::from_secs(20) => die(&format!("{path}: {e}")),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn disk_pages(name: &str) -> usize {
    let text = std::fs::read_to_string(format!("/sys/block/{name}/size"))
        .unwrap_or_else(|e| die(&format!("size of {name}: {e}")));
    text.trim().parse::<usize>().unwrap_or(0) * SECTOR / 4096
}

/// Data that is known page by page: the words and the checksum of each page.
struct Known {
    what: &'static str,
    words: &'static mut [u64],
    sums: Vec<u64>,
    next: usize,
}

impl Known {
    fn of(what: &'static str, words: &'static mut [u64]) -> Known {
        let sums = words.chunks(PAGE_WORDS).map(checksum).collect();
        Known { what, words, sums, next: 0 }
    }

    /// Checks `count` pages from where the last call ended, round and round.
    fn check(&mut self, count: usize, bad: &mut Vec<String>) {
        for _ in 0..count.min(self.sums.len()) {
            let got = checksum(page(self.words, self.next));
            if got != self.sums[self.next] {
                bad.push(format!("{} page {} sum {got:x} want {:x}", self.what, self.next, self.sums[self.next]));
            }
            self.next = (self.next + 1) % self.sums.len();
        }
    }
}

/// The writer: dirties a working set at a known rate. Every other page is
/// rewritten entirely, the others change in 64 bytes.
struct Writer {
    set: Known,
    kb_per_s: u64,
    since: Instant,
    done: u64,
    written: u64,
    random: u64,
}

impl Writer {
    fn new(seed: u64, kb_per_s: u64) -> Writer {
        let words = map(WORKING_PAGES, None);
        fill(words, seed ^ 0x5711);
        let set = Known::of("working set", words);
        Writer { set, kb_per_s, since: Instant::now(), done: 0, written: 0, random: mix(seed) }
    }

    fn pace(&mut self, kb_per_s: u64) {
        (self.kb_per_s, self.since, self.done) = (kb_per_s, Instant::now(), 0);
    }

    /// Writes what is due by now, at most what 100 ms allow: a guest that
    /// was held up does not make good for it in a burst.
    fn step(&mut self) {
        let per_s = self.kb_per_s * 1000 / 4096;
        let due = self.since.elapsed().as_millis() as u64 * per_s / 1000;
        let behind = due.saturating_sub(self.done);
        let now = behind.min(per_s / 10 + 1);
        self.done += behind;
        for _ in 0..now {
            self.write_one();
        }
    }

    fn write_one(&mut self) {
        self.random = mix(self.random);
        let index = (self.random >> 32) as usize % WORKING_PAGES;
        let words = &mut self.set.words[index * PAGE_WORDS..(index + 1) * PAGE_WORDS];
        if self.written % 2 == 0 {
            fill(words, self.random);
            self.set.sums[index] = checksum(words);
        } else {
            let at = self.random as usize % (PAGE_WORDS / 8) * 8;
            let mut sum = self.set.sums[index];
            for i in at..at + 8 {
                let new = mix(self.random ^ i as u64);
                sum = sum.wrapping_add(new.wrapping_sub(words[i]).wrapping_mul(weight(i)));
                words[i] = new;
            }
            self.set.sums[index] = sum;
        }
        self.written += 1;
    }
}

/// One buffer of the disk readers and what it must hold.
struct Slot {
    words: &'static mut [u64],
    holds: Option<(u8, u64)>,
}

/// The readers: O_DIRECT from the stamped disks into buffers that are kept.
struct Readers {
    slots: Vec<Mutex<Slot>>,
    reads: AtomicU64,
    on: AtomicBool,
    bad: Mutex<Vec<String>>,
}

const SLOT_PAGES: usize = 32;
const SLOTS: usize = 64;
const READERS: u64 = 4;

impl Readers {
    fn start(seed: u64) -> Arc<Readers> {
        let slots = (0..SLOTS).map(|_| Mutex::new(Slot { words: map(SLOT_PAGES, None), holds: None })).collect();
        let all = Arc::new(Readers { slots, reads: AtomicU64::new(0), on: AtomicBool::new(true), bad: Mutex::default() });
        for t in 0..READERS {
            let all = Arc::clone(&all);
            // Disk 1 is read with native AIO, disk 2 with io_uring (host side).
            let disk = (t % 2) as u8 + 1;
            let name = if disk == 1 { "vdb" } else { "vdc" };
            let file = open_wait(&format!("/dev/{name}"), O_DIRECT, false);
            let chunks = (disk_pages(name) / SLOT_PAGES) as u64;
            std::thread::spawn(move || {
                let mut random = mix(seed ^ t);
                loop {
                    if !all.on.load(Ordering::Relaxed) {
                        std::thread::sleep(STEP);
                        continue;
                    }
                    random = mix(random);
                    all.read_one(&file, disk, (random >> 32) % chunks, random as usize % SLOTS);
                }
            });
        }
        all
    }

    fn read_one(&self, mut file: &File, disk: u8, chunk: u64, slot: usize) {
        use std::io::{Seek, SeekFrom};
        let Ok(mut slot) = self.slots[slot].try_lock() else { return };
        slot.holds = None;
        let bytes: &mut [u8] = {
            let words = &mut *slot.words;
            // SAFETY: u64 has no padding and any byte is valid; same extent, alignment 1.
            unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len() * 8) }
        };
        let lba = chunk * (SLOT_PAGES * 4096 / SECTOR) as u64;
        // Each reader has its own open file, so seek and read belong together.
        let done = file.seek(SeekFrom::Start(lba * SECTOR as u64)).and_then(|_| file.read_exact(bytes));
        if let Err(e) = done {
            self.bad.lock().unwrap().push(format!("read of disk {disk} sector {lba}: {e}"));
            return;
        }
        slot.holds = Some((disk, lba));
        self.check_slot(&slot, "just read");
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    fn check_slot(&self, slot: &Slot, when: &str) {
        if let Some((disk, lba)) = slot.holds {
            if let Some(at) = check_sectors(disk, lba, slot.words) {
                self.bad.lock().unwrap().push(format!("disk {disk} sector {at} {when} holds other content"));
            }
        }
    }

    fn check_all(&self) {
        for slot in &self.slots {
            self.check_slot(&slot.lock().unwrap(), "kept");
        }
    }
}

struct Guest {
    seed: u64,
    common: Known,
    own: Known,
    writer: Option<Writer>,
    readers: Option<Arc<Readers>>,
    mode: String,
    verified: u64,
    bad: Vec<String>,
}

impl Guest {
    fn command(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["idle"] => {
                self.set_rate(0);
                if let Some(r) = &self.readers {
                    r.on.store(false, Ordering::Relaxed);
                }
            }
            ["busy", rate] => match rate.parse() {
                Ok(kb_per_s) => self.set_rate(kb_per_s),
                Err(_) => say(&format!("ignored rate {rate:?}")),
            },
            ["dma"] => {
                let readers = self.readers.get_or_insert_with(|| Readers::start(self.seed));
                readers.on.store(true, Ordering::Relaxed);
            }
            ["verify"] => return self.verify(),
            [] => return,
            _ => return say(&format!("ignored command {line:?}")),
        }
        self.mode = words[0].to_string();
    }

    fn set_rate(&mut self, kb_per_s: u64) {
        if kb_per_s > 0 && self.writer.is_none() {
            self.writer = Some(Writer::new(self.seed, kb_per_s));
        }
        if let Some(w) = &mut self.writer {
            w.pace(kb_per_s);
        }
    }

    fn check(&mut self, count: usize) {
        self.common.check(count, &mut self.bad);
        self.own.check(count, &mut self.bad);
        if let Some(w) = &mut self.writer {
            w.set.check(count, &mut self.bad);
        }
        if let Some(r) = &self.readers {
            self.bad.append(&mut r.bad.lock().unwrap());
        }
    }

    fn verify(&mut self) {
        if let Some(r) = &self.readers {
            r.check_all();
        }
        self.check(usize::MAX);
        self.verified += 1;
        let pages = self.common.sums.len() + self.own.sums.len() + self.writer.as_ref().map_or(0, |w| w.set.sums.len());
        match self.bad.first() {
            None => say(&format!("VERIFIED {} pages={pages}", self.verified)),
            Some(first) => say(&format!("CORRUPT {} places, first: {first}", self.bad.len())),
        }
    }

    fn tick(&mut self, n: u64) {
        self.check(CHECK_PER_TICK);
        let written = self.writer.as_ref().map_or(0, |w| w.written);
        let reads = self.readers.as_ref().map_or(0, |r| r.reads.load(Ordering::Relaxed));
        match self.bad.first() {
            None => say(&format!("TICK {n} ok mode={} w={written} r={reads}", self.mode)),
            Some(first) => say(&format!("CORRUPT {} places, first: {first}", self.bad.len())),
        }
    }
}

fn main() {
    mount_fs("devtmpfs", "/dev");
    mount_fs("proc", "/proc");
    mount_fs("sysfs", "/sys");
    load_modules();
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let param = |key: &str| line.split_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix('='));
    let seed: u64 = param("lab.seed").and_then(|v| v.parse().ok()).unwrap_or_else(|| die("no lab.seed"));

    let disk = open_wait("/dev/vda", 0, false);
    let common = Known::of("common", map(disk_pages("vda"), Some(&disk)));
    let own_words = map(OWN_PAGES, None);
    fill(own_words, seed);
    let own = Known::of("own", own_words);
    let mut guest = Guest {
        seed, common, own, writer: None, readers: None, mode: "idle".into(), verified: 0, bad: Vec::new(),
    };
    match param("lab.workload") {
        Some("busy") => guest.command(&format!("busy {}", param("lab.rate").unwrap_or("4000"))),
        Some(other) => guest.command(other),
        None => (),
    }
    let mut control = open_wait("/dev/ttyS1", O_NONBLOCK, true);
    say(&format!("READY seed={seed} common={} own={OWN_PAGES}", guest.common.sums.len()));

    let mut pending = Vec::new();
    let mut next_tick = Instant::now();
    let mut n = 0;
    loop {
        let mut buf = [0; 256];
        if let Ok(got) = control.read(&mut buf) {
            pending.extend_from_slice(&buf[..got]);
        }
        while let Some(end) = pending.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            guest.command(String::from_utf8_lossy(&line).trim());
        }
        let writes = guest.writer.as_ref().is_some_and(|w| w.kb_per_s > 0);
        if let Some(w) = guest.writer.as_mut().filter(|_| writes) {
            w.step();
        }
        if Instant::now() >= next_tick {
            n += 1;
            guest.tick(n);
            next_tick = Instant::now() + TICK;
        }
        // An idle guest sleeps long, so that it costs the host next to nothing.
        std::thread::sleep(if writes { STEP } else { TICK / 4 });
    }
}
