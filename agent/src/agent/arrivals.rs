//! VMs that arrive at this host, until they have all their device state; then
//! [`super::landing`] goes on.

use super::Agent;
use super::arrival::{Arrival, Held, Pages};
use super::gangs::LocalGang;
use crate::dedup::fingerprint::FingerprintKey;
use crate::dedup::resolve::TargetConfig;
use crate::gang::handover::care::Care;
use crate::gang::handover::chain;
use crate::gang::handover::machine::{Target, TargetEvent};
use crate::gang::journal::{Record, Side, Step};
use crate::gang::message::{Digest, GangResponse, GangSpec, SourceFacts};
use crate::gang::moments::Moment;
use crate::gang::target::TargetGang;
use crate::net::Incoming;
use crate::types::VmIndex;
use crate::vmm::definition::{Definition, Family, Kind, Role, VmPaths};
use crate::vmm::kinds::{TargetVm, VmFacts};
use crate::vmm::ram::{free_bytes, free_memory};
use crate::vmm::relay::relay_after;
use crate::vmm::{PageRead, PageSink};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::UnixStream;

/// How long the relay of device state may stand still.
pub(super) const RELAY_IDLE: Duration = Duration::from_secs(30);
/// How long the first byte of a stream may take: it comes when the source's
/// QEMU has gone through all of RAM as often as the guest's writing makes it.
pub(super) const STREAM_BEGINS: Duration = Duration::from_secs(3600);
/// Longest that a step waits for its source, whatever that asks for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// How often outstanding references are looked at while the guest waits.
const SEAL_POLL: Duration = Duration::from_millis(1);
/// References that are still outstanding after this are asked for anew: the
/// first request may have been lost with its lane.
const ASK_AGAIN: Duration = Duration::from_secs(1);

impl Agent {
    /// Whether a VM could be taken in. Touches nothing.
    pub(super) fn check_target(&self, name: &str, facts: &SourceFacts) -> Result<(), String> {
        if let VmFacts::Managed(managed) = &facts.vmm {
            return self.check_managed(name, managed);
        }
        self.journal.check().map_err(|e| e.to_string())?;
        self.acceptable(name, facts).map(drop)
    }

    fn acceptable(&self, name: &str, facts: &SourceFacts) -> Result<Definition, String> {
        if self.vms.get(name).is_some() {
            return Err(format!(
                "a VM {name} is on {host} already; if its VMM has ended, `drover vm stop {name}` \
                 there clears it away",
                host = self.name()
            ));
        }
        let definition = Definition::parse(&format!("definition of VM {name}"), &facts.definition)
            .map_err(|e| chain(&e))?;
        if definition.name != name {
            return Err(format!(
                "the definition sent for VM {name} is of {}",
                definition.name
            ));
        }
        let (allowed, key) = match definition.family {
            Family::Qemu => (&self.config.qemu_binaries, "qemu_binaries"),
            Family::Linked => (&self.config.vmm_binaries, "vmm_binaries"),
        };
        if !allowed.contains(&definition.binary) {
            return Err(format!(
                "VM {name} wants {}, which is not among `{key}` in {} of {}",
                definition.binary.display(),
                self.config.file.display(),
                self.name()
            ));
        }
        let files = VmPaths::new(&self.config.run_dir, &self.config.ram_dir, name);
        definition
            .expand(&files, &self.config.placeholders, Role::Incoming)
            .map_err(|e| chain(&e))?;
        let ram_dir = &self.config.ram_dir;
        let (free, place) = match definition.has_ram_file() {
            true => (free_bytes(ram_dir), ram_dir.display().to_string()),
            false => (free_memory(), "its memory".to_owned()),
        };
        let free = free.map_err(|e| chain(&e))?;
        let promised = self.promised_bytes();
        if facts.vmm.ram_bytes() > free.saturating_sub(promised) {
            return Err(format!(
                "no room for VM {name} on {}: it has {} MiB of RAM; {} has {} MiB free, {} MiB of \
                 them promised to other VMs of running gangs. Free memory there or plan another \
                 target",
                self.name(),
                facts.vmm.ram_bytes() >> 20,
                place,
                free >> 20,
                promised >> 20
            ));
        }
        Ok(definition)
    }

