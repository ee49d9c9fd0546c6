//! A hostile agent that was given a part in a gang: it takes what is sent to
//! it, serves rubbish as a holder, tells lies as a claim shard, and as a source
//! does what [`super::source`] has in store.

use super::identity::Identity;
use super::source::Source;
use anyhow::{Context, Result, bail};
use drover::gang::handover::machine::Whose;
use drover::gang::message::{CoreState, GangRequest, GangResponse, GangSpec, Phase, VmState};
use drover::lane::{
    BatchSink, DecodedBatch, LaneReceiver, LaneStream, Placement, ReceiveConfig, SinkError,
};
use drover::net::listener::ConnectionPermit;
use drover::net::rack::{
    ClaimAnswer, ClaimOp, ClaimReply, ClaimServer, NotOfTheGang, PageServer, RackLimits,
    RackService, Served, Wanted,
};
use drover::net::rpc::{RpcHandler, RpcLimits, serve};
use drover::net::{ConnectionHandler, Hello, Incoming, Kind, Listener, ListenerLimits};
use drover::types::{GangId, HolderId, Page, VmIndex};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;

/// The host that liars say has everything.
pub const ACCOMPLICE: &str = "r2h2";

/// What a hostile member has seen and done, for the test.
#[derive(Debug, Default)]
pub struct Seen {
    /// The gang it was opened into.
    pub gang: OnceLock<GangSpec>,
    /// Claims that it answered with lies.
    pub claims: AtomicU64,
    /// Pages that were asked of it and answered with rubbish.
    pub rubbish: AtomicU64,
    /// Batches that it took and threw away.
    pub batches: AtomicU64,
    /// What it did as a source, and what came of it.
    pub acts: Mutex<Acts>,
    /// Whether that was all.
    pub lied: AtomicBool,
}

