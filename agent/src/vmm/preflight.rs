//! Everything direct mode takes for granted, checked before a VM is touched.
//! Each refusal says what to change.

mod error;
mod hmp;

pub use error::PreflightError;
pub use hmp::{RamBlock, parse_devices, parse_ramblocks};

use super::definition::Definition;
use super::dirty::kernel_features;
use super::launch::{Vmm, blocking};
use super::qmp::{RunState, Version};
use super::ram::{RamLayout, find_layout};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Oldest QEMU that direct mode was thought through for.
pub const MIN_VERSION: Version = Version {
    major: 6,
    minor: 0,
    micro: 0,
};
/// RAM blocks outside of the shared file (video memory, ROMs) travel with the
/// device state while the guest stands still; more of them than this is refused.
pub const MAX_STATE_RAM: u64 = 256 << 20;

/// What the source knows of a QEMU that can be moved; travels to the
/// target, which checks its side against it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuFacts {
    /// The VM's name.
    pub name: String,
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// `id` of the memory backend, or name of the RAM block in stream mode.
    pub backend: String,
    /// Machine type, versioned: `pc-q35-7.2`.
    pub machine: String,
    /// Version of the source's QEMU.
    pub version: Version,
    /// On KVM, rather than emulated.
    pub kvm: bool,
    /// Bytes of RAM blocks that travel with the device state.
    pub state_ram_bytes: u64,
    /// Whether the guest was running when it was looked at.
    pub running: bool,
}

/// Capabilities that direct mode cannot be combined with; an operator who set
/// one has plans of his own.
const CONFLICTING: [&str; 5] = [
    "postcopy-ram",
    "x-colo",
    "background-snapshot",
    "block",
    "mapped-ram",
];

/// Capabilities that direct mode needs.
const NEEDED: [&str; 3] = ["x-ignore-shared", "return-path", "events"];

/// Checks a VM that is to be moved from here. Changes nothing.
pub async fn check_source(vmm: &Vmm) -> Result<(QemuFacts, RamLayout), PreflightError> {
    let vm = &vmm.name;
    let qmp = vmm.qmp()?;
    let asked = |source| PreflightError::Qmp {
        vm: vm.clone(),
        source,
    };
    kernel_features().map_err(|source| PreflightError::Kernel {
        vm: vm.clone(),
        source,
    })?;
    let version = check_version(vmm)?;
    // Asked all at once: QEMU answers in this order, without waiting for us in
    // between, and the gang waits for the slowest of its VMs.
    let (state, (), (), (backend, layout), machine, kvm, blocks) = tokio::try_join!(
        check_idle(vmm),
        check_capabilities(vmm, &NEEDED),
        check_devices(vmm),
        check_ram(vmm),
        async { qmp.machine_type().await.map_err(asked) },
        async { qmp.kvm().await.map_err(asked) },
        async { qmp.human("info ramblock").await.map_err(asked) },
    )?;
    let facts = QemuFacts {
        name: vm.clone(),
        ram_bytes: layout.len,
        machine,
        version,
        kvm,
        state_ram_bytes: check_other_ram(vmm, &blocks, &backend, layout.len)?,
        backend,
        running: state == RunState::Running,
    };
    Ok((facts, layout))
}

/// Checks a VMM that waits for the VM of `facts`. QEMU itself would accept a
/// target with `share=off` and lose all RAM.
pub async fn check_target(vmm: &Vmm, facts: &QemuFacts) -> Result<RamLayout, PreflightError> {
    let vm = &vmm.name;
    let qmp = vmm.qmp()?;
    let asked = |source| PreflightError::Qmp {
        vm: vm.clone(),
        source,
    };
    let ((), (), (), (backend, layout), machine, kvm) = tokio::try_join!(
        check_incoming(vmm),
        check_capabilities(vmm, &NEEDED),
        check_devices(vmm),
        check_ram(vmm),
        async { qmp.machine_type().await.map_err(asked) },
        async { qmp.kvm().await.map_err(asked) },
    )?;
    check_same(vmm, facts, layout.len, &backend, machine, kvm)?;
    Ok(layout)
}

/// The VMM's version, if it is new enough.
pub(super) fn check_version(vmm: &Vmm) -> Result<Version, PreflightError> {
    let have = vmm.qmp()?.version();
    match have < MIN_VERSION {
        false => Ok(have),
        true => Err(PreflightError::OldQemu {
            vm: vmm.name.clone(),
            have,
        }),
    }
}

/// The state of a VM that is here and of which nobody is moving anything.
pub(super) async fn check_idle(vmm: &Vmm) -> Result<RunState, PreflightError> {
    let vm = &vmm.name;
    let asked = |source| PreflightError::Qmp {
        vm: vm.clone(),
        source,
    };
    let qmp = vmm.qmp()?;
    let (state, migration) =
        tokio::try_join!(async { qmp.status().await.map_err(asked) }, async {
            qmp.migration().await.map_err(asked)
        },)?;
    if !matches!(state, RunState::Running | RunState::Paused) {
        return Err(PreflightError::State {
            vm: vm.clone(),
            state: state_name(&state),
        });
    }
    if !migration.status.is_over() {
        let status = format!("{:?}", migration.status);
        return Err(PreflightError::Migrating {
            vm: vm.clone(),
            status,
        });
    }
    Ok(state)
}

