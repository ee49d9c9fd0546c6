//! `agent.toml` as a struct.

use super::check;
use super::document::{Document, Problems, Section};
use super::{ByteSize, IpPrefix};
use crate::pki::TlsFiles;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Everything an agent is told by its operator. Paths are absolute: relative
/// ones in the file count from the file's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentConfig {
    /// The file this came from.
    pub file: PathBuf,
    /// This agent's name: what plans call this host.
    pub name: String,
    /// The rack this host is in.
    pub rack: String,
    /// Where agents reach this one.
    pub listen: SocketAddr,
    /// The Unix socket of the HTTP API.
    pub api_socket: PathBuf,
    /// The group whose members may do everything over the API; besides root.
    pub api_group: Option<String>,
    /// The group whose members may look at status, VMs and metrics.
    pub api_readonly_group: Option<String>,
    /// Journals and other state that outlives the agent.
    pub state_dir: PathBuf,
    /// A directory a VM: sockets, logs, pid files.
    pub run_dir: PathBuf,
    /// RAM files of VMs; on tmpfs or hugetlbfs.
    pub ram_dir: PathBuf,
    /// Sockets `NAME.sock` of VMs whose manager (libvirt) drives their migration.
    pub transport_dir: PathBuf,
    /// The group that may make sockets there, if the agent makes the directory:
    /// that of QEMU's user. Only root otherwise.
    pub transport_group: Option<String>,
    /// How to log.
    pub log: LogConfig,
    /// File of the cluster secret.
    pub secret_file: PathBuf,
    /// How connections to other agents are protected.
    pub tls: TlsConfig,
    /// Interfaces that lead to the core link, metered by eBPF.
    pub uplinks: Vec<String>,
    /// Networks inside this rack: what goes there does not cross the core.
    pub rack_prefixes: Vec<IpPrefix>,
    /// The other agents of the cluster, without this one.
    pub peers: Vec<PeerConfig>,
    /// The pacing policy.
    pub policy: PathBuf,
    /// Directory of VM definitions, `NAME.toml`.
    pub vm_definitions: PathBuf,
    /// QEMU binaries a definition that comes from a peer may name.
    pub qemu_binaries: Vec<PathBuf>,
    /// The same for VMMs that embed `drover-vmm`: `[vmm]` in definitions.
    pub vmm_binaries: Vec<PathBuf>,
    /// Values for `{name}` placeholders in VM definitions on this host.
    pub placeholders: BTreeMap<String, String>,
    /// Cap of the memory that holds page data in flight, bytes.
    pub data_memory: u64,
    /// How to prove that another host is down, when a VM is in doubt.
    pub fencing: Option<FencingConfig>,
    /// `[debug] hold_at_switch`: before a VM is committed, its source agent
    /// writes `NAME.ready` here with the paths of both RAM files, and waits (at
    /// most 30 s) for `NAME.go`. For tests that compare guest RAM at the switch.
    pub hold_at_switch: Option<PathBuf>,
    /// `[debug] moments`: where the agent shows how far handovers are, and
    /// tests hold it; see [`crate::gang::moments`].
    pub moments: Option<PathBuf>,
}

/// How connections between agents are protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TlsConfig {
    /// By mutual TLS, with these files.
    Files(TlsFiles),
    /// Not at all, since the operator explicitly said so.
    Plaintext,
}

/// Another agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    /// Its name.
    pub name: String,
    /// Its rack.
    pub rack: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Addresses it may connect from besides that of `address`.
    pub source_addresses: Vec<IpAddr>,
}

/// `[fencing]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FencingConfig {
    /// Program and arguments; the host to be fenced and the VM in doubt are
    /// added as two more. It succeeds only if that host is down.
    pub command: Vec<String>,
    /// How long it may take.
    pub limit: Duration,
}

/// How the agent logs, to standard error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// A level (`info`) or a filter in `tracing`'s syntax (`info,drover::net=debug`).
    pub level: String,
    /// Lines for people, or JSON for collectors.
    pub format: LogFormat,
}

/// Shape of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One line of text an event.
    Text,
    /// One JSON object an event.
    Json,
}

/// How much of a configuration to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checks {
    /// Only what the file says: for checking a file away from its host.
    File,
    /// Also paths, interfaces and the secret of this host.
    Host,
}

impl AgentConfig {
    /// All programs that a VMM may be.
    pub fn vmms(&self) -> Vec<PathBuf> {
        [&*self.qemu_binaries, &*self.vmm_binaries].concat()
    }

    /// Reads and checks `file`. On failure every problem is in the error.
    pub fn load(file: &Path, checks: Checks) -> Result<Self, Problems> {
        let text = std::fs::read_to_string(file).map_err(|error| {
            Problems::whole(
                file,
                format!("cannot be read: {error}"),
                "name an existing file with --config; configs/agent.toml is an example",
            )
        })?;
        Self::parse(file, &text, checks)
    }

    /// Checks `text` as the content of `file`.
    pub fn parse(file: &Path, text: &str, checks: Checks) -> Result<Self, Problems> {
        let document = Document::parse(file, text);
        let root = document.root();
        let config = read(file, &root);
        check::file(&root, &config);
        if checks == Checks::Host {
            check::host(&root, &config);
        }
        root.finish();
        document.finish(config.complete())
    }

