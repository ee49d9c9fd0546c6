//! Between two QEMUs on one host: a socket offered to the source, connections
//! to the target, and the rules for when a migration has failed.

use super::error::{Fault, StreamError};
use super::item::{RawFrom, Tally};
use super::session::{Channel, MAX_MULTIFD, Session};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Until the source's QEMU connects, and for reaching the target's.
    pub connect: Duration,
    /// How long no byte may move on any connection. A source that waits for
    /// `migrate-continue` sends nothing either.
    pub idle: Duration,
}

/// The relay broke off. Every socket was shut down: the source's QEMU reports
/// its migration `failed` and the VM goes on there; the target's QEMU ends.
#[derive(Debug, Error)]
pub enum RelayError {
    /// The socket for the source cannot be offered.
    #[error("VM {vm}: cannot offer {path} to its QEMU")]
    Listen {
        /// The VM.
        vm: Arc<str>,
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The source did not come.
    #[error(
        "VM {vm}: its QEMU did not connect to {path} within {limit:?}: see `query-migrate` there"
    )]
    NotConnected {
        /// The VM.
        vm: Arc<str>,
        /// The socket.
        path: PathBuf,
        /// How long it had.
        limit: Duration,
    },
    /// The target cannot be reached.
    #[error("VM {vm}: cannot connect to {path}: does the target's QEMU run, with `-incoming unix:{path}`?", path = path.display())]
    Target {
        /// The VM.
        vm: Arc<str>,
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// What came is not a stream, or not one that is carried.
    #[error("VM {vm}: {channel} of QEMU's migration")]
    Stream {
        /// The VM.
        vm: Arc<str>,
        /// The connection.
        channel: Channel,
        /// Where and what.
        #[source]
        source: StreamError,
    },
    /// A QEMU cannot be read from.
    #[error("VM {vm}: cannot read the {channel} of QEMU's migration")]
    Read {
        /// The VM.
        vm: Arc<str>,
        /// The connection.
        channel: Channel,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A QEMU takes no more.
    #[error(
        "VM {vm}: cannot write the {channel} of QEMU's migration: has the other QEMU ended? Its log says why"
    )]
    Write {
        /// The VM.
        vm: Arc<str>,
        /// The connection.
        channel: Channel,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The target went away without saying that it has it all.
    #[error(
        "VM {vm}: the target's QEMU closed the migration before it had confirmed it: its log says why"
    )]
    Unconfirmed {
        /// The VM.
        vm: Arc<str>,
    },
    /// The target said that it failed.
    #[error(
        "VM {vm}: the target's QEMU says that its migration failed (SHUT with {value}): its log says why"
    )]
    TargetFailed {
        /// The VM.
        vm: Arc<str>,
        /// The message's value.
        value: u32,
    },
    /// Two main connections.
    #[error("VM {vm}: a second migration came while one is under way: one relay carries one")]
    SecondMain {
        /// The VM.
        vm: Arc<str>,
    },
    /// Too many connections.
    #[error(
        "VM {vm}: more than {MAX_MULTIFD} multifd connections: set the migration parameter multifd-channels to {MAX_MULTIFD} at most, on both QEMUs"
    )]
    TooManyConnections {
        /// The VM.
        vm: Arc<str>,
    },
    /// Nothing moves.
    #[error("VM {vm}: its migration has stood still for {limit:?}, after {moved} bytes in and out")]
    Stalled {
        /// The VM.
        vm: Arc<str>,
        /// How long it may.
        limit: Duration,
        /// What went before.
        moved: u64,
    },
    /// No thread for a connection.
    #[error("VM {vm}: cannot start a thread for a connection of its migration")]
    Thread {
        /// The VM.
        vm: Arc<str>,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The relay was given up.
    #[error("VM {vm}: the relay of its migration was closed")]
    Closed {
        /// The VM.
        vm: Arc<str>,
    },
}

impl RelayError {
    /// What is wrong with the stream, if it is that.
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            RelayError::Stream { source, .. } => Some(&source.fault),
            _ => None,
        }
    }
}

/// What one connection carried to the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChannelReport {
    /// Bytes.
    pub bytes: u64,
    /// Pages among them.
    pub tally: Tally,
}

/// What a migration was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamReport {
    /// The main connection.
    pub main: ChannelReport,
    /// Since where it was passed on unread. [`RawFrom::Unknown`] is to be told to
    /// operators: pages after it are not deduplicated.
    pub raw: Option<RawFrom>,
    /// Multifd's connections, in the order of their ends.
    pub multifd: Vec<ChannelReport>,
    /// Bytes of the return path.
    pub back: u64,
}

