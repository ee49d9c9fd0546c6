//! A client of the QEMU Machine Protocol.
//!
//! One task reads, one writes, so a command whose caller gave up never leaves
//! half a line on the wire and no event is lost while a command is under way.
//! Every wait has a limit.

mod commands;
pub mod proto;

pub use commands::{MemoryBackend, MigrationInfo, MigrationStatus, RunState};
pub use proto::{CommandError, Event, Version};

use proto::{EventLog, LineCutter, LineError, Message, compose, parse_line};
use serde_json::Value;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long a command may take that only looks or sets something.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// How long connecting and greeting may take.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// What can go wrong in talking to a VMM. Messages name its socket.
#[derive(Debug, Error)]
pub enum QmpError {
    /// No connection.
    #[error("cannot connect to the QMP socket {path}: is the VM running, and the path right?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Connected, but no greeting came.
    #[error(
        "no greeting on the QMP socket {path} within {limit:?}: another client (libvirt?) holds it, or the VMM hangs; give the VM a second `-qmp unix:…,server=on,wait=off` for the agent"
    )]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// How long we waited.
        limit: Duration,
    },
    /// The connection ended.
    #[error("the VMM at {path} closed its QMP connection ({why})")]
    Closed {
        /// The socket.
        path: PathBuf,
        /// What ended it.
        why: String,
    },
    /// An answer did not come in time.
    #[error("the VMM at {path} did not answer {command} within {limit:?}")]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The command, or the event waited for.
        command: String,
        /// How long we waited.
        limit: Duration,
    },
    /// The VMM refused.
    #[error("the VMM at {path} refused {command}")]
    Refused {
        /// The socket.
        path: PathBuf,
        /// The command.
        command: String,
        /// In the VMM's words.
        #[source]
        source: CommandError,
    },
    /// The VMM's answer has not the form it should have.
    #[error("the VMM at {path} answered {command} with {what}")]
    Unexpected {
        /// The socket.
        path: PathBuf,
        /// The command.
        command: String,
        /// What came instead.
        what: String,
    },
    /// More events came than are kept.
    #[error("events of the VMM at {path} came faster than they were read, and some are lost")]
    EventsLost {
        /// The socket.
        path: PathBuf,
    },
}

/// A connection. Clones share it; it closes when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Qmp(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    peer_pid: Option<i32>,
    version: Version,
    next_id: AtomicU64,
    outbox: mpsc::Sender<Vec<u8>>,
    shared: Arc<Shared>,
    tasks: [JoinHandle<()>; 2],
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Changes with each event and when the connection ends.
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    pending: HashMap<u64, oneshot::Sender<Result<Value, CommandError>>>,
    events: EventLog,
    closed: Option<String>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock; the data is whole in any case.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, why: String) {
        let mut state = self.state();
        state.closed.get_or_insert(why);
        // Dropping the senders wakes those who wait for replies.
        state.pending.clear();
        drop(state);
        self.changed.send_modify(|n| *n += 1);
    }
}

/// A place in the stream of events, see [`Qmp::cursor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor(u64);

