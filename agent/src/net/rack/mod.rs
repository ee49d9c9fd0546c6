//! Claims, page fetches and load reports between the agents of one rack.
//!
//! All of it runs on one thread with its own runtime, so that control never
//! waits for data. Scan threads and target threads call [`ClaimClient`] and
//! [`FetchClient`] without blocking and get their answers by callback, on that
//! thread, at the latest at the deadline they gave: a shard or holder that is
//! slow, dead or wrong costs at most that, and then a page in full.
//! What concerns this very host is answered without sockets.

mod client;
mod handle;
mod local;
mod park;
mod serve;
pub mod wire;

pub use handle::{ClaimClient, FetchClient, RackError, RackService};

use crate::types::{Fingerprint, GangId, HolderId, Page};
use std::time::Duration;
use thiserror::Error;

/// Most fingerprints in one [`ClaimOp`].
pub const MAX_CLAIM: usize = 4096;
/// Most pages in one fetch; longer ones are split.
pub const MAX_FETCH: usize = 1024;
/// Longest load report, bytes.
pub const MAX_REPORT: usize = 16 << 10;

/// What a claim shard is asked to do, for one gang. At most [`MAX_CLAIM`]
/// fingerprints, all of that shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClaimOp {
    /// Who sends the content of these? The claimant's target is `holder`.
    Claim {
        /// The pages' fingerprints.
        fps: Vec<Fingerprint>,
        /// The target host of the claimant's VM.
        holder: HolderId,
    },
    /// The content has arrived at `holder`.
    Confirm {
        /// The pages' fingerprints.
        fps: Vec<Fingerprint>,
        /// Where it has arrived.
        holder: HolderId,
    },
    /// `holder` has (or will have) it, whatever was said before.
    Reassign {
        /// The pages' fingerprints.
        fps: Vec<Fingerprint>,
        /// The new holder.
        holder: HolderId,
    },
    /// `holder` will not get it after all.
    Release {
        /// The pages' fingerprints.
        fps: Vec<Fingerprint>,
        /// Who does not get it.
        holder: HolderId,
    },
    /// `holder` is gone: nothing is held there.
    Forget {
        /// The lost target host.
        holder: HolderId,
    },
}

impl ClaimOp {
    /// The fingerprints; none for `Forget`.
    pub fn fps(&self) -> &[Fingerprint] {
        match self {
            ClaimOp::Claim { fps, .. }
            | ClaimOp::Confirm { fps, .. }
            | ClaimOp::Reassign { fps, .. }
            | ClaimOp::Release { fps, .. } => fps,
            ClaimOp::Forget { .. } => &[],
        }
    }

    /// The target host it is about.
    pub fn holder(&self) -> HolderId {
        match self {
            ClaimOp::Claim { holder, .. }
            | ClaimOp::Confirm { holder, .. }
            | ClaimOp::Reassign { holder, .. }
            | ClaimOp::Release { holder, .. }
            | ClaimOp::Forget { holder } => *holder,
        }
    }
}

/// Answer to one claimed fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClaimAnswer {
    /// Send the content: nobody else was told to.
    Yours,
    /// Send a reference.
    Held {
        /// The target host that has the content, or will.
        holder: HolderId,
        /// Whether it is known to have arrived there.
        arrived: bool,
    },
}

/// What a shard replies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClaimReply {
    /// To `Claim`: one answer a fingerprint, in order.
    Claims(Vec<ClaimAnswer>),
    /// To everything else.
    Done,
}

/// How a [`ClaimOp`] ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClaimOutcome {
    /// The shard replied; for `Claim` with as many answers as asked for.
    Replied(ClaimReply),
    /// It did not, or could not be reached.
    NotInTime,
}

impl ClaimOutcome {
    /// The answers to a `Claim` of `n` fingerprints. Who does not answer in
    /// time means *yours*.
    pub fn answers(self, n: usize) -> Vec<ClaimAnswer> {
        match self {
            ClaimOutcome::Replied(ClaimReply::Claims(answers)) if answers.len() == n => answers,
            _ => vec![ClaimAnswer::Yours; n],
        }
    }
}

