//! The end of a move that the VM's manager decides (kind `qemu-managed`):
//! without a journal, since nothing of it is Drover's to decide.
//!
//! ```text
//! loaded ── SHUT to the source's QEMU ══ point of no return ══▶ its manager lets
//!                                          the target run, and ends the source
//! ```
//!
//! Before that message whatever fails closes the source's socket, and the manager
//! lets the guest run on and removes the target. After it the agent only looks
//! on: when the source's VMM has ended, the VM has arrived.

use super::chain;
use super::leaving::Watcher;
use super::live::Live;
use super::machine::{RunsOn, Source};
use crate::gang::coordinator::Caller;
use crate::gang::handover::care::Care;
use crate::gang::message::GangRequest;
use crate::gang::moments::{Moment, Moments};
use crate::types::GangId;
use crate::vmm::managed::{ManagedError, SourceVm};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the manager may take to decide before the VM counts as in doubt.
const DECIDE_LIMIT: Duration = Duration::from_secs(60);
/// How often the source's VMM is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How long the target agent may take to answer.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// See the module.
pub struct Managers<C> {
    /// Reaches the target agent.
    pub caller: Rc<C>,
    /// Tests stop it at these.
    pub moments: Moments,
    /// The gang.
    pub gang: GangId,
    /// The VM.
    pub vm: String,
    /// The target agent.
    pub peer: String,
    /// The VM as the handover has it.
    pub source: Arc<SourceVm>,
    /// What operators see.
    pub care: Rc<Care>,
    /// Hears of it.
    pub live: Rc<Live>,
}

impl<C: Caller> Managers<C> {
    /// `moved`: whether the target's VMM has everything and has said so.
    pub(super) async fn run(self, moved: Result<(), String>) -> RunsOn {
        if let Err(why) = moved {
            return self.stayed(&why).await;
        }
        match self.source.complete().await {
            Ok(()) => self.completed().await,
            Err(error @ ManagedError::Unconfirmed { .. }) => self.doubted(&chain(&error)),
            Err(error) => self.stayed(&chain(&error)).await,
        }
    }

    async fn stayed(self, why: &str) -> RunsOn {
        self.care.because(why);
        self.care.enter("its manager lets it run here");
        self.live.entered(Source::Returning, why);
        self.source.break_off();
        self.moments.reach(Moment::RolledBack, &self.vm).await;
        let abort = GangRequest::Abort {
            gang: self.gang,
            vm: self.vm.clone(),
            why: why.to_owned(),
        };
        // Otherwise the gang's end does that.
        if let Err(why) = self.caller.call(&self.peer, abort, ASK_LIMIT).await {
            tracing::warn!(vm = %self.vm, %why, "target agent not told");
        }
        self.live.entered(Source::Noting, why);
        self.live.entered(Source::Returned, why);
        RunsOn::Source
    }

    async fn completed(self) -> RunsOn {
        self.care
            .enter("complete: its manager lets it run at the target");
        self.live.entered(Source::Ending, "");
        let until = Instant::now() + DECIDE_LIMIT;
        while self.source.process().is_alive() {
            if Instant::now() > until {
                return self.undecided().await;
            }
            tokio::time::sleep(LOOK).await;
        }
        let settled = GangRequest::Settled {
            gang: self.gang,
            vm: self.vm.clone(),
        };
        // Otherwise the gang's end tells it.
        let _lost = self.caller.call(&self.peer, settled, ASK_LIMIT).await;
        self.live.entered(Source::Closing(RunsOn::Target), "");
        RunsOn::Target
    }

    /// The source's VMM is still there: the manager took the VM back, or hangs.
    async fn undecided(self) -> RunsOn {
        let why = format!(
            "VM {} has moved to {} completely, but its manager has not ended it here within {} s: \
             `virsh list` on both hosts says where it runs",
            self.vm,
            self.peer,
            DECIDE_LIMIT.as_secs()
        );
        self.doubted(&why)
    }

    fn doubted(self, why: &str) -> RunsOn {
        tracing::warn!(vm = %self.vm, %why);
        self.care.because(why);
        self.live.in_doubt(why);
        self.live.entered(Source::Returned, why);
        RunsOn::Source
    }
}