impl Qmp {
    /// Connects, reads the greeting, enters command mode. Needs a tokio runtime
    /// (tokio-uring's will do).
    pub async fn connect(path: &Path) -> Result<Qmp, QmpError> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| QmpError::Connect {
                path: path.to_owned(),
                source,
            })?;
        let peer_pid = stream
            .peer_cred()
            .ok()
            .and_then(|c| c.pid())
            .filter(|pid| *pid > 0);
        let (reader, writer) = stream.into_split();
        let mut reader = Reader {
            stream: reader,
            cutter: LineCutter::default(),
        };
        let greeting =
            timeout(CONNECT_LIMIT, reader.next())
                .await
                .map_err(|_| QmpError::NoGreeting {
                    path: path.to_owned(),
                    limit: CONNECT_LIMIT,
                })?;
        let version = match greeting {
            Ok(Message::Greeting(version)) => version,
            Ok(other) => {
                let what = format!("{other:?}");
                return Err(QmpError::Unexpected {
                    path: path.to_owned(),
                    command: "the connection".into(),
                    what,
                });
            }
            Err(why) => {
                return Err(QmpError::Closed {
                    path: path.to_owned(),
                    why,
                });
            }
        };
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: watch::Sender::new(0),
        });
        let (outbox, lines) = mpsc::channel(64);
        let tasks = [
            tokio::spawn(read_all(reader, shared.clone())),
            tokio::spawn(write_all(writer, lines, shared.clone())),
        ];
        let qmp = Qmp(Arc::new(Inner {
            path: path.to_owned(),
            peer_pid,
            version,
            next_id: AtomicU64::new(1),
            outbox,
            shared,
            tasks,
        }));
        qmp.execute("qmp_capabilities", Value::Null).await?;
        Ok(qmp)
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The process that listens on the socket (that made it, to be exact).
    pub fn peer_pid(&self) -> Option<i32> {
        self.0.peer_pid
    }

    /// The VMM's version.
    pub fn version(&self) -> Version {
        self.0.version
    }

    /// Runs a command with the usual limit.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, COMMAND_LIMIT).await
    }

    /// Runs a command with a limit of its own. `arguments`: an object, or null.
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        let (tx, rx) = oneshot::channel();
        {
            let mut state = self.0.shared.state();
            if let Some(why) = &state.closed {
                return Err(self.closed(why.clone()));
            }
            state.pending.insert(id, tx);
        }
        let _forget = Forget {
            shared: &self.0.shared,
            id,
        };
        let line = compose(id, command, &arguments);
        let asked = Instant::now();
        let answer = timeout(limit, async {
            // A failed send means the writer has closed the connection, which
            // has dropped our sender as well.
            let _ = self.0.outbox.send(line).await;
            rx.await
        });
        let answer = answer.await;
        tracing::trace!(socket = %self.0.path.display(), command, took = ?asked.elapsed(), "QMP command");
        match answer {
            Err(_) => Err(QmpError::Timeout {
                path: self.0.path.clone(),
                command: command.to_owned(),
                limit,
            }),
            Ok(Err(_)) => {
                let why = self.0.shared.state().closed.clone();
                Err(self.closed(why.unwrap_or_else(|| "our side ended it".into())))
            }
            Ok(Ok(Err(source))) => Err(QmpError::Refused {
                path: self.0.path.clone(),
                command: command.to_owned(),
                source,
            }),
            Ok(Ok(Ok(value))) => Ok(value),
        }
    }

    /// The place after the last event so far. Note it *before* the command
    /// whose events are wanted.
    pub fn cursor(&self) -> Cursor {
        Cursor(self.0.shared.state().events.next())
    }

    /// All events from `cursor` on that have come.
    pub fn events_since(&self, cursor: Cursor) -> Result<Vec<Event>, QmpError> {
        let state = self.0.shared.state();
        let events = state.events.since(cursor.0);
        let events = events.ok_or_else(|| QmpError::EventsLost {
            path: self.0.path.clone(),
        })?;
        Ok(events.cloned().collect())
    }

    /// [`EventLog::ended_unresumed`] of this connection.
    pub fn ended_unresumed(&self) -> bool {
        self.0.shared.state().events.ended_unresumed()
    }

    /// Waits for an event from `cursor` on of which `pick` makes something.
    /// Events that came before the connection ended are still looked at.
    pub async fn wait_event<T>(
        &self,
        cursor: Cursor,
        what: &str,
        limit: Duration,
        mut pick: impl FnMut(&Event) -> Option<T>,
    ) -> Result<T, QmpError> {
        let mut changed = self.0.shared.changed.subscribe();
        let mut at = cursor.0;
        let wait = async {
            loop {
                changed.borrow_and_update();
                {
                    let state = self.0.shared.state();
                    let mut events =
                        state.events.since(at).ok_or_else(|| QmpError::EventsLost {
                            path: self.0.path.clone(),
                        })?;
                    if let Some(found) = events.find_map(&mut pick) {
                        return Ok(found);
                    }
                    at = state.events.next();
                    if let Some(why) = &state.closed {
                        return Err(self.closed(why.clone()));
                    }
                }
                if changed.changed().await.is_err() {
                    return Err(self.closed("our side ended it".into()));
                }
            }
        };
        timeout(limit, wait).await.unwrap_or_else(|_| {
            Err(QmpError::Timeout {
                path: self.0.path.clone(),
                command: what.to_owned(),
                limit,
            })
        })
    }

    fn closed(&self, why: String) -> QmpError {
        QmpError::Closed {
            path: self.0.path.clone(),
            why,
        }
    }

    fn unexpected(&self, command: &str, value: &Value) -> QmpError {
        let mut what = value.to_string();
        if let Some((at, _)) = what.char_indices().nth(200) {
            what.truncate(at);
        }
        QmpError::Unexpected {
            path: self.0.path.clone(),
            command: command.to_owned(),
            what,
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Takes a command off the list of those that wait, also when its caller is dropped.
struct Forget<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.shared.state().pending.remove(&self.id);
    }
}

struct Reader {
    stream: OwnedReadHalf,
    cutter: LineCutter,
}

impl Reader {
    async fn next(&mut self) -> Result<Message, String> {
        let mut chunk = vec![0; 16 << 10];
        loop {
            let broken = |e: LineError| format!("broken protocol: {e}");
            if let Some(line) = self.cutter.next_line().map_err(broken)? {
                return parse_line(&line).map_err(broken);
            }
            match self.stream.read(&mut chunk).await {
                Ok(0) => return Err("end of stream: it ended or was ended".into()),
                Ok(n) => self.cutter.push(&chunk[..n]),
                Err(e) => return Err(e.to_string()),
            }
        }
    }
}

async fn read_all(mut reader: Reader, shared: Arc<Shared>) {
    loop {
        match reader.next().await {
            Ok(Message::Event(event)) => {
                tracing::trace!(name = event.name, data = %event.data, "QMP event");
                shared.state().events.push(event);
                shared.changed.send_modify(|n| *n += 1);
            }
            Ok(Message::Reply {
                id: Some(id),
                result,
            }) => {
                if let Some(waiting) = shared.state().pending.remove(&id) {
                    let _ = waiting.send(result);
                }
            }
            Ok(Message::Reply { id: None, result }) => {
                return shared.close(format!("reply without id: {result:?}"));
            }
            Ok(Message::Greeting(_)) => return shared.close("a second greeting".into()),
            Err(why) => return shared.close(why),
        }
    }
}

async fn write_all(
    mut writer: OwnedWriteHalf,
    mut lines: mpsc::Receiver<Vec<u8>>,
    shared: Arc<Shared>,
) {
    while let Some(line) = lines.recv().await {
        if let Err(e) = writer.write_all(&line).await {
            return shared.close(e.to_string());
        }
    }
}
