//! One VM that arrives at this host: its VMM, where its pages go, and how far
//! its handover has come.

use crate::api::types::VmInfo;
use crate::dedup::fingerprint::FingerprintKey;
use crate::dedup::target_vm::TargetVm as Placed;
use crate::gang::handover::care::Care;
use crate::gang::handover::machine::{RunsOn, Target};
use crate::gang::message::Digest;
use crate::gang::target::TargetGang;
use crate::gang::verify::full_digest;
use crate::types::{GangId, VmIndex};
use crate::vmm::PageSink;
use crate::vmm::definition::{Definition, Kind, VmPaths};
use crate::vmm::kinds::TargetVm;
use crate::vmm::launch::{Control, Vmm, has_leftover};
use crate::vmm::managed;
use crate::vmm::ram::parse_kib;
use std::cell::{Cell, RefCell};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Steps of an arrival do not wait for its source; see [`Arrival::end_waits`].
pub(super) struct EndsWaits<'a>(&'a watch::Sender<usize>);

impl Drop for EndsWaits<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

/// One VM on its way in.
pub(super) struct Arrival {
    pub(super) gang: GangId,
    pub(super) name: String,
    /// The agent it comes from.
    pub(super) from: String,
    pub(super) definition: Definition,
    pub(super) files: VmPaths,
    pub(super) ram_bytes: u64,
    /// How it is reached; as its definition wants it, if a restarted agent
    /// found it.
    pub(super) kind: Kind,
    pub(super) socket: PathBuf,
    /// While pages are placed; a restarted agent has none of it.
    pub(super) pages: RefCell<Option<Pages>>,
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
    /// How many mean to end it: steps that wait for its source do not go on
    /// while there are any.
    ending: watch::Sender<usize>,
}

/// What there is of the VM here.
pub(super) enum Held {
    /// A stopped VMM that ends with us.
    Waiting(Box<TargetVm>),
    /// One that its manager has started; only its connection is ours.
    Managed(Rc<managed::TargetVm>),
    /// One that lives on without us: it has all of its state.
    Kept(Vmm),
    /// None, or it is out of reach for the moment.
    Nothing,
}

