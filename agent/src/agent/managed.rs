//! VMs that arrive at this host in a VMM of their manager's: the manager has
//! started it and decides what becomes of it. The agent places pages in it and
//! plays the rest of its stream into it; there is no journal, and nothing is
//! ended here but a connection.

use super::Agent;
use super::arrival::{Arrival, Held};
use super::arrivals::{RELAY_IDLE, STREAM_BEGINS};
use super::gangs::LocalGang;
use super::offers::socket_of;
use crate::gang::handover::chain;
use crate::gang::handover::machine::{RunsOn, Target};
use crate::gang::moments::Moment;
use crate::gang::target::TargetGang;
use crate::net::Incoming;
use crate::types::VmIndex;
use crate::vmm::PageRead;
use crate::vmm::definition::{Definition, Family};
use crate::vmm::managed::{ManagedFacts, TargetVm};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

impl Agent {
    /// Whether a VM could be taken in by a VMM of its manager's. Touches nothing.
    pub(super) fn check_managed(&self, name: &str, facts: &ManagedFacts) -> Result<(), String> {
        if facts.name != name {
            return Err(format!("what is told of VM {name} is of {}", facts.name));
        }
        if self.vms.get(name).is_some() {
            return Err(format!("{} has a VM {name} in its own charge", self.name()));
        }
        let socket = socket_of(&self.config.transport_dir, name)?;
        match socket.exists() {
            true => Ok(()),
            false => Err(format!(
                "VM {name}: nobody listens on {} of {}: its migration has to be started with this \
                 path in --migrateuri, and libvirtd there must see the same directory as the agent",
                socket.display(),
                self.name()
            )),
        }
    }

    /// Connects to the VMM that its manager has started, and opens its RAM. On
    /// failure nothing is left here.
    pub(super) async fn make_managed(
        &self,
        gang: &LocalGang,
        side: &Arc<TargetGang>,
        index: VmIndex,
        facts: &ManagedFacts,
    ) -> Result<Arrival, String> {
        let plan = gang.spec.vm(index).ok_or("no such VM")?;
        self.check_managed(&plan.name, facts)?;
        self.moments.reach(Moment::Preparing, &plan.name).await;
        let socket = socket_of(&self.config.transport_dir, &plan.name)?;
        let waiting = TargetVm::prepare(&socket, facts, &self.config.vmms()).await;
        let waiting = waiting.map_err(|e| chain(&e))?;
        let exe = waiting.process().exe().map_err(|e| chain(&e))?;
        let ram = waiting.ram().clone();
        // As far as one can tell from outside.
        let definition = Definition {
            name: plan.name.clone(),
            domain: facts.domain.clone(),
            kind: facts.kind(),
            family: Family::Qemu,
            ram_bytes: facts.ram_bytes,
            binary: exe,
            args: Vec::new(),
            incoming_args: Vec::new(),
            text: String::new(),
        };
        let held = Held::Managed(Rc::new(waiting));
        self.arriving(gang, side, index, definition, held, ram)
    }

    /// Waits until the VMM has said that it has everything. The source decides
    /// then whether its own VMM hears of that.
    pub(super) async fn await_managed(
        &self,
        arrival: &Arrival,
        vm: &TargetVm,
        wait: Duration,
    ) -> Result<(), String> {
        let arrived = tokio::select! {
            biased;
            arrived = vm.wait_arrived(wait) => arrived.map_err(|e| chain(&e)),
            () = arrival.ending() => Err(format!("VM {} is being given up", arrival.name)),
        };
        arrived?;
        arrival.heard();
        self.moments
            .reach(Moment::DeviceArrived, &arrival.name)
            .await;
        Ok(())
    }

    /// Plays the rest of the stream into the VMM.
    pub(super) async fn play_managed(&self, arrival: &Arrival, vm: &TargetVm, incoming: Incoming) {
        let link = vm.link().clone();
        let played = link.play(incoming.stream, STREAM_BEGINS, RELAY_IDLE).await;
        match played {
            Ok(()) => tracing::debug!(vm = %arrival.name, "the rest of its stream is played"),
            Err(error) => {
                tracing::warn!(vm = %arrival.name, why = %chain(&error), "stream not played");
            }
        }
        drop(incoming.permit);
    }

    /// The manager has let it run here: nothing more is done for it, but others'
    /// references are still served from its memory while the gang is open.
    pub(super) fn manager_has(&self, arrival: &Rc<Arrival>) {
        tracing::info!(vm = %arrival.name, from = %arrival.from, ram = %arrival_place(arrival),
            "VM has arrived; its manager has it");
        arrival.enter(Target::Here);
        arrival.enter(Target::Over(RunsOn::Target));
        drop(arrival.take_held());
        self.landings
            .borrow_mut()
            .retain(|a| !Rc::ptr_eq(a, arrival));
        self.settled(&arrival.care);
    }
}

fn arrival_place(arrival: &Arrival) -> String {
    let vm = arrival.managed();
    vm.map(|vm| vm.ram().place()).unwrap_or_default()
}
