//! The VMs in this agent's charge: started, adopted, found again, arrived.

use super::adopted::Adopted;
use crate::api::{ApiError, ErrorKind};
use crate::config::AgentConfig;
use crate::gang::handover::chain;
use crate::types::GangId;
use crate::vmm::definition::{Definition, Family, VmPaths};
use crate::vmm::kinds::Survey;
use crate::vmm::launch::{Launched, Role, Vmm, remove_files};
use crate::vmm::qmp::RunState;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// One VM.
#[derive(Debug, Clone)]
pub(super) struct Vm {
    pub(super) definition: Definition,
    /// Its files, if an agent made them; `None` for one that was adopted.
    pub(super) files: Option<VmPaths>,
    pub(super) vmm: Vmm,
    /// The gang that is moving it away.
    pub(super) leaving: Option<GangId>,
    /// Pages fingerprinted in this agent's time.
    pub(super) pages_scanned: u64,
    /// As the last migration measured it.
    pub(super) dirty_bytes_per_s: Option<u64>,
    /// The kinds it allows, once they are known.
    kinds: Option<Survey>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Registry {
    /// VMs by name.
    vms: RefCell<BTreeMap<String, Vm>>,
    adopted: Adopted,
}

/// What the journal says of VMs that will be found.
pub(super) struct VmsFound {
    /// Arriving: they are not this host's yet.
    pub(super) on_their_way: BTreeSet<String>,
}

impl Registry {
    /// An empty one, which remembers adopted VMs.
    pub(super) fn new(adopted: Adopted) -> Self {
        Registry {
            vms: RefCell::default(),
            adopted,
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<Vm> {
        self.vms.borrow().get(name).cloned()
    }

    pub(super) fn all(&self) -> Vec<Vm> {
        self.vms.borrow().values().cloned().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.vms.borrow().len()
    }

    pub(super) fn insert(&self, vm: Vm) {
        self.vms.borrow_mut().insert(vm.definition.name.clone(), vm);
    }

    pub(super) fn remove(&self, name: &str) -> Option<Vm> {
        let removed = self.vms.borrow_mut().remove(name);
        if removed.as_ref().is_some_and(|vm| vm.files.is_none()) {
            self.adopted.forget(name);
        }
        removed
    }

    pub(super) fn update(&self, name: &str, f: impl FnOnce(&mut Vm)) {
        if let Some(vm) = self.vms.borrow_mut().get_mut(name) {
            f(vm);
        }
    }

    /// How a VM can be moved; `None` while nothing new can be learned of one
    /// that moves or has ended.
    pub(super) async fn kinds(&self, vm: &Vm) -> Option<Survey> {
        if vm.kinds.is_some() || vm.leaving.is_some() || !vm.vmm.process.is_alive() {
            return vm.kinds.clone();
        }
        let survey = Survey::of(&vm.vmm, vm.definition.kind).await;
        // What was not possible may be after a remedy: asked again each time.
        if survey.chosen.is_some() {
            self.update(&vm.definition.name, |vm| vm.kinds = Some(survey.clone()));
        }
        Some(survey)
    }

    /// Starts a VM from the definition `NAME.toml` of this host.
    pub(super) async fn run(&self, config: &AgentConfig, name: &str) -> Result<Vm, ApiError> {
        let definition = self.definition(config, name)?;
        self.refuse_twice(&definition.name)?;
        self.clear_ended(&definition.name)?;
        let files = VmPaths::new(&config.run_dir, &config.ram_dir, &definition.name);
        let launched = Launched::start(&definition, &files, &config.placeholders, Role::Run)
            .await
            .map_err(|e| {
                ApiError::new(
                    ErrorKind::Failed,
                    chain(&e),
                    "correct the VM's definition or the host, then run it again",
                )
            })?;
        let vm = Vm::new(definition, Some(files), launched.keep());
        self.insert(vm.clone());
        Ok(vm)
    }

    /// Takes charge of a VM that somebody else started.
    pub(super) async fn adopt(
        &self,
        config: &AgentConfig,
        name: &str,
        qmp: &Path,
    ) -> Result<Vm, ApiError> {
        let definition = self.definition(config, name)?;
        self.refuse_twice(&definition.name)?;
        let vmm = Vmm::find(&definition, qmp).await.map_err(|e| {
            let remedy = match definition.family {
                Family::Qemu => "give the QMP socket of a running QEMU that no other client holds",
                Family::Linked => "give the socket that its running VMM serves with drover-vmm",
            };
            ApiError::new(ErrorKind::Failed, chain(&e), remedy)
        })?;
        if let Err(error) = self.adopted.remember(name, qmp) {
            return Err(ApiError::new(
                ErrorKind::Failed,
                format!("VM {name} cannot be remembered: {error}"),
                "make the state directory writable and give it space",
            ));
        }
        let vm = Vm::new(definition, None, vmm);
        self.insert(vm.clone());
        Ok(vm)
    }

    fn definition(&self, config: &AgentConfig, name: &str) -> Result<Definition, ApiError> {
        let file = config.vm_definitions.join(format!("{name}.toml"));
        let definition = Definition::load(&file).map_err(|e| {
            ApiError::new(
                ErrorKind::Invalid,
                chain(&e),
                "see configs/vms/ for an example",
            )
        })?;
        if definition.name != name {
            return Err(ApiError::new(
                ErrorKind::Invalid,
                format!(
                    "{} defines VM {}, not {name}",
                    file.display(),
                    definition.name
                ),
                "give file and VM the same name",
            ));
        }
        Ok(definition)
    }

    fn refuse_twice(&self, name: &str) -> Result<(), ApiError> {
        match self.get(name) {
            Some(vm) if vm.vmm.process.is_alive() => Err(ApiError::new(
                ErrorKind::Conflict,
                format!(
                    "VM {name} runs here already (process {})",
                    vm.vmm.process.pid()
                ),
                "stop it first, or choose another name",
            )),
            _ => Ok(()),
        }
    }

    /// Removes what is left of a VM whose VMM has ended, by itself or by its
    /// guest's shutdown: nothing of its RAM is of use to anybody.
    fn clear_ended(&self, name: &str) -> Result<(), ApiError> {
        let Some(ended) = self.get(name) else {
            return Ok(());
        };
        refuse_leaving(&ended, name)?;
        if let Some(files) = &ended.files {
            remove_files(files);
        }
        self.remove(name);
        Ok(())
    }

    /// Ends a VM and removes the files an agent made for it.
    pub(super) async fn stop(&self, name: &str) -> Result<(), ApiError> {
        let Some(vm) = self.get(name) else {
            return Err(not_found(name));
        };
        refuse_leaving(&vm, name)?;
        vm.vmm
            .end()
            .await
            .map_err(|e| ApiError::new(ErrorKind::Failed, chain(&e), "end its process by hand"))?;
        if let Some(files) = &vm.files {
            remove_files(files);
        }
        self.remove(name);
        Ok(())
    }

    /// Finds the VMs that an earlier run of the agent left running: VMMs are
    /// not its children. Directories without a live VMM are left alone and
    /// named in the log.
    ///
    /// A VMM that waits for device state and is not in the journal is the
    /// half-made target of a move that no source can have committed: it is
    /// ended.
    pub(super) async fn find_again(&self, config: &AgentConfig, found: VmsFound) {
        for vm in self.adopted.all() {
            match self.adopt(config, &vm.name, &vm.qmp).await {
                Ok(_) => tracing::info!(vm = %vm.name, "adopted VM found again"),
                Err(error) => {
                    tracing::warn!(vm = %vm.name, error = %error.error,
                        "an adopted VM is not found again; adopt it anew if it still runs");
                }
            }
        }
        let entries = std::fs::read_dir(&config.run_dir).into_iter().flatten();
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let files = VmPaths::new(&config.run_dir, &config.ram_dir, &name);
            if found.on_their_way.contains(&name) {
                continue;
            }
            let Ok(definition) = Definition::load(&files.definition()) else {
                continue;
            };
            match Vmm::find(&definition, &files.control(definition.family)).await {
                Ok(vmm) if matches!(vmm.status().await, Ok(RunState::Inmigrate)) => {
                    match vmm.end().await {
                        Ok(()) => {
                            remove_files(&files);
                            tracing::warn!(vm = %name, "half-made VM of an earlier run removed");
                        }
                        Err(error) => tracing::error!(vm = %name, error = %chain(&error),
                            "half-made VM of an earlier run cannot be ended; end its process"),
                    }
                }
                Ok(vmm) => {
                    tracing::info!(vm = %name, pid = vmm.process.pid(), "VM found again");
                    self.insert(Vm::new(definition, Some(files), vmm));
                }
                Err(error) => {
                    tracing::warn!(vm = %name, dir = %files.dir.display(), error = %chain(&error),
                        "a VM was here and its VMM does not answer; remove its directory and \
                         RAM file if it has ended");
                }
            }
        }
    }
}

/// Whoever moves a VM has the say over it.
fn refuse_leaving(vm: &Vm, name: &str) -> Result<(), ApiError> {
    match vm.leaving {
        Some(gang) => Err(ApiError::new(
            ErrorKind::Conflict,
            format!("VM {name} is being moved by gang {gang}"),
            "cancel the migration first",
        )),
        None => Ok(()),
    }
}

impl Vm {
    pub(super) fn new(definition: Definition, files: Option<VmPaths>, vmm: Vmm) -> Self {
        Vm {
            definition,
            files,
            vmm,
            leaving: None,
            pages_scanned: 0,
            dirty_bytes_per_s: None,
            kinds: None,
        }
    }
}

pub(super) fn not_found(name: &str) -> ApiError {
    ApiError::new(
        ErrorKind::NotFound,
        format!("there is no VM {name} on this host"),
        "`drover vm list` shows those that are",
    )
}