/// What pages are placed with.
pub(super) struct Pages {
    pub(super) side: Arc<TargetGang>,
    pub(super) index: VmIndex,
    pub(super) placed: Arc<Placed>,
    pub(super) ram: Arc<dyn PageSink>,
    pub(super) key: Arc<FingerprintKey>,
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
        let kind = match &held {
            Held::Waiting(vm) => vm.kind(),
            Held::Managed(vm) => vm.facts().kind(),
            Held::Kept(_) | Held::Nothing => definition.kind,
        };
        let arrival = Arrival {
            kind,
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
            ending: watch::Sender::new(0),
        };
        arrival.enter(state);
        arrival
    }

    /// For `drover vm list`, while the VM is not here yet.
    pub(super) fn info(&self) -> Option<VmInfo> {
        let pid = match &*self.vmm.borrow() {
            Held::Waiting(vm) => vm.vmm().process.pid() as u32,
            Held::Managed(vm) => vm.process().pid() as u32,
            Held::Kept(vmm) => vmm.process.pid() as u32,
            Held::Nothing => 0,
        };
        let arriving = matches!(
            self.state(),
            Target::Waiting | Target::Loaded | Target::Committing
        );
        arriving.then(|| VmInfo {
            name: self.name.clone(),
            kind: self.kind.to_string(),
            kinds: Vec::new(),
            status: match self.care.in_doubt() {
                Some(_) => "in doubt".to_owned(),
                None => "incoming".to_owned(),
            },
            ram_bytes: self.ram_bytes,
            pages_scanned: 0,
            dirty_bytes_per_s: None,
            pid,
            qmp: self.control(),
            domain: self.definition.domain.clone(),
        })
    }

    /// The socket by which its VMM is driven.
    pub(super) fn control(&self) -> PathBuf {
        self.files.control(self.definition.family)
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

    /// Ends the waits of steps, for as long as what is returned lives. A source
    /// that says how long they are to wait must not decide how long the gang's
    /// end waits for them.
    pub(super) fn end_waits(&self) -> EndsWaits<'_> {
        self.ending.send_modify(|n| *n += 1);
        EndsWaits(&self.ending)
    }

    /// Whether waits are to end.
    pub(super) fn is_ending(&self) -> bool {
        *self.ending.borrow() > 0
    }

    /// Returns when waits are to end.
    pub(super) async fn ending(&self) {
        // The sender is in `self`.
        let _ = self.ending.subscribe().wait_for(|n| *n > 0).await;
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

    /// Whether its VMM has ended, or was killed and is sure to: such a one must
    /// not be told to run its guest, since nobody would know whether it did.
    pub(super) fn has_died(&self) -> bool {
        match &*self.vmm.borrow() {
            Held::Waiting(vm) => vm.vmm().process.is_ending(),
            Held::Managed(vm) => vm.process().is_ending(),
            Held::Kept(vmm) => vmm.process.is_ending(),
            Held::Nothing => !has_leftover(&self.files),
        }
    }

    /// Bytes of its RAM that have memory already.
    pub(super) fn filled_bytes(&self) -> u64 {
        if self.definition.has_ram_file() {
            return std::fs::metadata(&self.files.ram).map_or(0, |m| m.blocks() * 512);
        }
        if let Held::Waiting(vm) = &*self.vmm.borrow()
            && let Control::Link(link) = &vm.vmm().control
        {
            return link.filled_bytes().unwrap_or(0);
        }
        let resident = match &*self.vmm.borrow() {
            Held::Waiting(vm) => vm.vmm().process.status("VmRSS").ok().flatten(),
            Held::Managed(vm) => vm.process().status("VmRSS").ok().flatten(),
            Held::Kept(_) | Held::Nothing => None,
        };
        resident.as_deref().and_then(parse_kib).unwrap_or(0) * 1024
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

    /// The VMM, if its manager has started it.
    pub(super) fn managed(&self) -> Option<Rc<managed::TargetVm>> {
        match &*self.vmm.borrow() {
            Held::Managed(vm) => Some(vm.clone()),
            _ => None,
        }
    }

    pub(super) fn take_held(&self) -> Held {
        self.vmm.replace(Held::Nothing)
    }

    pub(super) fn hold(&self, held: Held) {
        self.vmm.replace(held);
    }

    pub(super) fn take_waiting(&self) -> Result<Box<TargetVm>, String> {
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

    pub(super) fn check_work(&self) -> Result<(Arc<TargetGang>, Check), String> {
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
pub(super) struct Check {
    name: String,
    pub(super) placed: Arc<Placed>,
    pub(super) ram: Arc<dyn PageSink>,
    pub(super) key: Arc<FingerprintKey>,
}

impl Check {
    /// Fingerprints all of guest RAM anew and compares with `digest`.
    pub(super) fn reread(&self, digest: &Digest) -> bool {
        match full_digest(&*self.ram, &self.key) {
            Ok(again) => again == *digest,
            Err(error) => {
                tracing::error!(vm = %self.name, %error, "guest RAM cannot be read again");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gang::journal::Side;
    use std::path::Path;
    use std::pin::pin;

    fn arrival() -> Arrival {
        let dir = Path::new("/nowhere");
        let care = Care::new(GangId(1), "web1", Side::Target, "a1", "");
        Arrival::new(
            "a1",
            Definition::parse("web1.toml", include_str!("../../../configs/vms/web1.toml")).unwrap(),
            VmPaths::new(dir, dir, "web1"),
            Held::Nothing,
            Target::Waiting,
            care,
        )
    }

    /// Whether a step that waits for the source would stop waiting now.
    async fn waits_end(arrival: &Arrival) -> bool {
        let ended = tokio::select! {
            biased;
            () = arrival.ending() => true,
            () = std::future::ready(()) => false,
        };
        assert_eq!(ended, arrival.is_ending());
        ended
    }

    #[tokio::test]
    async fn waits_are_over_until_the_last_who_ended_them_is_done() {
        let arrival = arrival();
        assert!(!waits_end(&arrival).await);
        let first = arrival.end_waits();
        assert!(waits_end(&arrival).await);
        let second = arrival.end_waits();
        // The first to finish does not let steps wait again under the other.
        drop(first);
        assert!(waits_end(&arrival).await);
        drop(second);
        assert!(!waits_end(&arrival).await);
    }

    #[tokio::test]
    async fn an_abort_that_is_dropped_half_way_lets_steps_wait_again() {
        let arrival = arrival();
        let step = arrival.step.lock().await;
        {
            // As an abort does it: it ends the waits, then wants the step, which
            // somebody else has.
            let mut abort = pin!(async {
                let _ends = arrival.end_waits();
                let _step = arrival.step.lock().await;
            });
            tokio::select! {
                biased;
                () = &mut abort => unreachable!("the step is taken"),
                () = std::future::ready(()) => {}
            }
            assert!(waits_end(&arrival).await);
        }
        assert!(!waits_end(&arrival).await);
        drop(step);
    }

    #[tokio::test]
    async fn a_step_that_waits_already_is_woken() {
        let arrival = arrival();
        let end = async {
            tokio::task::yield_now().await;
            arrival.end_waits()
        };
        let wait = tokio::time::timeout(Duration::from_secs(30), arrival.ending());
        let (woken, _ends) = tokio::join!(wait, end);
        assert!(woken.is_ok());
    }
}
