//! The simulated guests, and the source pipeline that moves them.

use super::{
    network::{Entry, Frame, Message},
    world::{Content, Faults, World, page_of},
};
use crate::{
    dedup::{
        fingerprint::FingerprintKey,
        resolve::PageMemory,
        source::{Plan, SentBatch, ShardNote, Verdict},
    },
    types::{Class, Fingerprint, Gfn, HolderId, Page, Round, VmIndex},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

/// RAM on the target. Panics if the store writes while the guest runs.
pub(super) struct SimMemory {
    pages: Mutex<Vec<Page>>,
    runs: AtomicBool,
}

impl SimMemory {
    pub(super) fn new(pages: usize) -> Self {
        Self {
            pages: Mutex::new(vec![page_of(0); pages]),
            runs: AtomicBool::new(false),
        }
    }

    fn change(&self, gfn: Gfn, page: &Page) {
        self.pages.lock().expect("one thread")[gfn.index()] = *page;
    }
}

impl PageMemory for Arc<SimMemory> {
    fn write(&self, gfn: Gfn, page: &Page) {
        assert!(
            !self.runs.load(Relaxed),
            "{gfn} written under a running guest"
        );
        self.change(gfn, page);
    }
    fn read(&self, gfn: Gfn, page: &mut Page) {
        *page = self.pages.lock().expect("one thread")[gfn.index()];
    }
    fn zero(&self, gfn: Gfn, count: u32) {
        (gfn.0..gfn.0 + count).for_each(|gfn| self.write(Gfn(gfn), &page_of(0)));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Precopy,
    StopCopy,
    Moved,
    Failed,
}

/// A batch in the claims.
pub(super) struct Open {
    pub(super) id: u64,
    pub(super) plan: Plan,
    /// What was captured, in the plan's order.
    contents: Vec<Content>,
}

pub(super) struct Vm {
    pub(super) index: VmIndex,
    pub(super) source: usize,
    pub(super) target: usize,
    pub(super) domain: usize,
    pub(super) phase: Phase,
    /// RAM on the source: the content of each page.
    pub(super) ram: Vec<Content>,
    pub(super) open: Vec<Open>,
    /// Sent and not acknowledged.
    pub(super) unacked: BTreeMap<u64, (SentBatch, Frame)>,
    key: Arc<FingerprintKey>,
    memory: Arc<SimMemory>,
    dirty: BTreeSet<Gfn>,
    queue: Vec<Gfn>,
    round: Round,
    rounds: u32,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "VM {} {:?} round {} dirty {} queue {} open {} unacked {}",
            self.index.0,
            self.phase,
            self.round.0,
            self.dirty.len(),
            self.queue.len(),
            self.open.len(),
            self.unacked.len()
        )
    }
}

impl Vm {
    #[expect(clippy::too_many_arguments, reason = "one caller")]
    pub(super) fn new(
        index: VmIndex,
        source: usize,
        target: usize,
        domain: usize,
        key: Arc<FingerprintKey>,
        ram: Vec<Content>,
        rounds: u32,
        memory: Arc<SimMemory>,
    ) -> Self {
        Self {
            index,
            source,
            target,
            domain,
            phase: Phase::Precopy,
            open: Vec::new(),
            unacked: BTreeMap::new(),
            key,
            memory,
            dirty: (0..ram.len() as u32).map(Gfn).collect(),
            ram,
            queue: Vec::new(),
            round: Round(0),
            rounds,
        }
    }

    pub(super) fn is_moving(&self) -> bool {
        matches!(self.phase, Phase::Precopy | Phase::StopCopy)
    }

    pub(super) fn name(&self, content: Content) -> Fingerprint {
        self.key.fingerprint(&page_of(content))
    }
}

