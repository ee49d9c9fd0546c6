//! QEMU in direct mode: both ends of one VM's move.
//!
//! ```text
//! source                                   target
//! SourceVm::open        preflight
//! start_log             uffd, stop-protect-cont
//!   rounds …                               TargetVm::prepare   (-S -incoming defer)
//! pause                                      pages placed in its RAM file
//!   last round                             listen(socket)
//! state_out(socket) ───── relay ─────────▶ wait_arrived        (paused)
//!                                          ── point of no return: journal, not here ──
//! end                                      resume, keep
//! ```
//! Until the point of no return [`SourceVm::roll_back`] lets the source go on,
//! from whatever state; `abort` (or dropping) leaves nothing of the target.

mod error;

pub use error::DirectError;

use super::definition::{Definition, VmPaths};
use super::dirty::{DirtyLog, ScanStats};
use super::launch::{Launched, Role, Vmm, blocking, remove_files};
use super::preflight::{QemuFacts, check_source, check_target};
use super::qmp::{Cursor, MigrationStatus, QmpError, RunState};
use super::ram::{GuestRam, RamLayout};
use super::relay::{OfferedSocket, relay};
use super::setup::{self, Move};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};

/// How long QEMU may take to get over a migration that has failed.
const FINISH_LIMIT: Duration = Duration::from_secs(2);

fn qmp_error(vmm: &Vmm, doing: &'static str) -> impl FnOnce(QmpError) -> DirectError {
    let (vm, tail) = (vmm.name.clone(), vmm.log_tail());
    let said = if tail.is_empty() {
        tail
    } else {
        format!("; QEMU's log ends: {tail}")
    };
    move |source| DirectError::Qmp {
        vm,
        doing,
        said,
        source,
    }
}

/// What starting the log cost the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quiesced {
    /// How long the guest stood still (0 if it was paused anyway).
    pub stopped: Duration,
    /// The scan at the standstill.
    pub scan: ScanStats,
}

/// A VM on the host it is moved from.
#[derive(Debug)]
pub struct SourceVm {
    vmm: Vmm,
    facts: QemuFacts,
    layout: Arc<RamLayout>,
    ram: Arc<GuestRam>,
}

