//! The coordinator hears of every agent whose VMs are on their way, sources
//! and targets, each asked on its own: one that hangs keeps nobody waiting,
//! and is noticed within two seconds.

use super::{Caller, Gang, LOST_AFTER, POLL, unexpected};
use crate::gang::message::{GangRequest, GangResponse, LostAgent, VmState};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// How often an agent is asked that VMs only come to: it has no progress to
/// tell.
const TARGET_POLL: Duration = Duration::from_millis(200);
/// An agent that goes on so much later than it wanted to was held up itself:
/// nobody else is blamed for that time.
const HELD_UP: Duration = Duration::from_millis(300);

/// Why there is no answer.
enum NoAnswer {
    /// It says that it does not take part (any more): it was started anew.
    Stranger(String),
    /// It says nothing.
    Silent(String),
}

impl<C: Caller> Gang<C> {
    /// Asks all agents until no VM is on its way. They are asked for as long
    /// as what is returned lives.
    pub(super) fn attend(self: &Rc<Self>) -> JoinSet<()> {
        let live = self.live();
        let hosts: BTreeSet<String> = live.into_iter().flat_map(|(_, v)| [v.from, v.to]).collect();
        let mut tasks = JoinSet::new();
        for host in hosts {
            tasks.spawn_local(self.clone().attend_to(host));
        }
        tasks
    }

    /// Asks every source once: what those of a gang that is taken over know.
    pub(super) async fn ask_sources(self: &Rc<Self>) {
        let sources: BTreeSet<String> = self.live().into_iter().map(|(_, v)| v.from).collect();
        let mut tasks = JoinSet::new();
        for host in sources {
            let gang = self.clone();
            tasks.spawn_local(async move {
                let asked = Instant::now();
                if let Err(none) = gang.ask(&host, LOST_AFTER).await {
                    gang.lost(&host, none.why(), asked.elapsed());
                }
            });
        }
        while tasks.join_next().await.is_some() {}
    }

    async fn attend_to(self: Rc<Self>, host: String) {
        let mut heard = Instant::now();
        loop {
            let live = self.live();
            let leaves = live.iter().any(|(_, v)| v.from == host);
            if !leaves && !live.iter().any(|(_, v)| v.to == host) {
                return;
            }
            let first_source = live.iter().map(|(_, v)| &v.from).min() == Some(&host);
            let limit = match self.is_lost(&host) {
                true => LOST_AFTER,
                false => LOST_AFTER.saturating_sub(heard.elapsed()),
            };
            let core = async {
                if first_source {
                    self.look_at_core(&host, limit).await;
                }
            };
            let asked = Instant::now();
            match tokio::join!(self.ask(&host, limit), core).0 {
                Ok(()) => {
                    heard = Instant::now();
                    self.found_again(&host);
                }
                Err(_) if was_held_up(asked, limit) => heard = Instant::now(),
                Err(NoAnswer::Stranger(why)) => self.lost(&host, why, heard.elapsed()),
                Err(NoAnswer::Silent(why)) if heard.elapsed() >= LOST_AFTER => {
                    self.lost(&host, why, heard.elapsed());
                }
                Err(NoAnswer::Silent(_)) => {}
            }
            let pause = if leaves { POLL } else { TARGET_POLL };
            let slept = Instant::now();
            tokio::time::sleep(pause).await;
            if was_held_up(slept, pause) {
                heard = Instant::now();
            }
        }
    }

    async fn ask(&self, host: &str, limit: Duration) -> Result<(), NoAnswer> {
        let gang = self.state.borrow().spec.id;
        let request = GangRequest::Progress { gang };
        match self.caller.call(host, request, limit).await {
            Ok(GangResponse::Progress(vms)) => {
                self.merge(host, vms);
                Ok(())
            }
            Ok(other) => Err(NoAnswer::Stranger(unexpected(host, other))),
            Err(why) => Err(NoAnswer::Silent(why)),
        }
    }

    async fn look_at_core(&self, host: &str, limit: Duration) {
        let core = self.caller.call(host, GangRequest::Core, limit).await;
        if let Ok(GangResponse::Core(core)) = core {
            self.state.borrow_mut().core = core;
        }
    }

    /// Takes over what `host` tells of the VMs that leave it. Of others' it
    /// has nothing to tell.
    fn merge(&self, host: &str, vms: Vec<VmState>) {
        let mut state = self.state.borrow_mut();
        for vm in vms {
            let own = state.spec.vm(vm.vm).is_some_and(|plan| plan.from == host);
            if let Some(slot) = state.vms.get_mut(vm.vm.0 as usize)
                && own
                && !slot.phase.is_final()
            {
                *slot = vm;
            }
        }
    }

