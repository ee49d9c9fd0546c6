//! VM definitions: one TOML text that means the same VM on every host. It
//! travels from source to target; what differs between hosts is left to
//! placeholders and filled in where the VMM is started. `[qemu]` says what to
//! start, or `[vmm]` for a VMM that embeds `drover-vmm`.
//!
//! ```
//! use drover::vmm::definition::Definition;
//! let vm = Definition::parse("web-1.toml", r#"
//! name = "web-1"
//! domain = "tenant-a"
//! ram = "2G"
//! [qemu]
//! binary = "/usr/bin/qemu-system-x86_64"
//! args = ["-machine", "q35,accel=kvm,memory-backend=ram", "-m", "{ram_size}",
//!         "-object", "memory-backend-file,id=ram,size={ram_size},mem-path={ram},share=on",
//!         "-drive", "file={disks}/web-1.qcow2,if=virtio,cache=none"]
//! "#).unwrap();
//! assert_eq!(vm.ram_bytes, 2 << 30);
//! ```

mod program;

use super::ram::check_len;
use program::{Program, RawLinked, RawQemu};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use thiserror::Error;
use toml::Spanned;

/// Longest definition taken: it comes over the network.
pub const MAX_TEXT: usize = 64 << 10;

/// How a VM is reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The best kind that the VM allows.
    #[default]
    Auto,
    /// QEMU whose RAM is a shared file.
    QemuDirect,
    /// QEMU whose RAM is its own: its migration stream tells what to send.
    QemuStream,
    /// A VMM that embeds `drover-vmm` and answers KVM's own dirty log.
    KvmLog,
    /// QEMU whose manager (libvirt) drives its migration. No definition names it.
    #[serde(skip_deserializing)]
    QemuManaged,
    /// Cloud Hypervisor, whose `send-migration` somebody starts. As before.
    #[serde(skip_deserializing)]
    CloudHypervisor,
}

impl Kind {
    /// All that can be chosen, the best first.
    pub const BEST_FIRST: [Kind; 3] = [Kind::QemuDirect, Kind::KvmLog, Kind::QemuStream];

    /// The kinds that this wish leaves open, the best first.
    pub fn candidates(self) -> Vec<Kind> {
        match self {
            Kind::Auto => Self::BEST_FIRST.to_vec(),
            one => vec![one],
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Auto => "auto",
            Kind::QemuDirect => "qemu-direct",
            Kind::QemuStream => "qemu-stream",
            Kind::KvmLog => "kvm-log",
            Kind::QemuManaged => "qemu-managed",
            Kind::CloudHypervisor => "cloud-hypervisor",
        })
    }
}

/// What VMM a definition starts, and so how that is started and driven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `[qemu]`: QEMU, which daemonizes itself and has a monitor.
    Qemu,
    /// `[vmm]`: another one, which embeds `drover-vmm` and listens at `{link}`.
    Linked,
}

/// What a VMM is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// To run the guest from its start.
    Run,
    /// To wait, stopped, for a VM from elsewhere.
    Incoming,
}

/// A valid definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// Unique among the VMs of the agents that know each other.
    pub name: String,
    /// Dedup domain (tenant): only VMs of one domain share pages.
    pub domain: String,
    /// How it is to be reached.
    pub kind: Kind,
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// What is started.
    pub family: Family,
    /// The VMM's binary.
    pub binary: PathBuf,
    /// Its arguments, placeholders not yet filled in.
    pub args: Vec<String>,
    /// Those that follow them where it is to wait for the VM. None of QEMU's: the
    /// agent knows them.
    pub incoming_args: Vec<String>,
    /// The text it was read from, for sending it to the target.
    pub text: String,
}

/// What is wrong with a definition, where, and what to do.
#[derive(Debug, Error)]
pub enum DefinitionError {
    /// The text is not what it should be.
    #[error("{file}:{line}: {what}")]
    Invalid {
        /// File, or where else the text came from.
        file: String,
        /// Line, counted from 1.
        line: usize,
        /// What is wrong, and the remedy.
        what: String,
    },
    /// The file could not be read.
    #[error("cannot read the VM definition {file}")]
    Read {
        /// The file.
        file: PathBuf,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// A placeholder means nothing on this host.
    #[error(
        "VM {vm}: this host does not know the placeholder {{{name}}} in the argument `{arg}`: add `{name} = \"…\"` to [placeholders] in the agent's configuration (known here: {known})"
    )]
    Placeholder {
        /// The VM.
        vm: String,
        /// The placeholder.
        name: String,
        /// The argument it stands in.
        arg: String,
        /// All that are known.
        known: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDefinition {
    name: Spanned<String>,
    domain: Spanned<String>,
    #[serde(default)]
    kind: Kind,
    ram: Spanned<String>,
    qemu: Option<RawQemu>,
    vmm: Option<RawLinked>,
}

/// Placeholders that the agent fills in; the rest come from its configuration.
pub const OWN_PLACEHOLDERS: [&str; 8] = [
    "name", "ram", "ram_size", "dir", "qmp", "link", "pidfile", "serial",
];

/// Paths of one VM on this host, from which the agent's placeholders are filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPaths {
    /// `{dir}`: the VM's run directory.
    pub dir: PathBuf,
    /// `{ram}`: its RAM file.
    pub ram: PathBuf,
}

