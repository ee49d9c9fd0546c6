//! The calling side of RPC.

use super::message::decode_body;
use super::{Envelope, RpcError, RpcLimits};
use crate::net::frame::{FrameReader, FrameWriter, TooLong};
use crate::net::{ConnectError, Kind, Roster, Stream, connect};
use crate::types::GangId;
use serde::{Serialize, de::DeserializeOwned};
use std::collections::HashMap;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};

/// What is known of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerState {
    /// Nothing was wanted from it yet.
    Idle,
    /// There is a connection, the `epoch`-th: calls on earlier ones failed.
    Connected {
        /// Counts connections from 1.
        epoch: u64,
    },
    /// The connection broke, or none comes about; it is tried again as soon as
    /// there is a call.
    Lost {
        /// What the last attempt said.
        why: String,
    },
}

enum Command {
    /// An encoded request, and where its encoded response goes.
    Call(Vec<u8>, oneshot::Sender<Answer>),
    /// An encoded notice.
    Notice(Vec<u8>),
}

enum Answer {
    Response(Vec<u8>),
    Fault(String),
    Lost(String),
}

/// Calls one peer. Clones share the connection, which is opened at the first
/// call, kept alive, and opened again after a loss.
pub struct RpcClient<Req, Resp> {
    peer: Arc<str>,
    address: String,
    limits: RpcLimits,
    commands: mpsc::Sender<Command>,
    in_flight: Arc<Semaphore>,
    state: watch::Receiver<PeerState>,
    messages: PhantomData<fn(Req) -> Resp>,
}

impl<Req, Resp> std::fmt::Debug for RpcClient<Req, Resp> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RpcClient({} at {})", self.peer, self.address)
    }
}

impl<Req, Resp> Clone for RpcClient<Req, Resp> {
    fn clone(&self) -> Self {
        RpcClient {
            peer: self.peer.clone(),
            address: self.address.clone(),
            limits: self.limits,
            commands: self.commands.clone(),
            in_flight: self.in_flight.clone(),
            state: self.state.clone(),
            messages: PhantomData,
        }
    }
}

impl<Req: Serialize, Resp: DeserializeOwned> RpcClient<Req, Resp> {
    /// A client for `peer`. Must be called in a `LocalSet` (as in
    /// `tokio_uring::start`); its task ends when the last clone is dropped.
    pub fn new(roster: Arc<Roster>, peer: &str, limits: RpcLimits) -> Self {
        let (commands, queue) = mpsc::channel(limits.in_flight.max(1));
        let (state_out, state) = watch::channel(PeerState::Idle);
        let address = roster.peer(peer).map(|p| p.address.to_string());
        let peer: Arc<str> = peer.into();
        let task = Task {
            roster,
            peer: peer.clone(),
            limits,
            queue,
            state: state_out,
            epoch: 0,
            next_id: 1,
        };
        tokio::task::spawn_local(task.run());
        RpcClient {
            peer,
            address: address.unwrap_or_else(|| "unknown".to_owned()),
            limits,
            commands,
            in_flight: Arc::new(Semaphore::new(limits.in_flight)),
            state,
            messages: PhantomData,
        }
    }

    /// The peer's name.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// What is known of the peer now.
    pub fn state(&self) -> PeerState {
        self.state.borrow().clone()
    }

    /// Follows the peer's state; changes tell of a loss within
    /// [`RpcLimits::silence`].
    pub fn watch(&self) -> watch::Receiver<PeerState> {
        self.state.clone()
    }