/// That the VMM waits for a VM.
pub(super) async fn check_incoming(vmm: &Vmm) -> Result<(), PreflightError> {
    let vm = &vmm.name;
    let asked = vmm.qmp()?.status().await;
    let state = asked.map_err(|source| PreflightError::Qmp {
        vm: vm.clone(),
        source,
    })?;
    match state {
        RunState::Inmigrate => Ok(()),
        state => Err(PreflightError::State {
            vm: vm.clone(),
            state: state_name(&state),
        }),
    }
}

/// That a waiting VMM is like the source's.
pub(super) fn check_same(
    vmm: &Vmm,
    facts: &QemuFacts,
    ram_bytes: u64,
    backend: &str,
    machine: String,
    kvm: bool,
) -> Result<(), PreflightError> {
    let vm = &vmm.name;
    let same = |what, have: String, wanted: String| {
        if have == wanted {
            return Ok(());
        }
        Err(PreflightError::Differs {
            vm: vm.clone(),
            what,
            have,
            wanted,
            whose: "source",
        })
    };
    let ram = facts.ram_bytes.to_string();
    same("RAM size", ram_bytes.to_string(), ram)?;
    same(
        "RAM backend's id",
        backend.to_owned(),
        facts.backend.clone(),
    )?;
    same("machine type", machine, facts.machine.clone())?;
    let accelerator = |kvm| if kvm { "kvm" } else { "tcg" }.to_owned();
    same("accelerator", accelerator(kvm), accelerator(facts.kvm))?;
    let version = vmm.qmp()?.version();
    // Patch releases go both ways.
    if (version.major, version.minor) < (facts.version.major, facts.version.minor) {
        let (have, wanted) = (version.to_string(), format!("{} or newer", facts.version));
        same("QEMU version", have, wanted)?;
    }
    Ok(())
}

/// Checks that a definition fits the running VM it is to describe.
pub fn check_definition(facts: &QemuFacts, definition: &Definition) -> Result<(), PreflightError> {
    if definition.ram_bytes == facts.ram_bytes {
        return Ok(());
    }
    Err(PreflightError::Differs {
        vm: facts.name.clone(),
        what: "RAM size",
        have: facts.ram_bytes.to_string(),
        wanted: definition.ram_bytes.to_string(),
        whose: "definition",
    })
}

fn state_name(state: &RunState) -> String {
    serde_json::to_value(state)
        .ok()
        .and_then(|v| v.as_str().map(str::to_owned))
        .unwrap_or_default()
}