impl World {
    /// One VM's pipeline takes a step: settles a batch, captures one, begins a
    /// round, or tries to finish.
    pub(super) fn vm_step(&mut self) {
        let vm = self.rng.below(self.vms.len());
        if !self.vms[vm].is_moving() {
            return;
        }
        if self.settle_one(vm) {
            return;
        }
        let state = &self.vms[vm];
        if !state.queue.is_empty() {
            if state.open.len() < 3 {
                self.capture(vm);
            }
            return;
        }
        if state.open.is_empty() {
            self.next_round(vm);
        }
    }

    fn capture(&mut self, vm: usize) {
        let size = 1 + self.rng.below(8);
        let state = &mut self.vms[vm];
        let at = state.queue.len().saturating_sub(size);
        let gfns = state.queue.split_off(at);
        let contents: Vec<Content> = gfns.iter().map(|gfn| state.ram[gfn.index()]).collect();
        let captured: Vec<(Gfn, Fingerprint)> = gfns
            .iter()
            .zip(&contents)
            .map(|(gfn, content)| (*gfn, state.name(*content)))
            .collect();
        let class = match state.phase {
            Phase::StopCopy => Class::StopCopy,
            _ => Class::Precopy,
        };
        let plan = self.sources[state.source]
            .plan(state.index, class, state.round, &captured)
            .expect("pages of this VM");
        let id = self.id();
        let me = HolderId(self.vms[vm].target as u16);
        for (batch, claims) in plan.claims().iter().enumerate() {
            self.wire.push(Message::Claim {
                vm,
                plan: id,
                batch,
                shard: claims.shard,
                fps: claims.fps.clone(),
                me,
            });
        }
        self.vms[vm].open.push(Open { id, plan, contents });
        if self.storm() && self.rng.percent(2) {
            let open = self.vms[vm].open.pop().expect("just pushed");
            let source = self.vms[vm].source;
            let notes = self.sources[source].abandon(open.plan);
            self.note(vm, notes);
        }
    }

    /// Settles one open batch if one can be; not always the oldest.
    fn settle_one(&mut self, vm: usize) -> bool {
        let source = self.vms[vm].source;
        let patient = !self.impatient();
        let can = |open: &Open| match patient {
            true => self.sources[source].is_ready(&open.plan),
            false => open.plan.is_answered(),
        };
        let ready: Vec<usize> = (0..self.vms[vm].open.len())
            .filter(|at| can(&self.vms[vm].open[*at]))
            .collect();
        if ready.is_empty() {
            return false;
        }
        let at = self.rng.pick(&ready);
        let Open { plan, contents, .. } = self.vms[vm].open.remove(at);
        let mut batch = self.sources[source].settle(plan, Duration::ZERO);
        let notes = std::mem::take(&mut batch.notes);
        self.note(vm, notes);
        let stopped = self.vms[vm].phase == Phase::StopCopy;
        let mut entries = Vec::new();
        for (page, content) in batch.pages.iter().zip(contents) {
            let entry = match page.verdict {
                Verdict::Unchanged => {
                    self.tally.unchanged += 1;
                    continue;
                }
                Verdict::Zero => Entry::Zero,
                Verdict::Send => {
                    self.tally.full += 1;
                    Entry::Full(content)
                }
                Verdict::Reference { holder } => {
                    self.tally.references += 1;
                    self.tally.stop_copy_references += u64::from(stopped);
                    let there = self.arrived.contains(&(holder.0.into(), page.fp));
                    assert!(
                        there || !stopped || !self.exact_claims,
                        "a reference in stop-and-copy to content that has not arrived"
                    );
                    Entry::Reference(page.fp, holder)
                }
            };
            entries.push((page.gfn, entry));
        }
        if !entries.is_empty() {
            let seq = self.id();
            let frame = Frame {
                vm,
                seq,
                round: batch.round,
                entries,
            };
            self.wire.push(Message::Pages(frame.clone()));
            self.vms[vm].unacked.insert(seq, (batch, frame));
        }
        true
    }

    pub(super) fn note(&mut self, vm: usize, notes: Vec<ShardNote>) {
        let holder = HolderId(self.vms[vm].target as u16);
        self.wire
            .extend(notes.into_iter().map(|note| Message::Note(note, holder)));
    }

