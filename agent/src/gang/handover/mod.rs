//! The handover of one VM, driven by its source agent.
//!
//! ```text
//! rounds … Ready ── Switch ──▶ Barrier ▶ pause ▶ last pages ▶ Seal ▶ device state
//!          ▶ journal: committed ══ point of no return ══▶ Resume ▶ end the source
//! ```
//!
//! Here is the way to *loaded*: the target has everything. What follows, and
//! what follows instead if that fails, is decided by [`machine`] and done by
//! [`leaving`]; a restarted agent begins there.
//!
//! Before: the VM runs at the source with its RAM protected, its scan thread
//! has just started; the target's VMM waits.
//! After success: the VM is the target's, nothing of it is left here.
//! After failure: the VM is at the source as it was before (running, or paused
//! if its operator had paused it), and the target has cleaned up.
//! In between, for as long as it takes: committed, and the target has not
//! confirmed. The source's copy stands still and is kept.
//!
//! A VM whose manager drives its migration takes the same way to *loaded*, and
//! then its [`manager`] decides.
//!
//! See `docs/handover.md`.

pub mod care;
pub mod fence;
pub mod leaving;
mod live;
pub mod machine;
pub mod manager;
#[cfg(test)]
mod model;

use crate::dedup::fingerprint::FingerprintKey;
use crate::gang::coordinator::Caller;
use crate::gang::flight::Flight;
use crate::gang::message::{GangRequest, GangResponse, GangSpec, Verify};
use crate::gang::moments::{Moment, Moments};
use crate::gang::plant::{self, Plant};
use crate::gang::scan::{Command, Step};
use crate::gang::verify::full_digest;
use crate::net::{Kind, Roster, connect};
use crate::types::VmIndex;
pub use crate::types::chain;
use crate::vmm::kinds::SourceVm;
use leaving::Leaving;
pub use live::Live;
use machine::{RunsOn, Source, SourceEvent};
use manager::Managers;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// How long the target may take to settle outstanding references.
const SEAL_WAIT: Duration = Duration::from_secs(15);
/// How long device state may take.
const DEVICE_LIMIT: Duration = Duration::from_secs(30);
/// How long an answer to a short request of the handover may take.
const STEP_LIMIT: Duration = Duration::from_secs(10);
/// How long the last pages of a stopped guest may take.
const LAST_PAGES_LIMIT: Duration = Duration::from_secs(120);
/// How often a step that waits for others looks whether it is cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(10);
/// How long the debug hold waits for its go.
const HOLD_LIMIT: Duration = Duration::from_secs(30);

/// Who decides where the VM runs, and what goes on when the target has
/// everything, or when it cannot have it.
pub enum Decides<C> {
    /// The two agents, by their journals.
    Agents(Box<Leaving<C>>),
    /// The VM's manager.
    Manager(Managers<C>),
}

impl<C: Caller> Decides<C> {
    fn caller(&self) -> &Rc<C> {
        match self {
            Decides::Agents(leaving) => &leaving.caller,
            Decides::Manager(managers) => &managers.caller,
        }
    }

    fn moments(&self) -> &Moments {
        match self {
            Decides::Agents(leaving) => &leaving.moments,
            Decides::Manager(managers) => &managers.moments,
        }
    }

    /// Makes durable, where that is the agents' business, that the VM is here,
    /// and whether its guest, found stopped, is to be let run.
    pub async fn moving(&mut self, run: bool) -> Result<(), String> {
        match self {
            Decides::Agents(leaving) => leaving.moving(run).await,
            Decides::Manager(_) => Ok(()),
        }
    }

    fn ran(&mut self, run: bool) {
        if let Decides::Agents(leaving) = self {
            leaving.record.run = run;
        }
    }

    async fn run(self, source: SourceVm, moved: Result<(), String>) -> RunsOn {
        match self {
            Decides::Agents(mut leaving) => {
                let event = match moved {
                    Ok(()) => SourceEvent::Loaded,
                    Err(why) => {
                        source.break_off();
                        leaving.care.because(&why);
                        leaving.why = why;
                        SourceEvent::Failed
                    }
                };
                let decided = leaving.run(Source::Moving.on(event)).await;
                drop(source);
                decided
            }
            Decides::Manager(managers) => managers.run(moved).await,
        }
    }
}

/// One VM on its way out.
pub struct Handover<C> {
    /// What goes on when the target has everything, or when it cannot have it.
    pub decides: Decides<C>,
    /// Hears of that: the same as in `decides`.
    pub live: Rc<Live>,
    /// Opens the connection for device state.
    pub roster: Arc<Roster>,
    /// The gang.
    pub spec: GangSpec,
    /// What the scan thread shares.
    pub flight: Arc<Flight>,
    /// The VM.
    pub source: SourceVm,
    /// Key of the VM's dedup domain.
    pub key: Arc<FingerprintKey>,
    /// Where a socket for device state may be made.
    pub socket: PathBuf,
    /// To the scan thread.
    pub commands: Sender<Command>,
    /// From the scan thread.
    pub steps: mpsc::UnboundedReceiver<Step>,
    /// Becomes true when it is this VM's turn.
    pub turn: watch::Receiver<bool>,
    /// Tests look at both sides' RAM at the switch: see `[debug]` in agent.toml.
    pub hold: Option<PathBuf>,
}