    /// Sends `request` and waits for the response, at most `limit` in all.
    pub async fn call(&self, request: &Req, limit: Duration) -> Result<Resp, RpcError> {
        let body = self.encode(request)?;
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            // Waiting for a free place is part of the limit. The semaphore is
            // never closed.
            let _place = self.in_flight.acquire().await;
            let _ = self.commands.send(Command::Call(body, reply)).await;
            answer.await
        };
        let answer = match tokio::time::timeout(limit, exchange).await {
            Err(_) => return Err(self.timed_out(limit)),
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Answer::Lost("the agent is shutting down".to_owned()),
        };
        let (peer, address) = (self.peer.to_string(), self.address.clone());
        match answer {
            Answer::Response(body) => {
                decode_body(&body).map_err(|_| RpcError::Malformed { peer, address })
            }
            Answer::Fault(why) => Err(RpcError::Fault { peer, address, why }),
            Answer::Lost(why) => Err(RpcError::Lost { peer, address, why }),
        }
    }

    /// Sends `notice`, without waiting; it is lost if the peer is. At most
    /// [`RpcLimits::in_flight`] wait to be sent, further ones are refused; if
    /// there is no connection the oldest of them are dropped.
    pub fn notify(&self, notice: &Req) -> Result<(), RpcError> {
        let body = self.encode(notice)?;
        let sent = self.commands.try_send(Command::Notice(body));
        sent.map_err(|_| RpcError::Busy {
            peer: self.peer.to_string(),
        })
    }

    fn encode(&self, message: &Req) -> Result<Vec<u8>, RpcError> {
        let peer = || self.peer.to_string();
        let body = postcard::to_stdvec(message).map_err(|source| RpcError::Encode {
            peer: peer(),
            source,
        })?;
        let (length, max) = (body.len() + 9, self.limits.max_frame);
        if length > max {
            let source = TooLong { length, max };
            return Err(RpcError::TooLong {
                peer: peer(),
                source,
            });
        }
        Ok(body)
    }

    fn timed_out(&self, limit: Duration) -> RpcError {
        let (peer, address) = (self.peer.to_string(), self.address.clone());
        match &*self.state.borrow() {
            PeerState::Connected { .. } => RpcError::TimedOut {
                peer,
                address,
                limit,
            },
            PeerState::Idle => RpcError::Unreachable {
                peer,
                address,
                limit,
                why: "still connecting".to_owned(),
            },
            PeerState::Lost { why } => RpcError::Unreachable {
                peer,
                address,
                limit,
                why: why.clone(),
            },
        }
    }
}

struct Task {
    roster: Arc<Roster>,
    peer: Arc<str>,
    limits: RpcLimits,
    queue: mpsc::Receiver<Command>,
    state: watch::Sender<PeerState>,
    epoch: u64,
    next_id: u64,
}

impl Task {
    /// Connects whenever there is something to send.
    async fn run(mut self) {
        while let Some(first) = self.queue.recv().await {
            let mut waiting = vec![first];
            let Some(stream) = self.connect(&mut waiting).await else {
                return;
            };
            self.epoch += 1;
            let epoch = self.epoch;
            self.state.send_replace(PeerState::Connected { epoch });
            let mut session = Session::new(stream, self.limits);
            match session.run(&mut self, waiting).await {
                End::Dropped => return,
                End::Lost(why) => {
                    tracing::warn!(peer = %self.peer, %why, "lost agent");
                    session.fail(&why);
                    self.state.send_replace(PeerState::Lost { why });
                }
            }
        }
    }

    /// Tries until it works, or until all clients are dropped (`None`). Calls
    /// whose callers gave up are dropped from `waiting`, and new ones added.
    async fn connect(&mut self, waiting: &mut Vec<Command>) -> Option<Stream> {
        let mut pause = self.limits.backoff_min;
        loop {
            let (roster, peer) = (self.roster.clone(), self.peer.clone());
            let limit = self.limits.connect;
            let attempt = connect(&roster, &peer, Kind::Control, GangId(0), 0, limit);
            match self.collect_while(attempt, waiting).await? {
                Ok(stream) => return Some(stream),
                Err(error) => {
                    let why = reason(&error);
                    tracing::debug!(peer = %self.peer, %why, "cannot connect");
                    self.state.send_replace(PeerState::Lost { why });
                }
            }
            self.collect_while(tokio::time::sleep(pause), waiting)
                .await?;
            pause = (pause * 2).min(self.limits.backoff_max);
            if waiting.is_empty() {
                waiting.push(self.queue.recv().await?);
            }
        }
    }

    /// Waits for `future` while taking commands in.
    async fn collect_while<F: Future>(
        &mut self,
        future: F,
        waiting: &mut Vec<Command>,
    ) -> Option<F::Output> {
        tokio::pin!(future);
        loop {
            tokio::select! {
                output = &mut future => {
                    self.weed(waiting);
                    return Some(output);
                }
                command = self.queue.recv() => {
                    waiting.push(command?);
                    if waiting.len() > 4 * self.limits.in_flight {
                        self.weed(waiting);
                    }
                }
            }
        }
    }
}

impl Task {
    /// Drops calls nobody waits for any more, and the oldest notices if there
    /// are too many.
    fn weed(&self, waiting: &mut Vec<Command>) {
        waiting.retain(|c| !matches!(c, Command::Call(_, reply) if reply.is_closed()));
        let notices = waiting.iter().filter(|c| matches!(c, Command::Notice(_)));
        let mut surplus = notices.count().saturating_sub(self.limits.in_flight);
        waiting.retain(|c| {
            let drop = surplus > 0 && matches!(c, Command::Notice(_));
            surplus -= usize::from(drop);
            !drop
        });
    }
}

