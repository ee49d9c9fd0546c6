//! The dirty log of a VM in direct mode: which pages of guest RAM were written
//! since it was last asked, seen from outside the VMM.

use super::inject::{self, InjectError};
use super::pagemap::{self, Pagemap};
use super::pageset::PageSet;
use super::process::{ProcessError, VmProcess};
use super::ram::RamLayout;
use super::uffd::{self, Uffd, UffdError};
use crate::types::{Gfn, PAGE_SIZE};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// The dirty log cannot be made, or cannot be trusted any more.
#[derive(Debug, Error)]
pub enum DirtyLogError {
    /// The kernel lacks something.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The userfaultfd could not be had from the VMM.
    #[error("making a userfaultfd inside the VMM failed")]
    Inject(#[from] InjectError),
    /// An ioctl on it failed.
    #[error("write-protecting guest RAM failed")]
    Uffd(#[from] UffdError),
    /// `PAGEMAP_SCAN` failed.
    #[error(
        "PAGEMAP_SCAN of process {pid} at {va:#x} failed; the VMM may have mapped its RAM anew: migrate it in stream mode"
    )]
    Scan {
        /// The VMM.
        pid: i32,
        /// Address in the VMM of the mapping scanned.
        va: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The VMM has ended: what was found is not all.
    #[error("the VMM ended while its memory was watched")]
    Process(#[from] ProcessError),
}

/// What this kernel lacks for direct mode.
#[derive(Debug, Error)]
pub enum KernelError {
    /// Features of userfaultfd.
    #[error(
        "this kernel lacks {missing}; direct mode needs Linux 6.7 or newer (this is {release}) with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP: boot a newer kernel, or use stream mode"
    )]
    Missing {
        /// Names, with the version that brought each.
        missing: String,
        /// `uname -r`.
        release: String,
    },
    /// Asking failed.
    #[error("cannot find out what this kernel's {what} can do; the agent needs root")]
    Ask {
        /// The interface.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Checks that this kernel has all that the dirty log needs.
pub fn kernel_features() -> Result<(), KernelError> {
    let mut missing = Vec::new();
    match uffd::offered_features() {
        Ok(have) if have & uffd::FEATURES == uffd::FEATURES => {}
        Ok(have) => missing.push(uffd::missing_names(have)),
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => {
            missing.push("userfaultfd (CONFIG_USERFAULTFD)".to_owned());
        }
        Err(source) => {
            return Err(KernelError::Ask {
                what: "userfaultfd",
                source,
            });
        }
    }
    if !pagemap::supported().map_err(|source| KernelError::Ask {
        what: "pagemap",
        source,
    })? {
        missing.push("PAGEMAP_SCAN (Linux 6.7)".to_owned());
    }
    if missing.is_empty() {
        return Ok(());
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Err(KernelError::Missing {
        missing: missing.join(", "),
        release: release.trim().to_owned(),
    })
}

/// What one scan found and cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScanStats {
    /// Pages reported.
    pub pages: u64,
    /// Runs of pages reported.
    pub runs: u64,
    /// Calls into the kernel.
    pub calls: u32,
    /// Time taken, the callback's work included.
    pub took: Duration,
}

/// A live dirty log. Moves to the VM's scan thread. Dropping it takes the
/// write-protection off again: the guest runs as if nothing had been.
#[derive(Debug)]
pub struct DirtyLog {
    uffd: Uffd,
    pagemap: Pagemap,
    process: Arc<VmProcess>,
    layout: Arc<RamLayout>,
    recent: RecentlyWritten,
}

impl DirtyLog {
    /// Makes a userfaultfd inside the VMM, registers guest RAM with it and
    /// protects all of it. Blocking, ≈ 1 ms and what protecting takes (about
    /// 5 ms a GiB, the guest keeps running).
    ///
    /// On failure nothing stays behind in the VMM. On success the log reports
    /// every *CPU* write from here on (guest, VMM, vhost); DMA into pages
    /// pinned earlier is only ruled out by [`Self::restart`] with the VM
    /// stopped, see `docs/vmm-qemu-direct.md`.
    pub fn attach(
        process: Arc<VmProcess>,
        layout: Arc<RamLayout>,
    ) -> Result<DirtyLog, DirtyLogError> {
        let uffd = Uffd::handshake(inject::userfaultfd_in(&process)?)?;
        let pagemap = Pagemap::open(process.pid()).map_err(|source| DirtyLogError::Scan {
            pid: process.pid(),
            va: 0,
            source,
        })?;
        let recent = RecentlyWritten::new(layout.pages());
        // From here on drop undoes the registrations made so far.
        let log = DirtyLog {
            uffd,
            pagemap,
            process,
            layout,
            recent,
        };
        for m in &log.layout.mappings {
            log.uffd.register_wp(m.va, m.len)?;
            log.uffd.write_protect(m.va, m.len)?;
        }
        log.process.check_alive()?;
        Ok(log)
    }

    /// Write-protects all pages again and forgets what was written before:
    /// with the VM stopped this is the log's point zero. Costs a walk of the
    /// page tables (≈ 0.65 ms a GiB).
    pub fn restart(&mut self) -> Result<ScanStats, DirtyLogError> {
        let stats = self.scan(|_| ())?;
        self.recent = RecentlyWritten::new(self.layout.pages());
        Ok(stats)
    }

    /// Reports each run of pages written since the last scan, by rising gfn,
    /// and protects them again. Each write is reported by this scan or the
    /// next one, never by neither.
    pub fn scan(&mut self, mut f: impl FnMut(Range<Gfn>)) -> Result<ScanStats, DirtyLogError> {
        let begun = Instant::now();
        let mut stats = ScanStats::default();
        self.recent.rotate(begun);
        for m in &self.layout.mappings {
            let recent = &mut self.recent;
            let end_gfn = self.layout.pages();
            let taken = self.pagemap.take_written(m.va..m.va + m.len, |run| {
                let gfn = |va: u64| ((va - m.va + m.offset) / PAGE_SIZE as u64) as u32;
                // A huge page may reach past the end of RAM.
                let (start, end) = (gfn(run.start), gfn(run.end).min(end_gfn));
                if start < end {
                    stats.pages += u64::from(end - start);
                    stats.runs += 1;
                    recent.record(Gfn(start)..Gfn(end));
                    f(Gfn(start)..Gfn(end));
                }
            });
            match taken {
                Ok(calls) => stats.calls += calls,
                Err(source) => {
                    self.process.check_alive()?;
                    return Err(DirtyLogError::Scan {
                        pid: self.process.pid(),
                        va: m.va,
                        source,
                    });
                }
            }
        }
        // An address space outlives its process and then shows nothing written.
        self.process.check_alive()?;
        stats.took = begun.elapsed();
        Ok(stats)
    }

    /// The pages that scans of the last 60 to 90 seconds reported: after the
    /// final stop each is compared with what was sent last, since DMA may have
    /// landed in it after it was protected again.
    pub fn recently_written(&self) -> PageSet {
        self.recent.pages()
    }

    /// Layout of the RAM watched.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        for m in &self.layout.mappings {
            if let Err(error) = self.uffd.unregister(m.va, m.len)
                && self.process.is_alive()
            {
                // Closing the userfaultfd, which follows, unregisters as well.
                tracing::debug!(pid = self.process.pid(), %error, "unregistering guest RAM");
            }
        }
    }
}

