//! The source host's side: for each captured page, what to send.
//!
//! A scan thread captures up to a few hundred pages, fingerprints the copies, and
//! then, per batch:
//!
//! ```text
//! plan() ── claims() ──▶ shards ──▶ answer() / no_answer() ──▶ settle() ──▶ lane
//!                                                                 │
//!                                     placed() ◀── acknowledged ──┤
//!                                     lost()   ◀── not known ─────┘
//! ```
//!
//! Several batches may be between `plan` and `settle` at once, of one VM or of
//! many. **Each capture of a page has a higher round than the one before** (a pass
//! that sends lost pages again is a round of its own): that is what makes the
//! newest capture win on the target. A round is begun only when the batches of the
//! round before are settled, since "unchanged" is judged by what was settled.
//!
//! What this side knows, it knows from its own acts: a page counts as unchanged if
//! what was last handed to a lane for it was not reported lost; content counts as
//! known if this host sent it or was told its holder. The claim shards cannot tell
//! a host what it sent itself (see [`super::claim`]), so a batch that was lost is
//! remembered page by page, and such pages are sent in full without asking.

use super::{
    claim::{ClaimAnswer, ShardMap},
    fingerprint::{FingerprintKey, UNSENT},
    plan::{Notes, Planned, Step, verdict},
    source_vm::{Again, Known, SourceVm},
    table::{ContentIndex, FingerprintArray, halves, lock},
};
use crate::types::{Class, Fingerprint, Gfn, HolderId, Round, VmIndex};
use ahash::AHashMap;
use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

pub use super::plan::{
    BadAnswer, ClaimBatch, Plan, SentBatch, SentPage, ShardNote, SourceError, Verdict,
};

/// A claim of this host that is not settled yet.
#[derive(Debug)]
struct Claiming {
    plan: u64,
    known: Option<Known>,
}

#[derive(Default)]
struct ClaimingShard {
    open: Mutex<AHashMap<Fingerprint, Claiming>>,
    answered: Condvar,
}

const CLAIMING_SHARDS: usize = 64;

/// All VMs of one gang that leave this host.
pub struct SourceDedup {
    vms: RwLock<AHashMap<VmIndex, Arc<SourceVm>>>,
    index: ContentIndex,
    shards: ShardMap,
    holders: u16,
    claiming: Box<[ClaimingShard]>,
    plans: AtomicU64,
}

impl SourceDedup {
    /// For a gang with target hosts `0..holders`, whose claims are answered by the
    /// agents of `shards`.
    pub fn new(shards: ShardMap, holders: u16) -> Self {
        Self {
            vms: RwLock::default(),
            index: ContentIndex::new(),
            shards,
            holders,
            claiming: (0..CLAIMING_SHARDS).map(|_| Default::default()).collect(),
            plans: AtomicU64::new(0),
        }
    }

    /// Adds a VM of `pages` pages bound for target host `holder`, whose memory
    /// there is all zero. `key` is the one of the VM's dedup domain, which its pages
    /// are fingerprinted with.
    pub fn add_vm(
        &self,
        vm: VmIndex,
        pages: u32,
        holder: HolderId,
        key: Arc<FingerprintKey>,
    ) -> Result<(), SourceError> {
        let mut vms = self.vms.write().unwrap_or_else(PoisonError::into_inner);
        if vms.contains_key(&vm) {
            return Err(SourceError::Twice { vm });
        }
        let sent = Arc::new(FingerprintArray::new(pages));
        let range = self
            .index
            .add_vm(vm, sent.clone())
            .map_err(|source| SourceError::Index { vm, source })?;
        vms.insert(vm, Arc::new(SourceVm::new(vm, holder, key, sent, range)));
        Ok(())
    }

    /// Forgets a VM: it has moved, or will not. Its batches are abandoned or
    /// settled before.
    pub fn remove_vm(&self, vm: VmIndex) {
        let removed = {
            let mut vms = self.vms.write().unwrap_or_else(PoisonError::into_inner);
            vms.remove(&vm)
        };
        if let Some(vm) = removed {
            vm.close();
            self.index.remove_vm(vm.range());
        }
    }

    fn vm(&self, vm: VmIndex) -> Result<Arc<SourceVm>, SourceError> {
        let vms = self.vms.read().unwrap_or_else(PoisonError::into_inner);
        vms.get(&vm).cloned().ok_or(SourceError::NoVm { vm })
    }

    fn claiming(&self, fp: &Fingerprint) -> &ClaimingShard {
        &self.claiming[(halves(fp).0 >> 34) as usize % CLAIMING_SHARDS]
    }

