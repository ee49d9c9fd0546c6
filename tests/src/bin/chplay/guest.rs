//! RAM, and a thread that writes it.

#![allow(unsafe_code)]

use anyhow::Result;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tests::pattern;

pub(crate) const PAGE: u64 = 4096;
/// Pages that all guests have.
const COMMON: u64 = 1024;
/// Pages that only this one has.
const OWN: u64 = 512;
/// Pages that are written over and over, after those.
const WRITTEN: u64 = 256;
/// From one write to the next.
const PAUSE: Duration = Duration::from_micros(500);

/// See the module. RAM is a file, mapped once so that it is in this process's
/// memory like any VMM's; the process itself reads and writes the file.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) bytes: u64,
    pub(crate) seed: u64,
    pub(crate) file: File,
    /// Pages written since this was last taken.
    dirty: Mutex<BTreeSet<u64>>,
    tick: AtomicU64,
    /// Whether it runs. The guest's thread holds the lock for each write.
    running: Mutex<bool>,
    ended: AtomicBool,
}

impl Guest {
    /// One that stands still, its RAM zero.
    pub(crate) fn new(bytes: u64, seed: u64) -> Result<Arc<Guest>> {
        let file = File::from(memfd_create("ch_ram", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(bytes)?;
        let len = NonZeroUsize::try_from(bytes as usize)?;
        let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a mapping of its own, which nothing in this process refers to.
        unsafe { mmap(None, len, rw, MapFlags::MAP_SHARED, &file, 0)? };
        let guest = Arc::new(Guest {
            bytes,
            seed,
            file,
            dirty: Mutex::default(),
            tick: AtomicU64::new(0),
            running: Mutex::new(false),
            ended: AtomicBool::new(false),
        });
        let it = guest.clone();
        std::thread::spawn(move || it.live());
        Ok(guest)
    }

    /// Content as after booting.
    pub(crate) fn fill(&self) -> Result<()> {
        for page in 0..COMMON + OWN {
            let seed = match page < COMMON {
                true => page,
                false => (self.seed << 32) + page,
            };
            self.write(page, seed)?;
        }
        Ok(())
    }

    fn write(&self, page: u64, seed: u64) -> Result<()> {
        let mut words = [0; PAGE as usize / 8];
        pattern::fill(&mut words, seed);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok(self.file.write_all_at(&bytes, page * PAGE)?)
    }

    fn live(&self) {
        while !self.ended.load(SeqCst) {
            {
                let running = self.running.lock().expect("no thread panics");
                if *running {
                    let tick = self.tick.fetch_add(1, SeqCst);
                    let page = COMMON + OWN + tick % WRITTEN;
                    let seed = (self.seed << 32) + (tick << 8);
                    self.write(page, seed).expect("its own memory");
                    // After the write, as a log that is taken before contents are
                    // read must have it.
                    self.dirty.lock().expect("no thread panics").insert(page);
                }
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Lets it run, or stand still: nothing is written any more then.
    pub(crate) fn run(&self, run: bool) {
        *self.running.lock().expect("no thread panics") = run;
    }

    pub(crate) fn is_running(&self) -> bool {
        *self.running.lock().expect("no thread panics")
    }

    pub(crate) fn tick(&self) -> u64 {
        self.tick.load(SeqCst)
    }

    pub(crate) fn set_tick(&self, tick: u64) {
        self.tick.store(tick, SeqCst);
    }

    /// The dirty log, which begins anew.
    pub(crate) fn take_dirty(&self) -> BTreeSet<u64> {
        std::mem::take(&mut *self.dirty.lock().expect("no thread panics"))
    }

    /// It is not wanted any more.
    pub(crate) fn end(&self) {
        self.ended.store(true, SeqCst);
    }
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.is_running() {
            "running"
        } else {
            "paused"
        };
        write!(f, "{state} {}", self.tick())
    }
}
