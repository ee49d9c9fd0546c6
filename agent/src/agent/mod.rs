//! The agent: what `drover agent` runs.
//!
//! One control thread (tokio-uring) answers operators ([`operator`]) and other
//! agents ([`gangs`]) and drives handovers; [`data`] is what the data threads
//! answer with. The VMs in its charge are in the [`registry`].

mod adopted;
mod arrival;
mod arrivals;
mod data;
mod departures;
mod gangs;
mod incoming;
mod landing;
mod managed;
mod offers;
mod operator;
mod pacing;
mod recovery;
mod registry;
mod report;
mod resolve;

use crate::api::{Access, ApiLimits, ApiServer, ServeError};
use crate::config::{AgentConfig, ClusterSecret, GroupError, SecretError};
use crate::gang::coordinator::{Caller, Gang};
use crate::gang::handover::care::Care;
use crate::gang::handover::chain;
use crate::gang::journal::{Journal, JournalError};
use crate::gang::message::{CoreState, GangRequest, GangResponse};
use crate::gang::moments::Moments;
use crate::gang::slots::ScanSlots;
use crate::lane::BufferPool;
use crate::lane::pool::BUF_LEN;
use crate::net::listener::ListenError;
use crate::net::rack::{RackError, RackLimits, RackService};
use crate::net::rpc::{RpcClient, RpcLimits};
use crate::net::{Listener, ListenerLimits, Roster, Security};
use crate::pace::meter::Measure;
use crate::pace::pacer::Identity;
use crate::pace::policy::{Policy, PolicyError, check_meter};
use crate::pace::{LoadReport, Meter, MeterConfig, Pacer, PolicyWatch};
use crate::pki::PkiError;
use crate::types::GangId;
use adopted::Adopted;
use arrival::Arrival;
use data::DataPlane;
use gangs::LocalGang;
use offers::Offers;
use registry::Registry;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use thiserror::Error;
use tokio::sync::mpsc;

/// How often the policy and TLS files are looked at.
const FILES_PACE: Duration = Duration::from_secs(1);
/// How often what is wrong with this agent's protection is repeated in the log.
const WARN_PACE: Duration = Duration::from_secs(3600);
/// How often target gangs give up what is overdue.
const TICK: Duration = Duration::from_millis(50);

