//! VMs that arrive at this host, until they have all their device state; then
//! [`super::landing`] goes on.

use super::Agent;
use super::gangs::LocalGang;
use crate::api::types::VmInfo;
use crate::dedup::fingerprint::FingerprintKey;
use crate::dedup::resolve::TargetConfig;
use crate::dedup::target_vm::TargetVm as Placed;
use crate::gang::handover::care::Care;
use crate::gang::handover::chain;
use crate::gang::handover::machine::{RunsOn, Target, TargetEvent};
use crate::gang::journal::{Record, Side, Step};
use crate::gang::message::{Digest, GangResponse, GangSpec, SourceFacts};
use crate::gang::moments::Moment;
use crate::gang::target::TargetGang;
use crate::gang::verify::full_digest;
use crate::net::Incoming;
use crate::types::{GangId, VmIndex};
use crate::vmm::definition::{Definition, VmPaths};
use crate::vmm::direct::TargetVm;
use crate::vmm::launch::{Vmm, has_leftover};
use crate::vmm::ram::{GuestRam, free_bytes};
use crate::vmm::relay::relay;
use std::cell::{Cell, RefCell};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::UnixStream;

/// How long the relay of device state may stand still.
const RELAY_IDLE: Duration = Duration::from_secs(30);
/// How often outstanding references are looked at while the guest waits.
const SEAL_POLL: Duration = Duration::from_millis(1);
/// References that are still outstanding after this are asked for anew: the
/// first request may have been lost with its lane.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// One VM on its way in.
pub(super) struct Arrival {
    pub(super) gang: GangId,
    pub(super) name: String,
    /// The agent it comes from.
    pub(super) from: String,
    pub(super) definition: Definition,
    pub(super) files: VmPaths,
    ram_bytes: u64,
    pub(super) socket: PathBuf,
    /// While pages are placed; a restarted agent has none of it.
    pages: RefCell<Option<Pages>>,
    vmm: RefCell<Held>,
    state: Cell<Target>,
    /// Whether its guest is to run.
    pub(super) run: Cell<bool>,
    pub(super) care: Rc<Care>,
    /// When its source spoke last.
    heard: Cell<Instant>,
    /// How long the last record took to become durable.
    pub(super) journal_took: Cell<Duration>,
    /// Somebody is looking after it.
    pub(super) minded: Cell<bool>,
    pub(super) fenced: Cell<Option<Instant>>,
    /// Serialises the steps of the handover.
    pub(super) step: tokio::sync::Mutex<()>,
}

/// What there is of the VM here.
pub(super) enum Held {
    /// A stopped VMM that ends with us.
    Waiting(Box<TargetVm>),
    /// One that lives on without us: it has all of its state.
    Kept(Vmm),
    /// None, or it is out of reach for the moment.
    Nothing,
}

/// What pages are placed with.
struct Pages {
    side: Arc<TargetGang>,
    index: VmIndex,
    placed: Arc<Placed>,
    ram: Arc<GuestRam>,
    key: Arc<FingerprintKey>,
}

impl Agent {
    /// Whether a VM could be taken in. Touches nothing.
    pub(super) fn check_target(&self, name: &str, facts: &SourceFacts) -> Result<(), String> {
        self.journal.check().map_err(|e| e.to_string())?;
        self.acceptable(name, facts).map(drop)
    }

