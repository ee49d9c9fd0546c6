//! Who a hostile program is: a host of the lab, whose agent was ended.

use crate::agentcfg::AgentFiles;
use crate::netns::Netns;
use crate::topology::Host;
use anyhow::{Context, Result};
use drover::config::{AgentConfig, Checks, ClusterSecret};
use drover::dedup::fingerprint::FingerprintKey;
use drover::net::{Kind, Roster, Stream, connect};
use drover::types::GangId;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::LocalSet;

/// How long a connection may take to come about.
pub const CONNECT: Duration = Duration::from_secs(5);

/// A host's network, certificate, key and secret.
#[derive(Clone)]
pub struct Identity {
    ns: Netns,
    secret: ClusterSecret,
    /// The cluster as that host's agent would know it.
    pub roster: Arc<Roster>,
    /// Where its agent would listen.
    pub listen: SocketAddr,
}

impl Identity {
    /// Of the host's agent, by its own files. The agent must have ended.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn of(host: &Host) -> Result<Identity> {
        let file = AgentFiles::of(host).config;
        let config = AgentConfig::load(&file, Checks::File)?;
        let secret = ClusterSecret::load(&config.secret_file)?;
        let roster = Arc::new(Roster::from_config(&config, &secret)?);
        Ok(Identity {
            ns: host.ns.clone(),
            secret,
            roster,
            listen: config.listen,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.roster.me().name
    }

    /// The key of a dedup domain's fingerprints: every agent can have it.
    pub fn key(&self, domain: &str) -> FingerprintKey {
        FingerprintKey::derive(&self.secret, domain)
    }

    /// Runs `work` on this thread, which joins the host's network for good.
    ///
    /// # Errors
    /// When there is no runtime, or what `work` returns.
    pub fn run<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.ns.enter()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("no runtime for a hostile program")?;
        LocalSet::new().block_on(&runtime, work)
    }

    /// A connection to an agent, as its preamble has been accepted.
    ///
    /// # Errors
    /// When it is refused, with the agent's words.
    pub async fn call(&self, to: &str, kind: Kind, gang: GangId) -> Result<Stream> {
        call(&self.roster, to, kind, gang).await
    }
}

/// As [`Identity::call`].
///
/// # Errors
/// As [`Identity::call`].
pub async fn call(roster: &Roster, to: &str, kind: Kind, gang: GangId) -> Result<Stream> {
    connect(roster, to, kind, gang, 0, CONNECT)
        .await
        .map_err(|error| anyhow::anyhow!("{error}: {}", error.source))
}
