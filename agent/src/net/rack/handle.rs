//! What other threads hold of the rack service.

use super::client::{Ask, Job, Link, Purpose, Question, fits};
use super::local::{self, LocalFetch};
use super::serve::{self, Offer};
use super::{
    ClaimDone, ClaimOp, ClaimOutcome, ClaimServer, ClaimSink, FetchSink, Fetched, MAX_CLAIM,
    MAX_FETCH, MAX_REPORT, PageServer, RackLimits, ReportSink, Served, Wanted,
};
use crate::net::listener::ConnectionPermit;
use crate::net::stream::Detached;
use crate::net::{Hello, Incoming, Roster};
use crate::types::{GangId, PAGE_SIZE};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};

/// The rack service cannot be started or used.
#[derive(Debug, Error)]
pub enum RackError {
    /// No thread or no runtime.
    #[error("cannot start the rack thread")]
    Start(#[source] io::Error),
    /// A connection could not be moved to the rack thread.
    #[error("cannot take over a rack connection")]
    Adopt(#[source] io::Error),
    /// The rack thread has ended.
    #[error("the rack thread has ended")]
    Ended,
}

struct Links {
    claims: mpsc::Sender<Job>,
    fetches: mpsc::Sender<Job>,
}

struct Shared {
    roster: Arc<Roster>,
    offer: Offer,
    links: HashMap<String, Links>,
    local: mpsc::Sender<LocalFetch>,
    adopted: mpsc::UnboundedSender<Adopted>,
    wakes: watch::Sender<u64>,
}

struct Adopted {
    stream: Detached,
    hello: Hello,
    permit: ConnectionPermit,
}

/// The rack thread. Dropping it ends the thread; requests still under way are
/// answered *not in time*.
pub struct RackService {
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl std::fmt::Debug for RackService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RackService of {}", self.shared.roster.me().name)
    }
}

impl RackService {
    /// Starts the thread. `claims` and `pages` answer for this host; `reports`
    /// takes what others of the rack publish.
    pub fn start(
        roster: Arc<Roster>,
        claims: Arc<dyn ClaimServer>,
        pages: Arc<dyn PageServer>,
        reports: ReportSink,
        limits: RackLimits,
    ) -> Result<Self, RackError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(RackError::Start)?;
        let offer = Offer {
            claims,
            pages,
            reports: Arc::new(reports),
            limits,
            offences: roster.offences().clone(),
        };
        let mut links = HashMap::new();
        let mut tasks = Vec::new();
        let mine = roster.me().rack.clone();
        for peer in roster.peers().filter(|p| p.rack == mine) {
            let mut link = |purpose| {
                let (sender, jobs) = mpsc::channel(limits.queue.max(1));
                tasks.push(Link {
                    roster: roster.clone(),
                    peer: peer.name.clone(),
                    purpose,
                    limits,
                    jobs,
                });
                sender
            };
            let both = Links {
                claims: link(Purpose::Claims),
                fetches: link(Purpose::Fetches),
            };
            links.insert(peer.name.clone(), both);
        }
        let (local, local_fetches) = mpsc::channel(limits.queue.max(1));
        let (adopted, connections) = mpsc::unbounded_channel();
        let (wakes, _) = watch::channel(0);
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::new(Shared {
            roster,
            offer: offer.clone(),
            links,
            local,
            adopted,
            wakes: wakes.clone(),
        });
        let main = move || {
            let set = tokio::task::LocalSet::new();
            for link in tasks {
                set.spawn_local(link.run());
            }
            set.spawn_local(local::run(
                offer.pages.clone(),
                local_fetches,
                wakes.subscribe(),
            ));
            set.spawn_local(adopt(connections, offer, wakes));
            // Ends when told to, or when the service is dropped.
            let _ = runtime.block_on(set.run_until(stopped));
        };
        let thread = std::thread::Builder::new()
            .name("rack".to_owned())
            .spawn(main)
            .map_err(RackError::Start)?;
        Ok(RackService {
            shared,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Whether a `Rack` connection with this preamble is wanted: only agents
    /// of the same rack may ask for claims and pages.
    pub fn admit(&self, hello: &Hello) -> Result<(), String> {
        if self.shared.links.contains_key(&hello.from) {
            return Ok(());
        }
        let me = self.shared.roster.me();
        Err(format!(
            "{} is not in rack {} of agent {}; claims and pages stay inside a rack",
            hello.from, me.rack, me.name
        ))
    }

    /// Takes an accepted `Rack` connection.
    pub fn adopt(&self, incoming: Incoming) -> Result<(), RackError> {
        let adopted = Adopted {
            stream: incoming.stream.detach().map_err(RackError::Adopt)?,
            hello: incoming.hello,
            permit: incoming.permit,
        };
        let sent = self.shared.adopted.send(adopted);
        sent.map_err(|_| RackError::Ended)
    }

    /// For submitting claims; cheap to clone.
    pub fn claims(&self) -> ClaimClient {
        ClaimClient(self.shared.clone())
    }

    /// For fetching pages; cheap to clone.
    pub fn fetches(&self) -> FetchClient {
        FetchClient(self.shared.clone())
    }

    /// Page content has arrived at this host: fetches that wait for it are
    /// looked at again soon. Cheap; call it once for each batch placed.
    pub fn waker(&self) -> impl Fn() + Clone + Send + Sync + use<> {
        let wakes = self.shared.wakes.clone();
        move || wakes.send_modify(|n| *n = n.wrapping_add(1))
    }

    /// Sends a load report to all other agents of the rack. Agents that cannot
    /// be reached do not get it. `false` if it is longer than [`MAX_REPORT`].
    pub fn publish(&self, report: &[u8]) -> bool {
        if report.len() > MAX_REPORT {
            return false;
        }
        let report: Arc<[u8]> = report.into();
        for link in self.shared.links.values() {
            let _ = link.claims.try_send(Job::Report(report.clone()));
        }
        true
    }
}

impl Drop for RackService {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the rack thread had panicked");
        }
    }
}

/// Serves connections as they come in.
async fn adopt(
    mut connections: mpsc::UnboundedReceiver<Adopted>,
    offer: Offer,
    wakes: watch::Sender<u64>,
) {
    while let Some(adopted) = connections.recv().await {
        let peer = adopted.hello.from;
        let stream = match adopted.stream.attach() {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%peer, %error, "cannot serve a rack connection");
                continue;
            }
        };
        let session = serve::run(stream, peer.clone(), offer.clone(), wakes.subscribe());
        let permit = adopted.permit;
        tokio::task::spawn_local(async move {
            let why = session.await;
            tracing::debug!(%peer, %why, "rack connection ended");
            drop(permit);
        });
    }
}

