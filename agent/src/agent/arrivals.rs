//! VMs that arrive at this host.

use super::Agent;
use super::gangs::LocalGang;
use super::registry::Vm;
use crate::api::types::VmInfo;
use crate::dedup::fingerprint::FingerprintKey;
use crate::dedup::resolve::TargetConfig;
use crate::dedup::target_vm::TargetVm as Placed;
use crate::gang::handover::chain;
use crate::gang::journal::{Record, Side, Step};
use crate::gang::message::{Digest, GangResponse, GangSpec, SourceFacts};
use crate::gang::moments::Moment;
use crate::gang::target::TargetGang;
use crate::gang::verify::full_digest;
use crate::net::Incoming;
use crate::types::VmIndex;
use crate::vmm::definition::{Definition, VmPaths};
use crate::vmm::direct::TargetVm;
use crate::vmm::ram::{GuestRam, free_bytes};
use crate::vmm::relay::relay;
use std::cell::RefCell;
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
    name: String,
    definition: Definition,
    files: VmPaths,
    ram: Arc<GuestRam>,
    ram_bytes: u64,
    placed: Arc<Placed>,
    key: Arc<FingerprintKey>,
    socket: PathBuf,
    stage: RefCell<Stage>,
    /// Serialises the steps of the handover.
    step: tokio::sync::Mutex<()>,
}

/// What there is of the VM here.
enum Stage {
    /// A stopped VMM that waits.
    Waiting(Box<TargetVm>),
    /// A step of the handover has it.
    Busy,
    /// It has been resumed and is in the registry.
    Here,
    /// It was given up.
    Gone,
}

impl Agent {
    /// Whether a VM could be taken in. Touches nothing.
    pub(super) fn check_target(&self, name: &str, facts: &SourceFacts) -> Result<(), String> {
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
        let gangs = self.open_gangs();
        let arrivals = gangs
            .iter()
            .flat_map(|g| g.arrivals.borrow().values().cloned().collect::<Vec<_>>());
        arrivals
            .filter(|a| !matches!(*a.stage.borrow(), Stage::Here | Stage::Gone))
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
        let definition = self.acceptable(&plan.name, &facts)?;
        let files = VmPaths::new(&self.config.run_dir, &self.config.ram_dir, &plan.name);
        let host = &self.config.placeholders;
        self.moments.reach(Moment::Preparing, &plan.name).await;
        let waiting = TargetVm::prepare(&definition, &files, host, &facts.direct)
            .await
            .map_err(|e| chain(&e))?;
        let key = Arc::new(FingerprintKey::derive(&self.secret, &definition.domain));
        let ram = waiting.ram().clone();
        let placed = side
            .add_vm(index, ram.clone(), key.clone())
            .map_err(|e| chain(&e))?;
        let record = Record {
            gang: gang.spec.id,
            vm: plan.name.clone(),
            side: Side::Target,
            step: Step::Moving,
            peer: plan.from.clone(),
        };
        self.journal.write(&record).map_err(|e| e.to_string())?;
        let arrival = Arrival {
            name: plan.name.clone(),
            socket: files.dir.join("state.sock"),
            definition,
            files,
            ram,
            ram_bytes: facts.direct.ram_bytes,
            placed,
            key,
            stage: RefCell::new(Stage::Waiting(Box::new(waiting))),
            step: tokio::sync::Mutex::new(()),
        };
        tracing::info!(vm = %plan.name, from = %plan.from, "incoming VMM waits");
        gang.arrivals.borrow_mut().insert(index, Rc::new(arrival));
        self.moments.reach(Moment::Prepared, &plan.name).await;
        Ok(())
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
        let side = gang
            .target
            .as_ref()
            .ok_or("no VM of the gang arrives here")?;
        let _step = arrival.step.lock().await;
        self.moments.reach(Moment::Sealing, &arrival.name).await;
        let until = Instant::now() + wait;
        let mut ask_again = Instant::now() + ASK_AGAIN;
        loop {
            if let Some(why) = side.failure(index) {
                return Err(format!("VM {}: {why}", arrival.name));
            }
            let pending = arrival.placed.counts().pending;
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
                side.ask_again(index, &arrival.placed);
            }
            tokio::time::sleep(SEAL_POLL).await;
        }
        let side = side.clone();
        let work = arrival.clone_for_check();
        let equal = tokio::task::spawn_blocking(move || {
            let here = side.store.complete(&work.placed);
            here.pending == 0 && here.digest == digest && (!full || work.reread(&here.digest))
        })
        .await
        .map_err(|panic| format!("comparing digests panicked: {panic}"))?;
        if let Some(why) = gang.target.as_ref().and_then(|side| side.failure(index)) {
            return Err(format!("VM {}: {why}", arrival.name));
        }
        if equal {
            gang.target
                .as_ref()
                .inspect(|side| side.store.seal(&arrival.placed));
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
        let mut vm = arrival.take()?;
        let listening = vm.listen(&arrival.socket).await.map_err(|e| chain(&e));
        arrival.put_back(vm);
        listening?;
        self.moments
            .reach(Moment::DeviceExpected, &arrival.name)
            .await;
        Ok(GangResponse::DeviceExpected {
            ram: arrival.files.ram.display().to_string(),
        })
    }