    /// The peers of this agent's own rack.
    pub fn rack_peers(&self) -> impl Iterator<Item = &PeerConfig> {
        self.peers.iter().filter(|p| p.rack == self.rack)
    }
}

/// A configuration as far as it could be read: checks run on what is there,
/// so that one mistake does not hide the next.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) file: PathBuf,
    pub(super) name: Option<String>,
    pub(super) rack: Option<String>,
    pub(super) listen: Option<SocketAddr>,
    pub(super) api_socket: Option<PathBuf>,
    pub(super) api_group: Option<String>,
    pub(super) api_readonly_group: Option<String>,
    pub(super) state_dir: Option<PathBuf>,
    pub(super) run_dir: Option<PathBuf>,
    pub(super) ram_dir: Option<PathBuf>,
    pub(super) transport_dir: Option<PathBuf>,
    pub(super) transport_group: Option<String>,
    pub(super) log: LogConfig,
    pub(super) secret_file: Option<PathBuf>,
    pub(super) tls: Option<TlsConfig>,
    pub(super) uplinks: Option<Vec<String>>,
    pub(super) rack_prefixes: Option<Vec<IpPrefix>>,
    pub(super) peers: Vec<PeerConfig>,
    pub(super) policy: Option<PathBuf>,
    pub(super) vm_definitions: Option<PathBuf>,
    pub(super) qemu_binaries: Option<Vec<PathBuf>>,
    pub(super) vmm_binaries: Option<Vec<PathBuf>>,
    pub(super) placeholders: BTreeMap<String, String>,
    pub(super) data_memory: Option<ByteSize>,
    pub(super) fencing: Option<FencingConfig>,
    pub(super) hold_at_switch: Option<PathBuf>,
    pub(super) moments: Option<PathBuf>,
}

fn read(file: &Path, root: &Section<'_, '_>) -> Draft {
    let here = file.parent().unwrap_or(Path::new("")).to_owned();
    let here = std::path::absolute(&here).unwrap_or(here);
    let path = |key, remedy| {
        let path: Option<PathBuf> = root.required(key, remedy);
        path.map(|p| here.join(p))
    };
    let [hold_at_switch, moments] = check::debug(root).map(|dir| dir.map(|p| here.join(p)));
    Draft {
        file: file.to_owned(),
        name: root.required("name", "add name = \"…\": what plans call this host"),
        rack: root.required("rack", "add rack = \"…\": the rack this host is in"),
        listen: root.required(
            "listen",
            "add listen = \"10.1.0.11:7400\": where other agents reach this one",
        ),
        api_socket: Some(root.or("api_socket", PathBuf::from("/run/drover/agent.sock")))
            .map(|p| here.join(p)),
        api_group: root.optional("api_group"),
        api_readonly_group: root.optional("api_readonly_group"),
        state_dir: path("state_dir", "add state_dir = \"/var/lib/drover\""),
        run_dir: path("run_dir", "add run_dir = \"/run/drover/vms\""),
        ram_dir: path("ram_dir", "add ram_dir = \"/dev/shm/drover\""),
        transport_dir: Some(root.or("transport_dir", PathBuf::from("/run/drover/transport")))
            .map(|p| here.join(p)),
        transport_group: root.optional("transport_group"),
        log: check::log(root),
        secret_file: path(
            "secret_file",
            "add secret_file = \"/etc/drover/secret\"; `drover secret init` makes one",
        ),
        tls: check::tls(root, &here),
        uplinks: root.optional("uplinks").or(Some(Vec::new())),
        rack_prefixes: root.optional("rack_prefixes").or(Some(Vec::new())),
        peers: check::peers(root),
        policy: path("policy", "add policy = \"policy.toml\""),
        vm_definitions: path("vm_definitions", "add vm_definitions = \"vms\""),
        qemu_binaries: Some(root.or("qemu_binaries", Vec::new())),
        vmm_binaries: Some(root.or("vmm_binaries", Vec::new())),
        placeholders: check::placeholders(root),
        data_memory: Some(root.or("data_memory", ByteSize(64 << 20))),
        fencing: check::fencing(root),
        hold_at_switch,
        moments,
    }
}

impl Draft {
    fn complete(self) -> Option<AgentConfig> {
        let name = self.name?;
        Some(AgentConfig {
            file: self.file,
            rack: self.rack?,
            listen: self.listen?,
            api_socket: self.api_socket?,
            api_group: self.api_group,
            api_readonly_group: self.api_readonly_group,
            state_dir: self.state_dir?,
            run_dir: self.run_dir?,
            ram_dir: self.ram_dir?,
            transport_dir: self.transport_dir?,
            transport_group: self.transport_group,
            log: self.log,
            secret_file: self.secret_file?,
            tls: self.tls?,
            uplinks: self.uplinks?,
            rack_prefixes: self.rack_prefixes?,
            peers: self.peers.into_iter().filter(|p| p.name != name).collect(),
            policy: self.policy?,
            vm_definitions: self.vm_definitions?,
            qemu_binaries: self.qemu_binaries?,
            vmm_binaries: self.vmm_binaries?,
            placeholders: self.placeholders,
            data_memory: self.data_memory?.0,
            fencing: self.fencing,
            hold_at_switch: self.hold_at_switch,
            moments: self.moments,
            name,
        })
    }
}

#[cfg(test)]
#[path = "agent_tests.rs"]
mod tests;
