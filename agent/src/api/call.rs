//! API requests on their way to the agent.

use super::types::*;
use tokio::sync::oneshot;

/// What every call is answered with.
pub type ApiResult<T> = Result<T, ApiError>;

/// Where the answer goes. The agent may drop it: the client then gets an
/// internal error.
pub type Reply<T> = oneshot::Sender<ApiResult<T>>;

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// What kind of failure: decides the HTTP status.
    pub kind: ErrorKind,
    /// What went wrong.
    pub error: String,
    /// What to do about it.
    pub remedy: String,
}

/// Kinds of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request is wrong (400).
    Invalid,
    /// The caller may not ask this (403).
    Forbidden,
    /// There is no such VM or migration (404).
    NotFound,
    /// It cannot be done in the present state (409).
    Conflict,
    /// It was tried and failed (500).
    Failed,
    /// Not now; try again (503).
    Busy,
    /// It took too long (504).
    TimedOut,
}

impl ApiError {
    /// An error of the given kind.
    pub fn new(kind: ErrorKind, error: impl Into<String>, remedy: impl Into<String>) -> Self {
        ApiError {
            kind,
            error: error.into(),
            remedy: remedy.into(),
        }
    }
}

/// One request to the agent, with the place for its answer.
#[derive(Debug)]
#[non_exhaustive]
pub enum ApiCall {
    /// `GET /v1/status`
    Status {
        /// Where the answer goes.
        reply: Reply<StatusInfo>,
    },
    /// `GET /v1/vms`
    ListVms {
        /// Where the answer goes.
        reply: Reply<Vec<VmInfo>>,
    },
    /// `POST /v1/vms/run`
    RunVm {
        /// What to run.
        request: RunVm,
        /// Where the answer goes.
        reply: Reply<VmInfo>,
    },
    /// `POST /v1/vms/adopt`
    AdoptVm {
        /// What to adopt.
        request: AdoptVm,
        /// Where the answer goes.
        reply: Reply<VmInfo>,
    },
    /// `POST /v1/vms/{name}/stop`: end the VMM.
    StopVm {
        /// The VM.
        name: String,
        /// Where the answer goes.
        reply: Reply<()>,
    },
    /// `POST /v1/offers`: offer sockets to VMs.
    Offer {
        /// To which.
        request: OfferRequest,
        /// Where the answer goes.
        reply: Reply<Vec<OfferInfo>>,
    },
    /// `GET /v1/offers/{gang}`: how far they are. Offers that nobody asks after
    /// are withdrawn.
    Offers {
        /// The gang's name.
        gang: String,
        /// Where the answer goes.
        reply: Reply<Vec<OfferInfo>>,
    },
    /// `POST /v1/offers/{gang}/withdraw`
    Withdraw {
        /// The gang's name.
        gang: String,
        /// Which.
        request: Withdraw,
        /// Where the answer goes.
        reply: Reply<()>,
    },
    /// `POST /v1/migrations`: answered once the plan is accepted (or, for a
    /// dry run, checked), not when it is over.
    StartMigration {
        /// What to migrate.
        request: MigrationRequest,
        /// Where the answer goes.
        reply: Reply<MigrationStarted>,
    },
    /// `GET /v1/migrations`: newest first.
    ListMigrations {
        /// Where the answer goes.
        reply: Reply<Vec<GangProgress>>,
    },
    /// `GET /v1/migrations/{id}`
    Migration {
        /// A run's id or a gang's name (then its newest run).
        id: String,
        /// Where the answer goes.
        reply: Reply<MigrationInfo>,
    },
    /// `POST /v1/migrations/{id}/cancel`: answered once it is asked for, not
    /// when everything has gone back.
    CancelMigration {
        /// A run's id or a gang's name.
        id: String,
        /// Only this VM; the whole gang if `None`.
        vm: Option<String>,
        /// Where the answer goes.
        reply: Reply<()>,
    },
    /// `POST /v1/gangs/{id}/resume`: take over a gang whose coordinator died.
    ResumeGang {
        /// The gang's id or name.
        id: String,
        /// Where the answer goes.
        reply: Reply<MigrationStarted>,
    },
    /// `POST /v1/handovers/resolve`: decide where a VM in doubt runs.
    Resolve {
        /// The decision.
        request: Resolve,
        /// Where the answer goes.
        reply: Reply<HandoverInfo>,
    },
    /// `GET /metrics`: Prometheus text format.
    Metrics {
        /// Where the answer goes.
        reply: Reply<String>,
    },
}
