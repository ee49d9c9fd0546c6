//! The commands Drover uses, typed.

use super::{COMMAND_LIMIT, Cursor, Qmp, QmpError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::time::Duration;

/// How long QEMU may take to stop a VM: it drains block I/O first.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// Run state of a VM, as `query-status` names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// The guest runs.
    Running,
    /// Stopped by command.
    Paused,
    /// Started with `-S` and not yet continued.
    Prelaunch,
    /// Waits for incoming state.
    Inmigrate,
    /// Stopped by its own migration, which is about to end.
    FinishMigrate,
    /// Stopped after its migration.
    Postmigrate,
    /// Any other: `shutdown`, `io-error`, `internal-error`, `guest-panicked`, …
    #[serde(untagged)]
    Other(String),
}

/// A migration's status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// There was none yet.
    None,
    /// Connecting.
    Setup,
    /// Under way.
    Active,
    /// The guest stands still, and QEMU waits for `migrate-continue`.
    PreSwitchover,
    /// Sending device state.
    Device,
    /// Done.
    Completed,
    /// Failed.
    Failed,
    /// Being cancelled.
    Cancelling,
    /// Cancelled.
    Cancelled,
    /// Any other: `postcopy-active`, `colo`, …
    #[serde(untagged)]
    Other(String),
}

impl MigrationStatus {
    /// Whether nothing more will happen.
    pub fn is_over(&self) -> bool {
        matches!(
            self,
            Self::None | Self::Completed | Self::Failed | Self::Cancelled
        )
    }
}

/// What `query-migrate` tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// How far it is.
    #[serde(default = "no_migration")]
    pub status: MigrationStatus,
    /// Why it failed.
    #[serde(default)]
    pub error_desc: Option<String>,
}

fn no_migration() -> MigrationStatus {
    MigrationStatus::None
}

/// A memory backend, of `query-memdev`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MemoryBackend {
    /// Its `id=`; absent for some that QEMU makes itself.
    #[serde(default)]
    pub id: Option<String>,
    /// Bytes.
    pub size: u64,
    /// `share=`; absent before QEMU 6.1.
    #[serde(default)]
    pub share: Option<bool>,
}

impl Qmp {
    async fn ask<T: DeserializeOwned>(&self, command: &str, args: Value) -> Result<T, QmpError> {
        let value = self.execute(command, args).await?;
        T::deserialize(&value).map_err(|_| self.unexpected(command, &value))
    }

    /// `query-status`.
    pub async fn status(&self) -> Result<RunState, QmpError> {
        #[derive(Deserialize)]
        struct Status {
            status: RunState,
        }
        Ok(self
            .ask::<Status>("query-status", Value::Null)
            .await?
            .status)
    }

