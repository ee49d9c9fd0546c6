//! The API from the outside: one request a connection, each with a time
//! limit.

use super::types::*;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;
use tokio::net::UnixStream;

/// Longest answer that is read, bytes.
const MAX_ANSWER: usize = 16 << 20;
/// The server gives up earlier on every request.
const LIMIT: Duration = Duration::from_secs(75);

/// A request got no result.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody serves the socket.
    #[error("no agent answers on {socket}")]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The socket is not for this user.
    #[error("user {uid} may not use the agent on {socket}")]
    NotAdmitted {
        /// The socket.
        socket: PathBuf,
        /// Who asks.
        uid: u32,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The agent said no.
    #[error("{}", .body.error)]
    Refused {
        /// HTTP status.
        status: u16,
        /// Why, and what to do.
        body: ErrorBody,
    },
    /// The connection broke.
    #[error("the connection to the agent broke")]
    Broken(#[source] hyper::Error),
    /// The answer is not what this client knows.
    #[error("the agent's answer cannot be read: {0}")]
    Unreadable(String),
    /// The agent does not answer.
    #[error("the agent did not answer within {} s", LIMIT.as_secs())]
    TimedOut,
}

impl ClientError {
    /// What the operator can do about it.
    pub fn remedy(&self) -> String {
        match self {
            ClientError::Unreachable { .. } => {
                "start the agent (systemctl start drover-agent), or \
                                                name its socket with --socket or DROVER_SOCKET"
                    .to_owned()
            }
            ClientError::NotAdmitted { .. } => "run it as root, or set api_group (or, to look \
                                                only, api_readonly_group) in agent.toml to a group \
                                                that this user is in and restart the agent"
                .to_owned(),
            ClientError::Refused { body, .. } => body.remedy.clone(),
            ClientError::Broken(_) | ClientError::TimedOut => {
                "look into the agent's log (journalctl -u drover-agent)".to_owned()
            }
            ClientError::Unreadable(_) => "install the same drover command as the agent".to_owned(),
        }
    }

    /// Whether trying again may help: the agent could not be asked.
    pub fn is_unreachable(&self) -> bool {
        !matches!(
            self,
            ClientError::Refused { .. }
                | ClientError::NotAdmitted { .. }
                | ClientError::Unreadable(_)
        )
    }
}

/// A client of one agent. Its methods need a tokio runtime.
#[derive(Debug, Clone)]
pub struct ApiClient {
    socket: PathBuf,
}

impl ApiClient {
    /// A client of the agent on `socket`; connects with each request.
    pub fn new(socket: &Path) -> Self {
        ApiClient {
            socket: socket.to_owned(),
        }
    }

    /// The agent's state.
    pub async fn status(&self) -> Result<StatusInfo, ClientError> {
        self.get("/v1/status").await
    }

    /// The VMs in the agent's charge.
    pub async fn vms(&self) -> Result<Vec<VmInfo>, ClientError> {
        self.get("/v1/vms").await
    }

    /// Starts a VM.
    pub async fn run_vm(&self, request: &RunVm) -> Result<VmInfo, ClientError> {
        self.post("/v1/vms/run", request).await
    }

    /// Puts a running VM in the agent's charge.
    pub async fn adopt_vm(&self, request: &AdoptVm) -> Result<VmInfo, ClientError> {
        self.post("/v1/vms/adopt", request).await
    }

    /// Ends a VM.
    pub async fn stop_vm(&self, name: &str) -> Result<(), ClientError> {
        let path = format!("/v1/vms/{}/stop", escape(name));
        self.post(&path, &()).await
    }

    /// Offers sockets to VMs of a gang.
    pub async fn offer(&self, request: &OfferRequest) -> Result<Vec<OfferInfo>, ClientError> {
        self.post("/v1/offers", request).await
    }

    /// How far the sockets of a gang's VMs are.
    pub async fn offers(&self, gang: &str) -> Result<Vec<OfferInfo>, ClientError> {
        self.get(&format!("/v1/offers/{}", escape(gang))).await
    }

    /// Withdraws the sockets of these VMs; of all of the gang if none is named.
    pub async fn withdraw(&self, gang: &str, vms: Vec<String>) -> Result<(), ClientError> {
        let path = format!("/v1/offers/{}/withdraw", escape(gang));
        self.post(&path, &Withdraw { vms }).await
    }

    /// Starts (or, dry, checks) a migration.
    pub async fn migrate(
        &self,
        request: &MigrationRequest,
    ) -> Result<MigrationStarted, ClientError> {
        self.post("/v1/migrations", request).await
    }

    /// All migrations the agent knows, newest first.
    pub async fn migrations(&self) -> Result<Vec<GangProgress>, ClientError> {
        self.get("/v1/migrations").await
    }

    /// One migration, by id or by its gang's name.
    pub async fn migration(&self, id: &str) -> Result<MigrationInfo, ClientError> {
        self.get(&format!("/v1/migrations/{}", escape(id))).await
    }

    /// Cancels a migration, or one VM of it.
    pub async fn cancel(&self, id: &str, vm: Option<&str>) -> Result<(), ClientError> {
        let cancel = Cancel {
            vm: vm.map(str::to_owned),
        };
        let path = format!("/v1/migrations/{}/cancel", escape(id));
        self.post(&path, &cancel).await
    }

    /// Has the agent take over a gang whose coordinator died.
    pub async fn resume_gang(&self, id: &str) -> Result<MigrationStarted, ClientError> {
        let path = format!("/v1/gangs/{}/resume", escape(id));
        self.post(&path, &()).await
    }

    /// Decides where a VM in doubt runs.
    pub async fn resolve(&self, request: &Resolve) -> Result<HandoverInfo, ClientError> {
        self.post("/v1/handovers/resolve", request).await
    }

    /// The agent's metrics, Prometheus text.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let body = self.exchange(Method::GET, "/metrics", Bytes::new()).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let body = self.exchange(Method::GET, path, Bytes::new()).await?;
        read(&body)
    }

    async fn post<Q: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        request: &Q,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(request);
        let body = body.map_err(|e| ClientError::Unreadable(e.to_string()))?;
        read(&self.exchange(Method::POST, path, body.into()).await?)
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Bytes, ClientError> {
        let exchange = self.exchange_untimed(method, path, body);
        let result = tokio::time::timeout(LIMIT, exchange).await;
        result.unwrap_or(Err(ClientError::TimedOut))
    }

    async fn exchange_untimed(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Bytes, ClientError> {
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| {
            let socket = self.socket.clone();
            match source.kind() {
                io::ErrorKind::PermissionDenied => ClientError::NotAdmitted {
                    socket,
                    uid: nix::unistd::geteuid().as_raw(),
                    source,
                },
                _ => ClientError::Unreachable { socket, source },
            }
        })?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.map_err(ClientError::Broken)?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "drover")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|e| ClientError::Unreadable(e.to_string()))?;
        let answer = async {
            let response = sender.send_request(request).await;
            let (head, body) = response.map_err(ClientError::Broken)?.into_parts();
            let body = Limited::new(body, MAX_ANSWER).collect().await;
            let body = body.map_err(|e| ClientError::Unreadable(e.to_string()))?;
            Ok((head.status, body.to_bytes()))
        };
        tokio::pin!(answer);
        let answered = tokio::select! {
            answered = &mut answer => answered,
            ended = connection => match ended {
                Ok(()) => answer.await,
                Err(error) => Err(ClientError::Broken(error)),
            },
        };
        let (status, body) = answered?;
        if status == StatusCode::OK {
            return Ok(body);
        }
        let body = serde_json::from_slice(&body).unwrap_or_else(|_| ErrorBody {
            error: format!("the agent answered {status}"),
            remedy: "look into the agent's log (journalctl -u drover-agent)".to_owned(),
        });
        Err(ClientError::Refused {
            status: status.as_u16(),
            body,
        })
    }
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(|e| ClientError::Unreadable(e.to_string()))
}

/// Percent-encodes one segment of a path.
fn escape(segment: &str) -> String {
    let mut escaped = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}
