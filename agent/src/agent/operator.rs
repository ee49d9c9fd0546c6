//! Answers to operators.

use super::registry::{Vm, not_found};
use super::{Agent, AgentCaller, report};
use crate::api::types::{
    Check, MigrationInfo, MigrationOptions, MigrationRequest, MigrationStarted, StatusInfo, VmInfo,
};
use crate::api::{ApiCall, ApiError, ApiResult, ErrorKind};
use crate::gang::coordinator::Gang;
use crate::gang::message::{GangHost, GangSpec, GangVm, Phase};
use crate::gang::plan::Plan;
use crate::pace::ProfileName;
use crate::types::{GangId, VmIndex};
use std::path::Path;
use std::rc::Rc;
use std::time::SystemTime;
use tokio::sync::mpsc;

/// Downtime limit where the operator gives none, milliseconds.
const DOWNTIME_LIMIT_MS: u64 = 300;
/// Runs that are kept for `drover status`.
const RUNS_KEPT: usize = 64;

/// Answers calls until the API ends. Long ones get a task of their own.
pub(super) async fn answer(agent: Rc<Agent>, mut calls: mpsc::Receiver<ApiCall>) {
    while let Some(call) = calls.recv().await {
        let agent = agent.clone();
        tokio::task::spawn_local(async move { agent.answer_one(call).await });
    }
}

impl Agent {
    async fn answer_one(self: Rc<Self>, call: ApiCall) {
        // A client that has gone away does not get its answer.
        match call {
            ApiCall::Status { reply } => drop(reply.send(Ok(self.status()))),
            ApiCall::ListVms { reply } => drop(reply.send(Ok(self.list_vms().await))),
            ApiCall::RunVm { request, reply } => {
                drop(reply.send(self.run_vm(&request.name).await));
            }
            ApiCall::AdoptVm { request, reply } => {
                drop(reply.send(self.adopt_vm(&request.name, &request.qmp).await));
            }
            ApiCall::StopVm { name, reply } => drop(reply.send(self.stop_vm(&name).await)),
            ApiCall::Offer { request, reply } => drop(reply.send(self.offer(request).await)),
            ApiCall::Offers { gang, reply } => drop(reply.send(self.offered(&gang))),
            ApiCall::Withdraw {
                gang,
                request,
                reply,
            } => {
                self.withdraw(&gang, &request.vms);
                drop(reply.send(Ok(())));
            }
            ApiCall::StartMigration { request, reply } => {
                drop(reply.send(self.start_migration(request).await));
            }
            ApiCall::ListMigrations { reply } => drop(reply.send(Ok(self.migrations()))),
            ApiCall::Migration { id, reply } => drop(reply.send(self.migration(&id))),
            ApiCall::CancelMigration { id, vm, reply } => {
                drop(reply.send(self.cancel_migration(&id, vm.as_deref())));
            }
            ApiCall::ResumeGang { id, reply } => drop(reply.send(self.resume_gang(&id).await)),
            ApiCall::Resolve { request, reply } => {
                drop(reply.send(self.resolve(&request).await));
            }
            ApiCall::Metrics { reply } => drop(reply.send(Ok(self.metrics()))),
        }
    }

    async fn run_vm(&self, name: &str) -> Result<VmInfo, ApiError> {
        self.no_landing(name).await?;
        let vm = self.vms.run(&self.config, name).await?;
        Ok(self.vm_info(&vm).await)
    }

    async fn adopt_vm(&self, name: &str, qmp: &Path) -> Result<VmInfo, ApiError> {
        self.no_landing(name).await?;
        let vm = self.vms.adopt(&self.config, name, qmp).await?;
        Ok(self.vm_info(&vm).await)
    }

    async fn stop_vm(&self, name: &str) -> Result<(), ApiError> {
        self.no_landing(name).await?;
        self.vms.stop(name).await
    }

    /// While the source of a VM that came here does not know that it runs
    /// here, or its handover is in doubt, nobody starts or ends it unasked.
    async fn no_landing(&self, name: &str) -> Result<(), ApiError> {
        self.settle_landing(name).await.map_err(|why| {
            ApiError::new(
                ErrorKind::Conflict,
                why,
                "`drover status` here says what it waits for, and how to decide it",
            )
        })
    }