impl<C: Caller> Handover<C> {
    fn vm(&self) -> VmIndex {
        self.flight.vm
    }

    fn name(&self) -> &str {
        &self.flight.name
    }

    async fn reach(&self, moment: Moment) {
        self.decides.moments().reach(moment, self.name()).await;
    }

    /// Runs the handover to its end, however long that takes.
    pub async fn run(mut self) -> RunsOn {
        let moved = self.until_loaded().await;
        self.decides.run(self.source, moved).await
    }

    /// Everything up to the moment where the target has the whole VM and has
    /// said so. The guest stands still afterwards.
    async fn until_loaded(&mut self) -> Result<(), String> {
        self.reach(Moment::Precopy).await;
        self.wait_for_turn().await?;
        self.reach(Moment::Switch).await;
        // A guest that may stop at any moment from here on stands still only
        // for what has to be done then.
        let mut device = None;
        if self.source.stops_by_itself() {
            self.may_be_stopped().await?;
            device = Some(self.prepare_device().await?);
        }
        let begun = self.source.begin(&self.socket).await;
        begun.map_err(|e| chain(&e))?;
        self.commands
            .send(Command::Switch)
            .map_err(|_| self.thread_gone())?;
        match self.next_step().await? {
            Step::Barrier => {}
            other => return Err(self.out_of_step(&other)),
        }
        let device = match device {
            Some(device) => device,
            None => {
                let device = self.prepare_device().await?;
                self.may_be_stopped().await?;
                device
            }
        };
        let pausing = Instant::now();
        let ran = self.source.pause().await.map_err(|e| chain(&e))?;
        self.decides.ran(ran);
        self.live
            .stopped_since(self.source.stopped_at().unwrap_or(pausing));
        self.live.lap(|stop| &mut stop.pause_ms);
        self.reach(Moment::Paused).await;
        self.source.report_rest().await.map_err(|e| chain(&e))?;
        // What that leaves out, the target never gets.
        if !plant::has(Plant::EarlyResume) {
            self.last_pages().await?;
        }
        self.live.lap(|stop| &mut stop.seal_ms);
        self.reach(Moment::Sealed).await;
        tokio::select! {
            sent = self.device_state(device) => sent?,
            () = self.cancelled() => return Err("cancelled".into()),
        }
        self.live.lap(|stop| &mut stop.device_ms);
        self.reach(Moment::DeviceSent).await;
        match self.flight.is_cancelled() {
            true => Err("cancelled".into()),
            false => Ok(()),
        }
    }

    /// Makes durable that whoever finds the guest stopped is to let it run, if
    /// it runs now.
    async fn may_be_stopped(&mut self) -> Result<(), String> {
        let runs = self.source.is_running().await.map_err(|e| chain(&e))?;
        self.decides.moving(runs).await
    }

    async fn cancelled(&self) {
        while !self.flight.is_cancelled() {
            tokio::time::sleep(CANCEL_POLL).await;
        }
    }

    /// Waits while the scan thread does its rounds, until the coordinator
    /// calls this VM's turn.
    async fn wait_for_turn(&mut self) -> Result<(), String> {
        let mut turn = self.turn.clone();
        tokio::select! {
            step = self.next_step() => Err(match step {
                Ok(step) => format!("VM {}: its scan thread said {step:?} too early", self.name()),
                Err(why) => why,
            }),
            turn = turn.wait_for(|turn| *turn) => {
                turn.map(drop).map_err(|_| "the gang was closed".to_owned())
            }
        }
    }

    async fn next_step(&mut self) -> Result<Step, String> {
        loop {
            match self.steps.recv().await {
                Some(Step::Ready) => self.reach(Moment::Ready).await,
                Some(Step::Failed(error)) => return Err(chain(&error)),
                Some(step) => return Ok(step),
                None => return Err(self.thread_gone()),
            }
        }
    }

    fn thread_gone(&self) -> String {
        format!(
            "VM {}: its scan thread has died; see the agent's log",
            self.name()
        )
    }

    fn out_of_step(&self, step: &Step) -> String {
        format!(
            "VM {}: its scan thread said {step:?} out of turn",
            self.name()
        )
    }