impl VmPaths {
    /// The usual places for VM `name`: a directory of its own in `run_dir`, the
    /// RAM file in `ram_dir` (a tmpfs or hugetlbfs).
    pub fn new(run_dir: &Path, ram_dir: &Path, name: &str) -> VmPaths {
        VmPaths {
            dir: run_dir.join(name),
            ram: ram_dir.join(format!("{name}.ram")),
        }
    }
    /// `{qmp}`: the socket by which the agent drives QEMU.
    pub fn qmp(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }
    /// `{link}`: the one by which it drives a VMM that embeds `drover-vmm`.
    pub fn link(&self) -> PathBuf {
        self.dir.join("link.sock")
    }
    /// Whichever of them a VMM of this family has.
    pub fn control(&self, family: Family) -> PathBuf {
        match family {
            Family::Qemu => self.qmp(),
            Family::Linked => self.link(),
        }
    }
    /// `{pidfile}`.
    pub fn pidfile(&self) -> PathBuf {
        self.dir.join("qemu.pid")
    }
    /// `{serial}`: for the guest's console, if the definition wants it.
    pub fn serial(&self) -> PathBuf {
        self.dir.join("serial.log")
    }
    /// What the VMM says.
    pub fn log(&self, family: Family) -> PathBuf {
        self.dir.join(match family {
            Family::Qemu => "qemu.log",
            Family::Linked => "vmm.log",
        })
    }
    /// The definition, kept beside the VM for restarted agents.
    pub fn definition(&self) -> PathBuf {
        self.dir.join("definition.toml")
    }
}

impl Definition {
    /// Reads a definition file.
    pub fn load(file: &Path) -> Result<Definition, DefinitionError> {
        let text = std::fs::read_to_string(file).map_err(|source| DefinitionError::Read {
            file: file.to_owned(),
            source,
        })?;
        Self::parse(&file.display().to_string(), &text)
    }

    /// Checks a definition. `file` is named in errors only. Pure.
    pub fn parse(file: &str, text: &str) -> Result<Definition, DefinitionError> {
        let fail = |at: usize, what: String| DefinitionError::Invalid {
            file: file.to_owned(),
            line: line_of(text, at),
            what,
        };
        if text.len() > MAX_TEXT {
            return Err(fail(0, format!("longer than {MAX_TEXT} bytes")));
        }
        let raw: RawDefinition = toml::from_str(text)
            .map_err(|e| fail(e.span().map_or(0, |s| s.start), e.message().to_owned()))?;
        for (key, value) in [("name", &raw.name), ("domain", &raw.domain)] {
            check_name(value.get_ref())
                .map_err(|what| fail(value.span().start, format!("{key}: {what}")))?;
        }
        let ram_at = raw.ram.span().start;
        let ram_bytes =
            parse_size(raw.ram.get_ref()).map_err(|what| fail(ram_at, format!("ram: {what}")))?;
        check_len(ram_bytes).map_err(|e| fail(ram_at, format!("ram: {e}")))?;
        let program = match (raw.qemu, raw.vmm) {
            (Some(qemu), None) => Program::qemu(qemu, raw.kind),
            (None, Some(vmm)) => Program::linked(vmm, raw.kind),
            (Some(_), Some(vmm)) => {
                let what = "vmm: the VM has a [qemu] already; leave out one of the two";
                Err((vmm.binary.span().start, what.to_owned()))
            }
            (None, None) => {
                let what = "neither [qemu] nor [vmm] says what to start; see configs/vms/";
                Err((0, what.to_owned()))
            }
        };
        let program = program.map_err(|(at, what)| fail(at, what))?;
        Ok(Definition {
            name: raw.name.into_inner(),
            domain: raw.domain.into_inner(),
            kind: raw.kind,
            ram_bytes,
            family: program.family,
            binary: program.binary,
            args: program.args,
            incoming_args: program.incoming_args,
            text: text.to_owned(),
        })
    }

