//! The kinds of VM, and the one place where they differ: what a VM's move asks
//! of it at its source and at its target.
//!
//! ```text
//! source                                     target
//! SourceVm::open    checks, touches nothing
//! start             pages can be had         TargetVm::prepare   VMM waits, stopped
//!   rounds …                                   pages placed in TargetVm::ram
//! begin             its turn has come
//! pause             the guest stands still   listen
//! report_rest         last pages
//! state_out ─────── device state ──────────▶ wait_arrived
//!                                              ── point of no return: journal, not here ──
//! Vmm::end                                   resume_arrived, keep
//! ```
//!
//! Up to the point of no return [`roll_back`] lets the source go on from whatever
//! state, and [`TargetVm::abort`] (or dropping) leaves nothing of the target. A
//! further kind is a variant of each enum here, and of [`Kind`](super::definition::Kind).

use super::definition::{Definition, Kind, VmPaths};
use super::direct::{self, DirectError};
use super::kvm_log::{self, KvmLogSource, KvmLogVmError, LinkedFacts};
use super::launch::{Control, Vmm};
use super::preflight::QemuFacts;
use super::source::{DirectSource, PageRead, PageSink};
use super::stream::{self, StreamPages, StreamVmError};
use crate::types::chain;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};

/// What a source knows of its VM; travels to the target, which takes the VM in
/// as the same kind and checks its side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmFacts {
    /// QEMU whose RAM is a shared file.
    QemuDirect(QemuFacts),
    /// QEMU whose RAM is its own.
    QemuStream(QemuFacts),
    /// A VMM that answers KVM's dirty log.
    KvmLog(LinkedFacts),
}

impl VmFacts {
    /// How the VM is reached.
    pub fn kind(&self) -> Kind {
        match self {
            VmFacts::QemuDirect(_) => Kind::QemuDirect,
            VmFacts::QemuStream(_) => Kind::QemuStream,
            VmFacts::KvmLog(_) => Kind::KvmLog,
        }
    }

    /// Bytes of guest RAM.
    pub fn ram_bytes(&self) -> u64 {
        match self {
            VmFacts::QemuDirect(facts) | VmFacts::QemuStream(facts) => facts.ram_bytes,
            VmFacts::KvmLog(facts) => facts.ram_bytes,
        }
    }
}