    fn next_round(&mut self, vm: usize) {
        let state = &mut self.vms[vm];
        let source = &self.sources[state.source];
        let resends = source.take_resends(state.index).expect("a VM of this host");
        let mut pages = std::mem::take(&mut state.dirty);
        pages.extend(resends);
        if pages.is_empty() || state.round.0 >= state.rounds && state.phase == Phase::Precopy {
            state.dirty.append(&mut pages);
            match state.phase {
                Phase::Precopy => {
                    state.phase = Phase::StopCopy;
                    // What was handed out for sending again stays to be sent.
                }
                _ => self.try_finish(vm),
            }
            return;
        }
        state.round.0 += 1;
        state.queue = pages.into_iter().collect();
    }

    /// In stop-and-copy, with nothing left to capture.
    fn try_finish(&mut self, vm: usize) {
        let state = &self.vms[vm];
        let source = &self.sources[state.source];
        if !state.unacked.is_empty() || source.outstanding(state.index).expect("VM") > 0 {
            return;
        }
        let store = &self.targets[state.target].store;
        let target = store.vm(state.index).expect("VM");
        let done = store.complete(&target);
        if done.pending > 0 {
            // Lists of pages to send in full may have been lost: ask again, as the
            // source pipeline does when its last round does not end.
            if self.rng.percent(10) && self.impatient() {
                let pending = target.pending_pages(usize::MAX);
                assert_eq!(pending.len() as u64, done.pending);
                for gfn in pending {
                    let fp = source.last_sent(state.index, gfn).expect("VM");
                    source.needed(state.index, gfn, fp).expect("VM's page");
                }
            }
            return;
        }
        let digest = source.digest(state.index).expect("VM");
        let mut page = page_of(0);
        for (at, content) in state.ram.iter().enumerate() {
            let gfn = Gfn(at as u32);
            state.memory.read(gfn, &mut page);
            assert!(
                page == page_of(*content),
                "VM {}: {gfn} has content {} instead of {content}",
                state.index.0,
                u32::from_le_bytes(page[..4].try_into().expect("4 bytes")),
            );
        }
        assert_eq!(digest, done.digest, "digests of VM {}", state.index.0);
        store.seal(&target);
        state.memory.runs.store(true, Relaxed);
        self.vms[vm].phase = Phase::Moved;
    }

    /// Guests write: on the source while they run there, on the target after.
    pub(super) fn guests_write(&mut self) {
        if self.faults == Faults::None {
            return;
        }
        let vm = self.rng.below(self.vms.len());
        let state = &mut self.vms[vm];
        for _ in 0..self.rng.below(4) {
            let gfn = self.rng.below(state.ram.len());
            let content = match self.rng.below(3) {
                0 => 1000 + self.rng.below(1_000_000) as Content,
                1 => state.ram[self.rng.below(state.ram.len())],
                _ => self.rng.below(20) as Content,
            };
            match state.phase {
                Phase::Precopy => {
                    state.ram[gfn] = content;
                    state.dirty.insert(Gfn(gfn as u32));
                }
                Phase::Moved => state.memory.change(Gfn(gfn as u32), &page_of(content)),
                Phase::StopCopy | Phase::Failed => {}
            }
        }
    }

    /// A VM fails and goes back to its source, alone.
    pub(super) fn fail_vm(&mut self, vm: usize) {
        if !self.vms[vm].is_moving() {
            return;
        }
        let source = self.vms[vm].source;
        for open in std::mem::take(&mut self.vms[vm].open) {
            let notes = self.sources[source].abandon(open.plan);
            self.note(vm, notes);
        }
        let state = &mut self.vms[vm];
        state.unacked.clear();
        self.sources[source].remove_vm(state.index);
        self.targets[state.target].store.remove_vm(state.index);
        // From here on its memory there may be given to someone else.
        state.memory.runs.store(true, Relaxed);
        state.phase = Phase::Failed;
        self.tally.vms_failed += 1;
    }
}
