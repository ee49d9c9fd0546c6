//! Rounds of pages by KVM's dirty log.

use super::client::LinkClient;
use super::error::LinkClientError;
use crate::types::Gfn;
use crate::vmm::dirty::ScanStats;
use crate::vmm::pageset::PageSet;
use crate::vmm::ram::GuestRam;
use crate::vmm::source::PageSource;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use thiserror::Error;

/// Why a round of [`KvmLogSource`] failed.
#[derive(Debug, Error)]
pub enum KvmLogSourceError {
    /// The VMM did not answer it.
    #[error(transparent)]
    Link(#[from] LinkClientError),
    /// The RAM file could not be looked through for holes.
    #[error("cannot tell data from holes in {place}")]
    Extents {
        /// The RAM file.
        place: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// [`PageSource`] of a VM whose VMM answers KVM's dirty log. The log is on for
/// as long as this is.
#[derive(Debug)]
pub struct KvmLogSource {
    ram: Arc<GuestRam>,
    link: Arc<LinkClient>,
    /// Pages reported so far in any round.
    reported: PageSet,
}

impl KvmLogSource {
    /// Starts the log. The guest runs on.
    ///
    /// # Errors
    /// The VMM refuses, or its RAM cannot be read.
    pub fn start(link: Arc<LinkClient>) -> Result<KvmLogSource, LinkClientError> {
        let ram = link.ram(false)?;
        link.start_log()?;
        let reported = PageSet::new(ram.pages());
        Ok(KvmLogSource {
            ram,
            link,
            reported,
        })
    }

    /// Reports all that may hold something.
    fn all_data(&mut self, f: &mut dyn FnMut(Range<Gfn>)) -> Result<ScanStats, KvmLogSourceError> {
        let begun = Instant::now();
        let mut stats = ScanStats::default();
        for run in self.data_runs()? {
            stats.runs += 1;
            stats.pages += u64::from(run.end.0 - run.start.0);
            self.reported.insert(run.clone());
            f(run);
        }
        stats.took = begun.elapsed();
        Ok(stats)
    }

    fn data_runs(&self) -> Result<Vec<Range<Gfn>>, KvmLogSourceError> {
        let runs: io::Result<Vec<_>> = self.ram.data_extents(Gfn(0)).collect();
        runs.map_err(|source| KvmLogSourceError::Extents {
            place: self.ram.path().display().to_string(),
            source,
        })
    }
}

impl PageSource for KvmLogSource {
    type Error = KvmLogSourceError;

    fn pages(&self) -> u32 {
        self.ram.pages()
    }

    fn first_round(
        &mut self,
        f: &mut dyn FnMut(Range<Gfn>),
    ) -> Result<ScanStats, KvmLogSourceError> {
        self.all_data(f)
    }

    /// A round that the VMM refuses has lost writes: a ring has overflowed, KVM has
    /// failed, or the log went off with a connection that broke. The log is
    /// started anew then, and everything that is in RAM is the round.
    fn next_round(
        &mut self,
        f: &mut dyn FnMut(Range<Gfn>),
    ) -> Result<ScanStats, KvmLogSourceError> {
        let reported = &mut self.reported;
        let round = self.link.round(&mut |run| {
            reported.insert(run.clone());
            f(run);
        });
        match round {
            Err(error @ LinkClientError::Refused { .. }) => {
                tracing::warn!(vm = self.link.vm(), %error, "all of its RAM is looked at again");
                self.link.start_log()?;
                self.all_data(f)
            }
            round => Ok(round?),
        }
    }

    /// What was given back since it was reported: a balloon that punches holes
    /// into the RAM file writes nothing. All writes are in the log: those of
    /// devices are marked when they are over, at the latest by the pause.
    fn recheck(&mut self) -> Result<Vec<Range<Gfn>>, KvmLogSourceError> {
        let mut again = self.reported.clone();
        for run in self.data_runs()? {
            again.remove(run);
        }
        Ok(again.runs())
    }

    fn read_run(&self, start: Gfn, out: &mut [u8]) -> io::Result<()> {
        self.ram.read_run(start, out)
    }
}

impl Drop for KvmLogSource {
    fn drop(&mut self) {
        // A VMM that is gone has no log either.
        if let Err(error) = self.link.stop_log() {
            tracing::debug!(%error, "the dirty log may be on still");
        }
    }
}

#[cfg(test)]
#[path = "pages_tests.rs"]
mod tests;
