//! Who belongs to the cluster.

use super::Offences;
use super::preamble::MembershipKey;
use super::tls::Security;
use crate::config::{AgentConfig, ClusterSecret};
use crate::pki::PkiError;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// One agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Its rack.
    pub rack: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Further addresses it may connect from.
    pub source_addresses: Vec<IpAddr>,
}

impl Member {
    /// Whether a connection from `address` may be this agent's.
    pub fn connects_from(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.address.ip().to_canonical() == address
            || self
                .source_addresses
                .iter()
                .any(|a| a.to_canonical() == address)
    }
}

/// All agents of the cluster, and what proves that one belongs to it.
#[derive(Debug)]
pub struct Roster {
    me: Member,
    peers: BTreeMap<String, Member>,
    key: MembershipKey,
    security: Security,
    offences: Arc<Offences>,
}

impl Roster {
    /// A roster of `me` and its `peers`; an entry of `me` among them is
    /// ignored.
    pub fn new(me: Member, peers: Vec<Member>, secret: &ClusterSecret, security: Security) -> Self {
        let others = peers.into_iter().filter(|p| p.name != me.name);
        Roster {
            peers: others.map(|p| (p.name.clone(), p)).collect(),
            key: MembershipKey::derive(secret),
            security,
            offences: Arc::default(),
            me,
        }
    }

    /// The roster a configuration describes.
    pub fn from_config(config: &AgentConfig, secret: &ClusterSecret) -> Result<Self, PkiError> {
        let security = Security::open(&config.tls, &config.name)?;
        let me = Member {
            name: config.name.clone(),
            rack: config.rack.clone(),
            address: config.listen,
            source_addresses: Vec::new(),
        };
        let peers = config.peers.iter().map(|p| Member {
            name: p.name.clone(),
            rack: p.rack.clone(),
            address: p.address,
            source_addresses: p.source_addresses.clone(),
        });
        Ok(Self::new(me, peers.collect(), secret, security))
    }

    /// This agent.
    pub fn me(&self) -> &Member {
        &self.me
    }

    /// Another agent, by name.
    pub fn peer(&self, name: &str) -> Option<&Member> {
        self.peers.get(name)
    }

    /// Any agent of the cluster, by name.
    pub fn member(&self, name: &str) -> Option<&Member> {
        if name == self.me.name {
            return Some(&self.me);
        }
        self.peer(name)
    }

    /// The other agents, by name.
    pub fn peers(&self) -> impl Iterator<Item = &Member> {
        self.peers.values()
    }

    /// The names of all agents, this one included: what a plan may name.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.peers.keys().map(String::as_str).collect();
        names.push(&self.me.name);
        names.sort_unstable();
        names
    }

    /// All agents of `rack`, by name, this one included if it is there.
    pub fn rack(&self, rack: &str) -> Vec<&Member> {
        let all = self.peers.values().chain([&self.me]);
        let mut members: Vec<&Member> = all.filter(|m| m.rack == rack).collect();
        members.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        members
    }

    /// How connections are protected.
    pub fn security(&self) -> &Security {
        &self.security
    }

    /// Who broke the rules, as this agent has seen it.
    pub fn offences(&self) -> &Arc<Offences> {
        &self.offences
    }

    pub(super) fn key(&self) -> &MembershipKey {
        &self.key
    }
}
