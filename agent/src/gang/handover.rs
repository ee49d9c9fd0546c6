//! The handover of one VM, driven by its source agent.
//!
//! ```text
//! rounds … Ready ── Switch ──▶ Barrier ▶ pause ▶ last pages ▶ Seal ▶ device state
//!          ▶ journal: committed ══ point of no return ══▶ Resume ▶ end the source
//! ```
//!
//! Before: the VM runs at the source with its RAM protected, its scan thread
//! has just started; the target's VMM waits.
//! After `Arrived`: the VM is the target's, nothing of it is left here.
//! After `Stayed`: the VM is at the source as it was before (running, or paused
//! if its operator had paused it), and the target has been told to clean up.
//! After `InDoubt`: the journal says *committed*, the target has not confirmed.
//! The source's copy stands still and is kept.
//!
//! See `docs/handover.md`.

use super::coordinator::Caller;
use super::flight::Flight;
use super::journal::{Journal, Record, Side, Step as JournalStep};
use super::message::{GangRequest, GangResponse, GangSpec, Phase, Verify};
use super::moments::{Moment, Moments};
use super::plant::{self, Plant};
use super::scan::{Command, Step};
use super::verify::full_digest;
use crate::dedup::fingerprint::FingerprintKey;
use crate::net::{Kind, Roster, connect};
use crate::types::VmIndex;
use crate::vmm::definition::VmPaths;
use crate::vmm::direct::SourceVm;
use crate::vmm::relay::relay;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};

/// How long the target may take to settle outstanding references.
const SEAL_WAIT: Duration = Duration::from_secs(15);
/// How long device state may take.
const DEVICE_LIMIT: Duration = Duration::from_secs(30);
/// How long an answer to a short request of the handover may take.
const STEP_LIMIT: Duration = Duration::from_secs(10);
/// How long `Resume` is repeated before the VM is in doubt.
const RESUME_LIMIT: Duration = Duration::from_secs(30);
/// How long the debug hold waits for its go.
const HOLD_LIMIT: Duration = Duration::from_secs(30);

/// How a VM's migration ended.
#[derive(Debug)]
pub enum End {
    /// It is the target's.
    Arrived,
    /// It is the source's, for this reason.
    Stayed(String),
    /// Committed, but not confirmed.
    InDoubt(String),
}

/// One VM on its way out.
pub struct Handover<C> {
    /// Reaches the target agent.
    pub caller: Rc<C>,
    /// Opens the connection for device state.
    pub roster: Arc<Roster>,
    /// Where the point of no return is written.
    pub journal: Journal,
    /// The gang.
    pub spec: GangSpec,
    /// What the scan thread shares.
    pub flight: Arc<Flight>,
    /// The VM.
    pub source: SourceVm,
    /// Its files, if this agent made them.
    pub files: Option<VmPaths>,
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
    /// Tests stop the handover at these.
    pub moments: Moments,
}

/// An error before the point of no return, and what it left.
struct Failure {
    why: String,
    /// Whether the guest was running when it was paused for the switch; `None`
    /// if it was not paused.
    paused: Option<bool>,
}

impl<C: Caller> Handover<C> {
    fn vm(&self) -> VmIndex {
        self.flight.vm
    }

    fn name(&self) -> &str {
        &self.flight.name
    }

    async fn reach(&self, moment: Moment) {
        self.moments.reach(moment, self.name()).await;
    }

    /// Runs the handover to its end, whatever that is.
    pub async fn run(mut self) -> End {
        let stopped = match self.until_committed().await {
            Ok(stopped) => stopped,
            Err(failure) => return self.stay(failure).await,
        };
        // The point of no return has been passed: from here on only the
        // target may run the VM.
        let (was_running, since) = stopped;
        match self.resume_at_target(was_running).await {
            Ok(()) => {}
            Err(why) => {
                let why = format!(
                    "VM {}: the handover was committed, but {} did not confirm that it runs \
                     ({why}). It is kept paused at {}: ask the target with `drover vm list` \
                     before anything else",
                    self.name(),
                    self.flight.target,
                    self.spec.vm(self.vm()).map_or("?", |v| &v.from)
                );
                self.finish(Phase::Failed, Some(&why));
                return End::InDoubt(why);
            }
        }
        let downtime = since.elapsed().as_secs_f64() * 1e3;
        if plant::has(Plant::EarlyResume) {
            let _too_late = self.last_pages().await;
        }
        self.reach(Moment::Resumed).await;
        self.flight
            .update(|state| state.downtime_ms = Some(downtime));
        let _thread_gone = self.commands.send(Command::Done);
        self.reach(Moment::EndingSource).await;
        if let Err(error) = self.source.end(self.files.as_ref()).await {
            tracing::error!(vm = %self.flight.name, %error,
                "the VM runs at its target, but its paused copy could not be ended here");
        }
        self.moments
            .reach(Moment::SourceEnded, &self.flight.name)
            .await;
        if let Err(error) = self.journal.forget(&self.flight.name) {
            tracing::warn!(%error, "journal entry stays");
        }
        self.flight.set_phase(Phase::Arrived);
        End::Arrived
    }

    fn finish(&self, phase: Phase, error: Option<&str>) {
        self.flight.update(|state| {
            state.phase = phase;
            state.error = error.map(str::to_owned);
        });
    }

