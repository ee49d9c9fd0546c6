//! The Unix socket that the API is served on.

use super::access::{Access, Admission, Role};
use super::call::ApiCall;
use super::peer::Caller;
use super::routes::router;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Bounds of the API.
#[derive(Debug, Clone, Copy)]
pub struct ApiLimits {
    /// Longest request body, bytes.
    pub body: usize,
    /// Connections at a time of callers who may do everything; more wait.
    pub connections: usize,
    /// The same of callers who may only look; more are hung up on.
    pub lookers: usize,
    /// The same of callers who are refused, and are told so; more are hung up
    /// on. They cannot keep operators waiting.
    pub strangers: usize,
    /// Time a client has for the head of its request.
    pub head: Duration,
    /// Time for calls that only look.
    pub quick: Duration,
    /// Time for calls that start or stop something.
    pub slow: Duration,
}

impl Default for ApiLimits {
    fn default() -> Self {
        ApiLimits {
            body: 1 << 20,
            connections: 64,
            lookers: 32,
            strangers: 8,
            head: Duration::from_secs(5),
            quick: Duration::from_secs(10),
            slow: Duration::from_secs(60),
        }
    }
}

/// The API's socket cannot be made.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Somebody answers there.
    #[error("another agent serves {0} already; stop it first, or give this one another api_socket")]
    InUse(PathBuf),
    /// Something that is no socket is in the way.
    #[error("{0} exists and is not a socket; move it away, or choose another api_socket")]
    InTheWay(PathBuf),
    /// Anything else.
    #[error("cannot serve the API on {path}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The socket, bound. Removed again when dropped.
#[derive(Debug)]
pub struct ApiServer {
    listener: UnixListener,
    path: PathBuf,
    access: Arc<Access>,
    limits: ApiLimits,
    /// Held for as long as this agent serves.
    _lock: Flock<File>,
}

impl ApiServer {
    /// Binds `path`, making its directory if need be. Its mode is 0600, or 0666
    /// if `access` names groups: then the credentials of each caller decide. A
    /// socket left over by an agent that died is replaced. Must be called on a
    /// runtime.
    pub fn bind(path: &Path, access: Access, limits: ApiLimits) -> Result<Self, ServeError> {
        let io = |source| ServeError::Io {
            path: path.to_owned(),
            source,
        };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(io)?;
        }
        let lock = lock(path)?;
        match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(ServeError::InTheWay(path.to_owned()));
            }
            Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(io)?;
                }
                _ => return Err(ServeError::InUse(path.to_owned())),
            },
        }
        let listener = UnixListener::bind(path).map_err(io)?;
        let mode = Permissions::from_mode(access.socket_mode());
        std::fs::set_permissions(path, mode).map_err(io)?;
        Ok(ApiServer {
            listener,
            path: path.to_owned(),
            access: Arc::new(access),
            limits,
            _lock: lock,
        })
    }

    /// Serves until dropped; every request that its caller may make goes to
    /// `calls`.
    pub async fn run(self, calls: mpsc::Sender<ApiCall>) {
        let router = router(calls, self.limits);
        let places = Places::new(&self.limits);
        let mut connections = tokio::task::JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept API connections; trying again");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let admission = match Caller::of(&stream) {
                Ok(caller) => Arc::new(Admission::new(&self.access, caller)),
                Err(error) => {
                    tracing::warn!(%error, "API caller hung up on: the kernel does not say who it is");
                    continue;
                }
            };
            let (router, head, places) = (router.clone(), self.limits.head, places.clone());
            connections.spawn(async move {
                let Some(_place) = places.take(&admission).await else {
                    tracing::debug!(?admission, "API caller hung up on: too many of its kind");
                    return;
                };
                serve(stream, router, admission, head).await;
            });
        }
    }
}

async fn serve(
    stream: UnixStream,
    router: axum::Router,
    admission: Arc<Admission>,
    head: Duration,
) {
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(admission.clone());
        router.call(request)
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "API connection ended");
    }
}

/// Who is connected at the same time.
#[derive(Clone)]
struct Places {
    operators: Arc<Semaphore>,
    lookers: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
}

impl Places {
    fn new(limits: &ApiLimits) -> Self {
        Places {
            operators: Arc::new(Semaphore::new(limits.connections)),
            lookers: Arc::new(Semaphore::new(limits.lookers)),
            strangers: Arc::new(Semaphore::new(limits.strangers)),
        }
    }

    async fn take(&self, admission: &Admission) -> Option<OwnedSemaphorePermit> {
        match admission.role {
            Ok(Role::Full) => self.operators.clone().acquire_owned().await.ok(),
            Ok(Role::ReadOnly) => self.lookers.clone().try_acquire_owned().ok(),
            Err(_) => self.strangers.clone().try_acquire_owned().ok(),
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Of two agents that start at the same time, one gets the lock.
fn lock(path: &Path) -> Result<Flock<File>, ServeError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&name);
    let file = opened.map_err(|source| ServeError::Io {
        path: name.into(),
        source,
    })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| ServeError::InUse(path.to_owned()))
}
