//! What is told of a gang on its way besides how far its VMs are.

use serde::{Deserialize, Serialize};

/// Where the time went in which a VM stood still, milliseconds each; together
/// its downtime. Without drover's handover (`commit_ms` and `resume_ms`) a
/// guest would run on as soon as its device state has arrived.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StopTimes {
    /// Until the source's VMM had stopped the guest.
    pub pause_ms: f64,
    /// The last scan, and until every page was sent and acknowledged.
    pub last_pages_ms: f64,
    /// Until both sides' digests had been compared.
    pub seal_ms: f64,
    /// Until the target's VMM had all device state.
    pub device_ms: f64,
    /// Until *committed* was durable at the source.
    pub commit_ms: f64,
    /// Until the target had made it durable as well, had let the guest run
    /// and had said so.
    pub resume_ms: f64,
}

impl StopTimes {
    /// What the handover's own protocol adds to the stop.
    pub fn handover_ms(&self) -> f64 {
        self.commit_ms + self.resume_ms
    }
}

/// An agent that fell silent, or was started anew, while VMs of the gang were
/// on their way from it or to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostAgent {
    /// Its name.
    pub agent: String,
    /// When that was noticed, in milliseconds from the gang's start.
    pub at_ms: u64,
    /// How long it had been silent by then, milliseconds.
    pub silent_ms: u64,
    /// What the last attempt to ask it said.
    pub why: String,
    /// Whether it has answered since.
    pub found_again: bool,
}

impl LostAgent {
    /// Whether this is `host`, and it is still lost.
    pub fn is(&self, host: &str) -> bool {
        self.agent == host && !self.found_again
    }
}