    fn acceptable(&self, name: &str, facts: &SourceFacts) -> Result<Definition, String> {
        if self.vms.get(name).is_some() {
            return Err(format!("a VM {name} is on {} already", self.name()));
        }
        let definition = Definition::parse(&format!("definition of VM {name}"), &facts.definition)
            .map_err(|e| chain(&e))?;
        if definition.name != name {
            return Err(format!(
                "the definition sent for VM {name} is of {}",
                definition.name
            ));
        }
        if !self.config.qemu_binaries.contains(&definition.binary) {
            return Err(format!(
                "VM {name} wants {}, which is not among `qemu_binaries` in {} of {}",
                definition.binary.display(),
                self.config.file.display(),
                self.name()
            ));
        }
        let files = VmPaths::new(&self.config.run_dir, &self.config.ram_dir, name);
        definition
            .expand(&files, &self.config.placeholders)
            .map_err(|e| chain(&e))?;
        let free = free_bytes(&self.config.ram_dir).map_err(|e| chain(&e))?;
        let promised = self.promised_bytes();
        if facts.direct.ram_bytes > free.saturating_sub(promised) {
            return Err(format!(
                "no room for VM {name} on {}: it has {} MiB of RAM; {} has {} MiB free, {} MiB of \
                 them promised to other VMs of running gangs. Free memory there or plan another \
                 target",
                self.name(),
                facts.direct.ram_bytes >> 20,
                self.config.ram_dir.display(),
                free >> 20,
                promised >> 20
            ));
        }
        Ok(definition)
    }

    /// Bytes of RAM files of arriving VMs that are not filled yet.
    fn promised_bytes(&self) -> u64 {
        let landings = self.landings.borrow();
        let unfilled = |a: &&Rc<Arrival>| matches!(a.state(), Target::Waiting | Target::Loaded);
        landings
            .iter()
            .filter(unfilled)
            .map(|a| {
                let used = std::fs::metadata(&a.files.ram).map_or(0, |m| m.blocks() * 512);
                a.ram_bytes.saturating_sub(used)
            })
            .sum()
    }

    /// What the VMs of a gang that arrive here share.
    pub(super) fn target_gang(&self, spec: &GangSpec) -> Result<Arc<TargetGang>, String> {
        let me = spec
            .holder(self.name())
            .ok_or("this host is not in the gang's roster")?;
        let limits = self.policy().limits;
        let config = TargetConfig {
            side_cache_bytes: limits.side_cache_bytes as usize,
            ..TargetConfig::default()
        };
        Ok(TargetGang::new(
            spec.clone(),
            me,
            config,
            self.rack.fetches(),
            limits.fetch_deadline,
            Box::new(self.rack.waker()),
        ))
    }

    /// Makes the RAM file, starts the incoming VMM and checks both. On failure
    /// nothing is left here.
    pub(super) async fn prepare_target(
        &self,
        gang: &LocalGang,
        index: VmIndex,
        facts: SourceFacts,
    ) -> Result<(), String> {
        let plan = gang.spec.vm(index).filter(|vm| vm.to == self.name());
        let plan = plan.ok_or("that VM does not arrive at this host")?;
        let side = gang
            .target
            .as_ref()
            .ok_or("no VM of the gang arrives at this host")?;
        if self.landing(gang.spec.id, &plan.name).is_some() {
            return Ok(());
        }
        let definition = self.acceptable(&plan.name, &facts)?;
        let files = VmPaths::new(&self.config.run_dir, &self.config.ram_dir, &plan.name);
        let record = Record {
            gang: gang.spec.id,
            vm: plan.name.clone(),
            side: Side::Target,
            step: Step::Moving,
            peer: plan.from.clone(),
            run: false,
        };
        self.journal.write(&record).map_err(|e| e.to_string())?;
        let made = self.make_target(gang, side, index, definition, files, &facts);
        match made.await {
            Ok(arrival) => {
                tracing::info!(vm = %plan.name, from = %plan.from, "incoming VMM waits");
                let arrival = Rc::new(arrival);
                gang.arrivals.borrow_mut().insert(index, arrival.clone());
                self.landings.borrow_mut().push(arrival.clone());
                self.cares.borrow_mut().push(arrival.care.clone());
                self.moments.reach(Moment::Prepared, &plan.name).await;
                if self.gang(gang.spec.id).is_err() {
                    arrival.care.because("its gang was closed meanwhile");
                    self.land(&arrival, TargetEvent::GiveUp).await;
                    return Err("the gang was closed meanwhile".to_owned());
                }
                Ok(())
            }
            Err(why) => {
                if let Err(error) = self.journal.forget(&plan.name, gang.spec.id) {
                    tracing::warn!(%error, "journal entry stays");
                }
                Err(why)
            }
        }
    }

