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
use super::managed::{self, ManagedError, ManagedFacts};
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
    /// A VMM whose manager drives its migration.
    Managed(ManagedFacts),
}

impl VmFacts {
    /// How the VM is reached.
    pub fn kind(&self) -> Kind {
        match self {
            VmFacts::QemuDirect(_) => Kind::QemuDirect,
            VmFacts::QemuStream(_) => Kind::QemuStream,
            VmFacts::KvmLog(_) => Kind::KvmLog,
            VmFacts::Managed(facts) => facts.kind(),
        }
    }

    /// Bytes of guest RAM.
    pub fn ram_bytes(&self) -> u64 {
        match self {
            VmFacts::QemuDirect(facts) | VmFacts::QemuStream(facts) => facts.ram_bytes,
            VmFacts::KvmLog(facts) => facts.ram_bytes,
            VmFacts::Managed(facts) => facts.ram_bytes,
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
    /// Moved by its manager.
    #[error(transparent)]
    Managed(#[from] Box<ManagedError>),
    /// A manager starts and drives the VMM.
    #[error("VM {vm}: its manager drives it, so it moves by `drover gang open`")]
    Managers {
        /// The VM.
        vm: String,
    },
    /// No kind takes the VM.
    #[error("{}", told(.0))]
    None(Vec<Unfit>),
}

/// A kind that does not take a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfit {
    /// Which.
    pub kind: Kind,
    /// Why, with causes and remedy.
    pub why: String,
}

fn told(unfit: &[Unfit]) -> String {
    let each = unfit
        .iter()
        .map(|Unfit { kind, why }| format!("not {kind}: {why}"));
    each.collect::<Vec<_>>().join("; ")
}

/// Whether a VM that is driven so can be of this kind.
fn fits(kind: Kind, control: &Control) -> bool {
    match control {
        Control::Qmp(_) => matches!(kind, Kind::QemuDirect | Kind::QemuStream),
        Control::Link(_) => kind == Kind::KvmLog,
    }
}

/// The kinds of moving that a VM allows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// Those that are possible, the best first.
    pub possible: Vec<Kind>,
    /// Those that are not.
    pub unfit: Vec<Unfit>,
    /// The one that is taken.
    pub chosen: Option<Kind>,
}

impl Survey {
    /// Tries each kind on a VM of this host, as [`SourceVm::open`] does: the VM
    /// is not touched.
    pub async fn of(vmm: &Vmm, wanted: Kind) -> Survey {
        let mut survey = Survey::default();
        for kind in Kind::BEST_FIRST {
            if !fits(kind, &vmm.control) {
                survey.unfit.push(Unfit {
                    kind,
                    why: format!("its VMM is driven by {}", vmm.control.name()),
                });
                continue;
            }
            match SourceVm::of_kind(vmm.clone(), kind).await {
                Ok(_) => survey.possible.push(kind),
                Err(error) => survey.unfit.push(Unfit {
                    kind,
                    why: chain(&error),
                }),
            }
        }
        let wanted = wanted.candidates();
        let mut chosen = survey.possible.iter().filter(|kind| wanted.contains(kind));
        survey.chosen = chosen.next().copied();
        survey
    }
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
    /// A VMM whose manager drives its migration.
    Managed(Arc<managed::SourceVm>),
}

impl SourceVm {
    /// Checks every precondition and opens guest RAM for reading. The VM is
    /// not touched.
    pub async fn open(vmm: Vmm, wanted: Kind) -> Result<SourceVm, KindError> {
        Ok(Self::choose(vmm, wanted).await?.0)
    }

    /// [`Self::open`]; with it the better kinds that were not possible.
    pub async fn choose(vmm: Vmm, wanted: Kind) -> Result<(SourceVm, Vec<Unfit>), KindError> {
        if wanted != Kind::Auto {
            return Ok((Self::of_kind(vmm, wanted).await?, Vec::new()));
        }
        let mut unfit = Vec::new();
        let kinds = Kind::BEST_FIRST.into_iter();
        for kind in kinds.filter(|kind| fits(*kind, &vmm.control)) {
            match Self::of_kind(vmm.clone(), kind).await {
                Ok(vm) => return Ok((vm, unfit)),
                Err(error) => unfit.push(Unfit {
                    kind,
                    why: chain(&error),
                }),
            }
        }
        Err(KindError::None(unfit))
    }

    async fn of_kind(vmm: Vmm, kind: Kind) -> Result<SourceVm, KindError> {
        match kind {
            Kind::QemuDirect => Ok(SourceVm::Direct(direct::SourceVm::open(vmm).await?)),
            Kind::QemuStream => {
                let vm = stream::SourceVm::open(vmm).await.map_err(boxed)?;
                Ok(SourceVm::Stream(Box::new(vm)))
            }
            Kind::KvmLog => Self::by_log(vmm).await,
            Kind::QemuManaged | Kind::CloudHypervisor => Err(KindError::Managers {
                vm: vmm.name.clone(),
            }),
            Kind::Auto => Box::pin(Self::open(vmm, kind)).await,
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
            SourceVm::Managed(vm) => VmFacts::Managed(vm.facts().clone()),
        }
    }