    /// `stop`: returns when the vCPUs stand still and block I/O is drained.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.execute_within("stop", Value::Null, STOP_LIMIT)
            .await
            .map(drop)
    }

    /// `cont`.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.execute_within("cont", Value::Null, STOP_LIMIT)
            .await
            .map(drop)
    }

    /// `quit`. That the connection ends instead of an answer is success too.
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.execute("quit", Value::Null).await {
            Ok(_) | Err(QmpError::Closed { .. }) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// `query-memdev`: all memory backends.
    pub async fn memory_backends(&self) -> Result<Vec<MemoryBackend>, QmpError> {
        self.ask("query-memdev", Value::Null).await
    }

    /// `query-memory-devices`: number of plugged memory devices (DIMMs, virtio-mem, …).
    pub async fn memory_device_count(&self) -> Result<usize, QmpError> {
        let devices: Vec<Value> = self.ask("query-memory-devices", Value::Null).await?;
        Ok(devices.len())
    }

    /// `query-memory-size-summary`: bytes of RAM that is not plugged in.
    pub async fn base_memory(&self) -> Result<u64, QmpError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Summary {
            base_memory: u64,
        }
        let asked = self.ask::<Summary>("query-memory-size-summary", Value::Null);
        Ok(asked.await?.base_memory)
    }

    /// `qom-get`.
    pub async fn qom_get(&self, path: &str, property: &str) -> Result<Value, QmpError> {
        self.execute("qom-get", json!({ "path": path, "property": property }))
            .await
    }

    /// `qom-list`: names and types of what is below `path`.
    pub async fn qom_list(&self, path: &str) -> Result<Vec<(String, String)>, QmpError> {
        #[derive(Deserialize)]
        struct Property {
            name: String,
            r#type: String,
        }
        let list: Vec<Property> = self.ask("qom-list", json!({ "path": path })).await?;
        Ok(list.into_iter().map(|p| (p.name, p.r#type)).collect())
    }

    /// The machine's type without its `-machine`: `pc-q35-7.2`.
    pub async fn machine_type(&self) -> Result<String, QmpError> {
        let value = self.qom_get("/machine", "type").await?;
        let name = value
            .as_str()
            .ok_or_else(|| self.unexpected("qom-get /machine type", &value))?;
        Ok(name.trim_end_matches("-machine").to_owned())
    }

    /// `query-kvm`: whether the guest runs on KVM.
    pub async fn kvm(&self) -> Result<bool, QmpError> {
        #[derive(Deserialize)]
        struct Kvm {
            enabled: bool,
        }
        Ok(self.ask::<Kvm>("query-kvm", Value::Null).await?.enabled)
    }

    /// A command of the human monitor (`info ramblock`, `info qtree`, …): its text.
    pub async fn human(&self, line: &str) -> Result<String, QmpError> {
        self.ask("human-monitor-command", json!({ "command-line": line }))
            .await
    }

    /// `query-migrate-capabilities`: the names of those that are on, and of all.
    pub async fn migration_capabilities(&self) -> Result<Vec<(String, bool)>, QmpError> {
        #[derive(Deserialize)]
        struct Capability {
            capability: String,
            state: bool,
        }
        let list: Vec<Capability> = self.ask("query-migrate-capabilities", Value::Null).await?;
        Ok(list.into_iter().map(|c| (c.capability, c.state)).collect())
    }

    /// `migrate-set-capabilities`.
    pub async fn set_migration_capabilities(
        &self,
        capabilities: &[(&str, bool)],
    ) -> Result<(), QmpError> {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|(name, on)| json!({ "capability": name, "state": on }))
            .collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": list }))
            .await
            .map(drop)
    }

    /// `migrate-set-parameters`; `parameters` is an object.
    pub async fn set_migration_parameters(&self, parameters: Value) -> Result<(), QmpError> {
        self.execute("migrate-set-parameters", parameters)
            .await
            .map(drop)
    }

    /// `migrate`: starts it and returns.
    pub async fn migrate(&self, uri: &str) -> Result<(), QmpError> {
        self.execute("migrate", json!({ "uri": uri }))
            .await
            .map(drop)
    }

    /// `migrate-incoming`: returns when the VMM listens.
    pub async fn migrate_incoming(&self, uri: &str) -> Result<(), QmpError> {
        self.execute("migrate-incoming", json!({ "uri": uri }))
            .await
            .map(drop)
    }

    /// `migrate-continue`: the switchover that QEMU waits before may begin.
    pub async fn migrate_continue(&self) -> Result<(), QmpError> {
        let state = json!({ "state": "pre-switchover" });
        self.execute("migrate-continue", state).await.map(drop)
    }

    /// `migrate_cancel`: asks for it and returns.
    pub async fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.execute("migrate_cancel", Value::Null).await.map(drop)
    }

    /// `query-migrate`.
    pub async fn migration(&self) -> Result<MigrationInfo, QmpError> {
        self.ask("query-migrate", Value::Null).await
    }

    /// Waits from `cursor` on for the `MIGRATION` event (capability `events`)
    /// that ends the migration; its status.
    pub async fn wait_migration_over(
        &self,
        cursor: Cursor,
        limit: Duration,
    ) -> Result<MigrationStatus, QmpError> {
        self.wait_migration(cursor, "the end of the migration", limit, |status| {
            status.is_over()
        })
        .await
    }

    /// Waits from `cursor` on for a `MIGRATION` event with a status that is
    /// `wanted`.
    pub async fn wait_migration(
        &self,
        cursor: Cursor,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&MigrationStatus) -> bool,
    ) -> Result<MigrationStatus, QmpError> {
        self.wait_event(cursor, what, limit, |event| {
            if event.name != "MIGRATION" {
                return None;
            }
            let status = MigrationStatus::deserialize(&event.data["status"]).ok()?;
            wanted(&status).then_some(status)
        })
        .await
    }

    /// Stops a migration that is under way, if any, and waits until it is over.
    pub async fn cancel_migration(&self) -> Result<(), QmpError> {
        if self.migration().await?.status.is_over() {
            return Ok(());
        }
        self.migrate_cancel().await?;
        let over = async {
            loop {
                if self.migration().await?.status.is_over() {
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(COMMAND_LIMIT, over)
            .await
            .unwrap_or_else(|_| {
                Err(QmpError::Timeout {
                    path: self.path().to_owned(),
                    command: "the end of the cancelled migration".into(),
                    limit: COMMAND_LIMIT,
                })
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_by_name() {
        let state = |s: &str| serde_json::from_value::<RunState>(json!(s)).unwrap();
        assert_eq!(state("running"), RunState::Running);
        assert_eq!(state("inmigrate"), RunState::Inmigrate);
        assert_eq!(state("finish-migrate"), RunState::FinishMigrate);
        assert_eq!(state("io-error"), RunState::Other("io-error".into()));
        let info = |v| serde_json::from_value::<MigrationInfo>(v).unwrap();
        assert_eq!(info(json!({})).status, MigrationStatus::None);
        let failed = info(json!({ "status": "failed", "error-desc": "why" }));
        assert!(failed.status.is_over() && failed.error_desc.as_deref() == Some("why"));
        let other = info(json!({ "status": "wait-unplug", "ram": { "transferred": 5 } }));
        assert_eq!(other.status, MigrationStatus::Other("wait-unplug".into()));
    }
}
