//! The asking side: one link to a peer, with what waits for its answers.

use super::wire::{self, MAX_FRAME, Message, PageStatus};
use super::{ClaimOp, ClaimOutcome, ClaimReply, ClaimSink, FetchSink, Fetched, RackLimits, Wanted};
use crate::net::frame::{FrameReader, FrameWriter};
use crate::net::{Kind, Roster, Stream, connect};
use crate::types::GangId;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// One thing to be sent to the peer.
pub(super) enum Job {
    Ask(Ask),
    Report(Arc<[u8]>),
}

/// A request and where its answer goes. Dropping it unanswered answers *not in
/// time*, so no path can forget to.
pub(super) struct Ask {
    pub(super) gang: GangId,
    pub(super) deadline: Instant,
    pub(super) question: Question,
}

pub(super) enum Question {
    Claim {
        op: ClaimOp,
        sink: Option<ClaimSink>,
    },
    Fetch {
        /// Emptied once sent.
        wanted: Vec<Wanted>,
        /// Index of the first page in the caller's request.
        first: usize,
        /// Pages not delivered yet; by index from `first`.
        open: Vec<bool>,
        sink: FetchSink,
    },
}

impl Drop for Ask {
    fn drop(&mut self) {
        match &mut self.question {
            Question::Claim { sink, .. } => {
                if let Some(sink) = sink.take() {
                    sink(ClaimOutcome::NotInTime);
                }
            }
            Question::Fetch {
                open, sink, first, ..
            } => {
                for (i, open) in open.iter_mut().enumerate() {
                    if std::mem::take(open) {
                        sink(*first + i, Fetched::NotInTime);
                    }
                }
            }
        }
    }
}

/// What a link is for: a separate connection each, so that claims never wait
/// behind pages. Sent as the preamble's tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Claims and load reports.
    Claims = 0,
    /// Fetches.
    Fetches = 1,
}

/// A link to one peer: connects when there is something to send.
pub(super) struct Link {
    pub(super) roster: Arc<Roster>,
    pub(super) peer: String,
    pub(super) purpose: Purpose,
    pub(super) limits: RackLimits,
    pub(super) jobs: mpsc::Receiver<Job>,
}

impl Link {
    /// Runs until the service ends.
    pub(super) async fn run(mut self) {
        let mut pause = self.limits.backoff_min;
        while let Some(job) = self.jobs.recv().await {
            let mut queue = Queue::default();
            queue.add(job, &self.limits);
            let Some(connected) = self.connect(&mut queue).await else {
                return;
            };
            let why = match connected {
                Ok(stream) => {
                    let since = Instant::now();
                    let Some(why) = self.session(stream, queue).await else {
                        return;
                    };
                    if since.elapsed() > self.limits.backoff_max {
                        pause = self.limits.backoff_min;
                    }
                    why
                }
                Err(why) => why,
            };
            tracing::debug!(peer = %self.peer, purpose = ?self.purpose, %why, "no rack connection");
            // Until the pause is over, everything is answered at once by being
            // dropped: the peer is taken for dead.
            let over = tokio::time::sleep(pause);
            tokio::pin!(over);
            loop {
                tokio::select! {
                    () = &mut over => break,
                    job = self.jobs.recv() => if job.is_none() { return },
                }
            }
            pause = (pause * 2).min(self.limits.backoff_max);
        }
    }

    /// Connects while taking jobs in; `None` if the service ends.
    async fn connect(&mut self, queue: &mut Queue) -> Option<Result<Stream, String>> {
        let (roster, peer) = (self.roster.clone(), self.peer.clone());
        let tag = self.purpose as u64;
        let limit = self.limits.connect;
        let attempt = connect(&roster, &peer, Kind::Rack, GangId(0), tag, limit);
        tokio::pin!(attempt);
        loop {
            let first = queue.first_deadline();
            tokio::select! {
                result = &mut attempt => {
                    return Some(result.map_err(|e| format!("{e}: {}", e.source)));
                }
                job = self.jobs.recv() => queue.add(job?, &self.limits),
                () = sleep_until(first), if first.is_some() => queue.expire(),
            }
        }
    }