    fn status(&self) -> StatusInfo {
        StatusInfo {
            agent: self.name().to_owned(),
            rack: self.config.rack.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_s: self.started.elapsed().as_secs(),
            vms: self.vms.len() as u64,
            peers: self.peer_states(),
            metered_uplinks: match self.unmetered {
                None => self.config.uplinks.clone(),
                Some(_) => Vec::new(),
            },
            tls: report::tls_status(self.roster.security()),
            warnings: self.warnings(),
            core: report::core_load(&self.core_state()),
            lanes: self.lane_totals(),
            migrations: self.migrations(),
            handovers: self.handovers(),
        }
    }

    /// What every status and report says of this agent.
    fn warnings(&self) -> Vec<String> {
        let mut warnings = self.roster.security().warnings(SystemTime::now());
        warnings.extend(self.roster.offences().warnings());
        warnings
    }

    async fn list_vms(&self) -> Vec<VmInfo> {
        let mut infos = Vec::new();
        for vm in self.vms.all() {
            infos.push(self.vm_info(&vm).await);
        }
        infos.extend(self.offers.vms());
        infos.extend(self.landings.borrow().iter().filter_map(|a| a.info()));
        infos
    }

    async fn vm_info(&self, vm: &Vm) -> VmInfo {
        let status = match vm.leaving {
            Some(_) if self.is_in_doubt(&vm.definition.name) => "in doubt".to_owned(),
            Some(_) => "migrating".to_owned(),
            None if !vm.vmm.process.is_alive() => "dead".to_owned(),
            None => match vm.vmm.status().await {
                Ok(state) => format!("{state:?}").to_lowercase(),
                Err(_) => "unreachable".to_owned(),
            },
        };
        let kinds = self.vms.kinds(vm).await;
        let kind = match &kinds {
            None => vm.definition.kind.to_string(),
            Some(survey) => survey
                .chosen
                .map_or("none".to_owned(), |kind| kind.to_string()),
        };
        let flight = self.open_gangs().into_iter().find_map(|gang| {
            let departures = gang.departures.borrow();
            let flight = departures
                .values()
                .find(|d| d.flight.name == vm.definition.name)?;
            Some(flight.flight.snapshot())
        });
        let scanned = flight
            .as_ref()
            .map_or(0, |f| f.pages.sent + f.pages.reference + f.pages.unchanged);
        let rate = flight.map(|f| (f.dirty_pages_per_s * crate::types::PAGE_SIZE as f64) as u64);
        VmInfo {
            name: vm.definition.name.clone(),
            kind,
            kinds: kinds.as_ref().map(report::kind_infos).unwrap_or_default(),
            status,
            ram_bytes: vm.definition.ram_bytes,
            pages_scanned: vm.pages_scanned + scanned,
            dirty_bytes_per_s: rate.or(vm.dirty_bytes_per_s),
            pid: vm.vmm.process.pid() as u32,
            qmp: vm.vmm.socket().to_owned(),
            domain: vm.definition.domain.clone(),
        }
    }

    async fn start_migration(
        self: &Rc<Self>,
        request: MigrationRequest,
    ) -> ApiResult<MigrationStarted> {
        let hosts = self.roster.names();
        let plan = Plan::parse(Path::new(&request.plan_file), &request.plan, Some(&hosts))
            .map_err(|problems| {
                let remedy = "correct the plan; configs/plans/ has an example";
                ApiError::new(ErrorKind::Invalid, problems.to_string(), remedy)
            })?;
        let spec = self.spec(&plan, &request.options)?;
        let (id, dry_run) = (spec.id, request.options.dry_run);
        let caller = Rc::new(AgentCaller(self.clone()));
        let gang = Gang::new(caller, spec, self.moments.clone());
        if dry_run {
            let state = gang.dry_run().await;
            let checks = state
                .vms
                .iter()
                .zip(&state.spec.vms)
                .map(|(vm, plan)| Check {
                    vm: Some(plan.name.clone()),
                    what: format!("{} → {}", plan.from, plan.to),
                    ok: vm.phase != Phase::Failed,
                    detail: vm.error.clone().unwrap_or_else(|| "can be moved".into()),
                })
                .collect();
            return Ok(MigrationStarted {
                gang: plan.gang,
                id: None,
                checks,
            });
        }
        {
            let runs = self.runs.borrow();
            let busy = runs.iter().any(|run| {
                let state = run.snapshot();
                !state.ended && state.spec.name == plan.gang
            });
            if busy {
                return Err(ApiError::new(
                    ErrorKind::Conflict,
                    format!("gang {} is moving already", plan.gang),
                    "wait for its end, or cancel it",
                ));
            }
        }
        self.keep_run(gang.clone());
        tokio::task::spawn_local(async move {
            gang.run().await;
        });
        Ok(MigrationStarted {
            gang: plan.gang,
            id: Some(id.to_string()),
            checks: Vec::new(),
        })
    }