    /// Before: the guest is paused. After: the target has every page, and both
    /// sides' digests are equal.
    async fn last_pages(&mut self) -> Result<(), String> {
        self.commands
            .send(Command::Final)
            .map_err(|_| self.thread_gone())?;
        let sent = tokio::time::timeout(LAST_PAGES_LIMIT, self.next_step())
            .await
            .map_err(|_| {
                format!(
                    "VM {}: its last pages did not arrive within {} s",
                    self.name(),
                    LAST_PAGES_LIMIT.as_secs()
                )
            })?;
        let digest = match sent? {
            Step::Sent { digest } => digest,
            other => return Err(self.out_of_step(&other)),
        };
        self.live.lap(|stop| &mut stop.last_pages_ms);
        self.reach(Moment::LastPages).await;
        let full = self.spec.verify == Verify::Full;
        if full {
            self.reread(digest).await?;
        }
        let seal = GangRequest::Seal {
            gang: self.spec.id,
            vm: self.vm(),
            digest,
            full,
            wait_ms: SEAL_WAIT.as_millis() as u64,
        };
        let caller = self.decides.caller().clone();
        let target = self.flight.target.clone();
        let answer = caller.call(&target, seal, SEAL_WAIT + STEP_LIMIT);
        let answer = tokio::select! {
            answer = answer => answer?,
            // The thread goes on serving what the target still asks for; if it
            // fails, nothing will come of waiting.
            why = self.next_step() => return Err(match why {
                Ok(step) => self.out_of_step(&step),
                Err(why) => why,
            }),
        };
        match answer {
            GangResponse::Sealed {
                equal: true,
                pending: 0,
            } => {
                self.flight.update(|state| state.verified = true);
                Ok(())
            }
            GangResponse::Sealed { pending, .. } if pending > 0 => Err(format!(
                "VM {}: {pending} references were not settled within {} s at {}",
                self.name(),
                SEAL_WAIT.as_secs(),
                self.flight.target
            )),
            GangResponse::Sealed { .. } => Err(format!(
                "VM {}: guest RAM at {} differs from what was sent; the VM must not run there. \
                 This is a bug of drover or a fault of that host's memory: please report it",
                self.name(),
                self.flight.target
            )),
            other => Err(self.refused(other)),
        }
    }

    /// `--verify full` on this side: what RAM holds now is what was sent.
    async fn reread(&self, sent: [u8; 16]) -> Result<(), String> {
        let (ram, key) = (self.source.ram(), self.key.clone());
        let now = tokio::task::spawn_blocking(move || full_digest(&*ram, &key))
            .await
            .map_err(|panic| format!("reading RAM again panicked: {panic}"))?
            .map_err(|e| format!("RAM of VM {} cannot be read again: {e}", self.name()))?;
        match now == sent {
            true => Ok(()),
            false => Err(format!(
                "VM {}: its RAM differs from what was sent: a write was missed. The VM stays \
                 here; please report this",
                self.name()
            )),
        }
    }

    fn refused(&self, response: GangResponse) -> String {
        match response {
            GangResponse::Failed(why) => format!("{}: {why}", self.flight.target),
            _ => format!("{} answered something else than asked", self.flight.target),
        }
    }

    /// What can be made ready for the device state while the guest still runs.
    async fn prepare_device(&self) -> Result<Device, String> {
        let request = GangRequest::ExpectDevice {
            gang: self.spec.id,
            vm: self.vm(),
        };
        let ram = match self
            .decides
            .caller()
            .call(&self.flight.target, request, STEP_LIMIT)
            .await?
        {
            GangResponse::DeviceExpected { ram } => ram,
            other => return Err(self.refused(other)),
        };
        let stream = connect(
            &self.roster,
            &self.flight.target,
            Kind::DeviceState,
            self.spec.id,
            u64::from(self.vm().0),
            STEP_LIMIT,
        )
        .await
        .map_err(|e| chain(&e))?;
        Ok(Device {
            stream,
            target_ram: ram,
        })
    }

    /// Before: the target has every page. After: both VMMs say that the device
    /// state has arrived, both guests stand still.
    async fn device_state(&self, device: Device) -> Result<(), String> {
        let Device { stream, target_ram } = device;
        let sending = async {
            self.source
                .state_out(&self.socket, stream, DEVICE_LIMIT)
                .await
                .map_err(|e| chain(&e))
        };
        let arriving = async {
            let request = GangRequest::AwaitDevice {
                gang: self.spec.id,
                vm: self.vm(),
                wait_ms: DEVICE_LIMIT.as_millis() as u64,
            };
            match self
                .decides
                .caller()
                .call(&self.flight.target, request, DEVICE_LIMIT + STEP_LIMIT)
                .await?
            {
                GangResponse::Done => Ok(()),
                other => Err(self.refused(other)),
            }
        };
        tokio::try_join!(sending, arriving)?;
        self.hold_for_tests(&target_ram).await;
        Ok(())
    }

    /// Lets a test compare both sides' RAM at the switch; off unless
    /// `[debug] hold_at_switch` names a directory.
    async fn hold_for_tests(&self, target_ram: &str) {
        let Some(dir) = &self.hold else { return };
        let json = serde_json::json!({
            "source_ram": self.source.ram().place(),
            "target_ram": target_ram,
        });
        let ready = dir.join(format!("{}.ready", self.name()));
        let go = dir.join(format!("{}.go", self.name()));
        let tmp = dir.join(format!("{}.tmp", self.name()));
        let put =
            std::fs::write(&tmp, json.to_string()).and_then(|()| std::fs::rename(&tmp, &ready));
        if let Err(error) = put {
            tracing::warn!(%error, dir = %dir.display(), "no hold at the switch");
            return;
        }
        let until = Instant::now() + HOLD_LIMIT;
        while !go.exists() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// What is ready for the device state.
struct Device {
    stream: crate::net::Stream,
    target_ram: String,
}
