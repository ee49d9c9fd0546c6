//! Agents on loopback, for the tests of this folder.

use super::{Listener, ListenerLimits, Member, Roster};
use crate::config::ClusterSecret;
use std::sync::Arc;
use std::time::Duration;

/// Much longer than anything here takes; so that a test fails, not hangs.
pub(super) const LONG: Duration = Duration::from_secs(20);

/// Agents of the given names and racks, all of one cluster, with their
/// listeners. Must be called on a runtime.
pub(super) fn cluster<const N: usize>(agents: [(&str, &str); N]) -> [(Arc<Roster>, Listener); N] {
    let bound = agents.map(|(name, rack)| {
        let listener = Listener::bind(
            "127.0.0.1:0".parse().unwrap(),
            ListenerLimits {
                preamble: Duration::from_millis(300),
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
        let roster = Roster::new(me, members.clone(), &secret);
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
