//! The scan threads' way to the claim shards of their rack.
//!
//! Claims are asked without waiting; a [`Ticket`] is where the answer turns
//! up. No answer by the deadline means *yours*.

use crate::dedup::claim::ClaimAnswer;
use crate::dedup::source::ShardNote;
use crate::net::rack::{self, ClaimClient, ClaimOp, ClaimOutcome, ClaimReply};
use crate::types::{Fingerprint, GangId, HolderId};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Claim shards of one gang, as this host reaches them.
pub struct Claims {
    client: ClaimClient,
    gang: GangId,
    /// The agent behind each shard's index.
    members: Vec<String>,
    limit: Duration,
}

#[derive(Default)]
struct Slot {
    outcome: Mutex<Option<ClaimOutcome>>,
    answered: Condvar,
}

/// Where the answer to a batch of claims turns up.
pub struct Ticket(Arc<Slot>);

impl Claims {
    /// `members` are the agents of the shards, in the order of the shard map;
    /// claims not answered within `limit` are given up.
    pub fn new(client: ClaimClient, gang: GangId, members: Vec<String>, limit: Duration) -> Self {
        Claims {
            client,
            gang,
            members,
            limit,
        }
    }

    /// Claims contents for the target host `holder`.
    pub fn claim(&self, shard: usize, fps: &[Fingerprint], holder: HolderId) -> Ticket {
        let slot = Arc::new(Slot::default());
        let sink = slot.clone();
        let op = ClaimOp::Claim {
            fps: fps.to_vec(),
            holder,
        };
        self.submit(shard, op, move |outcome| sink.put(outcome));
        Ticket(slot)
    }

    /// Tells shards what became of claims. May get lost: it only saves work.
    pub fn tell(&self, notes: Vec<ShardNote>, holder: HolderId) {
        for note in notes {
            let ops = [
                (
                    note.reassign,
                    ClaimOp::Reassign {
                        fps: Vec::new(),
                        holder,
                    },
                ),
                (
                    note.release,
                    ClaimOp::Release {
                        fps: Vec::new(),
                        holder,
                    },
                ),
                (
                    note.confirm,
                    ClaimOp::Confirm {
                        fps: Vec::new(),
                        holder,
                    },
                ),
            ];
            for (list, mut op) in ops {
                if list.is_empty() {
                    continue;
                }
                match &mut op {
                    ClaimOp::Reassign { fps, .. }
                    | ClaimOp::Release { fps, .. }
                    | ClaimOp::Confirm { fps, .. }
                    | ClaimOp::Claim { fps, .. } => *fps = list,
                    ClaimOp::Forget { .. } => {}
                }
                self.submit(note.shard, op, |_| {});
            }
        }
    }

    fn submit(&self, shard: usize, op: ClaimOp, sink: impl FnOnce(ClaimOutcome) + Send + 'static) {
        match self.members.get(shard) {
            Some(host) => {
                self.client
                    .submit(host, self.gang, op, self.limit, Box::new(sink));
            }
            None => sink(ClaimOutcome::NotInTime),
        }
    }
}

impl Slot {
    fn put(&self, outcome: ClaimOutcome) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        self.answered.notify_all();
    }
}

impl Ticket {
    /// Whether [`wait`](Self::wait) would return at once.
    pub fn is_answered(&self) -> bool {
        self.0
            .outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// The answers, or `None` if the shard gave none by `deadline`.
    pub fn wait(self, deadline: Instant) -> Option<Vec<ClaimAnswer>> {
        let mut outcome = self
            .0
            .outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            match outcome.take() {
                Some(ClaimOutcome::Replied(ClaimReply::Claims(answers))) => {
                    return Some(answers.into_iter().map(answer).collect());
                }
                Some(_) => return None,
                None => {}
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            outcome = self
                .0
                .answered
                .wait_timeout(outcome, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

fn answer(answer: rack::ClaimAnswer) -> ClaimAnswer {
    match answer {
        rack::ClaimAnswer::Yours => ClaimAnswer::Yours,
        rack::ClaimAnswer::Held { holder, arrived } => ClaimAnswer::Held { holder, arrived },
    }
}
