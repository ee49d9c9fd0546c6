//! What tests of gangs share.

use super::message::{Compress, GangHost, GangSpec, GangVm, Verify};
use crate::types::GangId;

/// web1 goes a1 → b1, web2 a2 → b2; agents of other names have no part in it.
pub(crate) fn spec(id: u64) -> GangSpec {
    let host = |name: &str| GangHost {
        name: name.to_owned(),
        rack: name[..1].to_owned(),
    };
    let vm = |name: &str, from: &str, to: &str| GangVm {
        name: name.to_owned(),
        from: from.to_owned(),
        to: to.to_owned(),
    };
    GangSpec {
        id: GangId(id),
        name: "web".into(),
        coordinator: "a1".into(),
        hosts: ["a1", "a2", "b1", "b2"].map(host).into(),
        vms: vec![vm("web1", "a1", "b1"), vm("web2", "a2", "b2")],
        profile: "normal".into(),
        compress: Compress::Auto,
        verify: Verify::Digest,
        downtime_limit_ms: 300,
        align: false,
    }
}
