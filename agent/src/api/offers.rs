//! What crosses the API about sockets for VMs whose manager drives their
//! migration; part of [`super::types`].

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// `POST /v1/offers`: offer sockets to VMs whose manager (libvirt) drives their
/// migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfferRequest {
    /// The gang that is to take them along.
    pub gang: String,
    /// Their dedup domain.
    pub domain: String,
    /// The VMs; each gets a socket of its name.
    pub vms: Vec<String>,
}

/// `POST /v1/offers/{gang}/withdraw`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Withdraw {
    /// Only these VMs; all that are offered if it is empty.
    pub vms: Vec<String>,
}

/// A socket that is offered to a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferInfo {
    /// The VM.
    pub vm: String,
    /// What `virsh migrate` is to be told by `--migrateuri`.
    pub uri: String,
    /// The socket.
    pub socket: PathBuf,
    /// How far it is.
    pub state: OfferState,
    /// Why it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How far an offer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OfferState {
    /// Nobody has connected.
    Offered,
    /// The VM's VMM has, and waits for its gang.
    Connected,
    /// A gang moves it.
    Moving,
    /// What has connected cannot be moved, or has gone again.
    Refused,
}

impl OfferState {
    /// The JSON name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Offered => "offered",
            Self::Connected => "connected",
            Self::Moving => "moving",
            Self::Refused => "refused",
        }
    }
}
