//! What is on the wire between simulated hosts, and what they do with it.

use super::world::{Content, World, page_of};
use crate::{
    dedup::{
        claim::ClaimAnswer,
        resolve::{Arrival, Fetched, Need, NotFetched, RefArrival, Served},
        source::ShardNote,
    },
    types::{Fingerprint, Gfn, HolderId, Page, Round},
};

#[derive(Debug, Clone)]
pub(super) enum Entry {
    Zero,
    Full(Content),
    Reference(Fingerprint, HolderId),
}

/// A batch as a lane carries it.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) vm: usize,
    pub(super) seq: u64,
    pub(super) round: Round,
    pub(super) entries: Vec<(Gfn, Entry)>,
}

#[derive(Clone)]
pub(super) enum Message {
    Claim {
        vm: usize,
        plan: u64,
        batch: usize,
        shard: usize,
        fps: Vec<Fingerprint>,
        me: HolderId,
    },
    Answer {
        vm: usize,
        plan: u64,
        batch: usize,
        answers: Vec<ClaimAnswer>,
    },
    Note(ShardNote, HolderId),
    Pages(Frame),
    Ack {
        vm: usize,
        seq: u64,
    },
    Fetch {
        from: usize,
        holder: usize,
        fp: Fingerprint,
    },
    Fetched {
        to: usize,
        holder: usize,
        fp: Fingerprint,
        page: Option<Box<Page>>,
    },
    Needs(Vec<Need>),
}

/// A request waiting at a holder.
#[derive(Clone)]
pub(super) struct Parked {
    from: usize,
    fp: Fingerprint,
}