/// The reason without the peer's name, which callers add.
fn reason(error: &ConnectError) -> String {
    error.source.to_string()
}

enum End {
    /// All clients are dropped.
    Dropped,
    Lost(String),
}

/// One connection.
struct Session {
    reader: FrameReader<tokio::io::ReadHalf<Stream>>,
    writer: FrameWriter<tokio::io::WriteHalf<Stream>>,
    limits: RpcLimits,
    pending: HashMap<u64, oneshot::Sender<Answer>>,
}

/// Bytes that may wait to be written before no more commands are taken.
const WRITE_AHEAD: usize = 1 << 20;

impl Session {
    fn new(stream: Stream, limits: RpcLimits) -> Self {
        let (read, write) = tokio::io::split(stream);
        Session {
            reader: FrameReader::new(read, limits.max_frame),
            writer: FrameWriter::new(write, limits.max_frame),
            limits,
            pending: HashMap::new(),
        }
    }

    async fn run(&mut self, task: &mut Task, waiting: Vec<Command>) -> End {
        for command in waiting {
            if let Err(error) = self.send(command, &mut task.next_id) {
                return End::Lost(error.to_string());
            }
        }
        let mut beat =
            tokio::time::interval_at(Instant::now() + self.limits.beat, self.limits.beat);
        // After this agent itself was held up, what came in meanwhile is read
        // before the peer is blamed.
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent = 0;
        loop {
            let room = self.writer.pending() < WRITE_AHEAD;
            tokio::select! {
                biased;
                filled = self.reader.fill() => {
                    silent = 0;
                    if let Err(why) = filled.map_err(lost).and_then(|()| self.receive()) {
                        return End::Lost(why);
                    }
                }
                drained = self.writer.drain(), if self.writer.pending() > 0 => {
                    if let Err(error) = drained {
                        return End::Lost(lost(error));
                    }
                }
                command = task.queue.recv(), if room => {
                    let Some(command) = command else { return End::Dropped };
                    if let Err(error) = self.send(command, &mut task.next_id) {
                        return End::Lost(error.to_string());
                    }
                }
                _ = beat.tick() => {
                    silent += 1;
                    if silent >= self.limits.silent_beats {
                        let silence = self.limits.silence();
                        return End::Lost(format!("it said nothing for {silence:?}"));
                    }
                    if self.writer.pending() == 0
                        && let Err(error) = self.writer.push(|out| Envelope::Ping.encode(out))
                    {
                        return End::Lost(error.to_string());
                    }
                    self.pending.retain(|_, reply| !reply.is_closed());
                }
            }
        }
    }

    fn send(&mut self, command: Command, next_id: &mut u64) -> Result<(), TooLong> {
        match command {
            Command::Notice(body) => {
                let notice = Envelope::Notice { body: &body };
                self.writer.push(|out| notice.encode(out))
            }
            Command::Call(_, reply) if reply.is_closed() => Ok(()),
            Command::Call(body, reply) => {
                let id = *next_id;
                *next_id += 1;
                self.pending.insert(id, reply);
                let request = Envelope::Request { id, body: &body };
                self.writer.push(|out| request.encode(out))
            }
        }
    }

    fn receive(&mut self) -> Result<(), String> {
        while let Some(frame) = self.reader.next_frame().map_err(|e| e.to_string())? {
            let (id, answer) = match Envelope::decode(frame).map_err(|e| e.to_string())? {
                Envelope::Response { id, body } => (id, Answer::Response(body.to_vec())),
                Envelope::Fault { id, why } => {
                    (id, Answer::Fault(String::from_utf8_lossy(why).into_owned()))
                }
                Envelope::Pong => continue,
                _ => return Err("it sent what only a caller may send".to_owned()),
            };
            // Unknown ids are answers to calls that timed out.
            if let Some(reply) = self.pending.remove(&id) {
                let _ = reply.send(answer);
            }
        }
        Ok(())
    }

    fn fail(&mut self, why: &str) {
        for (_, reply) in self.pending.drain() {
            let _ = reply.send(Answer::Lost(why.to_owned()));
        }
    }
}

fn lost(error: io::Error) -> String {
    error.to_string()
}