    /// Waits until the VMM has all device state.
    pub(super) async fn await_device(
        &self,
        gang: &LocalGang,
        index: VmIndex,
        wait: Duration,
    ) -> Result<(), String> {
        let arrival = gang.arrival(index).ok_or("that VM is not arriving here")?;
        let _step = arrival.step.lock().await;
        let vm = arrival.take()?;
        let arrived = vm.wait_arrived(wait).await.map_err(|e| chain(&e));
        arrival.put_back(vm);
        arrived?;
        self.moments
            .reach(Moment::DeviceArrived, &arrival.name)
            .await;
        Ok(())
    }

    /// The source has committed: the VM is this host's. Idempotent.
    pub(super) async fn resume(
        &self,
        gang: &LocalGang,
        index: VmIndex,
        run: bool,
    ) -> Result<(), String> {
        let arrival = gang.arrival(index).ok_or("that VM is not arriving here")?;
        let _step = arrival.step.lock().await;
        self.moments
            .reach(Moment::ResumeReceived, &arrival.name)
            .await;
        if matches!(*arrival.stage.borrow(), Stage::Here) {
            return Ok(());
        }
        let plan = gang.spec.vm(index).ok_or("no such VM")?;
        let vm = arrival.take()?;
        let record = Record {
            gang: gang.spec.id,
            vm: arrival.name.clone(),
            side: Side::Target,
            step: Step::Committed,
            peer: plan.from.clone(),
        };
        if let Err(error) = self.journal.write(&record) {
            arrival.put_back(vm);
            return Err(error.to_string());
        }
        self.moments
            .reach(Moment::TargetCommitted, &arrival.name)
            .await;
        if run && let Err(error) = vm.resume().await {
            arrival.put_back(vm);
            return Err(chain(&error));
        }
        self.moments
            .reach(Moment::TargetRunning, &arrival.name)
            .await;
        let vmm = vm.keep();
        *arrival.stage.borrow_mut() = Stage::Here;
        self.vms.insert(Vm::new(
            arrival.definition.clone(),
            Some(arrival.files.clone()),
            vmm,
        ));
        let _gone = std::fs::remove_file(&arrival.socket);
        if let Err(error) = self.journal.forget(&arrival.name) {
            tracing::warn!(%error, "journal entry stays");
        }
        tracing::info!(vm = %arrival.name, from = %plan.from, run, "VM has arrived");
        Ok(())
    }

    /// Ends a half-made VM and removes its files. Nothing happens to one that
    /// has been resumed.
    pub(super) async fn abort_arrival(&self, gang: &LocalGang, index: VmIndex, why: &str) {
        let Some(arrival) = gang.arrival(index) else {
            return;
        };
        let _step = arrival.step.lock().await;
        if matches!(*arrival.stage.borrow(), Stage::Here | Stage::Gone) {
            return;
        }
        if let Some(side) = &gang.target {
            side.store.remove_vm(index);
        }
        if let Ok(vm) = arrival.take() {
            vm.abort().await;
        }
        *arrival.stage.borrow_mut() = Stage::Gone;
        if let Err(error) = self.journal.forget(&arrival.name) {
            tracing::warn!(%error, "journal entry stays");
        }
        tracing::warn!(vm = %arrival.name, %why, "half-made VM removed");
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
    /// For `drover vm list`, while the VM is not here yet.
    pub(super) fn info(&self) -> Option<VmInfo> {
        let stage = self.stage.borrow();
        let pid = match &*stage {
            Stage::Waiting(vm) => vm.vmm().process.pid() as u32,
            Stage::Busy => 0,
            Stage::Here | Stage::Gone => return None,
        };
        Some(VmInfo {
            name: self.name.clone(),
            kind: "qemu-direct".to_owned(),
            status: "incoming".to_owned(),
            ram_bytes: self.ram_bytes,
            pages_scanned: 0,
            dirty_bytes_per_s: None,
            pid,
            qmp: self.files.qmp(),
            domain: self.definition.domain.clone(),
        })
    }

    fn take(&self) -> Result<TargetVm, String> {
        match std::mem::replace(&mut *self.stage.borrow_mut(), Stage::Busy) {
            Stage::Waiting(vm) => Ok(*vm),
            other => {
                let what = match &other {
                    Stage::Here => "runs here already",
                    _ => "was given up here",
                };
                *self.stage.borrow_mut() = other;
                Err(format!("VM {} {what}", self.name))
            }
        }
    }

    fn put_back(&self, vm: TargetVm) {
        *self.stage.borrow_mut() = Stage::Waiting(Box::new(vm));
    }

    fn clone_for_check(&self) -> Check {
        Check {
            name: self.name.clone(),
            placed: self.placed.clone(),
            ram: self.ram.clone(),
            key: self.key.clone(),
        }
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
