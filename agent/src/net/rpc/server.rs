//! The answering side of RPC.

use super::message::decode_body;
use super::{Envelope, RpcLimits};
use crate::net::Incoming;
use crate::net::frame::{FrameReader, FrameWriter};
use serde::{Serialize, de::DeserializeOwned};
use std::rc::Rc;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

/// Who answers requests. Runs on the control runtime: nothing may block.
pub trait RpcHandler<Req, Resp>: 'static {
    /// Answers one request of `peer`. Runs to its end even if the caller is
    /// gone, so that nothing is left half done.
    fn call(self: Rc<Self>, peer: Rc<str>, request: Req) -> impl Future<Output = Resp> + 'static;

    /// Takes one notice of `peer`. Notices and requests of one connection are
    /// begun in the order they were sent.
    fn notice(&self, peer: &str, notice: Req);

    /// The connection from `peer` ended, because of `why`; it may call again.
    fn lost(&self, peer: &str, why: &str);

    /// `peer` did what no honest agent does; its connection ends, or its
    /// request is refused.
    fn offence(&self, peer: &str, why: &str);
}

/// Serves one `Control` connection until it ends.
pub async fn serve<Req, Resp, H>(incoming: Incoming, limits: RpcLimits, handler: Rc<H>)
where
    Req: DeserializeOwned + 'static,
    Resp: Serialize + 'static,
    H: RpcHandler<Req, Resp>,
{
    let peer: Rc<str> = incoming.hello.from.as_str().into();
    let (read, write) = tokio::io::split(incoming.stream);
    let (done, finished) = mpsc::unbounded_channel();
    let mut session = Session {
        peer: peer.clone(),
        reader: FrameReader::new(read, limits.max_frame),
        writer: FrameWriter::new(write, limits.max_frame),
        limits,
        handler,
        done,
        finished,
        running: 0,
        running_bytes: 0,
        refused: 0,
    };
    let why = match session.run().await {
        End::Lost(why) => why,
        End::Broke(why) => {
            session.handler.offence(&peer, &why);
            why
        }
    };
    tracing::debug!(%peer, %why, "control connection ended");
    session.handler.lost(&peer, &why);
    drop(incoming.permit);
}

struct Session<H> {
    peer: Rc<str>,
    reader: FrameReader<tokio::io::ReadHalf<crate::net::Stream>>,
    writer: FrameWriter<tokio::io::WriteHalf<crate::net::Stream>>,
    limits: RpcLimits,
    handler: Rc<H>,
    done: mpsc::UnboundedSender<Finished>,
    finished: mpsc::UnboundedReceiver<Finished>,
    running: usize,
    /// Length of the messages of those requests.
    running_bytes: usize,
    /// Requests that were refused since others were under way.
    refused: u64,
}

/// Why a connection ended.
enum End {
    /// As connections do.
    Lost(String),
    /// By what the peer sent.
    Broke(String),
}

/// Refused requests of a connection after which its peer is named: an honest one
/// whose calls have timed out may send some.
const CROWD: u64 = 1000;

struct Finished {
    id: u64,
    bytes: usize,
    response: Result<Vec<u8>, String>,
}