    /// Remembers a run, for operators that ask.
    pub(super) fn keep_run(&self, gang: Rc<Gang<AgentCaller>>) {
        let mut runs = self.runs.borrow_mut();
        let surplus = (runs.len() + 1).saturating_sub(RUNS_KEPT);
        runs.drain(..surplus);
        runs.push(gang);
    }

    fn spec(&self, plan: &Plan, options: &MigrationOptions) -> ApiResult<GangSpec> {
        let invalid =
            |error: String, remedy: &str| ApiError::new(ErrorKind::Invalid, error, remedy);
        let profile = match &options.profile {
            Some(name) => name.parse::<ProfileName>().map_err(|e| {
                invalid(
                    e.to_string(),
                    "background, normal, urgent and evacuate are known",
                )
            })?,
            None => self.policy().profile,
        };
        let mut id = [0; 8];
        aws_lc_rs::rand::fill(&mut id).map_err(|_| {
            ApiError::new(
                ErrorKind::Failed,
                "the system gave no random bytes",
                "try again",
            )
        })?;
        let hosts = plan
            .hosts()
            .into_iter()
            .filter_map(|name| self.roster.member(name))
            .map(|m| GangHost {
                name: m.name.clone(),
                rack: m.rack.clone(),
            })
            .collect();
        Ok(GangSpec {
            id: GangId(u64::from_le_bytes(id)),
            name: plan.gang.clone(),
            coordinator: self.name().to_owned(),
            hosts,
            vms: plan
                .vms
                .iter()
                .map(|v| GangVm {
                    name: v.name.clone(),
                    from: v.from.clone(),
                    to: v.to.clone(),
                })
                .collect(),
            profile: profile.as_str().to_owned(),
            compress: options.compress,
            verify: options.verify,
            downtime_limit_ms: options.downtime_limit_ms.unwrap_or(DOWNTIME_LIMIT_MS),
            align: options.align,
        })
    }

    fn migrations(&self) -> Vec<crate::api::types::GangProgress> {
        self.runs
            .borrow()
            .iter()
            .rev()
            .map(|run| report::progress(&run.snapshot()))
            .collect()
    }

    /// The newest run by that id or gang name.
    fn find_run(&self, id: &str) -> ApiResult<Rc<Gang<AgentCaller>>> {
        let runs = self.runs.borrow();
        let found = runs.iter().rev().find(|run| {
            let spec = run.snapshot().spec;
            spec.id.to_string() == id || spec.name == id
        });
        found.cloned().ok_or_else(|| {
            ApiError::new(
                ErrorKind::NotFound,
                format!("{} coordinates no gang {id}", self.name()),
                "ask the agent that the migration was started with; `drover status` lists gangs",
            )
        })
    }

    fn migration(&self, id: &str) -> ApiResult<MigrationInfo> {
        let state = self.find_run(id)?.snapshot();
        Ok(MigrationInfo {
            progress: report::progress(&state),
            report: state.ended.then(|| report::report(&state, self.warnings())),
        })
    }

    fn cancel_migration(&self, id: &str, vm: Option<&str>) -> ApiResult<()> {
        let run = self.find_run(id)?;
        let spec = run.snapshot().spec;
        let index = match vm {
            None => None,
            Some(name) => {
                let at = spec.vms.iter().position(|v| v.name == name);
                Some(VmIndex(at.ok_or_else(|| not_found(name))? as u16))
            }
        };
        run.cancel(index);
        Ok(())
    }
}