/// Submits claims to shards, from any thread, without blocking.
#[derive(Clone)]
pub struct ClaimClient(Arc<Shared>);

impl std::fmt::Debug for ClaimClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ClaimClient of {}", self.0.roster.me().name)
    }
}

impl ClaimClient {
    /// Asks the shard on agent `shard` to do `op`. `sink` gets the outcome
    /// within `limit`; at once if the shard is this host's or is known to be
    /// unreachable. An operation on more than [`MAX_CLAIM`] fingerprints is
    /// not done (*not in time*).
    pub fn submit(&self, shard: &str, gang: GangId, op: ClaimOp, limit: Duration, sink: ClaimSink) {
        if op.fps().len() > MAX_CLAIM {
            return sink(ClaimOutcome::NotInTime);
        }
        let me = &self.0.roster.me().name;
        if shard == me {
            let asked = op.clone();
            let reply = self.0.offer.claims.handle(gang, me, op);
            let outcome = match reply {
                Ok(reply) if fits(&asked, &reply) => ClaimOutcome::Replied(reply),
                _ => ClaimOutcome::NotInTime,
            };
            return sink(outcome);
        }
        let ask = Ask {
            gang,
            deadline: Instant::now() + limit,
            question: Question::Claim {
                op,
                sink: Some(sink),
            },
        };
        // What cannot be sent is dropped, which answers it.
        if let Some(link) = self.0.links.get(shard) {
            let _ = link.claims.try_send(Job::Ask(ask));
        }
    }