/// That the capabilities in `needed` exist, and that none is on that cannot be
/// combined with what Drover does.
pub(super) async fn check_capabilities(
    vmm: &Vmm,
    needed: &[&'static str],
) -> Result<(), PreflightError> {
    let vm = &vmm.name;
    let qmp = vmm.qmp()?;
    let all = qmp.migration_capabilities().await;
    let all = all.map_err(|source| PreflightError::Qmp {
        vm: vm.clone(),
        source,
    })?;
    for &capability in needed {
        if !all.iter().any(|(name, _)| name == capability) {
            let version = qmp.version();
            return Err(PreflightError::NoCapability {
                vm: vm.clone(),
                version,
                capability,
            });
        }
    }
    match all
        .into_iter()
        .find(|(name, on)| *on && CONFLICTING.contains(&name.as_str()))
    {
        Some((capability, _)) => Err(PreflightError::Capability {
            vm: vm.clone(),
            capability,
        }),
        None => Ok(()),
    }
}

/// Devices that write guest RAM from outside the VMM's address space, or by
/// long-pinned pages.
pub(super) async fn check_devices(vmm: &Vmm) -> Result<(), PreflightError> {
    let vm = &vmm.name;
    let asked = |source| PreflightError::Qmp {
        vm: vm.clone(),
        source,
    };
    let qmp = vmm.qmp()?;
    let (tree, network) = tokio::try_join!(
        async { qmp.human("info qtree").await.map_err(asked) },
        async { qmp.human("info network").await.map_err(asked) },
    )?;
    const BY_THEMSELVES: [&str; 5] = ["vfio", "vhost-user", "vhost-vdpa", "vhost-scsi", "pvrdma"];
    for (kind, id) in parse_devices(&tree) {
        if BY_THEMSELVES.iter().any(|p| kind.starts_with(p)) || kind.contains("vdpa") {
            let device = if id.is_empty() {
                kind
            } else {
                format!("{kind} `{id}`")
            };
            return Err(PreflightError::Device {
                vm: vm.clone(),
                device,
            });
        }
    }
    for kind in ["vhost-user", "vhost-vdpa"] {
        if network.contains(&format!("type={kind}")) {
            let device = format!("a network of type {kind}");
            return Err(PreflightError::Device {
                vm: vm.clone(),
                device,
            });
        }
    }
    Ok(())
}

/// The one memory backend: its id and where it is.
async fn check_ram(vmm: &Vmm) -> Result<(String, RamLayout), PreflightError> {
    let vm = &vmm.name;
    let qmp = vmm.qmp()?;
    let asked = |source| PreflightError::Qmp {
        vm: vm.clone(),
        source,
    };
    let (backends, plugged) = tokio::try_join!(
        async { qmp.memory_backends().await.map_err(asked) },
        async { qmp.memory_device_count().await.map_err(asked) },
    )?;
    let id = match backends.as_slice() {
        [one] if plugged == 0 => one.id.clone().unwrap_or_else(|| "(without id)".into()),
        _ => {
            let ids: Vec<&str> = backends
                .iter()
                .map(|b| b.id.as_deref().unwrap_or("(without id)"))
                .collect();
            let (count, names) = (backends.len().max(plugged), ids.join(", "));
            return Err(PreflightError::Backends {
                vm: vm.clone(),
                count,
                names,
            });
        }
    };
    let path = format!("/objects/{id}");
    let (asked, path) = (&asked, path.as_str());
    let property = |name| async move { qmp.qom_get(path, name).await.map_err(asked) };
    let (type_name, file, share) = tokio::try_join!(
        property("type"),
        // Backends of other types have none: they are refused below by their type.
        async { Ok(property("mem-path").await) },
        property("share"),
    )?;
    let type_name = type_name.as_str().unwrap_or("?").to_owned();
    if type_name != "memory-backend-file" {
        return Err(PreflightError::BackendType {
            vm: vm.clone(),
            backend: id,
            type_name,
        });
    }
    let file = PathBuf::from(file?.as_str().unwrap_or_default());
    if share != true {
        return Err(PreflightError::NotShared {
            vm: vm.clone(),
            backend: id,
            path: file,
        });
    }
    let process = vmm.process.clone();
    let (name, me) = (vm.clone(), std::process::id() as i32);
    let layout = blocking(move || {
        if vmm_path(&process.proc_path("root"), &file).is_dir() {
            return Err(PreflightError::Unnamed {
                vm: name,
                path: file,
            });
        }
        let layout = find_layout(&process, &file).map_err(|source| PreflightError::Ram {
            vm: name.clone(),
            source,
        })?;
        match others_mapping(layout.file_id, &[process.pid(), me]) {
            Some((pid, comm)) => Err(PreflightError::SharedWith {
                vm: name,
                pid,
                comm,
            }),
            None => Ok(layout),
        }
    })
    .await?;
    Ok((id, layout))
}

/// A path as the VMM sees it.
fn vmm_path(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// A process other than `known` that maps the file shared and writable.
fn others_mapping(id: (u64, u64), known: &[i32]) -> Option<(i32, String)> {
    let pids = std::fs::read_dir("/proc").ok()?.filter_map(|entry| {
        let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        (!known.contains(&pid)).then_some(pid)
    });
    for pid in pids {
        // Processes come and go; one that cannot be read has just gone.
        let Ok(text) = std::fs::read(format!("/proc/{pid}/maps")) else {
            continue;
        };
        let Ok(rows) = super::maps::parse_maps(&String::from_utf8_lossy(&text)) else {
            continue;
        };
        if rows
            .iter()
            .any(|r| r.is_file(id.0, id.1) && r.shared && r.perms[1])
        {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            return Some((pid, comm.trim().to_owned()));
        }
    }
    None
}

/// Bytes of RAM blocks besides the backend's, which has to be one of them and
/// whole. `blocks`: what `info ramblock` says.
fn check_other_ram(
    vmm: &Vmm,
    blocks: &str,
    backend: &str,
    len: u64,
) -> Result<u64, PreflightError> {
    let vm = &vmm.name;
    let version = vmm.qmp()?.version();
    let unclear = |what: String| PreflightError::Monitor {
        vm: vm.clone(),
        version,
        command: "info ramblock",
        what,
    };
    let blocks = parse_ramblocks(blocks).map_err(unclear)?;
    // `ram`, or `/objects/ram` with machine types before 4.0.
    let is_ram = |b: &&RamBlock| b.name.rsplit('/').next() == Some(backend);
    match blocks.iter().filter(is_ram).collect::<Vec<_>>().as_slice() {
        [ram] if ram.used == len => {}
        [ram] => {
            return Err(unclear(format!(
                "{} has {} bytes, its file {len}",
                ram.name, ram.used
            )));
        }
        _ => return Err(unclear(format!("no single block of backend `{backend}`"))),
    }
    let others = blocks.iter().filter(|b| !is_ram(b));
    let bytes = others.clone().map(|b| b.used).sum();
    match others.max_by_key(|b| b.used) {
        Some(largest) if bytes > MAX_STATE_RAM => Err(PreflightError::OtherRam {
            vm: vm.clone(),
            bytes,
            largest: largest.name.clone(),
        }),
        _ => Ok(bytes),
    }
}