impl SourceVm {
    /// Checks every precondition and opens guest RAM for reading. The VM is
    /// not touched.
    pub async fn open(vmm: Vmm) -> Result<SourceVm, DirectError> {
        let (facts, layout) = check_source(&vmm).await?;
        let ram =
            GuestRam::open(&vmm.process, &layout, false).map_err(|source| DirectError::Ram {
                vm: vmm.name.clone(),
                source,
            })?;
        Ok(SourceVm {
            vmm,
            facts,
            layout: Arc::new(layout),
            ram: Arc::new(ram),
        })
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        &self.vmm
    }
    /// What the target has to know.
    pub fn facts(&self) -> &QemuFacts {
        &self.facts
    }
    /// Guest RAM, read-only.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Starts the dirty log: all RAM is protected while the guest runs, then
    /// once more at a standstill of about a millisecond. QEMU drains block I/O
    /// when it stops a VM, so no DMA is in flight into a page pinned before
    /// its protection. A guest that was paused stays paused.
    ///
    /// After success and after failure, and also if this future is dropped,
    /// the guest runs as it did before.
    pub async fn start_log(&self) -> Result<(DirtyLog, Quiesced), DirectError> {
        let vm = self.vmm.name.clone();
        let log_error = |vm: &str| {
            let vm = vm.to_owned();
            move |source| DirectError::Log { vm, source }
        };
        let (process, layout) = (self.vmm.process.clone(), self.layout.clone());
        let mut log = blocking(move || DirtyLog::attach(process, layout))
            .await
            .map_err(log_error(&vm))?;
        // A task of its own: whoever waits for it may go, the guest goes on.
        let vmm = self.vmm.clone();
        let quiesce = tokio::spawn(async move {
            let begun = Instant::now();
            let was_running = stop_if_running(&vmm).await?;
            let (log, scan) = blocking(move || {
                let scan = log.restart();
                (log, scan)
            })
            .await;
            if was_running {
                vmm.qmp()?
                    .cont()
                    .await
                    .map_err(qmp_error(&vmm, "resuming it"))?;
            }
            let stopped = if was_running {
                begun.elapsed()
            } else {
                Duration::ZERO
            };
            let scan = scan.map_err(log_error(&vmm.name))?;
            Ok((log, Quiesced { stopped, scan }))
        });
        match quiesce.await {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    /// Whether the guest runs.
    pub async fn is_running(&self) -> Result<bool, DirectError> {
        let asked = self.vmm.qmp()?.status().await;
        let state = asked.map_err(qmp_error(&self.vmm, "asking for its state"))?;
        Ok(state == RunState::Running)
    }

    /// Stops the guest for stop-and-copy. Returns whether it was running: one
    /// that its operator has paused must not run on the target either.
    pub async fn pause(&self) -> Result<bool, DirectError> {
        stop_if_running(&self.vmm).await
    }

    /// What the VMM has to be told before [`Self::state_out`]; the guest may
    /// run meanwhile. [`Self::roll_back`] takes it back.
    pub async fn prepare_state_out(&self) -> Result<(), DirectError> {
        let set_up = setup::apply(self.vmm.qmp()?, Move::DeviceState).await;
        set_up.map_err(qmp_error(
            &self.vmm,
            "setting up the move of its device state",
        ))
    }

    /// Sends the device state to `target`, through a Unix socket made at
    /// `socket`, and waits until the *target's* VMM has said that it has all of
    /// it. The guest must be paused and its last pages must be in place;
    /// nothing of guest RAM goes through the socket.
    ///
    /// On success the VMM stands still for good: the target owns the VM as
    /// soon as the journal says so. On failure, [`Self::roll_back`].
    pub async fn state_out(
        &self,
        socket: &Path,
        target: impl AsyncRead + AsyncWrite,
        limit: Duration,
    ) -> Result<(), DirectError> {
        let relayed = |source| DirectError::Relay {
            vm: self.vmm.name.clone(),
            source,
        };
        let offered = OfferedSocket::bind(socket).map_err(|source| DirectError::Socket {
            vm: self.vmm.name.clone(),
            path: socket.to_owned(),
            source,
        })?;
        let relaying = async {
            let source = offered.accept(limit).await.map_err(relayed)?;
            relay(source, target, limit).await.map_err(relayed)
        };
        tokio::try_join!(relaying, self.push_state(socket, limit)).map(drop)
    }

    /// Sends the device state to the Unix socket `socket`, where somebody listens.
    pub async fn push_state(&self, socket: &Path, limit: Duration) -> Result<(), DirectError> {
        let vmm = &self.vmm;
        let qmp = vmm.qmp()?;
        let fail = |doing| qmp_error(vmm, doing);
        let state = qmp.status().await.map_err(fail("asking for its state"))?;
        if state == RunState::Running {
            let doing = "being paused; somebody resumed it";
            return Err(DirectError::RunState {
                vm: vmm.name.clone(),
                doing,
                have: state,
            });
        }
        let cursor = qmp.cursor();
        let uri = format!("unix:{}", socket.display());
        qmp.migrate(&uri)
            .await
            .map_err(fail("starting to send its device state"))?;
        let status = qmp
            .wait_migration_over(cursor, limit)
            .await
            .map_err(fail("sending its device state"))?;
        if status != MigrationStatus::Completed {
            let info = qmp.migration().await;
            let why = info
                .map_err(fail("asking why its device state stayed"))?
                .error_desc
                .unwrap_or_else(|| "QEMU gives no reason".into());
            return Err(DirectError::State {
                vm: vmm.name.clone(),
                status,
                why,
            });
        }
        Ok(())
    }

    /// [`roll_back`] of this VM.
    pub async fn roll_back(&self, run: bool) -> Result<(), DirectError> {
        roll_back(&self.vmm, run).await
    }

    /// Ends the source's VMM after the point of no return; `files`: of a VM
    /// that the agent started, removed as well.
    pub async fn end(self, files: Option<&VmPaths>) -> Result<(), DirectError> {
        let vm = self.vmm.name.clone();
        self.vmm
            .end()
            .await
            .map_err(|source| DirectError::End { vm, source })?;
        if let Some(paths) = files.cloned() {
            blocking(move || remove_files(&paths)).await;
        }
        Ok(())
    }
}

/// Lets a source go on after a failure before the point of no return: ends a
/// migration that may be under way, resumes the guest if `run`,
/// and takes back the settings under which a migration by somebody else would
/// leave guest RAM behind. Works from every state, also for an agent that has
/// been restarted meanwhile; guest RAM is as the guest left it.
pub async fn roll_back(vmm: &Vmm, run: bool) -> Result<(), DirectError> {
    let qmp = vmm.qmp()?;
    let fail = |doing| qmp_error(vmm, doing);
    qmp.cancel_migration()
        .await
        .map_err(fail("cancelling the move of its device state"))?;
    if run {
        until_finished(vmm).await?;
        resume(vmm).await?;
    }
    setup::undo(qmp)
        .await
        .map_err(fail("taking back its migration settings"))
}

/// A QEMU whose migration has failed needs a moment more: until then it refuses
/// to resume its guest ("Migration is not finalized yet").
async fn until_finished(vmm: &Vmm) -> Result<(), DirectError> {
    let qmp = vmm.qmp()?;
    let deadline = Instant::now() + FINISH_LIMIT;
    loop {
        let state = qmp.status().await;
        let state = state.map_err(qmp_error(vmm, "asking for its state"))?;
        if state != RunState::FinishMigrate || Instant::now() > deadline {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Lets a guest that has arrived run (or stand, unless `run`), and takes back
/// what its VMM was set up with to receive it. Only after the point of no
/// return; also for an agent that has been restarted meanwhile.
pub async fn resume_arrived(vmm: &Vmm, run: bool) -> Result<(), DirectError> {
    let qmp = vmm.qmp()?;
    let running = async {
        match run {
            true => resume(vmm).await,
            false => Ok(()),
        }
    };
    // All at once, and QEMU does what it is told in the order it is told: while
    // the guest stands still it answers at once, beside a guest that runs its
    // main loop waits for a processor each time.
    let (undone, running) = tokio::join!(biased; setup::undo(qmp), running);
    running?;
    // The guest runs; settings for its next move must not undo that.
    if let Err(error) = undone {
        tracing::warn!(vm = vmm.name, %error, "x-ignore-shared could not be switched off");
    }
    Ok(())
}

async fn resume(vmm: &Vmm) -> Result<(), DirectError> {
    let fail = |doing| qmp_error(vmm, doing);
    let qmp = vmm.qmp()?;
    let cursor = qmp.cursor();
    qmp.cont().await.map_err(fail("resuming it"))?;
    // QEMU says so before it answers; of one that ran already it does not.
    let told = qmp.events_since(cursor);
    if told.is_ok_and(|events| events.iter().any(|event| event.name == "RESUME")) {
        return Ok(());
    }
    match qmp.status().await.map_err(fail("asking for its state"))? {
        RunState::Running => Ok(()),
        have => Err(DirectError::RunState {
            vm: vmm.name.clone(),
            doing: "resuming it",
            have,
        }),
    }
}

/// Whether it was running (and is stopped now).
async fn stop_if_running(vmm: &Vmm) -> Result<bool, DirectError> {
    let qmp = vmm.qmp()?;
    let state = qmp
        .status()
        .await
        .map_err(qmp_error(vmm, "asking for its state"))?;
    match state {
        RunState::Paused | RunState::Postmigrate => Ok(false),
        RunState::Running => match qmp.stop().await {
            Ok(()) => Ok(true),
            Err(source) => {
                // It may still stop later: this makes it run on in any case.
                if let Err(error) = qmp.cont().await {
                    tracing::error!(vm = vmm.name, %error, "VM could not be resumed");
                }
                Err(qmp_error(vmm, "stopping it")(source))
            }
        },
        have => Err(DirectError::RunState {
            vm: vmm.name.clone(),
            doing: "looking at it",
            have,
        }),
    }
}

/// A VM on the host it is moved to. Dropped before [`TargetVm::keep`], its VMM
/// is killed and its files are removed.
#[derive(Debug)]
pub struct TargetVm {
    launched: Launched,
    ram: Arc<GuestRam>,
    listening: Option<Cursor>,
}

impl TargetVm {
    /// Starts a VMM that waits for the VM, checks it against the source's
    /// facts (`share=on` above all) and opens its RAM for placing pages.
    pub async fn prepare(
        definition: &Definition,
        paths: &VmPaths,
        host: &BTreeMap<String, String>,
        facts: &QemuFacts,
    ) -> Result<TargetVm, DirectError> {
        super::preflight::check_definition(facts, definition)?;
        let launched = Launched::start(definition, paths, host, Role::Incoming).await?;
        let vmm = launched.vmm();
        let layout = check_target(vmm, facts).await?;
        setup::apply(vmm.qmp()?, Move::DeviceState)
            .await
            .map_err(qmp_error(vmm, "setting up for incoming device state"))?;
        let ram =
            GuestRam::open(&vmm.process, &layout, true).map_err(|source| DirectError::Ram {
                vm: vmm.name.clone(),
                source,
            })?;
        Ok(TargetVm {
            launched,
            ram: Arc::new(ram),
            listening: None,
        })
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        self.launched.vmm()
    }
    /// Guest RAM, for placing pages. They are where the guest will find them.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Lets the VMM listen for device state on the Unix socket `socket`, which
    /// must not exist. Returns when it listens.
    pub async fn listen(&mut self, socket: &Path) -> Result<(), DirectError> {
        self.listening = Some(listen(self.vmm(), socket).await?);
        Ok(())
    }

    /// Waits until all device state has arrived; the guest is then paused.
    pub async fn wait_arrived(&self, limit: Duration) -> Result<(), DirectError> {
        wait_arrived(self.vmm(), self.listening, limit).await
    }

    /// Lets the guest run here. Only after the point of no return.
    pub async fn resume(&self) -> Result<(), DirectError> {
        resume_arrived(self.vmm(), true).await
    }

    /// The VM lives here from now on: its VMM and files stay when we go.
    pub fn keep(self) -> Vmm {
        self.launched.keep()
    }

    /// Ends the half-made VM and removes its files.
    pub async fn abort(self) {
        blocking(move || drop(self)).await;
    }
}

/// Lets a VMM listen for device state on the Unix socket `socket`, which must
/// not exist. Returns when it listens, with the place among its events.
pub(super) async fn listen(vmm: &Vmm, socket: &Path) -> Result<Cursor, DirectError> {
    let qmp = vmm.qmp()?;
    let cursor = qmp.cursor();
    let uri = format!("unix:{}", socket.display());
    let listening = qmp.migrate_incoming(&uri).await;
    listening.map_err(qmp_error(vmm, "listening for device state"))?;
    Ok(cursor)
}

/// Waits until all device state has arrived; the guest is then paused.
/// A VMM that cannot use the state ends itself: the error has its words.
pub(super) async fn wait_arrived(
    vmm: &Vmm,
    listening: Option<Cursor>,
    limit: Duration,
) -> Result<(), DirectError> {
    let qmp = vmm.qmp()?;
    let cursor = listening.unwrap_or_else(|| qmp.cursor());
    let status = match qmp.wait_migration_over(cursor, limit).await {
        Ok(status) => status,
        Err(error) => return Err(qmp_error(vmm, "receiving device state")(error)),
    };
    if status != MigrationStatus::Completed {
        let why = vmm.log_tail();
        return Err(DirectError::State {
            vm: vmm.name.clone(),
            status,
            why,
        });
    }
    // The event comes just before the run state changes.
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        let have = qmp
            .status()
            .await
            .map_err(qmp_error(vmm, "asking for its state"))?;
        match have {
            RunState::Paused => return Ok(()),
            RunState::Inmigrate if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            have => {
                let doing = "the arrival of its device state";
                return Err(DirectError::RunState {
                    vm: vmm.name.clone(),
                    doing,
                    have,
                });
            }
        }
    }
}
