//! One unsettled handover as operators see it: what this side has decided and
//! why, whether it is in doubt, and where an operator's decision comes in.

use super::machine::{RunsOn, Source, Whose};
use crate::gang::journal::Side;
use crate::types::GangId;
use std::cell::{Cell, RefCell};
use std::time::Instant;
use tokio::sync::watch;

/// How long the other side may be silent, when only its word decides, before
/// the VM counts as in doubt.
pub const DOUBT_AFTER: std::time::Duration = std::time::Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub struct Care {
    /// The gang.
    pub gang: GangId,
    /// The VM.
    pub vm: String,
    /// Which end of the move this is.
    pub side: Side,
    /// The agent at the other end.
    pub peer: String,
    since: Instant,
    state: RefCell<String>,
    why: RefCell<String>,
    doubt: RefCell<Option<String>>,
    /// Of a source: where it is, and whether its guest is to run.
    source: Cell<(Source, bool)>,
    notable: Cell<bool>,
    decision: watch::Sender<Option<RunsOn>>,
}

impl Care {
    /// Of a handover that begins, or that a restarted agent found.
    pub fn new(gang: GangId, vm: &str, side: Side, peer: &str, why: &str) -> Self {
        Care {
            gang,
            vm: vm.to_owned(),
            side,
            peer: peer.to_owned(),
            since: Instant::now(),
            state: RefCell::default(),
            why: RefCell::new(why.to_owned()),
            doubt: RefCell::default(),
            source: Cell::new((Source::Moving, false)),
            notable: Cell::new(!why.is_empty()),
            decision: watch::channel(None).0,
        }
    }

    /// What is being done now.
    pub fn enter(&self, state: &str) {
        *self.state.borrow_mut() = state.to_owned();
    }

    /// A source is in this state, and its guest is to run.
    pub fn source_is(&self, state: Source, run: bool) {
        self.source.set((state, run));
    }

    /// What a target is told that asks its source whose the VM is.
    pub fn whose(&self) -> Whose {
        let (source, run) = self.source.get();
        source.whose(run)
    }

    /// Why it is being done.
    pub fn because(&self, why: &str) {
        *self.why.borrow_mut() = why.to_owned();
    }

    /// The other side's word is missing. Says whether that is news.
    pub fn doubt(&self, why: &str) -> bool {
        self.notable.set(true);
        self.doubt.borrow_mut().replace(why.to_owned()).is_none()
    }

    /// The other side has spoken.
    pub fn no_doubt(&self) {
        self.doubt.borrow_mut().take();
    }

    /// Why it is in doubt, if it is.
    pub fn in_doubt(&self) -> Option<String> {
        self.doubt.borrow().clone()
    }

    /// What is being done, and why.
    pub fn told(&self) -> (String, String) {
        (self.state.borrow().clone(), self.why.borrow().clone())
    }

    /// Whether operators want to hear of it after it is settled: a restart or
    /// a doubt was part of it.
    pub fn is_notable(&self) -> bool {
        self.notable.get()
    }

    /// When it began, in this run of the agent.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The host on which the VM is to run by this decision, as a side.
    pub fn side_of(&self, host: &str, me: &str) -> Option<RunsOn> {
        let (mine, theirs) = match self.side {
            Side::Source => (RunsOn::Source, RunsOn::Target),
            Side::Target => (RunsOn::Target, RunsOn::Source),
        };
        match host {
            host if host == me => Some(mine),
            host if host == self.peer => Some(theirs),
            _ => None,
        }
    }

    /// An operator, or a fence, has decided.
    pub fn decide(&self, runs_on: RunsOn) {
        self.because(match runs_on {
            RunsOn::Source => "it was decided that it runs on its source",
            RunsOn::Target => "it was decided that it runs on its target",
        });
        self.decision.send_replace(Some(runs_on));
    }

    /// Waits for a decision.
    pub async fn decided(&self) -> RunsOn {
        let mut decision = self.decision.subscribe();
        loop {
            if let Some(runs_on) = *decision.borrow_and_update() {
                return runs_on;
            }
            if decision.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}