/// The agent cannot start.
#[derive(Debug, Error)]
pub enum AgentError {
    /// No cluster secret.
    #[error("cannot use the cluster secret")]
    Secret(#[from] SecretError),
    /// No certificate and key.
    #[error("cannot use this agent's certificate")]
    Tls(#[from] PkiError),
    /// A group of the API is not there.
    #[error("cannot tell who may use the API")]
    Group(#[from] GroupError),
    /// No API socket.
    #[error("cannot serve operators")]
    Serve(#[from] ServeError),
    /// No listening port.
    #[error("cannot serve other agents")]
    Listen(#[from] ListenError),
    /// No rack thread.
    #[error(transparent)]
    Rack(#[from] RackError),
    /// No signal handler.
    #[error("cannot wait for signals")]
    Signal(#[source] io::Error),
    /// The policy is no policy, or needs what is not there.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The policy wants the uplinks counted and they cannot be.
    #[error(
        "the uplinks cannot be counted, and the policy requires it: {why}. Mend it, or set \
         `required = false` in [meter] of the policy to pace by delay alone"
    )]
    Meter {
        /// What is missing.
        why: String,
    },
    /// No pacer thread, or no memory for page data.
    #[error("cannot set up {what}")]
    Resources {
        /// For what.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Everything the control thread holds.
pub(crate) struct Agent {
    config: AgentConfig,
    secret: ClusterSecret,
    roster: Arc<Roster>,
    policy: RefCell<PolicyWatch>,
    pacer: Pacer,
    /// Why the uplinks are not counted, if they are not.
    unmetered: Option<String>,
    pool: BufferPool,
    scan_slots: ScanSlots,
    data: Arc<DataPlane>,
    rack: RackService,
    peers: BTreeMap<String, RpcClient<GangRequest, GangResponse>>,
    journal: Journal,
    moments: Moments,
    vms: Registry,
    offers: Offers,
    gangs: RefCell<BTreeMap<GangId, Rc<LocalGang>>>,
    /// VMs that arrive, until their sources know that they are here: longer
    /// than their gangs are open, and over restarts.
    landings: RefCell<Vec<Rc<Arrival>>>,
    /// Handovers that are not settled, and notable ones that are.
    cares: RefCell<Vec<Rc<Care>>>,
    settled: RefCell<Vec<Rc<Care>>>,
    /// Gangs this agent coordinates or has coordinated, newest last.
    runs: RefCell<Vec<Rc<Gang<AgentCaller>>>>,
    lanes_before: RefCell<crate::api::types::LaneCounters>,
    started: Instant,
}

/// Runs the agent until it is told to end (SIGTERM or SIGINT).
pub fn run(config: AgentConfig) -> Result<(), AgentError> {
    let secret = ClusterSecret::load(&config.secret_file)?;
    let roster = Arc::new(Roster::from_config(&config, &secret)?);
    let policy = PolicyWatch::open(&config.policy)?;
    check_meter(&policy.policy(), policy.path())?;
    let journal = Journal::open(&config.state_dir)?;
    tokio_uring::start(async move {
        use tokio::signal::unix::{SignalKind, signal};
        let mut term = signal(SignalKind::terminate()).map_err(AgentError::Signal)?;
        let mut int = signal(SignalKind::interrupt()).map_err(AgentError::Signal)?;
        let access = Access::find(
            config.api_group.as_deref(),
            config.api_readonly_group.as_deref(),
        )?;
        let api = ApiServer::bind(&config.api_socket, access, ApiLimits::default())?;
        let listener = Listener::bind(config.listen, listener_limits(&policy.policy()))?;
        let agent = Agent::assemble(config, secret, roster.clone(), policy, journal)?;
        agent.recover().await;
        let name = &agent.config.name;
        tracing::info!(agent = %name, listen = %agent.config.listen, "agent started");
        let (calls, queue) = mpsc::channel(64);
        let incoming = Rc::new(incoming::Incomings(agent.clone()));
        tokio::select! {
            () = api.run(calls) => {}
            () = listener.run(roster, incoming) => {}
            () = operator::answer(agent.clone(), queue) => {}
            () = agent.clone().keep_time() => {}
            () = agent.clone().share_load() => {}
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tracing::info!("agent ends; VMs go on running");
        agent.end().await;
        Ok(())
    })
}

impl Agent {
    fn assemble(
        config: AgentConfig,
        secret: ClusterSecret,
        roster: Arc<Roster>,
        policy: PolicyWatch,
        journal: Journal,
    ) -> Result<Rc<Self>, AgentError> {
        let now = policy.policy();
        let (meter, unmetered) = match attach_meter(&config, &roster) {
            Ok(meter) => (Some(Box::new(meter) as Box<dyn Measure>), None),
            Err(why) if now.meter.required => return Err(AgentError::Meter { why }),
            Err(why) => (None, Some(why)),
        };
        if let Some(why) = &unmetered {
            tracing::warn!(%why, "uplinks are not counted: pacing by the lanes' delay alone");
        }
        let resources = |what| move |source| AgentError::Resources { what, source };
        let pacer = start_pacer(&config, &now, meter).map_err(resources("the pacer"))?;
        let adopted = Adopted::open(&config.state_dir).map_err(resources("adopted VMs"))?;
        // Targets make their sockets there. Not everybody has VMs of libvirt's.
        if let Err(error) = offers::make_transport_dir(&config) {
            let dir = config.transport_dir.display();
            tracing::warn!(%dir, %error, "no directory for VMs whose manager drives their migration");
        }
        let buffers = (config.data_memory as usize / BUF_LEN).max(8);
        let pool = BufferPool::new(buffers).map_err(resources("memory for page data"))?;
        let data = Arc::new(DataPlane::default());
        let reports = pacer.clone();
        let rack = RackService::start(
            roster.clone(),
            data.clone(),
            data.clone(),
            Box::new(move |from, bytes| take_report(&reports, from, bytes)),
            RackLimits::default(),
        )?;
        let peers = roster
            .peers()
            .map(|peer| {
                let client = RpcClient::new(roster.clone(), &peer.name, RpcLimits::default());
                (peer.name.clone(), client)
            })
            .collect();
        Ok(Rc::new(Agent {
            moments: Moments::new(config.moments.clone()),
            config,
            secret,
            roster,
            policy: RefCell::new(policy),
            pacer,
            unmetered,
            pool,
            scan_slots: ScanSlots::new(now.limits.scan_threads as usize),
            data,
            rack,
            peers,
            journal,
            vms: Registry::new(adopted),
            offers: Offers::default(),
            gangs: RefCell::default(),
            landings: RefCell::default(),
            cares: RefCell::default(),
            settled: RefCell::default(),
            runs: RefCell::default(),
            lanes_before: RefCell::default(),
            started: Instant::now(),
        }))
    }

    fn policy(&self) -> Arc<Policy> {
        self.policy.borrow().policy()
    }

    fn name(&self) -> &str {
        &self.config.name
    }

    /// Policy changes, overdue fetches, gangs whose other side is gone.
    async fn keep_time(self: Rc<Self>) {
        let mut files_at = Instant::now();
        let mut warned: Option<Instant> = None;
        loop {
            tokio::time::sleep(TICK).await;
            for gang in self.open_gangs() {
                gang.tick();
            }
            self.mind_landings();
            if files_at.elapsed() < FILES_PACE {
                continue;
            }
            files_at = Instant::now();
            self.reap().await;
            self.offers.reap();
            self.poll_tls();
            if warned.is_none_or(|at| at.elapsed() > WARN_PACE) {
                warned = Some(Instant::now());
                for warning in self.roster.security().warnings(SystemTime::now()) {
                    tracing::warn!("{warning}");
                }
            }
            let polled = self.policy.borrow_mut().poll();
            match polled {
                Ok(Some(policy)) => {
                    tracing::info!("policy changed");
                    self.pacer.set_policy(&policy);
                    self.scan_slots.resize(policy.limits.scan_threads as usize);
                }
                Ok(None) => {}
                Err(error) => tracing::error!(error = %chain(&error), "policy not taken over"),
            }
        }
    }

    /// Takes over certificates that were renewed.
    fn poll_tls(&self) {
        let Security::Tls(store) = self.roster.security() else {
            return;
        };
        match store.poll() {
            Ok(None) => {}
            Ok(Some(tls)) => {
                let certificate = tls.credentials().certificate();
                tracing::info!(
                    fingerprint = %certificate.fingerprint_hex(),
                    expires = %crate::pki::date(certificate.not_after),
                    "TLS files changed; new connections use them"
                );
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "TLS files changed and are not taken over");
            }
        }
    }

    /// Tells the rack what this host's uplinks carry.
    async fn share_load(self: Rc<Self>) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(self.pacer.report_interval()) => {}
                () = self.pacer.news() => {}
            }
            match postcard::to_stdvec(&self.pacer.load_report()) {
                Ok(bytes) => drop(self.rack.publish(&bytes)),
                Err(error) => tracing::error!(%error, "load report cannot be encoded"),
            }
        }
    }

    fn core_state(&self) -> CoreState {
        let status = self.pacer.status();
        let report = self.pacer.load_report();
        let mbit = |bytes_per_s: f64| bytes_per_s * 8.0 / 1e6;
        let core_bytes = match report.metered {
            true => report.egress.migration + report.ingress.migration,
            false => self.lane_totals().sent_bytes,
        };
        CoreState {
            tenant_mbit: mbit(status.tenant),
            migration_mbit: mbit(status.migration),
            capacity_mbit: mbit(status.capacity),
            core_bytes,
            metered: self.unmetered.is_none(),
        }
    }

    /// Asks another agent.
    pub(super) async fn ask(
        &self,
        host: &str,
        request: GangRequest,
        limit: Duration,
    ) -> Result<GangResponse, String> {
        let Some(peer) = self.peers.get(host) else {
            return Err(format!("{host} is not among the peers of {}", self.name()));
        };
        peer.call(&request, limit).await.map_err(|e| chain(&e))
    }

    /// Cancels what is under way and closes everything, within a few seconds.
    async fn end(&self) {
        for gang in self.open_gangs() {
            gang.cancel_departures();
        }
        let until = Instant::now() + Duration::from_secs(5);
        while Instant::now() < until && self.open_gangs().iter().any(|g| g.has_departures()) {
            tokio::time::sleep(TICK).await;
        }
        for gang in self.open_gangs() {
            self.close_gang(gang.spec.id).await;
        }
        self.pacer.close();
    }
}

/// Calls the agents of a gang; this one directly.
pub(crate) struct AgentCaller(Rc<Agent>);

impl Caller for AgentCaller {
    async fn call(
        &self,
        host: &str,
        request: GangRequest,
        limit: Duration,
    ) -> Result<GangResponse, String> {
        if host == self.0.name() {
            let work = self.0.clone().gang_request(host, request);
            return tokio::time::timeout(limit, work)
                .await
                .map_err(|_| format!("{host}: not done within {} s", limit.as_secs()));
        }
        self.0.ask(host, request, limit).await
    }
}

fn take_report(pacer: &Pacer, from: &str, bytes: &[u8]) {
    let Ok(report) = postcard::from_bytes::<LoadReport>(bytes) else {
        tracing::warn!(%from, "load report cannot be read; are all agents of one version?");
        return;
    };
    if report.host != from {
        tracing::warn!(%from, "load report in another host's name ignored");
        return;
    }
    if let Err(error) = pacer.receive(report) {
        tracing::warn!(%from, %error, "load report ignored");
    }
}

fn start_pacer(
    config: &AgentConfig,
    policy: &Policy,
    meter: Option<Box<dyn Measure>>,
) -> io::Result<Pacer> {
    let mut boot = [0; 8];
    aws_lc_rs::rand::fill(&mut boot).map_err(|_| io::Error::other("no random bytes"))?;
    let identity = Identity {
        host: config.name.clone(),
        rack: config.rack.clone(),
        boot: u64::from_le_bytes(boot),
    };
    Pacer::start(identity, policy, meter)
}

/// Lanes cost memory, so one peer gets those of some gangs, not of any number.
fn listener_limits(policy: &Policy) -> ListenerLimits {
    let mut limits = ListenerLimits::default();
    let two_gangs = 2 * policy.limits.lanes_per_pair as usize;
    limits.per_peer.lanes = limits.per_peer.lanes.max(two_gangs);
    limits
}

/// Attaches the meter to the uplinks; the error is what to tell the operator.
fn attach_meter(config: &AgentConfig, roster: &Roster) -> Result<Meter, String> {
    if config.uplinks.is_empty() {
        return Err("agent.toml names no `uplinks`".into());
    }
    let in_rack = config
        .rack_prefixes
        .iter()
        .filter_map(|p| crate::pace::meter::Prefix::new(p.address(), p.length()))
        .collect();
    let mut agents: Vec<_> = roster.peers().map(|p| p.address.ip()).collect();
    agents.push(config.listen.ip());
    let mut ports: Vec<u16> = roster.peers().map(|p| p.address.port()).collect();
    ports.push(config.listen.port());
    ports.sort_unstable();
    ports.dedup();
    let meter = MeterConfig {
        uplinks: config.uplinks.clone(),
        in_rack,
        across_core: Vec::new(),
        agents,
        ports,
        mark: 0,
        attach: Default::default(),
    };
    Meter::attach(&meter).map_err(|e| chain(&e))
}
