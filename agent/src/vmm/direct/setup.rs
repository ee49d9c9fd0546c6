//! Settings of QEMU for moving device state only.

use crate::vmm::launch::Vmm;
use crate::vmm::qmp::QmpError;
use serde_json::json;

/// Device state leaves as fast as the relay takes it.
const STATE_BYTES_PER_SECOND: u64 = 1 << 40;
/// QEMU's default.
const DEFAULT_BYTES_PER_SECOND: u64 = 128 << 20;

const ON: [&str; 3] = ["events", "return-path", "x-ignore-shared"];
/// What changes how RAM travels, or when a migration ends.
const OFF: [&str; 12] = [
    "postcopy-ram",
    "multifd",
    "xbzrle",
    "compress",
    "zero-copy-send",
    "release-ram",
    "auto-converge",
    "dirty-limit",
    "rdma-pin-all",
    "pause-before-switchover",
    "late-block-activate",
    "switchover-ack",
];

/// Sets up a VMM, on either side. Capabilities this QEMU does not know are
/// left out; preflight has seen that it has those of `ON`.
pub(super) async fn apply(vmm: &Vmm) -> Result<(), QmpError> {
    let wanted: Vec<(&str, bool)> = ON
        .map(|name| (name, true))
        .into_iter()
        .chain(OFF.map(|name| (name, false)))
        .collect();
    set(vmm, &wanted).await?;
    let parameters = json!({ "max-bandwidth": STATE_BYTES_PER_SECOND });
    vmm.qmp.set_migration_parameters(parameters).await
}

/// Takes back what would harm a migration that somebody else starts later:
/// with `x-ignore-shared` on it would silently leave guest RAM behind.
///
/// Asks nothing first and waits for nothing in between: an arriving guest may
/// be stopped while it does.
pub(super) async fn undo(vmm: &Vmm) -> Result<(), QmpError> {
    let off = [("x-ignore-shared", false), ("return-path", false)];
    let parameters = json!({ "max-bandwidth": DEFAULT_BYTES_PER_SECOND });
    tokio::try_join!(
        vmm.qmp.set_migration_capabilities(&off),
        vmm.qmp.set_migration_parameters(parameters),
    )?;
    Ok(())
}

async fn set(vmm: &Vmm, wanted: &[(&str, bool)]) -> Result<(), QmpError> {
    let now = vmm.qmp.migration_capabilities().await?;
    let change: Vec<(&str, bool)> = wanted
        .iter()
        .filter(|(name, on)| now.iter().any(|(n, is)| n == name && is != on))
        .copied()
        .collect();
    if change.is_empty() {
        return Ok(());
    }
    vmm.qmp.set_migration_capabilities(&change).await
}