    async fn make_target(
        &self,
        gang: &LocalGang,
        side: &Arc<TargetGang>,
        index: VmIndex,
        definition: Definition,
        files: VmPaths,
        facts: &SourceFacts,
    ) -> Result<Arrival, String> {
        let plan = gang.spec.vm(index).ok_or("no such VM")?;
        self.moments.reach(Moment::Preparing, &plan.name).await;
        let host = &self.config.placeholders;
        let waiting = TargetVm::prepare(&definition, &files, host, &facts.direct)
            .await
            .map_err(|e| chain(&e))?;
        let key = Arc::new(FingerprintKey::derive(&self.secret, &definition.domain));
        let ram = waiting.ram().clone();
        let placed = side
            .add_vm(index, ram.clone(), key.clone())
            .map_err(|e| chain(&e))?;
        let pages = Pages {
            side: side.clone(),
            index,
            placed,
            ram,
            key,
        };
        let held = Held::Waiting(Box::new(waiting));
        let care = Care::new(gang.spec.id, &plan.name, Side::Target, &plan.from, "");
        let arrival = Arrival::new(&plan.from, definition, files, held, Target::Waiting, care);
        *arrival.pages.borrow_mut() = Some(pages);
        Ok(arrival)
    }

    /// Waits until every reference is settled, then compares.
    pub(super) async fn seal(
        &self,
        gang: &LocalGang,
        index: VmIndex,
        digest: Digest,
        full: bool,
        wait: Duration,
    ) -> Result<GangResponse, String> {
        let arrival = gang.arrival(index).ok_or("that VM is not arriving here")?;
        let _step = arrival.step.lock().await;
        arrival.heard();
        let (side, work) = arrival.check_work()?;
        self.moments.reach(Moment::Sealing, &arrival.name).await;
        let until = Instant::now() + wait;
        let mut ask_again = Instant::now() + ASK_AGAIN;
        loop {
            if let Some(why) = side.failure(index) {
                return Err(format!("VM {}: {why}", arrival.name));
            }
            let pending = work.placed.counts().pending;
            if pending == 0 {
                break;
            }
            if Instant::now() > until {
                return Ok(GangResponse::Sealed {
                    equal: false,
                    pending,
                });
            }
            if Instant::now() > ask_again {
                ask_again = Instant::now() + ASK_AGAIN;
                side.ask_again(index, &work.placed);
            }
            tokio::time::sleep(SEAL_POLL).await;
        }
        let (store, placed) = (side.clone(), work.placed.clone());
        let equal = tokio::task::spawn_blocking(move || {
            let here = store.store.complete(&work.placed);
            here.pending == 0 && here.digest == digest && (!full || work.reread(&here.digest))
        })
        .await
        .map_err(|panic| format!("comparing digests panicked: {panic}"))?;
        if let Some(why) = side.failure(index) {
            return Err(format!("VM {}: {why}", arrival.name));
        }
        if equal {
            side.store.seal(&placed);
        }
        Ok(GangResponse::Sealed { equal, pending: 0 })
    }

    /// Lets the VMM listen for device state.
    pub(super) async fn expect_device(
        &self,
        gang: &LocalGang,
        index: VmIndex,
    ) -> Result<GangResponse, String> {
        let arrival = gang.arrival(index).ok_or("that VM is not arriving here")?;
        let _step = arrival.step.lock().await;
        arrival.heard();
        let mut vm = arrival.take_waiting()?;
        let listening = vm.listen(&arrival.socket).await.map_err(|e| chain(&e));
        arrival.hold(Held::Waiting(vm));
        listening?;
        self.moments
            .reach(Moment::DeviceExpected, &arrival.name)
            .await;
        Ok(GangResponse::DeviceExpected {
            ram: arrival.files.ram.display().to_string(),
        })
    }

