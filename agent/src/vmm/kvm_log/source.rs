//! A VM of this kind on the host it is moved from.

use super::client::LinkClient;
use super::error::KvmLogVmError;
use super::pages::KvmLogSource;
use super::state;
use crate::vmm::launch::{Control, Vmm, blocking};
use crate::vmm::ram::GuestRam;
use crate::vmm::relay::relay;
use drover_vmm::wire::{Phase, RegionInfo};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};

/// What the source knows of a VM; its target's VMM has to have the same RAM.
/// That the two understand each other's state is for them to tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkedFacts {
    /// The VM's name.
    pub name: String,
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// Where the guest has it.
    pub parts: Vec<RamPart>,
}

/// A stretch of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamPart {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Where it begins in the file.
    pub offset: u64,
}

/// The parts in the order of their addresses, however a VMM lists them.
pub(super) fn parts(regions: &[RegionInfo]) -> Vec<RamPart> {
    let part = |r: &RegionInfo| RamPart {
        gpa: r.gpa,
        len: r.len,
        offset: r.offset,
    };
    let mut parts: Vec<_> = regions.iter().map(part).collect();
    parts.sort_by_key(|part| part.gpa);
    parts
}

/// See the module.
#[derive(Debug)]
pub struct SourceVm {
    vmm: Vmm,
    link: Arc<LinkClient>,
    facts: LinkedFacts,
    ram: Arc<GuestRam>,
}

impl SourceVm {
    /// Checks that a VM lives here and opens its RAM for reading. The VM is not
    /// touched.
    ///
    /// # Errors
    /// Its VMM has no link, or only waits for a VM.
    pub async fn open(vmm: Vmm) -> Result<SourceVm, KvmLogVmError> {
        let link = link(&vmm)?.clone();
        let asked = link.clone();
        let (status, ram) =
            blocking(move || Ok::<_, KvmLogVmError>((asked.status()?, asked.ram(false)?))).await?;
        if status.phase == Phase::Waiting {
            return Err(KvmLogVmError::Phase {
                vm: vmm.name.clone(),
                is: "waits for a VM",
                wanted: "has one",
            });
        }
        let facts = LinkedFacts {
            name: vmm.name.clone(),
            ram_bytes: ram.len(),
            parts: parts(link.regions()),
        };
        Ok(SourceVm {
            vmm,
            link,
            facts,
            ram,
        })
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        &self.vmm
    }

    /// What the target has to know.
    pub fn facts(&self) -> &LinkedFacts {
        &self.facts
    }

    /// Guest RAM, read-only.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Whether the guest runs.
    ///
    /// # Errors
    /// As all of these: the VMM does not answer, or refuses.
    pub async fn is_running(&self) -> Result<bool, KvmLogVmError> {
        is_running(&self.link).await
    }

    /// Starts the dirty log, for as long as the pages are being asked for.
    ///
    /// # Errors
    /// The guest runs on in any case.
    pub async fn start_log(&self) -> Result<KvmLogSource, KvmLogVmError> {
        let link = self.link.clone();
        Ok(blocking(move || KvmLogSource::start(link)).await?)
    }

    /// Stops the guest for stop-and-copy. Returns whether it was running: one
    /// that its operator has paused must not run on the target either.
    ///
    /// # Errors
    /// It may run, or stand: [`roll_back`] settles that.
    pub async fn pause(&self) -> Result<bool, KvmLogVmError> {
        let link = self.link.clone();
        Ok(blocking(move || link.pause()).await?)
    }

    /// Sends the device state to `target`, and waits until the *target's* VMM
    /// has said that it has all of it. The guest must be paused and its last
    /// pages must be in place.
    ///
    /// On success nobody but the target's agent says whose the VM is.
    ///
    /// # Errors
    /// The VM is this side's, paused: [`roll_back`].
    pub async fn state_out(
        &self,
        target: impl AsyncRead + AsyncWrite,
        limit: Duration,
    ) -> Result<(), KvmLogVmError> {
        let vm = &self.vmm.name;
        let pair = || -> io::Result<_> {
            let (ours, carried) = UnixStream::pair()?;
            carried.set_nonblocking(true)?;
            Ok((ours, tokio::net::UnixStream::from_std(carried)?))
        };
        let (ours, carried) = pair().map_err(|source| KvmLogVmError::Socket {
            vm: vm.clone(),
            source,
        })?;
        let link = self.link.clone();
        let sending = blocking(move || state::send(&link, ours, limit));
        let carrying = async {
            let carried = relay(carried, target, limit).await;
            carried.map_err(|source| KvmLogVmError::Carried {
                vm: vm.clone(),
                source,
            })
        };
        // If this ends early, so does the pair, and with it the thread.
        let both = async { tokio::try_join!(sending, carrying) };
        match tokio::time::timeout(limit, both).await {
            Ok(done) => done.map(drop),
            Err(_) => Err(KvmLogVmError::Limit {
                vm: vm.clone(),
                what: "moving its device state",
                limit,
            }),
        }
    }
}

/// Lets a source go on after a failure before the point of no return; `run`: its
/// guest, found stopped, is to run. Works from every state, also for an agent
/// that has been restarted meanwhile: the VMM has kept everything.
///
/// # Errors
/// The guest may stand; it can be tried again.
pub async fn roll_back(vmm: &Vmm, run: bool) -> Result<(), KvmLogVmError> {
    let_run(link(vmm)?, run).await
}

/// Lets a guest that has arrived run (or stand, unless `run`). Only after the
/// point of no return; also for an agent that has been restarted meanwhile.
///
/// # Errors
/// The guest may stand; it can be tried again.
pub async fn resume_arrived(vmm: &Vmm, run: bool) -> Result<(), KvmLogVmError> {
    let_run(link(vmm)?, run).await
}

async fn let_run(link: &Arc<LinkClient>, run: bool) -> Result<(), KvmLogVmError> {
    if !run {
        return Ok(());
    }
    let asked = link.clone();
    blocking(move || asked.resume()).await?;
    match is_running(link).await? {
        true => Ok(()),
        false => Err(KvmLogVmError::RunState {
            vm: link.vm().to_owned(),
            is: "stands",
            doing: "being resumed",
        }),
    }
}

async fn is_running(link: &Arc<LinkClient>) -> Result<bool, KvmLogVmError> {
    let link = link.clone();
    Ok(blocking(move || link.status()).await?.running)
}

/// The link of a VMM that has one.
pub(super) fn link(vmm: &Vmm) -> Result<&Arc<LinkClient>, KvmLogVmError> {
    match &vmm.control {
        Control::Link(link) => Ok(link),
        other => Err(KvmLogVmError::NoLink {
            vm: vmm.name.clone(),
            by: other.name(),
        }),
    }
}