/// Where the outcome of a claim goes. Called exactly once, on the rack thread
/// or (where there is nothing to wait for) on the submitting thread. Must
/// neither block nor panic.
pub type ClaimSink = Box<dyn FnOnce(ClaimOutcome) + Send>;

/// A claim's outcome as a message, for [`ClaimClient::submit_to`].
#[derive(Debug)]
pub struct ClaimDone {
    /// The number the submitter gave it.
    pub ticket: u64,
    /// How it ended.
    pub outcome: ClaimOutcome,
}

/// An agent asked for something that its part in the gang, if it has one, does
/// not give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("it has no part in gang {gang} that lets it {what}")]
pub struct NotOfTheGang {
    /// The gang.
    pub gang: GangId,
    /// What it asked for.
    pub what: &'static str,
}

/// The claim shards of this host.
pub trait ClaimServer: Send + Sync {
    /// Does `op` for `gang`, asked by agent `from` (this host's own name if it
    /// asks itself), if that agent may. A gang that is not known here gets
    /// *yours* for everything. Called on the rack thread and on submitting
    /// threads; must not block for long.
    fn handle(&self, gang: GangId, from: &str, op: ClaimOp) -> Result<ClaimReply, NotOfTheGang>;
}

/// A page to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Fingerprint of its content.
    pub fp: Fingerprint,
    /// Index of its dedup domain in the gang.
    pub domain: u16,
}

/// What a holder says to a wanted page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// The page was filled in.
    Page,
    /// It is expected, but has not arrived: ask again.
    NotYet,
    /// It is not here and is not expected.
    Gone,
}

/// The pages this host holds for others of its rack.
pub trait PageServer: Send + Sync {
    /// Whether agent `from` may fetch pages of `gang`: it must be a target of
    /// it. A gang that is not known here has no pages to protect.
    fn admit(&self, gang: GangId, from: &str) -> Result<(), NotOfTheGang>;

    /// Copies the content of `wanted` into `page`, and checks the copy against
    /// the fingerprint. Called on the rack thread and on fetching threads;
    /// must not block for long.
    fn serve(&self, gang: GangId, wanted: &Wanted, page: &mut Page) -> Served;
}

/// How the fetch of one page ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched<'a> {
    /// Here it is. What came by network has not been checked against the
    /// fingerprint here.
    Page(&'a Page),
    /// Not by the deadline; or the holder could not be reached.
    NotInTime,
    /// The holder does not have it.
    Gone,
}

/// Where fetched pages go: called once for each page with its index in the
/// request, in any order. Same rules as [`ClaimSink`].
pub type FetchSink = Box<dyn FnMut(usize, Fetched<'_>) + Send>;

/// Takes load reports: the sending agent's name and the bytes it published.
pub type ReportSink = Box<dyn Fn(&str, &[u8]) + Send + Sync>;

/// Bounds of the rack service.
#[derive(Debug, Clone, Copy)]
pub struct RackLimits {
    /// Requests that may wait on the way to each peer; more are answered
    /// *not in time* at once.
    pub queue: usize,
    /// Requests to each peer that may wait for an answer.
    pub in_flight: usize,
    /// Bytes that may wait to be written to each connection.
    pub write_ahead: usize,
    /// Fetched pages a connection may keep waiting for their arrival here.
    pub parked: usize,
    /// Longest deadline granted to a fetch from another agent.
    pub longest_fetch: Duration,
    /// Time for connecting.
    pub connect: Duration,
    /// First pause after a failed connect; doubles up to `backoff_max`.
    /// Requests meanwhile are answered *not in time* at once.
    pub backoff_min: Duration,
    /// Longest such pause.
    pub backoff_max: Duration,
    /// A connection on which several claims timed out, and nothing came since
    /// the first of them was sent this long ago, is given up.
    pub silence: Duration,
}

impl Default for RackLimits {
    fn default() -> Self {
        RackLimits {
            queue: 1024,
            in_flight: 1024,
            write_ahead: 4 << 20,
            parked: 1 << 16,
            longest_fetch: Duration::from_secs(30),
            connect: Duration::from_secs(1),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(2),
            silence: Duration::from_millis(500),
        }
    }
}

#[cfg(test)]
mod tests;