    /// Bytes of RAM of arriving VMs that have no memory yet.
    fn promised_bytes(&self) -> u64 {
        let landings = self.landings.borrow();
        let unfilled = |a: &&Rc<Arrival>| matches!(a.state(), Target::Waiting | Target::Loaded);
        landings
            .iter()
            .filter(unfilled)
            .map(|a| a.ram_bytes.saturating_sub(a.filled_bytes()))
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
        let made = match &facts.vmm {
            VmFacts::Managed(managed) => self.make_managed(gang, side, index, managed).await,
            _ => self.make_own(gang, side, index, &facts).await,
        };
        let arrival = Rc::new(made?);
        tracing::info!(vm = %plan.name, from = %plan.from, "incoming VMM waits");
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

    /// The target of a VM in a VMM that this agent starts, in the journal.
    async fn make_own(
        &self,
        gang: &LocalGang,
        side: &Arc<TargetGang>,
        index: VmIndex,
        facts: &SourceFacts,
    ) -> Result<Arrival, String> {
        let plan = gang.spec.vm(index).ok_or("no such VM")?;
        let definition = self.acceptable(&plan.name, facts)?;
        let record = Record {
            gang: gang.spec.id,
            vm: plan.name.clone(),
            side: Side::Target,
            step: Step::Moving,
            peer: plan.from.clone(),
            run: false,
        };
        self.journal.write(&record).map_err(|e| e.to_string())?;
        let made = self.make_target(gang, side, index, definition, facts);
        let made = made.await;
        if made.is_err()
            && let Err(error) = self.journal.forget(&plan.name, gang.spec.id)
        {
            tracing::warn!(%error, "journal entry stays");
        }
        made
    }

    async fn make_target(
        &self,
        gang: &LocalGang,
        side: &Arc<TargetGang>,
        index: VmIndex,
        definition: Definition,
        facts: &SourceFacts,
    ) -> Result<Arrival, String> {
        let plan = gang.spec.vm(index).ok_or("no such VM")?;
        self.moments.reach(Moment::Preparing, &plan.name).await;
        let host = &self.config.placeholders;
        let files = VmPaths::new(&self.config.run_dir, &self.config.ram_dir, &plan.name);
        let waiting = TargetVm::prepare(&definition, &files, host, &facts.vmm)
            .await
            .map_err(|e| chain(&e))?;
        let ram = waiting.ram();
        let held = Held::Waiting(Box::new(waiting));
        self.arriving(gang, side, index, definition, held, ram)
    }

    /// The VM whose VMM waits, its RAM ready to have pages placed in it.
    pub(super) fn arriving(
        &self,
        gang: &LocalGang,
        side: &Arc<TargetGang>,
        index: VmIndex,
        definition: Definition,
        held: Held,
        ram: Arc<dyn PageSink>,
    ) -> Result<Arrival, String> {
        let plan = gang.spec.vm(index).ok_or("no such VM")?;
        let key = Arc::new(FingerprintKey::derive(&self.secret, &definition.domain));
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
        let files = VmPaths::new(&self.config.run_dir, &self.config.ram_dir, &plan.name);
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
        let until = Instant::now() + wait.min(LONGEST_WAIT);
        let mut ask_again = Instant::now() + ASK_AGAIN;
        loop {
            if let Some(why) = side.failure(index) {
                return Err(format!("VM {}: {why}", arrival.name));
            }
            let pending = work.placed.counts().pending;
            if pending == 0 {
                break;
            }
            if Instant::now() > until || arrival.is_ending() {
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
        if let Some(vm) = arrival.managed() {
            let ram = vm.ram().place();
            self.moments
                .reach(Moment::DeviceExpected, &arrival.name)
                .await;
            return Ok(GangResponse::DeviceExpected { ram });
        }
        let mut vm = arrival.take_waiting()?;
        let listening = vm.listen(&arrival.socket).await.map_err(|e| chain(&e));
        let ram = vm.ram().place();
        arrival.hold(Held::Waiting(vm));
        listening?;
        self.moments
            .reach(Moment::DeviceExpected, &arrival.name)
            .await;
        Ok(GangResponse::DeviceExpected { ram })
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
        if let Some(vm) = arrival.managed() {
            return self
                .await_managed(&arrival, &vm, wait.min(LONGEST_WAIT))
                .await;
        }
        let vm = arrival.take_waiting()?;
        let arrived = tokio::select! {
            biased;
            arrived = vm.wait_arrived(wait.min(LONGEST_WAIT)) => arrived.map_err(|e| chain(&e)),
            () = arrival.ending() => Err(format!("VM {} is being given up", arrival.name)),
        };
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
        if let Some(vm) = arrival.managed() {
            return self.play_managed(&arrival, &vm, incoming).await;
        }
        let begin = match arrival.kind {
            Kind::QemuStream | Kind::QemuManaged | Kind::CloudHypervisor => STREAM_BEGINS,
            Kind::QemuDirect | Kind::KvmLog | Kind::Auto => RELAY_IDLE,
        };
        let outcome = match UnixStream::connect(&arrival.socket).await {
            Ok(vmm) => relay_after(begin, incoming.stream, vmm, RELAY_IDLE)
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