    /// The arguments for `role` with all placeholders filled in for this host; what
    /// `host` (the agent's `[placeholders]`) says cannot replace the agent's own.
    pub fn expand(
        &self,
        paths: &VmPaths,
        host: &BTreeMap<String, String>,
        role: Role,
    ) -> Result<Vec<String>, DefinitionError> {
        let path = |p: PathBuf| p.display().to_string();
        let mut values = host.clone();
        for (name, value) in OWN_PLACEHOLDERS.iter().zip([
            self.name.clone(),
            path(paths.ram.clone()),
            format!("{}K", self.ram_bytes / 1024),
            path(paths.dir.clone()),
            path(paths.qmp()),
            path(paths.link()),
            path(paths.pidfile()),
            path(paths.serial()),
        ]) {
            values.insert((*name).to_owned(), value);
        }
        self.args_for(role)
            .map(|arg| {
                let mut out = String::with_capacity(arg.len());
                let mut at = 0;
                for (start, name) in placeholders(arg) {
                    let value = values
                        .get(name)
                        .ok_or_else(|| DefinitionError::Placeholder {
                            vm: self.name.clone(),
                            name: name.to_owned(),
                            arg: arg.clone(),
                            known: values.keys().cloned().collect::<Vec<_>>().join(", "),
                        })?;
                    out.push_str(&arg[at..start]);
                    out.push_str(value);
                    at = start + name.len() + 2;
                }
                out.push_str(&arg[at..]);
                Ok(out)
            })
            .collect()
    }

    fn args_for(&self, role: Role) -> impl Iterator<Item = &String> {
        let more: &[String] = match role {
            Role::Run => &[],
            Role::Incoming => &self.incoming_args,
        };
        self.args.iter().chain(more)
    }

    /// Whether guest RAM is in a file that the agent makes.
    pub fn has_ram_file(&self) -> bool {
        self.args.iter().any(|arg| uses(arg, "ram"))
    }

    /// The placeholders a host must know to run this VM.
    pub fn host_placeholders(&self) -> BTreeSet<&str> {
        self.args_for(Role::Incoming)
            .flat_map(|arg| placeholders(arg).map(|(_, name)| name))
            .filter(|name| !OWN_PLACEHOLDERS.contains(name))
            .collect()
    }
}

fn uses(arg: &str, placeholder: &str) -> bool {
    placeholders(arg).any(|(_, name)| name == placeholder)
}

/// Byte offset and name of each `{name}` in an argument. Braces around
/// anything else (QEMU takes JSON arguments) are left alone.
fn placeholders(arg: &str) -> impl Iterator<Item = (usize, &str)> {
    arg.match_indices('{').filter_map(|(at, _)| {
        let name = &arg[at + 1..];
        let name = &name[..name.find('}')?];
        let valid = name.starts_with(|c: char| c.is_ascii_lowercase())
            && name
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        valid.then_some((at, name))
    })
}

/// Names are part of file names and of other hosts' messages. No more is
/// allowed than in a plan, which has to be able to name every VM.
pub fn check_name(name: &str) -> Result<(), String> {
    let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
    if name.is_empty() || name.len() > 63 || !name.chars().all(fine) {
        return Err(format!(
            "`{name}` is not 1 to 63 characters of a-z, 0-9, `-`, `_` and `.`"
        ));
    }
    if name.starts_with(['.', '-', '_']) {
        return Err(format!("`{name}` must not start with `.`, `-` or `_`"));
    }
    Ok(())
}

/// Bytes meant by `262136K`, `256M`, `1.5G` is not taken: whole numbers with
/// K, M, G or T (powers of 1024, an `iB` may follow).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("`{text}` is not a size like \"262136K\", \"512M\" or \"4G\"");
    let number = text.strip_suffix("iB").unwrap_or(text);
    let shift = match number.chars().last() {
        Some('K') => 10,
        Some('M') => 20,
        Some('G') => 30,
        Some('T') => 40,
        _ => return Err(bad()),
    };
    let digits = &number[..number.len() - 1];
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let n: u64 = digits.parse().map_err(|_| bad())?;
    n.checked_mul(1 << shift).ok_or_else(bad)
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())]
        .iter()
        .filter(|b| **b == b'\n')
        .count()
        + 1
}

#[cfg(test)]
mod tests;