/// A relay for one migration of one VM; removed with the value.
#[derive(Debug)]
pub struct StreamRelay {
    vm: Arc<str>,
    path: PathBuf,
    listener: UnixListener,
    limits: Limits,
}

impl StreamRelay {
    /// Offers `path` to the source's QEMU, for `migrate unix:PATH`.
    pub fn offer(vm: &str, path: &Path, limits: Limits) -> Result<StreamRelay, RelayError> {
        let vm: Arc<str> = vm.into();
        let offered = || {
            let listener = UnixListener::bind(path)?;
            fs::set_permissions(path, Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        match offered() {
            Ok(listener) => Ok(StreamRelay {
                vm,
                path: path.to_owned(),
                listener,
                limits,
            }),
            Err(source) => Err(RelayError::Listen {
                vm,
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Carries the migration from the source that connects to the QEMU that
    /// listens at `target`. Dropping the future breaks it off.
    ///
    /// Done without an error: the source has sent everything, the target has
    /// confirmed it, and the source has heard so. Which of them may run is
    /// decided elsewhere. With an error: see [`RelayError`]; a target may have it
    /// all nevertheless, when what was lost is its confirmation.
    pub async fn run(self, target: &Path) -> Result<StreamReport, RelayError> {
        let Limits { connect, idle } = self.limits;
        let session = Session::new(self.vm.clone(), target.to_owned(), self.limits);
        let mut threads = Threads {
            session: Arc::new(session),
            handles: Vec::new(),
        };
        let (ended, mut ends) = mpsc::unbounded_channel();
        let Ok(first) = timeout(connect, self.accept()).await else {
            return Err(RelayError::NotConnected {
                vm: self.vm.clone(),
                path: self.path.clone(),
                limit: connect,
            });
        };
        threads.spawn(first?, &ended)?;
        let mut running = 1;
        let mut last = (0, Instant::now());
        while running > 0 {
            let session = threads.session.clone();
            tokio::select! {
                // Without an end no connection is taken for the last.
                biased;
                Some(()) = ends.recv() => running -= 1,
                source = self.accept(), if session.is_open() => {
                    match source.and_then(|source| threads.spawn(source, &ended)) {
                        Ok(()) => running += 1,
                        Err(error) => session.fail(error),
                    }
                }
                () = tokio::time::sleep(idle / 8) => {
                    let moved = session.moved();
                    if moved != last.0 {
                        last = (moved, Instant::now());
                    } else if last.1.elapsed() > idle {
                        let vm = self.vm.clone();
                        session.fail(RelayError::Stalled { vm, limit: idle, moved });
                    }
                }
            }
        }
        threads.session.outcome()
    }

    async fn accept(&self) -> Result<UnixStream, RelayError> {
        let accepted = self.listener.accept().await;
        accepted
            .map(|(source, _)| source)
            .map_err(|source| RelayError::Listen {
                vm: self.vm.clone(),
                path: self.path.clone(),
                source,
            })
    }
}

impl Drop for StreamRelay {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The threads of the connections; dropped, they have ended.
struct Threads {
    session: Arc<Session>,
    handles: Vec<JoinHandle<()>>,
}

impl Threads {
    fn spawn(
        &mut self,
        source: UnixStream,
        ended: &mpsc::UnboundedSender<()>,
    ) -> Result<(), RelayError> {
        let vm = || self.session.vm.clone();
        let number = self.handles.len();
        if number > MAX_MULTIFD {
            return Err(RelayError::TooManyConnections { vm: vm() });
        }
        let blocking = || {
            let source = source.into_std()?;
            source.set_nonblocking(false)?;
            Ok(source)
        };
        let source = blocking().map_err(|source| RelayError::Read {
            vm: vm(),
            channel: Channel::New(number),
            source,
        })?;
        let ended = Ended(ended.clone());
        let session = self.session.clone();
        let spawned = thread::Builder::new()
            .name(format!("stream-{number}"))
            .spawn(move || {
                let _ended = ended;
                session.connection(source, number);
            });
        self.handles
            .push(spawned.map_err(|source| RelayError::Thread { vm: vm(), source })?);
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.session.close();
        for handle in self.handles.drain(..) {
            // A panic has been printed by its thread, and no report came of it.
            let _ = handle.join();
        }
    }
}

/// Tells that a thread ends, however it does.
struct Ended(mpsc::UnboundedSender<()>);

impl Drop for Ended {
    fn drop(&mut self) {
        // Nobody listens when the relay is being dropped.
        let _ = self.0.send(());
    }
}
