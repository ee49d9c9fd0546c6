//! The small interface by which pages leave and enter a VM, whatever its kind.

use super::dirty::{DirtyLog, DirtyLogError, ScanStats};
use super::pageset::PageSet;
use super::ram::GuestRam;
use crate::types::Gfn;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use thiserror::Error;

/// Where the pages of a VM that moves come from. Owned by its scan thread; all
/// calls block.
pub trait PageSource: Send {
    /// Why a round can fail.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Number of pages; gfns run from 0 to this.
    fn pages(&self) -> u32;

    /// Round 1: each run of pages that may hold something. The others are
    /// zero, and nothing was read to know it.
    fn first_round(&mut self, f: &mut dyn FnMut(Range<Gfn>)) -> Result<ScanStats, Self::Error>;

    /// A later round: each run of pages written since the round before began.
    /// With the guest paused: the last round.
    fn next_round(&mut self, f: &mut dyn FnMut(Range<Gfn>)) -> Result<ScanStats, Self::Error>;

    /// After the last round, with the guest paused: runs of pages that may have
    /// changed without being reported. They are compared by fingerprint with
    /// what was sent last, and sent only if they differ.
    fn recheck(&mut self) -> Result<Vec<Range<Gfn>>, Self::Error>;

    /// Copies `out.len() / 4096` pages out, from `start` on.
    fn read_run(&self, start: Gfn, out: &mut [u8]) -> io::Result<()>;
}

/// The RAM of a VM as it is now, on either side. Shared by threads; all calls
/// block shortly.
pub trait PageRead: Send + Sync {
    /// Number of pages; gfns run from 0 to this.
    fn pages(&self) -> u32;
    /// Copies `out.len() / 4096` pages out, from `start` on.
    fn read_run(&self, start: Gfn, out: &mut [u8]) -> io::Result<()>;
    /// The runs of pages that may hold something, by rising gfn. The others are
    /// zero, and nothing was read to know it.
    fn data_runs(&self) -> io::Result<Vec<Range<Gfn>>>;
    /// Where it is, for messages and tests: the path of a file, or
    /// `/proc/PID/mem@ADDRESS+BYTES`.
    fn place(&self) -> String;
}

/// Where the pages of a VM that arrives go. Failures (no memory left) are the
/// VM's, not the agent's.
pub trait PageSink: PageRead {
    /// Places `data.len() / 4096` pages, from `start` on.
    fn write_run(&self, start: Gfn, data: &[u8]) -> io::Result<()>;
    /// Makes a run of pages zero.
    fn zero_run(&self, run: Range<Gfn>) -> io::Result<()>;
}

impl PageRead for GuestRam {
    fn pages(&self) -> u32 {
        GuestRam::pages(self)
    }
    fn read_run(&self, start: Gfn, out: &mut [u8]) -> io::Result<()> {
        GuestRam::read_run(self, start, out)
    }
    fn data_runs(&self) -> io::Result<Vec<Range<Gfn>>> {
        self.data_extents(Gfn(0)).collect()
    }
    fn place(&self) -> String {
        self.path().display().to_string()
    }
}

impl PageSink for GuestRam {
    fn write_run(&self, start: Gfn, data: &[u8]) -> io::Result<()> {
        GuestRam::write_run(self, start, data)
    }
    fn zero_run(&self, run: Range<Gfn>) -> io::Result<()> {
        GuestRam::zero_run(self, run)
    }
}

/// Why a round of [`DirectSource`] failed.
#[derive(Debug, Error)]
pub enum DirectSourceError {
    /// The dirty log failed.
    #[error(transparent)]
    Log(#[from] DirtyLogError),
    /// The RAM file could not be looked through for holes.
    #[error("cannot tell data from holes in {path}")]
    Extents {
        /// The RAM file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// [`PageSource`] of QEMU in direct mode.
#[derive(Debug)]
pub struct DirectSource {
    ram: Arc<GuestRam>,
    log: DirtyLog,
    /// Pages reported so far in any round.
    reported: PageSet,
}

impl DirectSource {
    /// Of a VM whose log has just been started.
    pub fn new(ram: Arc<GuestRam>, log: DirtyLog) -> DirectSource {
        let reported = PageSet::new(ram.pages());
        DirectSource { ram, log, reported }
    }

    fn extents(&self, mut f: impl FnMut(Range<Gfn>)) -> Result<(), DirectSourceError> {
        for run in self.ram.data_extents(Gfn(0)) {
            f(run.map_err(|source| {
                let path = self.ram.path().to_owned();
                DirectSourceError::Extents { path, source }
            })?);
        }
        Ok(())
    }
}

impl PageSource for DirectSource {
    type Error = DirectSourceError;

    fn pages(&self) -> u32 {
        self.ram.pages()
    }

    fn first_round(
        &mut self,
        f: &mut dyn FnMut(Range<Gfn>),
    ) -> Result<ScanStats, DirectSourceError> {
        let begun = Instant::now();
        let mut stats = ScanStats::default();
        let mut reported = std::mem::replace(&mut self.reported, PageSet::new(0));
        let walked = self.extents(|run| {
            stats.runs += 1;
            stats.pages += u64::from(run.end.0 - run.start.0);
            reported.insert(run.clone());
            f(run);
        });
        self.reported = reported;
        walked?;
        stats.took = begun.elapsed();
        Ok(stats)
    }

    fn next_round(
        &mut self,
        f: &mut dyn FnMut(Range<Gfn>),
    ) -> Result<ScanStats, DirectSourceError> {
        Ok(self.log.scan(|run| {
            self.reported.insert(run.clone());
            f(run);
        })?)
    }

    /// What DMA may have reached (see [`DirtyLog::recently_written`]), and what
    /// was given back since it was reported: a balloon that punches holes into
    /// the RAM file writes nothing, so no log shows it.
    fn recheck(&mut self) -> Result<Vec<Range<Gfn>>, DirectSourceError> {
        let mut again = self.reported.clone();
        self.extents(|run| again.remove(run))?;
        again.extend(&self.log.recently_written());
        Ok(again.runs())
    }

    fn read_run(&self, start: Gfn, out: &mut [u8]) -> io::Result<()> {
        self.ram.read_run(start, out)
    }
}
