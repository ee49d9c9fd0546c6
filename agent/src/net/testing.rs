//! Agents on loopback, for the tests of this folder.

use super::{Listener, ListenerLimits, Member, Roster, Security, TlsStore};
use crate::config::ClusterSecret;
use crate::pki::{self, TlsFiles};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Much longer than anything here takes; so that a test fails, not hangs.
pub(super) const LONG: Duration = Duration::from_secs(20);

/// A cluster's certificates, on disk for as long as this is held.
pub(super) struct Pki(tempfile::TempDir);

impl Pki {
    pub(super) fn new() -> Pki {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), "test").unwrap();
        crate::private_file::create(&dir.path().join(pki::SECRET_FILE), b"").unwrap();
        Pki(dir)
    }

    pub(super) fn dir(&self) -> &Path {
        self.0.path()
    }

    /// The bundle of `name`, made if need be.
    pub(super) fn bundle(&self, name: &str) -> PathBuf {
        match pki::issue(self.dir(), name, pki::AGENT_DAYS) {
            Ok(bundle) => bundle,
            Err(_) => self.dir().join(pki::AGENTS_DIR).join(name),
        }
    }

    /// TLS as agent `name`.
    pub(super) fn security(&self, name: &str) -> Security {
        let files = TlsFiles::in_dir(&self.bundle(name));
        Security::Tls(Box::new(TlsStore::open(&files, name).unwrap()))
    }
}

/// Agents of the given names and racks, all of one cluster with mutual TLS,
/// and their listeners. Must be called on a runtime.
pub(super) fn cluster<const N: usize>(agents: [(&str, &str); N]) -> [(Arc<Roster>, Listener); N] {
    let pki = Pki::new();
    cluster_with(agents, |name| pki.security(name))
}

/// The same with connections protected as `security` says of each agent.
pub(super) fn cluster_with<const N: usize>(
    agents: [(&str, &str); N],
    security: impl Fn(&str) -> Security,
) -> [(Arc<Roster>, Listener); N] {
    let bound = agents.map(|(name, rack)| {
        let listener = Listener::bind(
            "127.0.0.1:0".parse().unwrap(),
            ListenerLimits {
                preamble: Duration::from_millis(600),
                connections: 4,
                ..ListenerLimits::default()
            },
        )
        .unwrap();
        let member = Member {
            name: name.to_owned(),
            rack: rack.to_owned(),
            address: listener.address().unwrap(),
            source_addresses: Vec::new(),
        };
        (member, listener)
    });
    let members: Vec<Member> = bound.iter().map(|(member, _)| member.clone()).collect();
    let secret = ClusterSecret::from_bytes([7; 32]);
    bound.map(|(me, listener)| {
        let security = security(&me.name);
        let roster = Roster::new(me, members.clone(), &secret, security);
        (Arc::new(roster), listener)
    })
}

/// Runs a test on the control plane's runtime.
pub(super) fn on_control<T>(test: impl Future<Output = T>) -> T {
    tokio_uring::start(async {
        let result = tokio::time::timeout(LONG, test).await;
        result.expect("the test hangs")
    })
}
