//! Agents that are lost on the way: a coordinator that another agent follows,
//! and source agents whose VMs' fate has to be found out.

use super::{Caller, Gang, GangState, LOST_AFTER, unexpected};
use crate::gang::handover::machine::Whose;
use crate::gang::message::{GangRequest, GangResponse, Phase};
use crate::gang::moments::Moment;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long the fate of a VM is asked for whose source agent was lost.
const FATE_LIMIT: Duration = Duration::from_secs(10);
/// How often.
const FATE_POLL: Duration = Duration::from_millis(100);

impl<C: Caller> Gang<C> {
    /// Follows a coordinator that has died, at the agent of any of the gang's
    /// hosts. An error: it may not, and nothing has been done.
    pub async fn take_over(self: &Rc<Self>) -> Result<(), String> {
        let spec = self.spec();
        let mut refused = Vec::new();
        for host in &spec.hosts {
            let request = GangRequest::TakeOver { gang: spec.id };
            match self.caller.call(&host.name, request, LOST_AFTER).await {
                Ok(GangResponse::Done) => {}
                Ok(other) => refused.push(unexpected(&host.name, other)),
                // One that is lost is dealt with like any that gets lost later.
                Err(why) => tracing::warn!(%why, "taking over a gang without this agent"),
            }
        }
        match refused.is_empty() {
            true => Ok(()),
            false => Err(refused.join("; ")),
        }
    }

    /// Runs a gang that was taken over to its end: VMs on their way are driven
    /// on, those that had not begun begin.
    pub async fn run_on(self: &Rc<Self>) -> GangState {
        self.ask_sources().await;
        let facts = self.check_all().await;
        self.start_all(facts).await;
        self.moments.reach_gang(Moment::Started).await;
        self.drive().await;
        self.end_gang().await
    }

    /// A source agent that was lost decides alone, and so does the one that is
    /// started in its place: what it has decided is asked for a while, so that
    /// the gang's report can tell.
    pub(super) async fn ask_fates(&self) {
        let spec = self.spec();
        let until = Instant::now() + FATE_LIMIT;
        let unsettled = self.out_of_sight.borrow().clone();
        for vm in unsettled {
            let plan = &spec.vms[vm.0 as usize];
            while Instant::now() < until {
                let request = GangRequest::WhoseIs {
                    gang: spec.id,
                    vm: plan.name.clone(),
                };
                let answer = self.caller.call(&plan.from, request, LOST_AFTER).await;
                let (phase, error) = match answer {
                    Ok(GangResponse::Whose(Whose::Mine)) => {
                        let why = format!(
                            "source agent {} was lost on the way; found again, it has let VM {} \
                             run on there",
                            plan.from, plan.name
                        );
                        (Phase::Failed, Some(why))
                    }
                    // Handed over, ended and forgotten.
                    Ok(GangResponse::Whose(Whose::Unknown)) => (Phase::Arrived, None),
                    _ => {
                        tokio::time::sleep(FATE_POLL).await;
                        continue;
                    }
                };
                let mut state = self.state.borrow_mut();
                let slot = &mut state.vms[vm.0 as usize];
                (slot.phase, slot.error) = (phase, error);
                // Nothing is handed over whose pages were not compared.
                slot.verified |= phase == Phase::Arrived;
                self.out_of_sight.borrow_mut().remove(&vm);
                break;
            }
        }
    }
}
