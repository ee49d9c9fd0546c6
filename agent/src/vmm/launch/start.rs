//! Starting a VMM, and what it is made of until it is known to stay.

use super::control::{Control, Vmm};
use super::error::{LaunchError, file_error};
use super::leftovers::RunDir;
use super::{KILL_LIMIT, linked, qemu};
use crate::vmm::definition::{Definition, Family, Role, VmPaths};
use crate::vmm::process::VmProcess;
use crate::vmm::qmp::Qmp;
use crate::vmm::ram::RamFile;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

/// What belongs to a VM that the agent started: on drop the VMM is killed and
/// its files are removed, unless [`Launched::keep`] was called.
#[derive(Debug)]
pub struct Launched {
    vmm: Option<Vmm>,
    // Fields drop in this order: the RAM file goes after the VMM that has it mapped.
    killer: Killer,
    ram: Option<RamFile>,
    dir: RunDir,
}

impl Launched {
    /// Starts a VMM for `definition`: run directory, RAM file, process, and what
    /// drives it. On failure nothing is left behind, and the error carries the
    /// VMM's own words.
    pub async fn start(
        definition: &Definition,
        paths: &VmPaths,
        host: &BTreeMap<String, String>,
        role: Role,
    ) -> Result<Launched, LaunchError> {
        let vm = definition.name.as_str();
        let args = match definition.family {
            Family::Qemu => qemu::full_args(definition, paths, host, role)?,
            Family::Linked => definition.expand(paths, host, role)?,
        };
        let dir = RunDir::create(vm, &paths.dir)?;
        let ram = definition
            .has_ram_file()
            .then(|| RamFile::create(&paths.ram, definition.ram_bytes))
            .transpose()
            .map_err(|source| LaunchError::Ram {
                vm: vm.into(),
                source,
            })?;
        let file = paths.definition();
        fs::write(&file, &definition.text).map_err(file_error(vm, "writing", &file))?;
        // From here on a VMM may exist: a daemon is found by its pid file, also if
        // this future is dropped.
        let mut launched = Launched {
            vmm: None,
            killer: Killer {
                process: None,
                pidfile: paths.pidfile(),
                binary: definition.binary.clone(),
                armed: true,
            },
            ram,
            dir,
        };
        let (binary, log) = (&definition.binary, paths.log(definition.family));
        let (process, control) = match definition.family {
            Family::Qemu => {
                qemu::run_daemonizing(vm, binary, &args, &log).await?;
                let process = Arc::new(qemu::process_of_pidfile(&paths.pidfile(), binary)?);
                launched.killer.process = Some(process.clone());
                (process, Control::Qmp(Qmp::connect(&paths.qmp()).await?))
            }
            Family::Linked => {
                let mut started = linked::Started::spawn(vm, binary, &args, paths, &log)?;
                let process = started.process.clone();
                launched.killer.process = Some(process.clone());
                let link = started.link(&paths.link()).await?;
                (process, Control::Link(Arc::new(link)))
            }
        };
        launched.vmm = Some(Vmm {
            name: vm.to_owned(),
            process,
            control,
            log: Some(log),
        });
        Ok(launched)
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        self.vmm.as_ref().expect("set before `start` returns")
    }

    /// Leaves the VM running and its files in place.
    pub fn keep(mut self) -> Vmm {
        self.killer.armed = false;
        self.dir.armed = false;
        let vmm = self.vmm.take().expect("set before `start` returns");
        if let Some(ram) = self.ram.take() {
            ram.keep();
        }
        vmm
    }
}
#[derive(Debug)]
struct Killer {
    process: Option<Arc<VmProcess>>,
    pidfile: PathBuf,
    binary: PathBuf,
    armed: bool,
}

impl Drop for Killer {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let process = self.process.take().or_else(|| {
            qemu::process_of_pidfile(&self.pidfile, &self.binary)
                .ok()
                .map(Arc::new)
        });
        if let Some(process) = process
            && let Err(error) = process.kill_and_wait(KILL_LIMIT)
        {
            tracing::error!(pid = process.pid(), %error, "VMM could not be ended");
        }
    }
}