    fn is_lost(&self, host: &str) -> bool {
        let state = self.state.borrow();
        state.lost.iter().any(|lost| lost.is(host))
    }

    fn found_again(&self, host: &str) {
        let mut state = self.state.borrow_mut();
        for lost in state.lost.iter_mut().filter(|lost| lost.is(host)) {
            tracing::info!(agent = %host, "lost agent answers again");
            lost.found_again = true;
        }
    }

    /// An agent is lost. Its own VMs it decides on alone; those that come to it
    /// are their sources', which notice as well.
    fn lost(&self, host: &str, why: String, silent: Duration) {
        if !self.is_lost(host) {
            tracing::warn!(agent = %host, %why, silent_ms = silent.as_millis() as u64, "lost agent");
            self.state.borrow_mut().lost.push(LostAgent {
                agent: host.to_owned(),
                at_ms: self.started.elapsed().as_millis() as u64,
                silent_ms: silent.as_millis() as u64,
                why: why.clone(),
                found_again: false,
            });
        }
        self.source_lost(host, why);
    }

    fn source_lost(&self, host: &str, why: String) {
        for (vm, plan) in self.live() {
            if plan.from == host {
                self.out_of_sight.borrow_mut().insert(vm);
                self.fail(
                    vm,
                    format!(
                        "source agent {host} is lost ({why}); it decides alone where VM {} \
                         runs: ask it with `drover status` there",
                        plan.name
                    ),
                );
            }
        }
    }
}

/// Whether what began then and was to take `limit` at most has taken much
/// longer.
fn was_held_up(begun: Instant, limit: Duration) -> bool {
    begun.elapsed() > limit + HELD_UP
}

impl NoAnswer {
    fn why(self) -> String {
        match self {
            NoAnswer::Stranger(why) | NoAnswer::Silent(why) => why,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gang::message::Phase;
    use crate::gang::moments::Moments;
    use crate::gang::testing::spec;
    use crate::types::VmIndex;
    use std::cell::RefCell;

    /// Agents that answer questions for progress with these words, whoever is
    /// asked.
    #[derive(Default)]
    struct Told(RefCell<Vec<VmState>>);

    impl Caller for Told {
        async fn call(
            &self,
            _: &str,
            request: GangRequest,
            _: Duration,
        ) -> Result<GangResponse, String> {
            match request {
                GangRequest::Progress { .. } => Ok(GangResponse::Progress(self.0.borrow().clone())),
                other => Err(format!("nobody expected {other:?}")),
            }
        }
    }

    fn state(vm: u16, phase: Phase) -> VmState {
        VmState {
            phase,
            ..VmState::new(VmIndex(vm))
        }
    }

    #[tokio::test]
    async fn an_agent_is_believed_only_about_vms_that_leave_it() {
        let told = Rc::new(Told::default());
        let gang = Gang::new(told.clone(), spec(7), Moments::default());
        let say = async |host: &str, vms: &[(u16, Phase)]| {
            *told.0.borrow_mut() = vms.iter().map(|&(vm, phase)| state(vm, phase)).collect();
            assert!(gang.ask(host, LOST_AFTER).await.is_ok());
            let known = gang.snapshot().vms;
            [known[0].phase, known[1].phase]
        };
        use Phase::{Arrived, Failed, Precopy, Preparing, Ready};

        // web1 leaves a1, web2 leaves a2. Their targets have no say, nor has an
        // agent that is none of theirs.
        for host in ["b1", "b2", "a3"] {
            let known = say(host, &[(0, Arrived), (1, Failed)]).await;
            assert_eq!(known, [Preparing, Preparing], "{host}");
        }
        // Of what a source says, its own VM counts; there is no third one.
        let words = [(1, Precopy), (0, Failed), (2, Failed), (u16::MAX, Failed)];
        assert_eq!(say("a2", &words).await, [Preparing, Precopy]);
        assert_eq!(
            say("a1", &[(1, Arrived), (0, Ready)]).await,
            [Ready, Precopy]
        );
        // What is final stays so.
        assert_eq!(say("a1", &[(0, Arrived)]).await, [Arrived, Precopy]);
        assert_eq!(say("a1", &[(0, Failed)]).await, [Arrived, Precopy]);
    }
}
