//! A VM in stream mode on the host it is moved to.

use super::error::StreamVmError;
use super::preflight::check_target;
use super::ram::ProcessRam;
use crate::vmm::definition::{Definition, VmPaths};
use crate::vmm::direct;
use crate::vmm::launch::{Launched, Role, Vmm, blocking};
use crate::vmm::preflight::{QemuFacts, check_definition};
use crate::vmm::qmp::Cursor;
use crate::vmm::setup::{self, Move};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Dropped before [`TargetVm::keep`], its VMM is killed and its files are
/// removed.
#[derive(Debug)]
pub struct TargetVm {
    launched: Launched,
    ram: Arc<ProcessRam>,
    listening: Option<Cursor>,
}

impl TargetVm {
    /// Starts a VMM that waits for the VM, checks it against the source's facts
    /// and opens its RAM for placing pages.
    pub async fn prepare(
        definition: &Definition,
        paths: &VmPaths,
        host: &BTreeMap<String, String>,
        facts: &QemuFacts,
    ) -> Result<TargetVm, StreamVmError> {
        check_definition(facts, definition)?;
        let launched = Launched::start(definition, paths, host, Role::Incoming).await?;
        let vmm = launched.vmm();
        let found = check_target(vmm, facts).await?;
        let set_up = setup::apply(vmm.qmp()?, Move::Residue).await;
        set_up.map_err(|source| StreamVmError::Qmp {
            vm: vmm.name.clone(),
            doing: "setting up for its arrival",
            source,
        })?;
        let ram = found.open(vmm, true);
        let ram = Arc::new(ram.map_err(|source| StreamVmError::Ram {
            vm: vmm.name.clone(),
            source,
        })?);
        Ok(TargetVm {
            launched,
            ram,
            listening: None,
        })
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        self.launched.vmm()
    }

    /// Guest RAM, for placing pages. They are where the guest will find them.
    pub fn ram(&self) -> &Arc<ProcessRam> {
        &self.ram
    }

    /// Lets the VMM listen on the Unix socket `socket`, which must not exist.
    pub async fn listen(&mut self, socket: &Path) -> Result<(), StreamVmError> {
        self.listening = Some(direct::listen(self.vmm(), socket).await?);
        Ok(())
    }

    /// Waits until all device state has arrived; the guest is then paused.
    pub async fn wait_arrived(&self, limit: Duration) -> Result<(), StreamVmError> {
        Ok(direct::wait_arrived(self.vmm(), self.listening, limit).await?)
    }

    /// The VM lives here from now on: its VMM and files stay when we go.
    pub fn keep(self) -> Vmm {
        self.launched.keep()
    }

    /// Ends the half-made VM and removes its files.
    pub async fn abort(self) {
        blocking(move || drop(self)).await;
    }
}