    /// As [`ClaimClient::submit`], but the outcome is sent to `done` with
    /// `ticket`. The channel needs room for all that is in flight: an outcome
    /// that finds it full is lost.
    pub fn submit_to(
        &self,
        shard: &str,
        gang: GangId,
        op: ClaimOp,
        limit: Duration,
        ticket: u64,
        done: &crossbeam_channel::Sender<ClaimDone>,
    ) {
        let done = done.clone();
        let sink = Box::new(move |outcome| {
            if done.try_send(ClaimDone { ticket, outcome }).is_err() {
                tracing::debug!(ticket, "nobody takes the outcome of a claim");
            }
        });
        self.submit(shard, gang, op, limit, sink);
    }
}

/// Fetches pages from holders, from any thread, without blocking.
#[derive(Clone)]
pub struct FetchClient(Arc<Shared>);

impl std::fmt::Debug for FetchClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FetchClient of {}", self.0.roster.me().name)
    }
}

impl FetchClient {
    /// Fetches pages from agent `holder`. `sink` is called for every page
    /// within `limit`, by the thread of the rack service or, if the holder is
    /// this host and has the page, by this one. Of more than [`MAX_FETCH`]
    /// pages several requests are made, whose pages come independently.
    pub fn fetch(
        &self,
        holder: &str,
        gang: GangId,
        wanted: Vec<Wanted>,
        limit: Duration,
        sink: FetchSink,
    ) {
        let deadline = Instant::now() + limit;
        if holder == self.0.roster.me().name {
            return self.fetch_here(gang, wanted, deadline, sink);
        }
        let parts = wanted.chunks(MAX_FETCH).enumerate();
        let shared_sink = Arc::new(std::sync::Mutex::new(sink));
        for (i, part) in parts {
            let sink = shared_sink.clone();
            let ask = Ask {
                gang,
                deadline,
                question: Question::Fetch {
                    wanted: part.to_vec(),
                    first: i * MAX_FETCH,
                    open: vec![true; part.len()],
                    sink: Box::new(move |index, fetched| {
                        let mut sink = sink.lock().unwrap_or_else(|e| e.into_inner());
                        sink(index, fetched);
                    }),
                },
            };
            if let Some(link) = self.0.links.get(holder) {
                let _ = link.fetches.try_send(Job::Ask(ask));
            }
        }
    }

    fn fetch_here(
        &self,
        gang: GangId,
        wanted: Vec<Wanted>,
        deadline: Instant,
        mut sink: FetchSink,
    ) {
        let mut page = Box::new([0; PAGE_SIZE]);
        let mut waiting = Vec::new();
        for (index, wanted) in wanted.into_iter().enumerate() {
            match self.0.offer.pages.serve(gang, &wanted, &mut page) {
                Served::Page => sink(index, Fetched::Page(&page)),
                Served::Gone => sink(index, Fetched::Gone),
                Served::NotYet => waiting.push((index, wanted)),
            }
        }
        if waiting.is_empty() {
            return;
        }
        let fetch = LocalFetch {
            gang,
            wanted: waiting,
            deadline,
            sink,
        };
        if let Err(
            mpsc::error::TrySendError::Full(fetch) | mpsc::error::TrySendError::Closed(fetch),
        ) = self.0.local.try_send(fetch)
        {
            let mut sink = fetch.sink;
            for (index, _) in fetch.wanted {
                sink(index, Fetched::NotInTime);
            }
        }
    }
}