    /// Waits until the VMM has all device state. Once this has said so, this
    /// side may not give the VM up by itself any more.
    pub(super) async fn await_device(
        &self,
        gang: &LocalGang,
        index: VmIndex,
        wait: Duration,
    ) -> Result<(), String> {
        let arrival = gang.arrival(index).ok_or("that VM is not arriving here")?;
        let _step = arrival.step.lock().await;
        let vm = arrival.take_waiting()?;
        let arrived = vm.wait_arrived(wait).await.map_err(|e| chain(&e));
        arrival.hold(Held::Waiting(vm));
        arrived?;
        arrival.heard();
        arrival.keep();
        self.land_locked(&arrival, TargetEvent::Arrived).await;
        self.moments
            .reach(Moment::DeviceArrived, &arrival.name)
            .await;
        match arrival.state() {
            Target::Loaded => Ok(()),
            _ => Err(format!("VM {} was given up", arrival.name)),
        }
    }

    /// Carries device state from a source agent to the waiting VMM.
    pub(super) async fn relay_device(&self, gang: Rc<LocalGang>, incoming: Incoming) {
        let index = VmIndex(incoming.hello.tag as u16);
        let Some(arrival) = gang.arrival(index) else {
            return;
        };
        let outcome = match UnixStream::connect(&arrival.socket).await {
            Ok(vmm) => relay(incoming.stream, vmm, RELAY_IDLE)
                .await
                .map_err(|e| chain(&e)),
            Err(error) => Err(format!("{}: {error}", arrival.socket.display())),
        };
        match outcome {
            Ok(bytes) => tracing::debug!(vm = %arrival.name, ?bytes, "device state relayed"),
            Err(why) => tracing::warn!(vm = %arrival.name, %why, "device state not relayed"),
        }
        drop(incoming.permit);
    }
}

impl Arrival {
    /// A VM that begins to arrive, or that a restarted agent found.
    pub(super) fn new(
        from: &str,
        definition: Definition,
        files: VmPaths,
        held: Held,
        state: Target,
        care: Care,
    ) -> Self {
        let arrival = Arrival {
            gang: care.gang,
            name: care.vm.clone(),
            from: from.to_owned(),
            ram_bytes: definition.ram_bytes,
            socket: files.dir.join("state.sock"),
            definition,
            files,
            pages: RefCell::default(),
            vmm: RefCell::new(held),
            state: Cell::new(state),
            run: Cell::new(false),
            care: Rc::new(care),
            heard: Cell::new(Instant::now()),
            journal_took: Cell::default(),
            minded: Cell::new(false),
            fenced: Cell::default(),
            step: tokio::sync::Mutex::new(()),
        };
        arrival.enter(state);
        arrival
    }

    /// For `drover vm list`, while the VM is not here yet.
    pub(super) fn info(&self) -> Option<VmInfo> {
        let pid = match &*self.vmm.borrow() {
            Held::Waiting(vm) => vm.vmm().process.pid() as u32,
            Held::Kept(vmm) => vmm.process.pid() as u32,
            Held::Nothing => 0,
        };
        let arriving = matches!(
            self.state(),
            Target::Waiting | Target::Loaded | Target::Committing
        );
        arriving.then(|| VmInfo {
            name: self.name.clone(),
            kind: "qemu-direct".to_owned(),
            status: match self.care.in_doubt() {
                Some(_) => "in doubt".to_owned(),
                None => "incoming".to_owned(),
            },
            ram_bytes: self.ram_bytes,
            pages_scanned: 0,
            dirty_bytes_per_s: None,
            pid,
            qmp: self.files.qmp(),
            domain: self.definition.domain.clone(),
        })
    }