impl World {
    /// Delivers, loses or doubles a message; any of those under way.
    pub(super) fn deliver_one(&mut self) {
        if self.wire.is_empty() {
            return;
        }
        let at = self.rng.below(self.wire.len());
        if self.storm() && self.rng.percent(3) {
            self.tally.doubled += 1;
            let copy = self.wire[at].clone();
            self.wire.push(copy);
        }
        let message = self.wire.swap_remove(at);
        if self.storm() && self.rng.percent(5) {
            self.tally.lost += 1;
            return;
        }
        self.tally.delivered += 1;
        self.deliver(message);
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::Claim {
                vm,
                plan,
                batch,
                shard,
                fps,
                me,
            } => {
                if self.dead.contains(&shard) {
                    return;
                }
                let mut answers = self.shards[shard].claim(&fps, me);
                if self.storm() && self.rng.percent(2) {
                    // An answer that is none, or names a host that is none.
                    match self.rng.below(2) {
                        0 => answers.truncate(answers.len() - 1),
                        _ => {
                            answers[0] = ClaimAnswer::Held {
                                holder: HolderId(999),
                                arrived: true,
                            }
                        }
                    }
                }
                self.wire.push(Message::Answer {
                    vm,
                    plan,
                    batch,
                    answers,
                });
            }
            Message::Answer {
                vm,
                plan,
                batch,
                answers,
            } => self.answer(vm, plan, batch, Some(&answers)),
            Message::Note(note, holder) => {
                if !self.dead.contains(&note.shard) {
                    let shard = &self.shards[note.shard];
                    shard.release(&note.release, holder);
                    shard.reassign(&note.reassign, holder);
                    shard.confirm(&note.confirm, holder);
                }
            }
            Message::Pages(frame) => self.arrive(frame),
            Message::Ack { vm, seq } => {
                if let Some((batch, _)) = self.vms[vm].unacked.remove(&seq) {
                    let source = self.vms[vm].source;
                    let notes = self.sources[source].placed(&batch);
                    self.note(vm, notes);
                }
            }
            Message::Fetch { from, holder, fp } => self.serve(from, holder, fp),
            Message::Fetched {
                to,
                holder,
                fp,
                page,
            } => self.fetched(to, holder, fp, page),
            Message::Needs(needs) => {
                for need in needs {
                    let vm = &self.vms[usize::from(need.vm.0)];
                    if vm.is_moving() {
                        self.sources[vm.source]
                            .needed(need.vm, need.gfn, need.fp)
                            .expect("a page of a VM that moves");
                    }
                }
            }
        }
    }

    fn answer(&mut self, vm: usize, plan: u64, batch: usize, answers: Option<&[ClaimAnswer]>) {
        let state = &mut self.vms[vm];
        let source = &self.sources[state.source];
        let Some(open) = state.open.iter_mut().find(|open| open.id == plan) else {
            return;
        };
        let refused = match answers {
            Some(answers) => source.answer(&mut open.plan, batch, answers).is_err(),
            None => true,
        };
        if refused {
            source.no_answer(&mut open.plan, batch);
        }
    }

    fn arrive(&mut self, frame: Frame) {
        let Frame {
            vm,
            seq,
            round,
            entries,
        } = frame;
        let (index, target) = (self.vms[vm].index, self.vms[vm].target);
        let store = &self.targets[target].store;
        let Ok(state) = store.vm(index) else {
            return;
        };
        let mut needs = Vec::new();
        for (gfn, entry) in entries {
            match entry {
                Entry::Zero => store.arrive_zero(&state, gfn, 1, round).expect("in range"),
                Entry::Full(content) => {
                    let page = page_of(content);
                    self.arrived.insert((target, self.vms[vm].name(content)));
                    let arrival = store.arrive_page(&state, gfn, round, &page);
                    self.tally.stale += u64::from(arrival.expect("in range") == Arrival::Stale);
                }
                Entry::Reference(fp, holder) => {
                    match store
                        .arrive_ref(&state, gfn, round, fp, holder)
                        .expect("in range")
                    {
                        RefArrival::Fetch => {
                            self.fetches.insert((target, fp));
                            self.wire.push(Message::Fetch {
                                from: target,
                                holder: holder.0.into(),
                                fp,
                            });
                        }
                        RefArrival::Await => {
                            self.fetches.insert((target, fp));
                        }
                        RefArrival::Need => needs.push(Need { vm: index, gfn, fp }),
                        RefArrival::Placed | RefArrival::Stale | RefArrival::Joined => {}
                    }
                }
            }
        }
        self.wire.push(Message::Ack { vm, seq });
        self.need(needs);
    }

    fn need(&mut self, needs: Vec<Need>) {
        if !needs.is_empty() {
            self.tally.needs += needs.len() as u64;
            self.wire.push(Message::Needs(needs));
        }
    }

    fn serve(&mut self, from: usize, holder: usize, fp: Fingerprint) {
        let id = self.id();
        let lie = self.storm() && self.targets[holder].lies;
        let target = &mut self.targets[holder];
        if target.mute && self.faults == super::Faults::All && self.next_id.is_multiple_of(2) {
            return;
        }
        let mut page = page_of(0);
        let answer = match target.store.serve_or_watch(&fp, &mut page, id) {
            Served::Page if lie => {
                self.tally.lies += 1;
                page[100] ^= 1;
                Some(Box::new(page))
            }
            Served::Page => Some(Box::new(page)),
            Served::NotYet => {
                self.tally.parked += 1;
                target.parked.insert(id, Parked { from, fp });
                return;
            }
            Served::Gone => {
                self.tally.gone += 1;
                None
            }
        };
        self.wire.push(Message::Fetched {
            to: from,
            holder,
            fp,
            page: answer,
        });
    }

    fn fetched(&mut self, to: usize, holder: usize, fp: Fingerprint, page: Option<Box<Page>>) {
        self.fetches.remove(&(to, fp));
        let store = &self.targets[to].store;
        let needs = match page {
            None => store.not_fetched(fp, NotFetched::Gone),
            Some(page) => match store.fetched(fp, HolderId(holder as u16), &page) {
                Fetched::Placed(_) | Fetched::Unwanted => Vec::new(),
                Fetched::Wrong { holder: who, needs } => {
                    assert_eq!(usize::from(who.0), holder);
                    needs
                }
            },
        };
        self.need(needs);
    }

    /// Answers requests whose content has come.
    pub(super) fn wake_parked(&mut self) {
        for holder in 0..self.targets.len() {
            let ready =
                std::mem::take(&mut *self.targets[holder].ready.lock().expect("one thread"));
            for watcher in ready {
                if let Some(Parked { from, fp }) = self.targets[holder].parked.remove(&watcher) {
                    self.serve(from, holder, fp);
                }
            }
        }
    }

    /// Somebody has waited long enough, or thinks so.
    pub(super) fn lose_patience(&mut self) {
        if !self.impatient() {
            return;
        }
        let vm = self.rng.below(self.vms.len());
        match self.rng.below(4) {
            0 => {
                let opens = self.vms[vm].open.len();
                if opens > 0 {
                    let open = &self.vms[vm].open[self.rng.below(opens)];
                    let (id, batches) = (open.id, open.plan.claims().len());
                    if batches > 0 {
                        let batch = self.rng.below(batches);
                        self.tally.claims_unanswered += 1;
                        self.answer(vm, id, batch, None);
                    }
                }
            }
            1 => self.give_up_batch(vm),
            2 => {
                let at = self.rng.below(self.fetches.len());
                if let Some((to, fp)) = self.fetches.iter().nth(at).copied() {
                    self.fetches.remove(&(to, fp));
                    self.tally.fetch_timeouts += 1;
                    let needs = self.targets[to].store.not_fetched(fp, NotFetched::Late);
                    self.need(needs);
                }
            }
            _ => {
                let holder = self.rng.below(self.targets.len());
                let target = &mut self.targets[holder];
                if let Some((watcher, parked)) = target.parked.pop_first() {
                    target.store.unwatch(&parked.fp, watcher);
                    self.wire.push(Message::Fetched {
                        to: parked.from,
                        holder,
                        fp: parked.fp,
                        page: None,
                    });
                }
            }
        }
    }

    /// A batch was not acknowledged: its lane sends the same frame again, or gives
    /// it up, though it may have arrived or be on its way.
    fn give_up_batch(&mut self, vm: usize) {
        let state = &mut self.vms[vm];
        let at = self.rng.below(state.unacked.len());
        let Some(seq) = state.unacked.keys().nth(at).copied() else {
            return;
        };
        if self.rng.percent(50) {
            let frame = state.unacked[&seq].1.clone();
            self.tally.batches_resent += 1;
            self.wire.push(Message::Pages(frame));
        } else if let Some((batch, _)) = state.unacked.remove(&seq) {
            self.tally.batches_given_up += 1;
            self.sources[state.source].lost(&batch);
        }
    }
}