/// What went wrong with a VM on either side. Messages carry its name.
#[derive(Debug, Error)]
pub enum KindError {
    /// In direct mode.
    #[error(transparent)]
    Direct(#[from] DirectError),
    /// In stream mode.
    #[error(transparent)]
    Stream(#[from] Box<StreamVmError>),
    /// By KVM's log.
    #[error(transparent)]
    KvmLog(#[from] Box<KvmLogVmError>),
    /// No kind takes the VM.
    #[error("{direct}; and in stream mode: {stream}")]
    None {
        /// Why not direct mode, with its causes.
        direct: String,
        /// Why not stream mode.
        stream: String,
    },
}

/// Where the scan thread gets pages from.
#[derive(Debug)]
pub enum Pages {
    /// The dirty log is asked, round by round.
    Direct(DirectSource),
    /// QEMU's stream reports, once it is begun.
    Stream(StreamPages),
    /// The VMM is asked for KVM's dirty log, round by round.
    KvmLog(KvmLogSource),
}

/// A VM on the host it is moved from.
#[derive(Debug)]
pub enum SourceVm {
    /// QEMU whose RAM is a shared file.
    Direct(direct::SourceVm),
    /// QEMU whose RAM is its own.
    Stream(Box<stream::SourceVm>),
    /// A VMM that answers KVM's dirty log.
    KvmLog(kvm_log::SourceVm),
}

impl SourceVm {
    /// Checks every precondition and opens guest RAM for reading. The VM is
    /// not touched.
    pub async fn open(vmm: Vmm, wanted: Kind) -> Result<SourceVm, KindError> {
        Ok(Self::choose(vmm, wanted).await?.0)
    }

    /// [`Self::open`]; with it why no better kind was chosen, if none could be.
    pub async fn choose(vmm: Vmm, wanted: Kind) -> Result<(SourceVm, Option<String>), KindError> {
        let stream = async |vmm| {
            let opened = stream::SourceVm::open(vmm).await;
            opened.map(|vm| SourceVm::Stream(Box::new(vm)))
        };
        let linked = matches!(vmm.control, Control::Link(_));
        match wanted {
            Kind::KvmLog => Ok((Self::by_log(vmm).await?, None)),
            // There is no other kind that such a VM could be of.
            Kind::Auto if linked => Ok((Self::by_log(vmm).await?, None)),
            Kind::QemuDirect => Ok((SourceVm::Direct(direct::SourceVm::open(vmm).await?), None)),
            Kind::QemuStream => Ok((stream(vmm).await.map_err(boxed)?, None)),
            Kind::Auto => {
                let error = match direct::SourceVm::open(vmm.clone()).await {
                    Ok(vm) => return Ok((SourceVm::Direct(vm), None)),
                    Err(error) => chain(&error),
                };
                match stream(vmm).await {
                    Ok(vm) => Ok((vm, Some(error))),
                    Err(stream) => Err(KindError::None {
                        direct: error,
                        stream: chain(&stream),
                    }),
                }
            }
        }
    }

    async fn by_log(vmm: Vmm) -> Result<SourceVm, KindError> {
        let opened = kvm_log::SourceVm::open(vmm).await;
        Ok(SourceVm::KvmLog(opened.map_err(log_boxed)?))
    }

    /// What the target has to know.
    pub fn facts(&self) -> VmFacts {
        match self {
            SourceVm::Direct(vm) => VmFacts::QemuDirect(vm.facts().clone()),
            SourceVm::Stream(vm) => VmFacts::QemuStream(vm.facts().clone()),
            SourceVm::KvmLog(vm) => VmFacts::KvmLog(vm.facts().clone()),
        }
    }

    /// Guest RAM as it is now.
    pub fn ram(&self) -> Arc<dyn PageRead> {
        match self {
            SourceVm::Direct(vm) => vm.ram().clone(),
            SourceVm::Stream(vm) => vm.ram().clone(),
            SourceVm::KvmLog(vm) => vm.ram().clone(),
        }
    }

    /// Whether the guest runs.
    pub async fn is_running(&self) -> Result<bool, KindError> {
        match self {
            SourceVm::Direct(vm) => Ok(vm.is_running().await?),
            SourceVm::Stream(vm) => Ok(vm.is_running().await.map_err(boxed)?),
            SourceVm::KvmLog(vm) => Ok(vm.is_running().await.map_err(log_boxed)?),
        }
    }

    /// Makes ready what pages are read by. The guest may stand still for a
    /// moment; it runs afterwards as it did before, also after a failure.
    pub async fn start(&self) -> Result<Pages, KindError> {
        match self {
            SourceVm::Direct(vm) => {
                let (log, quiesced) = vm.start_log().await?;
                tracing::debug!(vm = %vm.vmm().name,
                    stopped_us = quiesced.stopped.as_micros() as u64, "RAM is protected");
                Ok(Pages::Direct(DirectSource::new(vm.ram().clone(), log)))
            }
            SourceVm::Stream(vm) => Ok(Pages::Stream(vm.pages())),
            SourceVm::KvmLog(vm) => {
                let pages = vm.start_log().await.map_err(log_boxed)?;
                Ok(Pages::KvmLog(pages))
            }
        }
    }

    /// Whether the VMM, once [begun](Self::begin), may stop the guest by
    /// itself: then everybody has to be ready for that before.
    pub fn stops_by_itself(&self) -> bool {
        match self {
            SourceVm::Direct(_) | SourceVm::KvmLog(_) => false,
            SourceVm::Stream(_) => true,
        }
    }

    /// It is the VM's turn. `socket` is where a socket for its VMM may be made.
    pub async fn begin(&self, socket: &Path) -> Result<(), KindError> {
        match self {
            SourceVm::Direct(vm) => Ok(vm.prepare_state_out().await?),
            SourceVm::Stream(vm) => Ok(vm.begin(socket).await.map_err(boxed)?),
            SourceVm::KvmLog(_) => Ok(()),
        }
    }

    /// Stops the guest for stop-and-copy. Returns whether it was running: one
    /// that its operator has paused must not run on the target either.
    pub async fn pause(&self) -> Result<bool, KindError> {
        match self {
            SourceVm::Direct(vm) => Ok(vm.pause().await?),
            SourceVm::Stream(vm) => Ok(vm.pause().await.map_err(boxed)?),
            SourceVm::KvmLog(vm) => Ok(vm.pause().await.map_err(log_boxed)?),
        }
    }

    /// The guest stands still, and everybody knows: the last pages may follow.
    pub async fn report_rest(&self) -> Result<(), KindError> {
        match self {
            SourceVm::Direct(_) | SourceVm::KvmLog(_) => Ok(()),
            SourceVm::Stream(vm) => Ok(vm.report_rest().await.map_err(boxed)?),
        }
    }

    /// Since when the guest has stood still, if its VMM has stopped it by itself.
    pub fn stopped_at(&self) -> Option<Instant> {
        match self {
            SourceVm::Direct(_) | SourceVm::KvmLog(_) => None,
            SourceVm::Stream(vm) => vm.stopped_at(),
        }
    }

    /// Sends the device state to `target`, and waits until the *target's* VMM
    /// has said that it has all of it. Every page must be in place there.
    ///
    /// On success the VMM stands still for good: the target owns the VM as soon
    /// as the journal says so. On failure, [`roll_back`].
    pub async fn state_out(
        &self,
        socket: &Path,
        target: impl AsyncRead + AsyncWrite,
        limit: Duration,
    ) -> Result<(), KindError> {
        match self {
            SourceVm::Direct(vm) => Ok(vm.state_out(socket, target, limit).await?),
            SourceVm::Stream(vm) => Ok(vm.state_out(target, limit).await.map_err(boxed)?),
            SourceVm::KvmLog(vm) => Ok(vm.state_out(target, limit).await.map_err(log_boxed)?),
        }
    }

    /// Breaks off what is under way, so that [`roll_back`] is not kept waiting.
    pub fn break_off(&self) {
        match self {
            SourceVm::Direct(_) | SourceVm::KvmLog(_) => {}
            SourceVm::Stream(vm) => vm.break_off(),
        }
    }
}

fn boxed(error: StreamVmError) -> Box<StreamVmError> {
    Box::new(error)
}

fn log_boxed(error: KvmLogVmError) -> Box<KvmLogVmError> {
    Box::new(error)
}

/// Lets a source go on after a failure before the point of no return; `run`:
/// its guest, found stopped, is to run. Works from every state, also for an
/// agent that has been restarted meanwhile.
pub async fn roll_back(vmm: &Vmm, run: bool) -> Result<(), KindError> {
    match &vmm.control {
        Control::Qmp(_) => Ok(direct::roll_back(vmm, run).await?),
        Control::Link(_) => Ok(kvm_log::roll_back(vmm, run).await.map_err(log_boxed)?),
    }
}

/// Lets a guest that has arrived run (or stand, unless `run`). Only after the
/// point of no return; also for an agent that has been restarted meanwhile.
pub async fn resume_arrived(vmm: &Vmm, run: bool) -> Result<(), KindError> {
    match &vmm.control {
        Control::Qmp(_) => Ok(direct::resume_arrived(vmm, run).await?),
        Control::Link(_) => {
            let resumed = kvm_log::resume_arrived(vmm, run).await;
            Ok(resumed.map_err(log_boxed)?)
        }
    }
}

/// A VM on the host it is moved to. Dropped before [`TargetVm::keep`], its VMM
/// is killed and its files are removed.
#[derive(Debug)]
pub enum TargetVm {
    /// QEMU whose RAM is a shared file.
    Direct(direct::TargetVm),
    /// QEMU whose RAM is its own.
    Stream(stream::TargetVm),
    /// A VMM that embeds `drover-vmm`.
    KvmLog(kvm_log::TargetVm),
}

impl TargetVm {
    /// Starts a VMM that waits for the VM, checks it against the source's facts
    /// and opens its RAM for placing pages.
    pub async fn prepare(
        definition: &Definition,
        paths: &VmPaths,
        host: &BTreeMap<String, String>,
        facts: &VmFacts,
    ) -> Result<TargetVm, KindError> {
        match facts {
            VmFacts::QemuDirect(facts) => Ok(TargetVm::Direct(
                direct::TargetVm::prepare(definition, paths, host, facts).await?,
            )),
            VmFacts::QemuStream(facts) => Ok(TargetVm::Stream(
                stream::TargetVm::prepare(definition, paths, host, facts)
                    .await
                    .map_err(boxed)?,
            )),
            VmFacts::KvmLog(facts) => Ok(TargetVm::KvmLog(
                kvm_log::TargetVm::prepare(definition, paths, host, facts)
                    .await
                    .map_err(log_boxed)?,
            )),
        }
    }

    /// How the VM is reached.
    pub fn kind(&self) -> Kind {
        match self {
            TargetVm::Direct(_) => Kind::QemuDirect,
            TargetVm::Stream(_) => Kind::QemuStream,
            TargetVm::KvmLog(_) => Kind::KvmLog,
        }
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        match self {
            TargetVm::Direct(vm) => vm.vmm(),
            TargetVm::Stream(vm) => vm.vmm(),
            TargetVm::KvmLog(vm) => vm.vmm(),
        }
    }

    /// Guest RAM, for placing pages. They are where the guest will find them.
    pub fn ram(&self) -> Arc<dyn PageSink> {
        match self {
            TargetVm::Direct(vm) => vm.ram().clone(),
            TargetVm::Stream(vm) => vm.ram().clone(),
            TargetVm::KvmLog(vm) => vm.ram().clone(),
        }
    }

    /// Lets the VMM listen for device state on the Unix socket `socket`, which
    /// must not exist. Returns when it listens.
    pub async fn listen(&mut self, socket: &Path) -> Result<(), KindError> {
        match self {
            TargetVm::Direct(vm) => Ok(vm.listen(socket).await?),
            TargetVm::Stream(vm) => Ok(vm.listen(socket).await.map_err(boxed)?),
            TargetVm::KvmLog(vm) => Ok(vm.listen(socket).await.map_err(log_boxed)?),
        }
    }

    /// Waits until all device state has arrived; the guest is then paused.
    pub async fn wait_arrived(&self, limit: Duration) -> Result<(), KindError> {
        match self {
            TargetVm::Direct(vm) => Ok(vm.wait_arrived(limit).await?),
            TargetVm::Stream(vm) => Ok(vm.wait_arrived(limit).await.map_err(boxed)?),
            TargetVm::KvmLog(vm) => Ok(vm.wait_arrived(limit).await.map_err(log_boxed)?),
        }
    }

    /// The VM lives here from now on: its VMM and files stay when we go.
    pub fn keep(self) -> Vmm {
        match self {
            TargetVm::Direct(vm) => vm.keep(),
            TargetVm::Stream(vm) => vm.keep(),
            TargetVm::KvmLog(vm) => vm.keep(),
        }
    }

    /// Ends the half-made VM and removes its files.
    pub async fn abort(self) {
        match self {
            TargetVm::Direct(vm) => vm.abort().await,
            TargetVm::Stream(vm) => vm.abort().await,
            TargetVm::KvmLog(vm) => vm.abort().await,
        }
    }
}