    /// Decides what can be decided at once for pages captured in `round`; the rest
    /// is in [`Plan::claims`]. A page may be in a round only once.
    pub fn plan(
        &self,
        vm: VmIndex,
        class: Class,
        round: Round,
        captured: &[(Gfn, Fingerprint)],
    ) -> Result<Plan, SourceError> {
        let vm = self.vm(vm)?;
        if let Some((gfn, _)) = captured.iter().find(|(gfn, _)| gfn.0 >= vm.pages()) {
            return Err(SourceError::OutOfRange {
                vm: vm.index(),
                gfn: *gfn,
                pages: vm.pages(),
            });
        }
        vm.open_plan(round)
            .map_err(|(current, open)| SourceError::RoundOrder {
                vm: vm.index(),
                round,
                current,
                open,
            })?;
        let mut plan = Plan {
            round,
            id: self.plans.fetch_add(1, Relaxed),
            class,
            pages: Vec::with_capacity(captured.len()),
            claims: Vec::new(),
            release: Vec::new(),
            vm,
        };
        let mut batch_of = vec![None; self.shards.members()];
        for (gfn, fp) in captured {
            let (step, arrived) = self.first_step(&mut plan, *gfn, fp);
            if let Step::Claimed = step {
                let shard = self.shards.shard_of(fp);
                let at = *batch_of[shard].get_or_insert_with(|| {
                    plan.claims.push(ClaimBatch {
                        shard,
                        fps: Vec::new(),
                        at: Vec::new(),
                        answered: false,
                    });
                    plan.claims.len() - 1
                });
                plan.claims[at].fps.push(*fp);
                plan.claims[at].at.push(plan.pages.len() as u32);
            }
            plan.pages.push(Planned {
                gfn: *gfn,
                fp: *fp,
                step,
                arrived,
            });
        }
        Ok(plan)
    }

    fn first_step(&self, plan: &mut Plan, gfn: Gfn, fp: &Fingerprint) -> (Step, bool) {
        match plan.vm.take_again(gfn) {
            Some(again) if again.fp() == *fp && *fp != Fingerprint::ZERO => {
                return (Step::Forced, false);
            }
            // The content that was claimed and lost is no more: nobody will send it.
            Some(Again::Lost(old)) => plan.release.push(old),
            _ => {}
        }
        if plan.vm.sent(gfn) == *fp {
            return (Step::Done(Verdict::Unchanged), false);
        }
        if *fp == Fingerprint::ZERO {
            return (Step::Done(Verdict::Zero), false);
        }
        if let Some(known) = self.known(fp) {
            return (Step::Done(verdict(plan.class, known)), known.arrived);
        }
        let mut open = lock(&self.claiming(fp).open);
        match open.get(fp).map(|claiming| claiming.known) {
            None => {
                let claiming = Claiming {
                    plan: plan.id,
                    known: None,
                };
                open.insert(*fp, claiming);
                (Step::Claimed, false)
            }
            Some(Some(known)) => (Step::Done(verdict(plan.class, known)), known.arrived),
            Some(None) => match plan.class {
                Class::Precopy => (Step::Await, false),
                Class::StopCopy => (Step::Done(Verdict::Send), false),
            },
        }
    }

    /// What this host knows of content from its own pages.
    fn known(&self, fp: &Fingerprint) -> Option<Known> {
        let vms = self.vms.read().unwrap_or_else(PoisonError::into_inner);
        self.index
            .lookup(fp, |vm, gfn| vms.get(&vm).and_then(|vm| vm.known(gfn)))
            .flatten()
    }

    /// A shard's answers to the plan's batch number `batch`.
    ///
    /// # Panics
    /// If the plan has no such batch.
    pub fn answer(
        &self,
        plan: &mut Plan,
        batch: usize,
        answers: &[ClaimAnswer],
    ) -> Result<(), BadAnswer> {
        let claims = &plan.claims[batch];
        if answers.len() != claims.fps.len() {
            return Err(BadAnswer {
                shard: claims.shard,
                claims: claims.fps.len(),
                answers: answers.len(),
            });
        }
        self.take_answers(plan, batch, answers.iter().copied());
        Ok(())
    }

    /// The shard of batch number `batch` is dead or too slow: this host sends all
    /// of it.
    ///
    /// # Panics
    /// If the plan has no such batch.
    pub fn no_answer(&self, plan: &mut Plan, batch: usize) {
        self.take_answers(plan, batch, std::iter::repeat(ClaimAnswer::Yours));
    }

