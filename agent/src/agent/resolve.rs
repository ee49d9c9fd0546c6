//! What operators see of handovers that are not settled, and what they decide
//! where the two sides cannot agree.

use super::{Agent, AgentCaller};
use crate::api::types::{HandoverInfo, MigrationStarted, Resolve};
use crate::api::{ApiError, ApiResult, ErrorKind};
use crate::gang::coordinator::Gang;
use crate::gang::handover::care::Care;
use crate::gang::journal::Side;
use std::rc::Rc;

impl Agent {
    /// Handovers that are not settled, then those that were, if operators want
    /// to hear of them.
    pub(super) fn handovers(&self) -> Vec<HandoverInfo> {
        let (open, over) = (self.cares.borrow(), self.settled.borrow());
        let open = open.iter().map(|care| self.handover(care, false));
        open.chain(over.iter().rev().map(|care| self.handover(care, true)))
            .collect()
    }

    fn handover(&self, care: &Care, settled: bool) -> HandoverInfo {
        let (state, why) = care.told();
        let doubt = care.in_doubt();
        let resolve = |host: &str| format!("drover gang resolve --vm {} --runs-on {host}", care.vm);
        let remedies = match (&doubt, care.side) {
            (None, _) => Vec::new(),
            (Some(_), Side::Source) => vec![
                format!(
                    "if it runs on {0}, or {0} is to run it: {1}",
                    care.peer,
                    resolve(&care.peer)
                ),
                format!(
                    "if {} is down or does not have it, and will not run it: {}",
                    care.peer,
                    resolve(self.name())
                ),
            ],
            (Some(_), Side::Target) => vec![
                format!("if it runs on {}: {}", care.peer, resolve(&care.peer)),
                format!(
                    "if {0} is down, or has it stopped and will not run it: {1}",
                    care.peer,
                    resolve(self.name())
                ),
            ],
        };
        HandoverInfo {
            vm: care.vm.clone(),
            gang: care.gang.to_string(),
            side: match care.side {
                Side::Source => "source",
                Side::Target => "target",
            }
            .to_owned(),
            peer: care.peer.clone(),
            state,
            why,
            settled,
            in_doubt: doubt,
            remedies,
            age_ms: care.since().elapsed().as_millis() as u64,
        }
    }

    pub(super) fn is_in_doubt(&self, vm: &str) -> bool {
        let cares = self.cares.borrow();
        cares
            .iter()
            .any(|care| care.vm == vm && care.in_doubt().is_some())
    }

    /// The operator says where a VM in doubt is to run.
    pub(super) async fn resolve(&self, request: &Resolve) -> ApiResult<HandoverInfo> {
        let vm = &request.vm;
        let care = {
            let cares = self.cares.borrow();
            let mut of_vm = cares.iter().filter(|care| care.vm == *vm);
            of_vm.find(|care| care.in_doubt().is_some()).cloned()
        };
        let Some(care) = care else {
            return Err(ApiError::new(
                ErrorKind::Conflict,
                format!("VM {vm} is not in doubt on {}", self.name()),
                "`drover status` shows what is; nothing has to be decided here",
            ));
        };
        let Some(runs_on) = care.side_of(&request.runs_on, self.name()) else {
            return Err(ApiError::new(
                ErrorKind::Invalid,
                format!("VM {vm} is moved between {} and {}", self.name(), care.peer),
                "name one of the two with --runs-on",
            ));
        };
        tracing::warn!(%vm, runs_on = %request.runs_on, "an operator has decided");
        match (care.side, self.landing(care.gang, vm)) {
            (Side::Target, Some(arrival)) => drop(self.decide_landing(&arrival, runs_on).await),
            _ => care.decide(runs_on),
        }
        Ok(self.handover(&care, false))
    }

    /// Takes over a gang whose coordinator has died.
    pub(super) async fn resume_gang(self: &Rc<Self>, id: &str) -> ApiResult<MigrationStarted> {
        let open = self.open_gangs();
        let found = open
            .iter()
            .find(|gang| gang.spec.id.to_string() == id || gang.spec.name == id);
        let Some(found) = found else {
            return Err(ApiError::new(
                ErrorKind::NotFound,
                format!("gang {id} is not open on {} (any more)", self.name()),
                "its VMs are where `drover vm list` shows them on their hosts; start a new \
                 migration for those that are to move",
            ));
        };
        let mut spec = found.spec.clone();
        spec.coordinator = self.name().to_owned();
        let (name, id) = (spec.name.clone(), spec.id);
        let caller = Rc::new(AgentCaller(self.clone()));
        let gang = Gang::new(caller, spec, self.moments.clone());
        gang.take_over().await.map_err(|why| {
            ApiError::new(
                ErrorKind::Conflict,
                format!("gang {name} cannot be taken over: {why}"),
                "ask its coordinator with `drover status`, or wait until it is lost for sure",
            )
        })?;
        self.keep_run(gang.clone());
        tokio::task::spawn_local(async move {
            gang.run_on().await;
        });
        Ok(MigrationStarted {
            gang: name,
            id: Some(id.to_string()),
            checks: Vec::new(),
        })
    }
}