    /// Guest RAM as it is now.
    pub fn ram(&self) -> Arc<dyn PageRead> {
        match self {
            SourceVm::Direct(vm) => vm.ram().clone(),
            SourceVm::Stream(vm) => vm.ram().clone(),
            SourceVm::KvmLog(vm) => vm.ram().clone(),
            SourceVm::Managed(vm) => vm.ram().clone(),
        }
    }

    /// Whether the guest runs. Of one that its manager drives only the manager
    /// knows, and minds it.
    pub async fn is_running(&self) -> Result<bool, KindError> {
        match self {
            SourceVm::Direct(vm) => Ok(vm.is_running().await?),
            SourceVm::Stream(vm) => Ok(vm.is_running().await.map_err(boxed)?),
            SourceVm::KvmLog(vm) => Ok(vm.is_running().await.map_err(log_boxed)?),
            SourceVm::Managed(_) => Ok(true),
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
            SourceVm::Managed(vm) => Ok(Pages::Stream(vm.pages())),
        }
    }

    /// Whether the VMM, once [begun](Self::begin), may stop the guest by
    /// itself: then everybody has to be ready for that before.
    pub fn stops_by_itself(&self) -> bool {
        match self {
            SourceVm::Direct(_) | SourceVm::KvmLog(_) => false,
            SourceVm::Stream(_) | SourceVm::Managed(_) => true,
        }
    }

    /// It is the VM's turn. `socket` is where a socket for its VMM may be made.
    pub async fn begin(&self, socket: &Path) -> Result<(), KindError> {
        match self {
            SourceVm::Direct(vm) => Ok(vm.prepare_state_out().await?),
            SourceVm::Stream(vm) => Ok(vm.begin(socket).await.map_err(boxed)?),
            SourceVm::KvmLog(_) => Ok(()),
            SourceVm::Managed(vm) => Ok(vm.begin().map_err(managed)?),
        }
    }

    /// Stops the guest for stop-and-copy, or waits until its VMM has, if its
    /// manager drives it. Returns whether it was running: one
    /// that its operator has paused must not run on the target either.
    pub async fn pause(&self) -> Result<bool, KindError> {
        match self {
            SourceVm::Direct(vm) => Ok(vm.pause().await?),
            SourceVm::Stream(vm) => Ok(vm.pause().await.map_err(boxed)?),
            SourceVm::KvmLog(vm) => Ok(vm.pause().await.map_err(log_boxed)?),
            SourceVm::Managed(vm) => Ok(vm.stopped().await.map(|()| true).map_err(managed)?),
        }
    }

    /// The guest stands still, and everybody knows: the last pages may follow.
    pub async fn report_rest(&self) -> Result<(), KindError> {
        match self {
            SourceVm::Direct(_) | SourceVm::Managed(_) | SourceVm::KvmLog(_) => Ok(()),
            SourceVm::Stream(vm) => Ok(vm.report_rest().await.map_err(boxed)?),
        }
    }

    /// Since when the guest has stood still, if its VMM has stopped it by itself.
    pub fn stopped_at(&self) -> Option<Instant> {
        match self {
            SourceVm::Direct(_) | SourceVm::KvmLog(_) => None,
            SourceVm::Stream(vm) => vm.stopped_at(),
            SourceVm::Managed(vm) => vm.stopped_at(),
        }
    }

    /// Sends the device state to `target`, and waits until the *target's* VMM
    /// has said that it has all of it. Every page must be in place there.
    ///
    /// On success the VMM stands still for good: the target owns the VM as soon
    /// as the journal says so. On failure, [`roll_back`]. Of one that its manager
    /// drives, [`managed::SourceVm::complete`] is still to come.
    pub async fn state_out(
        &self,
        socket: &Path,
        target: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        limit: Duration,
    ) -> Result<(), KindError> {
        match self {
            SourceVm::Direct(vm) => Ok(vm.state_out(socket, target, limit).await?),
            SourceVm::Stream(vm) => Ok(vm.state_out(target, limit).await.map_err(boxed)?),
            SourceVm::KvmLog(vm) => Ok(vm.state_out(target, limit).await.map_err(log_boxed)?),
            SourceVm::Managed(vm) => Ok(vm.state_out(target, limit).await.map_err(managed)?),
        }
    }

    /// Breaks off what is under way, so that [`roll_back`] is not kept waiting.
    pub fn break_off(&self) {
        match self {
            SourceVm::Direct(_) | SourceVm::KvmLog(_) => {}
            SourceVm::Stream(vm) => vm.break_off(),
            SourceVm::Managed(vm) => vm.break_off(),
        }
    }
}

fn boxed(error: StreamVmError) -> Box<StreamVmError> {
    Box::new(error)
}

fn managed(error: ManagedError) -> Box<ManagedError> {
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

/// A VM on the host it is moved to, in a VMM that the agent has started
/// ([`managed::TargetVm`] is the other sort). Dropped before [`TargetVm::keep`], its VMM
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
            VmFacts::Managed(facts) => Err(KindError::Managers {
                vm: facts.name.clone(),
            }),
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