    fn take_answers(
        &self,
        plan: &mut Plan,
        batch: usize,
        answers: impl Iterator<Item = ClaimAnswer>,
    ) {
        let batch = &mut plan.claims[batch];
        if std::mem::replace(&mut batch.answered, true) {
            return;
        }
        for (at, answer) in batch.at.iter().zip(answers) {
            let page = &mut plan.pages[*at as usize];
            let mine = Known {
                holder: plan.vm.holder(),
                arrived: false,
            };
            let known = match answer {
                ClaimAnswer::Held { holder, arrived } if holder.0 < self.holders => {
                    page.step = Step::Done(verdict(plan.class, Known { holder, arrived }));
                    page.arrived = arrived;
                    Known { holder, arrived }
                }
                // A holder outside the gang is no answer either.
                ClaimAnswer::Held { .. } | ClaimAnswer::Yours => {
                    page.step = Step::Done(Verdict::Send);
                    mine
                }
            };
            let shard = self.claiming(&page.fp);
            if let Some(claiming) = lock(&shard.open).get_mut(&page.fp)
                && claiming.plan == plan.id
            {
                claiming.known = Some(known);
                shard.answered.notify_all();
            }
        }
    }

    /// Whether [`settle`](Self::settle) would decide everything without waiting.
    pub fn is_ready(&self, plan: &Plan) -> bool {
        let open = |page: &Planned| match page.step {
            Step::Await => lock(&self.claiming(&page.fp).open)
                .get(&page.fp)
                .is_some_and(|claiming| claiming.plan != plan.id && claiming.known.is_none()),
            _ => false,
        };
        plan.is_answered() && !plan.pages.iter().any(open)
    }

    /// Ends the planning: decides what waited for other batches' claims (for at
    /// most `wait`; then it is sent), and notes all of it as sent. Claims of this
    /// plan that were not answered count as *yours*.
    pub fn settle(&self, mut plan: Plan, wait: Duration) -> SentBatch {
        for batch in 0..plan.claims.len() {
            self.no_answer(&mut plan, batch);
        }
        let until = Instant::now() + wait;
        let vm = plan.vm.clone();
        let mut notes = Notes::default();
        let mut pages = Vec::with_capacity(plan.pages.len());
        for page in &plan.pages {
            let Planned { gfn, fp, .. } = *page;
            let mut arrived = page.arrived;
            let verdict = match page.step {
                Step::Done(verdict) => verdict,
                Step::Forced => {
                    notes.of(self.shards.shard_of(&fp)).reassign.push(fp);
                    Verdict::Send
                }
                // Answered above, all of them.
                Step::Claimed => Verdict::Send,
                Step::Await => match self.wait_for(&fp, until) {
                    Some(known) => {
                        arrived = known.arrived;
                        verdict(plan.class, known)
                    }
                    None => Verdict::Send,
                },
            };
            let known = match verdict {
                Verdict::Unchanged | Verdict::Zero => None,
                Verdict::Send => Some(Known {
                    holder: vm.holder(),
                    arrived: false,
                }),
                Verdict::Reference { holder } => Some(Known { holder, arrived }),
            };
            if verdict != Verdict::Unchanged {
                vm.note_sent(&self.index, gfn, fp, known);
            }
            pages.push(SentPage { gfn, fp, verdict });
        }
        self.close_claims(&plan);
        vm.close_plan();
        for fp in &plan.release {
            notes.of(self.shards.shard_of(fp)).release.push(*fp);
        }
        SentBatch {
            vm: vm.index(),
            round: plan.round,
            holder: vm.holder(),
            pages,
            notes: notes.0,
        }
    }

    fn close_claims(&self, plan: &Plan) {
        for fp in plan.claims.iter().flat_map(|batch| &batch.fps) {
            let shard = self.claiming(fp);
            let mut open = lock(&shard.open);
            if open
                .get(fp)
                .is_some_and(|claiming| claiming.plan == plan.id)
            {
                open.remove(fp);
                shard.answered.notify_all();
            }
        }
    }

    fn wait_for(&self, fp: &Fingerprint, until: Instant) -> Option<Known> {
        let shard = self.claiming(fp);
        let mut open = lock(&shard.open);
        loop {
            match open.get(fp) {
                // Settled meanwhile: its page is listed, if it was not overwritten.
                None => {
                    drop(open);
                    return self.known(fp);
                }
                Some(Claiming {
                    known: Some(known), ..
                }) => return Some(*known),
                Some(_) => {}
            }
            let left = until.checked_duration_since(Instant::now())?;
            let (guard, _) = shard
                .answered
                .wait_timeout(open, left)
                .unwrap_or_else(PoisonError::into_inner);
            open = guard;
        }
    }