    /// One way out for every failure before the point of no return: the guest
    /// goes on as it was, the target is told, the scan thread ends (which
    /// lifts the protection).
    async fn stay(self, failure: Failure) -> End {
        let cancelled = self.flight.is_cancelled();
        self.flight.cancel();
        if let Some(was_running) = failure.paused
            && let Err(error) = self.source.roll_back(was_running).await
        {
            tracing::error!(vm = %self.name(), %error, "VM could not be resumed; \
                resume it by `cont` on its monitor");
        }
        self.reach(Moment::RolledBack).await;
        let abort = GangRequest::Abort {
            gang: self.spec.id,
            vm: self.vm(),
            why: failure.why.clone(),
        };
        if let Err(why) = self
            .caller
            .call(&self.flight.target, abort, STEP_LIMIT)
            .await
        {
            tracing::warn!(vm = %self.name(), %why, "the target will clean up by itself");
        }
        if let Err(error) = self.journal.forget(self.name()) {
            tracing::warn!(%error, "journal entry stays");
        }
        tracing::warn!(vm = %self.name(), why = %failure.why, "VM stays here and runs on");
        let phase = if cancelled {
            Phase::Cancelled
        } else {
            Phase::Failed
        };
        self.finish(phase, (!cancelled).then_some(failure.why.as_str()));
        End::Stayed(failure.why)
    }

    /// Everything up to the point of no return. Returns whether the guest was
    /// running before the switch, and since when it stands still.
    async fn until_committed(&mut self) -> Result<(bool, Instant), Failure> {
        let running = |why| Failure { why, paused: None };
        self.record(JournalStep::Moving).map_err(running)?;
        self.reach(Moment::JournalMoving).await;
        self.reach(Moment::Precopy).await;
        self.wait_for_turn().await.map_err(running)?;
        self.reach(Moment::Switch).await;
        self.commands
            .send(Command::Switch)
            .map_err(|_| running(self.thread_gone()))?;
        match self.next_step().await.map_err(running)? {
            Step::Barrier => {}
            other => return Err(running(self.out_of_step(&other))),
        }
        let device = self.prepare_device().await.map_err(running)?;
        let since = Instant::now();
        let was_running = self.source.pause().await.map_err(|e| running(chain(&e)))?;
        let paused = |why| Failure {
            why,
            paused: Some(was_running),
        };
        self.reach(Moment::Paused).await;
        if !plant::has(Plant::EarlyResume) {
            self.last_pages().await.map_err(paused)?;
        }
        self.reach(Moment::Sealed).await;
        self.device_state(device).await.map_err(paused)?;
        self.reach(Moment::DeviceSent).await;
        if self.flight.is_cancelled() {
            return Err(paused("cancelled".into()));
        }
        self.reach(Moment::Committing).await;
        self.record(JournalStep::Committed).map_err(paused)?;
        self.reach(Moment::Committed).await;
        Ok((was_running, since))
    }

    fn record(&self, step: JournalStep) -> Result<(), String> {
        self.journal
            .write(&Record {
                gang: self.spec.id,
                vm: self.name().to_owned(),
                side: Side::Source,
                step,
                peer: self.flight.target.clone(),
            })
            .map_err(|e| e.to_string())
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
        let digest = match self.next_step().await? {
            Step::Sent { digest } => digest,
            other => return Err(self.out_of_step(&other)),
        };
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
        let caller = self.caller.clone();
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
        let (ram, key) = (self.source.ram().clone(), self.key.clone());
        let now = tokio::task::spawn_blocking(move || full_digest(&ram, &key))
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
            .caller
            .call(&self.flight.target, request, STEP_LIMIT)
            .await?
        {
            GangResponse::DeviceExpected { ram } => ram,
            other => return Err(self.refused(other)),
        };
        let _stale = std::fs::remove_file(&self.socket);
        let listener = UnixListener::bind(&self.socket)
            .map_err(|e| format!("socket {}: {e}", self.socket.display()))?;
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
            listener,
            stream,
            target_ram: ram,
        })
    }

    /// Before: the target has every page. After: both VMMs say that the device
    /// state has arrived, both guests stand still.
    async fn device_state(&self, device: Device) -> Result<(), String> {
        let Device {
            listener,
            stream,
            target_ram,
        } = device;
        let relaying = async {
            let (vmm, _) = listener.accept().await.map_err(|e| e.to_string())?;
            relay(vmm, stream, DEVICE_LIMIT)
                .await
                .map_err(|e| chain(&e))
        };
        let sending = async {
            self.source
                .state_out(&self.socket, DEVICE_LIMIT)
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
                .caller
                .call(&self.flight.target, request, DEVICE_LIMIT + STEP_LIMIT)
                .await?
            {
                GangResponse::Done => Ok(()),
                other => Err(self.refused(other)),
            }
        };
        let outcome = tokio::try_join!(relaying, sending, arriving);
        let _ = std::fs::remove_file(&self.socket);
        outcome?;
        self.hold_for_tests(&target_ram).await;
        Ok(())
    }

    /// Lets a test compare both sides' RAM at the switch; off unless
    /// `[debug] hold_at_switch` names a directory.
    async fn hold_for_tests(&self, target_ram: &str) {
        let Some(dir) = &self.hold else { return };
        let json = serde_json::json!({
            "source_ram": self.source.ram().path(),
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

    async fn resume_at_target(&self, run: bool) -> Result<(), String> {
        let until = Instant::now() + RESUME_LIMIT;
        loop {
            let request = GangRequest::Resume {
                gang: self.spec.id,
                vm: self.vm(),
                run,
            };
            let asking = self.caller.call(&self.flight.target, request, STEP_LIMIT);
            let (answer, ()) = tokio::join!(asking, self.reach(Moment::ResumeSent));
            let why = match answer {
                Ok(GangResponse::Done) => return Ok(()),
                Ok(other) => self.refused(other),
                Err(why) => why,
            };
            if Instant::now() > until {
                return Err(why);
            }
            tracing::warn!(vm = %self.name(), %why, "target has not confirmed; asking again");
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }
}

/// What is ready for the device state.
struct Device {
    listener: UnixListener,
    stream: crate::net::Stream,
    target_ram: String,
}

/// An error with its sources, in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