/// Acts, and what came of each.
pub type Acts = Vec<(&'static str, Result<String>)>;

impl Seen {
    /// Writes down what came of an act.
    pub fn note(&self, act: &'static str, outcome: Result<String>) {
        let mut acts = self.acts.lock().unwrap_or_else(PoisonError::into_inner);
        acts.push((act, outcome));
    }
}

/// A hostile member that runs. Dropping it ends it.
#[derive(Debug)]
pub struct Member {
    /// What it has seen.
    pub seen: Arc<Seen>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Member {
    /// Starts the program in the place of the host's agent. `source`: what it
    /// does once a VM is to leave it.
    ///
    /// # Errors
    /// When it has no thread; that it cannot listen shows in [`Member::finish`].
    pub fn start(identity: Identity, source: Option<Source>) -> Result<Member> {
        let seen = Arc::new(Seen::default());
        let (stop, stopped) = oneshot::channel();
        let shared = seen.clone();
        let thread = std::thread::Builder::new()
            .name("hostile".into())
            .spawn(move || identity.run(live(&identity, shared, source, stopped)))?;
        Ok(Member {
            seen,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Waits until it was given its part.
    ///
    /// # Errors
    /// When that takes longer than 20 s.
    pub fn await_gang(&self) -> Result<GangSpec> {
        for _ in 0..2000 {
            if let Some(spec) = self.seen.gang.get() {
                return Ok(spec.clone());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("the hostile member was not opened into a gang")
    }

    /// Waits until it has done all it does as a source; what came of it.
    ///
    /// # Errors
    /// When that takes longer than two minutes.
    pub fn finished(&self) -> Result<Acts> {
        for _ in 0..2400 {
            if self.seen.lied.load(Relaxed) {
                let acts = self.seen.acts.lock();
                let mut acts = acts.unwrap_or_else(PoisonError::into_inner);
                return Ok(std::mem::take(&mut *acts));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("the hostile source has not come to an end")
    }

    /// Ends it.
    ///
    /// # Errors
    /// What went wrong in it.
    pub fn finish(mut self) -> Result<()> {
        drop(self.stop.take());
        let thread = self.thread.take().context("ended already")?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

/// The program, as its threads share it.
struct Liar {
    seen: Arc<Seen>,
    identity: Identity,
    rack: RackService,
    source: Option<Source>,
    lanes: RefCell<Vec<(LaneReceiver, ConnectionPermit)>>,
}

async fn live(
    identity: &Identity,
    seen: Arc<Seen>,
    source: Option<Source>,
    stopped: oneshot::Receiver<()>,
) -> Result<()> {
    let roster = identity.roster.clone();
    let listener = Listener::bind(identity.listen, ListenerLimits::default())?;
    let rack = RackService::start(
        roster.clone(),
        Arc::new(LyingShard(seen.clone())),
        Arc::new(LyingHolder(seen.clone())),
        Box::new(|_, _| {}),
        RackLimits::default(),
    )?;
    let liar = Rc::new(Liar {
        seen,
        identity: identity.clone(),
        rack,
        source,
        lanes: RefCell::default(),
    });
    tokio::select! {
        () = listener.run(roster, Rc::new(Door(liar.clone()))) => {}
        _ = stopped => {}
    }
    let lanes = std::mem::take(&mut *liar.lanes.borrow_mut());
    for (lane, _) in &lanes {
        lane.close(Duration::from_millis(200));
    }
    Ok(())
}

/// Every content is held elsewhere, and nobody needs to send any.
struct LyingShard(Arc<Seen>);

impl ClaimServer for LyingShard {
    fn handle(&self, _: GangId, _: &str, op: ClaimOp) -> Result<ClaimReply, NotOfTheGang> {
        let ClaimOp::Claim { fps, holder } = op else {
            return Ok(ClaimReply::Done);
        };
        self.0.claims.fetch_add(fps.len() as u64, Relaxed);
        let accomplice = self.0.gang.get().and_then(|gang| gang.holder(ACCOMPLICE));
        let answer = |fp: &drover::types::Fingerprint| ClaimAnswer::Held {
            holder: match fp.0[1] % 4 {
                0 => holder,
                // No host of the gang has that number.
                1 => HolderId(99),
                _ => accomplice.unwrap_or(holder),
            },
            arrived: true,
        };
        Ok(ClaimReply::Claims(fps.iter().map(answer).collect()))
    }
}

/// Wrong content, or never any.
struct LyingHolder(Arc<Seen>);

impl PageServer for LyingHolder {
    fn admit(&self, _: GangId, _: &str) -> Result<(), NotOfTheGang> {
        Ok(())
    }

    fn serve(&self, _: GangId, wanted: &Wanted, page: &mut Page) -> Served {
        self.0.rubbish.fetch_add(1, Relaxed);
        match wanted.fp.0[2] % 8 {
            0 => Served::NotYet,
            1 => Served::Gone,
            rubbish => {
                page.fill(rubbish);
                Served::Page
            }
        }
    }
}

/// Takes every batch and keeps none.
struct Swallow(Arc<Seen>);

impl BatchSink for Swallow {
    fn ram_pages(&self, _: GangId, _: VmIndex) -> Option<u32> {
        Some(1 << 20)
    }

    fn batch(&self, _: &DecodedBatch<'_>) -> Result<Placement, SinkError> {
        self.0.batches.fetch_add(1, Relaxed);
        Ok(Placement::Placed)
    }
}

struct Door(Rc<Liar>);

impl ConnectionHandler for Door {
    fn admit(&self, _: &Hello) -> Result<(), String> {
        Ok(())
    }

    fn handle(&self, incoming: Incoming) {
        let liar = self.0.clone();
        match incoming.hello.kind {
            Kind::Control => {
                let parts = Rc::new(Part(liar));
                tokio::task::spawn_local(serve(incoming, RpcLimits::default(), parts));
            }
            // What cannot be taken over is hung up on, as agents do.
            Kind::Rack => drop(liar.rack.adopt(incoming)),
            Kind::Lane => drop(tokio::task::spawn_local(async move {
                liar.take_lane(incoming).await;
            })),
            Kind::DeviceState => drop(incoming),
        }
    }
}

impl Liar {
    async fn take_lane(&self, incoming: Incoming) {
        let (peer, permit) = (incoming.hello.from.clone(), incoming.permit);
        let lane = incoming.stream.into_lane();
        let Ok(stream) = lane.and_then(|lane| LaneStream::new(lane.tcp, lane.secrets)) else {
            return;
        };
        let sink = Arc::new(Swallow(self.seen.clone()));
        let started = tokio::task::spawn_blocking(move || {
            LaneReceiver::start(stream, ReceiveConfig::new(peer), sink)
        });
        if let Ok(Ok(receiver)) = started.await {
            self.lanes.borrow_mut().push((receiver, permit));
        }
    }

    /// Where the VM stands that was to leave: on its way, for as long as there
    /// is something left to do to the others.
    fn progress(&self) -> Vec<VmState> {
        let Some(spec) = self.seen.gang.get() else {
            return Vec::new();
        };
        let leaving = spec.leaving(self.identity.name());
        let state = |(vm, _)| {
            let mut state = VmState::new(vm);
            state.phase = Phase::Precopy;
            if self.seen.lied.load(Relaxed) {
                state.phase = Phase::Failed;
                state.error = Some("it was never there".into());
            }
            state
        };
        leaving.map(state).collect()
    }
}

struct Part(Rc<Liar>);

impl RpcHandler<GangRequest, GangResponse> for Part {
    async fn call(self: Rc<Self>, _: Rc<str>, request: GangRequest) -> GangResponse {
        use GangRequest as R;
        let liar = &self.0;
        match request {
            R::CheckSource { vm } => match &liar.source {
                Some(source) => match source.facts(&liar.identity, &vm).await {
                    Ok(facts) => GangResponse::Source(facts),
                    Err(error) => GangResponse::Failed(format!("{error:#}")),
                },
                None => GangResponse::Failed("no VM leaves here".into()),
            },
            R::Open(spec) => {
                // Only the first is of interest.
                let _ = liar.seen.gang.set(spec);
                GangResponse::Done
            }
            R::StartSource { gang, .. } => {
                let liar = liar.clone();
                tokio::task::spawn_local(async move {
                    if let (Some(source), Some(spec)) = (&liar.source, liar.seen.gang.get()) {
                        assert_eq!(spec.id, gang, "one gang a hostile member");
                        source
                            .lie(&liar.identity, &liar.rack, spec, &liar.seen)
                            .await;
                    }
                    liar.seen.lied.store(true, Relaxed);
                });
                GangResponse::Done
            }
            R::Progress { .. } => GangResponse::Progress(liar.progress()),
            R::Core => GangResponse::Core(CoreState::default()),
            R::WhoseIs { .. } => GangResponse::Whose(Whose::Mine),
            R::Seal { .. } | R::ExpectDevice { .. } | R::AwaitDevice { .. } | R::Resume { .. } => {
                GangResponse::Failed("this host takes VMs and gives nothing back".into())
            }
            _ => GangResponse::Done,
        }
    }

    fn notice(&self, _: &str, _: GangRequest) {}

    fn lost(&self, _: &str, _: &str) {}

    fn offence(&self, _: &str, _: &str) {}
}
