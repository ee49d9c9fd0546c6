//! QEMU's migration settings: what each kind of move needs, and back again.

use super::qmp::{Qmp, QmpError};
use serde_json::{Value, json};

/// What is sent leaves as fast as the agent takes it.
const BYTES_PER_SECOND: u64 = 1 << 40;
/// QEMU's defaults.
const DEFAULT_BYTES_PER_SECOND: u64 = 128 << 20;
const DEFAULT_DOWNTIME_MS: u64 = 300;

/// Everything that changes how RAM travels or when a migration ends: what a
/// move does not name is switched off.
const CONTROLLED: [&str; 15] = [
    "events",
    "return-path",
    "x-ignore-shared",
    "pause-before-switchover",
    "postcopy-ram",
    "multifd",
    "xbzrle",
    "compress",
    "zero-copy-send",
    "release-ram",
    "auto-converge",
    "dirty-limit",
    "rdma-pin-all",
    "late-block-activate",
    "switchover-ack",
];
/// What would harm a migration that somebody else starts later: with
/// `x-ignore-shared` on it would silently leave guest RAM behind.
const TAKEN_BACK: [&str; 3] = ["x-ignore-shared", "return-path", "pause-before-switchover"];

/// What QEMU is to send or to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Move {
    /// Device state only: guest RAM is shared.
    DeviceState,
    /// Its own pre-copy, from the source: it stops the guest by itself, and
    /// waits before the switch.
    Stream {
        /// How long QEMU may expect the guest to stand still.
        downtime_ms: u64,
    },
    /// What is left of that, at the target.
    Residue,
}

impl Move {
    fn on(self) -> &'static [&'static str] {
        match self {
            Move::DeviceState => &["events", "return-path", "x-ignore-shared"],
            Move::Stream { .. } => &["events", "return-path", "pause-before-switchover"],
            Move::Residue => &["events", "return-path"],
        }
    }

    fn parameters(self) -> Value {
        match self {
            Move::DeviceState | Move::Residue => json!({ "max-bandwidth": BYTES_PER_SECOND }),
            Move::Stream { downtime_ms } => json!({
                "max-bandwidth": BYTES_PER_SECOND,
                "downtime-limit": downtime_ms,
            }),
        }
    }
}

/// Sets up a QEMU, on either side. Capabilities this QEMU does not know are
/// left out; preflight has seen that it has those that are needed.
pub(super) async fn apply(qmp: &Qmp, what: Move) -> Result<(), QmpError> {
    let wanted = CONTROLLED.map(|name| (name, what.on().contains(&name)));
    set(qmp, &wanted).await?;
    qmp.set_migration_parameters(what.parameters()).await
}

/// Takes back what would harm a migration that somebody else starts later.
///
/// Asks nothing first and waits for nothing in between: an arriving guest may
/// be stopped while it does. Every QEMU that preflight lets through has these.
pub(super) async fn undo(qmp: &Qmp) -> Result<(), QmpError> {
    let off = TAKEN_BACK.map(|name| (name, false));
    let parameters = json!({
        "max-bandwidth": DEFAULT_BYTES_PER_SECOND,
        "downtime-limit": DEFAULT_DOWNTIME_MS,
    });
    tokio::try_join!(
        qmp.set_migration_capabilities(&off),
        qmp.set_migration_parameters(parameters),
    )?;
    Ok(())
}

async fn set(qmp: &Qmp, wanted: &[(&str, bool)]) -> Result<(), QmpError> {
    let now = qmp.migration_capabilities().await?;
    let change: Vec<(&str, bool)> = wanted
        .iter()
        .filter(|(name, on)| now.iter().any(|(n, is)| n == name && is != on))
        .copied()
        .collect();
    if change.is_empty() {
        return Ok(());
    }
    qmp.set_migration_capabilities(&change).await
}