    pub(super) fn state(&self) -> Target {
        self.state.get()
    }

    pub(super) fn enter(&self, state: Target) {
        self.state.set(state);
        self.care.enter(words(state));
        if matches!(state, Target::Here) {
            self.forget_pages();
        }
    }

    /// Its source has spoken.
    pub(super) fn heard(&self) {
        self.heard.set(Instant::now());
    }

    pub(super) fn silent_for(&self) -> Duration {
        self.heard.get().elapsed()
    }

    pub(super) fn only_from(&self, from: &str) -> Result<(), String> {
        match from == self.from {
            true => Ok(()),
            false => Err(format!("VM {} does not come here from {from}", self.name)),
        }
    }

    /// Whether its VMM has ended.
    pub(super) fn has_died(&self) -> bool {
        match &*self.vmm.borrow() {
            Held::Waiting(vm) => !vm.vmm().process.is_alive(),
            Held::Kept(vmm) => !vmm.process.is_alive(),
            Held::Nothing => !has_leftover(&self.files),
        }
    }

    /// From now on the VMM lives on without us.
    pub(super) fn keep(&self) {
        let held = self.take_held();
        self.hold(match held {
            Held::Waiting(vm) => Held::Kept(vm.keep()),
            other => other,
        });
    }

    pub(super) fn kept(&self) -> Option<Vmm> {
        match &*self.vmm.borrow() {
            Held::Kept(vmm) => Some(vmm.clone()),
            _ => None,
        }
    }

    pub(super) fn take_held(&self) -> Held {
        self.vmm.replace(Held::Nothing)
    }

    pub(super) fn hold(&self, held: Held) {
        self.vmm.replace(held);
    }

    fn take_waiting(&self) -> Result<Box<TargetVm>, String> {
        match (self.state(), self.take_held()) {
            (Target::Waiting, Held::Waiting(vm)) => Ok(vm),
            (state, held) => {
                self.hold(held);
                Err(format!("VM {} {} there", self.name, words(state)))
            }
        }
    }

    /// No page is placed any more.
    pub(super) fn forget_pages(&self) {
        if let Some(pages) = self.pages.borrow_mut().take()
            && self.state() != Target::Here
        {
            pages.side.store.remove_vm(pages.index);
        }
    }

    fn check_work(&self) -> Result<(Arc<TargetGang>, Check), String> {
        let pages = self.pages.borrow();
        let pages = pages
            .as_ref()
            .ok_or_else(|| format!("VM {} was given up here", self.name))?;
        let work = Check {
            name: self.name.clone(),
            placed: pages.placed.clone(),
            ram: pages.ram.clone(),
            key: pages.key.clone(),
        };
        Ok((pages.side.clone(), work))
    }
}

/// A state in an operator's words.
fn words(state: Target) -> &'static str {
    match state {
        Target::Waiting => "is on its way",
        Target::Loaded => "has arrived and stands still; its source's word decides",
        Target::Committing | Target::Starting { .. } => "is being let run",
        Target::Here => "runs here; its source does not know yet",
        Target::Lost => "had begun to run, and its VMM has ended",
        Target::Discarding | Target::Closing(RunsOn::Source) => "is being given up",
        Target::Over(RunsOn::Source) => "was given up",
        Target::Closing(_) | Target::Over(_) => "runs here",
    }
}

/// What a full check of guest RAM needs, on a thread of its own.
struct Check {
    name: String,
    placed: Arc<Placed>,
    ram: Arc<GuestRam>,
    key: Arc<FingerprintKey>,
}

impl Check {
    /// Fingerprints all of guest RAM anew and compares with `digest`.
    fn reread(&self, digest: &Digest) -> bool {
        match full_digest(&self.ram, &self.key) {
            Ok(again) => again == *digest,
            Err(error) => {
                tracing::error!(vm = %self.name, %error, "guest RAM cannot be read again");
                false
            }
        }
    }
}