/// Sets of the pages reported lately, one per period, the oldest dropped
/// whole: 3 bits a page.
#[derive(Debug)]
pub struct RecentlyWritten {
    periods: [PageSet; 3],
    turned: Instant,
}

impl RecentlyWritten {
    /// How long one set is added to. Three of them cover 60 to 90 s.
    pub const PERIOD: Duration = Duration::from_secs(30);

    /// For RAM of `pages` pages; nothing written yet.
    pub fn new(pages: u32) -> RecentlyWritten {
        RecentlyWritten {
            periods: std::array::from_fn(|_| PageSet::new(pages)),
            turned: Instant::now(),
        }
    }

    /// Drops the sets that are too old at `now`.
    pub fn rotate(&mut self, now: Instant) {
        let turns = now.saturating_duration_since(self.turned).as_secs() / Self::PERIOD.as_secs();
        for _ in 0..turns.min(self.periods.len() as u64) {
            self.periods.rotate_right(1);
            self.periods[0].clear();
        }
        self.turned += Self::PERIOD * turns.min(u64::from(u32::MAX)) as u32;
    }

    /// Notes a run of pages as written now.
    pub fn record(&mut self, run: Range<Gfn>) {
        self.periods[0].insert(run);
    }

    /// All pages noted in the window.
    pub fn pages(&self) -> PageSet {
        let [mut all, b, c] = self.periods.clone();
        all.extend(&b);
        all.extend(&c);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_can() {
        kernel_features().unwrap();
    }

    #[test]
    fn pages_are_remembered_for_60_to_90_seconds() {
        let mut recent = RecentlyWritten::new(1000);
        let t0 = recent.turned;
        let at = |s| t0 + Duration::from_secs(s);
        recent.rotate(at(29));
        recent.record(Gfn(5)..Gfn(7));
        recent.rotate(at(31));
        recent.record(Gfn(900)..Gfn(901));
        recent.rotate(at(89));
        assert_eq!(recent.pages().runs(), [Gfn(5)..Gfn(7), Gfn(900)..Gfn(901)]);
        recent.rotate(at(90));
        assert_eq!(recent.pages().runs(), [Gfn(900)..Gfn(901)]);
        recent.rotate(at(10_000));
        assert_eq!(recent.pages().runs(), []);
    }
}
