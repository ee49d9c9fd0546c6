//! The Unix socket that the API is served on.

use super::call::ApiCall;
use super::routes::router;
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
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, mpsc};

/// Bounds of the API.
#[derive(Debug, Clone, Copy)]
pub struct ApiLimits {
    /// Longest request body, bytes.
    pub body: usize,
    /// Connections at a time; more wait.
    pub connections: usize,
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
    limits: ApiLimits,
    /// Held for as long as this agent serves.
    _lock: Flock<File>,
}

impl ApiServer {
    /// Binds `path` with mode 0660, making its directory if need be. A socket
    /// left over by an agent that died is replaced. Must be called on a
    /// runtime.
    pub fn bind(path: &Path, limits: ApiLimits) -> Result<Self, ServeError> {
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
        std::fs::set_permissions(path, Permissions::from_mode(0o660)).map_err(io)?;
        Ok(ApiServer {
            listener,
            path: path.to_owned(),
            limits,
            _lock: lock,
        })
    }

    /// Serves until dropped; every request goes to `calls`.
    pub async fn run(self, calls: mpsc::Sender<ApiCall>) {
        let router = router(calls, self.limits);
        let places = Arc::new(Semaphore::new(self.limits.connections));
        let mut connections = tokio::task::JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept API connections; trying again");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(self.limits.head)
                .serve_connection(
                    TokioIo::new(stream),
                    TowerToHyperService::new(router.clone()),
                );
            connections.spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "API connection ended");
                }
                drop(place);
            });
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