    /// Uses one connection until it fails; returns why, or `None` if the
    /// service ends.
    async fn session(&mut self, stream: Stream, queue: Queue) -> Option<String> {
        let (read, write) = tokio::io::split(stream);
        let mut reader = FrameReader::new(read, MAX_FRAME);
        let mut session = Session {
            writer: FrameWriter::new(write, MAX_FRAME),
            pending: HashMap::new(),
            deadlines: BTreeSet::new(),
            next_ticket: 1,
            limits: self.limits,
        };
        for job in queue.jobs {
            session.send(job);
        }
        // When the first of the requests was sent that have timed out since the
        // peer was last heard, and how many there are.
        let mut unanswered: Option<(Instant, u32)> = None;
        loop {
            let first = session.deadlines.first().map(|(at, _)| *at);
            tokio::select! {
                biased;
                filled = reader.fill() => {
                    unanswered = None;
                    if let Err(error) = filled {
                        return Some(error.to_string());
                    }
                    loop {
                        match reader.next_frame() {
                            Ok(Some(frame)) => if let Err(why) = session.receive(frame) {
                                return Some(why);
                            },
                            Ok(None) => break,
                            Err(error) => return Some(error.to_string()),
                        }
                    }
                }
                drained = session.writer.drain(), if session.writer.pending() > 0 => {
                    if let Err(error) = drained {
                        return Some(error.to_string());
                    }
                }
                job = self.jobs.recv() => session.send(job?),
                () = sleep_until(first), if first.is_some() => {
                    let Some(asked) = session.expire() else { continue };
                    let (since, times) = unanswered.unwrap_or((asked, 0));
                    unanswered = Some((since, times + 1));
                    // Fetches may wait for pages in silence; claims do not.
                    let dead = times > 0 && since.elapsed() >= self.limits.silence;
                    if dead && self.purpose == Purpose::Claims {
                        return Some("it does not answer claims".to_owned());
                    }
                }
            }
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    if let Some(at) = at {
        tokio::time::sleep_until(at.into()).await;
    }
}

/// Jobs that wait for the connection.
#[derive(Default)]
struct Queue {
    jobs: Vec<Job>,
}

impl Queue {
    /// Beyond the limit, jobs are dropped (and so answered).
    fn add(&mut self, job: Job, limits: &RackLimits) {
        if self.jobs.len() < limits.queue {
            self.jobs.push(job);
        }
    }

    fn first_deadline(&self) -> Option<Instant> {
        let asks = self.jobs.iter().filter_map(|job| match job {
            Job::Ask(ask) => Some(ask.deadline),
            Job::Report(_) => None,
        });
        asks.min()
    }

    fn expire(&mut self) {
        let now = Instant::now();
        self.jobs.retain(|job| match job {
            Job::Ask(ask) => ask.deadline > now,
            Job::Report(_) => true,
        });
    }
}

/// One connection.
struct Session {
    writer: FrameWriter<tokio::io::WriteHalf<Stream>>,
    pending: HashMap<u64, (Ask, Instant)>,
    deadlines: BTreeSet<(Instant, u64)>,
    next_ticket: u64,
    limits: RackLimits,
}

impl Session {
    /// Sends a job, or drops it (and so answers it) if there is no room.
    fn send(&mut self, job: Job) {
        let room = self.writer.pending() < self.limits.write_ahead;
        match job {
            Job::Report(report) if room => {
                let message = Message::Report(&report);
                // Its length was checked when it was published.
                let _ = self.writer.push(|out| message.encode(out));
            }
            Job::Ask(ask) if room && self.pending.len() < self.limits.in_flight => self.ask(ask),
            _ => {}
        }
    }

    fn ask(&mut self, mut ask: Ask) {
        let now = Instant::now();
        let left = ask.deadline.saturating_duration_since(now);
        if left.is_zero() {
            return;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let gang = ask.gang;
        let pushed = match &mut ask.question {
            Question::Claim { op, .. } => {
                let op = op.clone();
                let message = Message::Claim { ticket, gang, op };
                self.writer.push(|out| message.encode(out))
            }
            Question::Fetch { wanted, .. } => {
                // The holder answers a little before this side gives up.
                let limit = left - (left / 8).min(Duration::from_millis(5));
                let message = Message::Fetch {
                    ticket,
                    gang,
                    limit_ms: limit.as_millis().min(u128::from(u32::MAX)) as u32,
                    wanted: std::mem::take(wanted),
                };
                self.writer.push(|out| message.encode(out))
            }
        };
        if pushed.is_ok() {
            self.deadlines.insert((ask.deadline, ticket));
            self.pending.insert(ticket, (ask, now));
        }
    }

    fn receive(&mut self, frame: &[u8]) -> Result<(), String> {
        match wire::decode(frame).map_err(|e| e.to_string())? {
            Message::ClaimReply { ticket, reply } => {
                // Unknown tickets are answers that came too late.
                let Some((mut ask, _)) = self.pending.remove(&ticket) else {
                    return Ok(());
                };
                self.deadlines.remove(&(ask.deadline, ticket));
                let Question::Claim { op, sink } = &mut ask.question else {
                    return Err("it answered a fetch as a claim".to_owned());
                };
                if !fits(op, &reply) {
                    return Err("it answered a claim with the wrong number".to_owned());
                }
                if let Some(sink) = sink.take() {
                    sink(ClaimOutcome::Replied(reply));
                }
                Ok(())
            }
            Message::Pages { ticket, pages } => self.pages(ticket, &pages),
            _ => Err("it asked on a connection where it is asked".to_owned()),
        }
    }

    fn pages(&mut self, ticket: u64, pages: &[(u32, PageStatus<'_>)]) -> Result<(), String> {
        let Some((ask, _)) = self.pending.get_mut(&ticket) else {
            return Ok(());
        };
        let Question::Fetch {
            first, open, sink, ..
        } = &mut ask.question
        else {
            return Err("it answered a claim as a fetch".to_owned());
        };
        for (index, status) in pages {
            let index = *index as usize;
            match open.get_mut(index) {
                Some(open) if *open => *open = false,
                _ => return Err("it sent a page that was not asked for".to_owned()),
            }
            let fetched = match status {
                PageStatus::Page(page) => Fetched::Page(page),
                PageStatus::NotInTime => Fetched::NotInTime,
                PageStatus::Gone => Fetched::Gone,
            };
            sink(*first + index, fetched);
        }
        if !open.contains(&true) {
            let deadline = ask.deadline;
            self.deadlines.remove(&(deadline, ticket));
            self.pending.remove(&ticket);
        }
        Ok(())
    }

    /// Gives up what is over its deadline; returns when the first of these was
    /// sent.
    fn expire(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let mut first = None;
        while let Some((at, ticket)) = self.deadlines.first().copied()
            && at <= now
        {
            self.deadlines.remove(&(at, ticket));
            if let Some((_, sent)) = self.pending.remove(&ticket) {
                first.get_or_insert(sent);
            }
        }
        first
    }
}

/// Whether a reply has as many answers as the operation asked for.
pub(super) fn fits(op: &ClaimOp, reply: &ClaimReply) -> bool {
    match (op, reply) {
        (ClaimOp::Claim { fps, .. }, ClaimReply::Claims(answers)) => fps.len() == answers.len(),
        (ClaimOp::Claim { .. }, ClaimReply::Done) => false,
        (_, reply) => *reply == ClaimReply::Done,
    }
}