impl<H> Session<H> {
    async fn run<Req, Resp>(&mut self) -> End
    where
        Req: DeserializeOwned + 'static,
        Resp: Serialize + 'static,
        H: RpcHandler<Req, Resp>,
    {
        let mut beat =
            tokio::time::interval_at(Instant::now() + self.limits.beat, self.limits.beat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent = 0;
        // Since when a message is under way, and how much of it there was then.
        let mut slow: Option<(Instant, usize)> = None;
        loop {
            // A peer that sends but does not read is not read from either.
            let room = self.writer.pending() < 2 * self.limits.max_frame;
            let step = tokio::select! {
                biased;
                filled = self.reader.fill(), if room => {
                    silent = 0;
                    if let Err(error) = filled {
                        return End::Lost(error.to_string());
                    }
                    if let Err(why) = self.receive::<Req, Resp>() {
                        return End::Broke(why);
                    }
                    Ok(())
                }
                drained = self.writer.drain(), if self.writer.pending() > 0 => {
                    if !room {
                        // Nothing can be heard of it meanwhile, but it reads.
                        silent = 0;
                    }
                    drained.map_err(|e| e.to_string())
                }
                Some(finished) = self.finished.recv() => self.finish(finished),
                _ = beat.tick() => {
                    silent += 1;
                    if self.is_slow(&mut slow) {
                        let (bytes, slow) = (RpcLimits::SLOW_BYTES, self.limits.slow);
                        return End::Broke(format!(
                            "sends a message too slowly: under {bytes} bytes in {slow:?}"
                        ));
                    }
                    if silent >= self.limits.silent_beats {
                        Err(format!("it said nothing for {:?}", self.limits.silence()))
                    } else if self.writer.pending() == 0 {
                        // Without being asked: the caller's ping may wait behind
                        // a long request.
                        let pushed = self.writer.push(|out| Envelope::Pong.encode(out));
                        pushed.map_err(|e| e.to_string())
                    } else {
                        Ok(())
                    }
                }
            };
            if let Err(why) = step {
                return End::Lost(why);
            }
        }
    }

    /// Whether the message that is being read has hardly grown for too long.
    fn is_slow(&self, since: &mut Option<(Instant, usize)>) -> bool {
        let unread = self.reader.unread();
        if unread == 0 {
            *since = None;
            return false;
        }
        let (at, had) = *since.get_or_insert((Instant::now(), unread));
        if unread < had || unread >= had + RpcLimits::SLOW_BYTES {
            *since = Some((Instant::now(), unread));
            return false;
        }
        at.elapsed() >= self.limits.slow
    }

    fn receive<Req, Resp>(&mut self) -> Result<(), String>
    where
        Req: DeserializeOwned + 'static,
        Resp: Serialize + 'static,
        H: RpcHandler<Req, Resp>,
    {
        while let Some(frame) = self.reader.next_frame().map_err(|e| e.to_string())? {
            match Envelope::decode(frame).map_err(|e| e.to_string())? {
                Envelope::Ping => {
                    let pushed = self.writer.push(|out| Envelope::Pong.encode(out));
                    pushed.map_err(|e| e.to_string())?;
                }
                Envelope::Notice { body } => {
                    let notice = decode_body(body).map_err(|e| e.to_string())?;
                    self.handler.notice(&self.peer, notice);
                }
                Envelope::Request { id, body }
                    if self.running >= self.limits.in_flight
                        || self.running_bytes + body.len() > 2 * self.limits.max_frame =>
                {
                    let why = b"it has too many requests of this agent already; try again";
                    self.refused += 1;
                    if self.refused == CROWD {
                        let most = self.limits.in_flight;
                        let why = format!(
                            "asks without end: {CROWD} requests while {most} were under way"
                        );
                        self.handler.offence(&self.peer, &why);
                    }
                    let fault = Envelope::Fault { id, why };
                    let pushed = self.writer.push(|out| fault.encode(out));
                    pushed.map_err(|e| e.to_string())?;
                }
                Envelope::Request { id, body } => {
                    let request: Req = decode_body(body).map_err(|e| e.to_string())?;
                    let bytes = body.len();
                    self.running += 1;
                    self.running_bytes += bytes;
                    let answer = self.handler.clone().call(self.peer.clone(), request);
                    let done = self.done.clone();
                    tokio::task::spawn_local(async move {
                        let response = postcard::to_stdvec(&answer.await);
                        let response = response.map_err(|e| e.to_string());
                        let _ = done.send(Finished {
                            id,
                            bytes,
                            response,
                        });
                    });
                }
                _ => return Err("it sent what only a server may send".to_owned()),
            }
        }
        Ok(())
    }

    fn finish(&mut self, finished: Finished) -> Result<(), String> {
        let Finished {
            id,
            bytes,
            response,
        } = finished;
        self.running -= 1;
        self.running_bytes -= bytes;
        let fault = match response {
            Ok(body) => {
                let response = Envelope::Response { id, body: &body };
                match self.writer.push(|out| response.encode(out)) {
                    Ok(()) => return Ok(()),
                    Err(error) => format!("the response is {error}"),
                }
            }
            Err(error) => error,
        };
        let why = fault.as_bytes();
        let pushed = self
            .writer
            .push(|out| Envelope::Fault { id, why }.encode(out));
        pushed.map_err(|e| e.to_string())
    }
}