    /// The plan will not be sent. Its pages are captured again by the next pass;
    /// what it claimed is to be released, see the result.
    pub fn abandon(&self, plan: Plan) -> Vec<ShardNote> {
        let mut notes = Notes::default();
        for fp in plan.claims.iter().flat_map(|batch| &batch.fps) {
            notes.of(self.shards.shard_of(fp)).release.push(*fp);
        }
        for fp in &plan.release {
            notes.of(self.shards.shard_of(fp)).release.push(*fp);
        }
        self.close_claims(&plan);
        plan.vm.close_plan();
        for page in &plan.pages {
            if !matches!(page.step, Step::Done(Verdict::Unchanged)) {
                plan.vm.forget(&self.index, page.gfn);
                plan.vm.add_again(page.gfn, Again::Missed);
            }
        }
        notes.0
    }

    /// The target acknowledged the batch: what was sent in full has arrived. The
    /// result is for the shards to [confirm](super::claim::ClaimShard::confirm).
    pub fn placed(&self, batch: &SentBatch) -> Vec<ShardNote> {
        let Ok(vm) = self.vm(batch.vm) else {
            return Vec::new();
        };
        let mut notes = Notes::default();
        for page in &batch.pages {
            if page.verdict == Verdict::Send {
                vm.note_arrived(page.gfn, &page.fp);
                let shard = self.shards.shard_of(&page.fp);
                notes.of(shard).confirm.push(page.fp);
            }
        }
        notes.0
    }

    /// The batch did not arrive, or nobody knows: its pages count as never sent
    /// and are in [`take_resends`](Self::take_resends), unless a later batch has
    /// sent other content for them.
    pub fn lost(&self, batch: &SentBatch) {
        let Ok(vm) = self.vm(batch.vm) else {
            return;
        };
        for page in &batch.pages {
            let again = match page.verdict {
                Verdict::Unchanged => continue,
                Verdict::Send => Again::Lost(page.fp),
                Verdict::Zero | Verdict::Reference { .. } => Again::Missed,
            };
            vm.note_lost(&self.index, page.gfn, &page.fp, again);
        }
    }

    /// The target cannot get this page's content by reference: it will be sent in
    /// full, see [`take_resends`](Self::take_resends).
    pub fn needed(&self, vm: VmIndex, gfn: Gfn, fp: Fingerprint) -> Result<(), SourceError> {
        let state = self.vm(vm)?;
        if gfn.0 >= state.pages() {
            return Err(SourceError::OutOfRange {
                vm,
                gfn,
                pages: state.pages(),
            });
        }
        // Whatever page told this host of that holder, it told wrong.
        let vms = self.vms.read().unwrap_or_else(PoisonError::into_inner);
        if let Some((vm, gfn)) = self.index.lookup(&fp, |vm, gfn| (vm, gfn))
            && let Some(lister) = vms.get(&vm)
        {
            self.index.unlist(&fp, lister.range().id(gfn));
        }
        drop(vms);
        state.note_lost(&self.index, gfn, &fp, Again::Needed(fp));
        Ok(())
    }

    /// Pages to capture again now, each handed out once; sorted. They count as
    /// outstanding until they are planned, by whatever pass.
    pub fn take_resends(&self, vm: VmIndex) -> Result<Vec<Gfn>, SourceError> {
        Ok(self.vm(vm)?.take_resends())
    }

    /// Pages that have yet to be captured again. A VM is complete only at 0.
    pub fn outstanding(&self, vm: VmIndex) -> Result<usize, SourceError> {
        Ok(self.vm(vm)?.outstanding())
    }

    /// Digest of what was sent, to compare with the target's. Cheap after a first
    /// call, see [`FingerprintArray::digest`]: call it once before the pause.
    pub fn digest(&self, vm: VmIndex) -> Result<[u8; 16], SourceError> {
        Ok(self.vm(vm)?.digest())
    }

    /// The fingerprint last sent for a page; [`UNSENT`] if the target has nothing
    /// certain.
    pub fn last_sent(&self, vm: VmIndex, gfn: Gfn) -> Result<Fingerprint, SourceError> {
        let vm = self.vm(vm)?;
        Ok(match gfn.0 < vm.pages() {
            true => vm.sent(gfn),
            false => UNSENT,
        })
    }

    /// Bytes held: arrays, index and open claims.
    pub fn memory_bytes(&self) -> usize {
        let vms = self.vms.read().unwrap_or_else(PoisonError::into_inner);
        let arrays: usize = vms.values().map(|vm| vm.memory_bytes()).sum();
        let open: usize = self
            .claiming
            .iter()
            .map(|shard| lock(&shard.open).capacity())
            .sum();
        arrays
            + self.index.memory_bytes()
            + open * size_of::<(Fingerprint, Claiming)>()
            + CLAIMING_SHARDS * size_of::<ClaimingShard>()
    }
}

#[cfg(test)]
impl SourceDedup {
    pub(crate) fn assert_consistent(&self) {
        self.index.assert_consistent();
    }
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
