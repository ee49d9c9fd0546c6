//! The files that agents of the lab are configured with: everything that
//! knows their formats is here.

use crate::qemu::{Guest, Places, QEMU};
use crate::sandbox::Sandbox;
use crate::topology::{Host, Lab, rack_prefix};
use anyhow::{Context, Result};
use drover::config::ClusterSecret;
use drover::gang::plant::Plant;
use drover::pki;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// The port of all agents.
pub const PORT: u16 = 7400;

/// How the agents of a lab are set up.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// Wait at each VM's switch until the lab has compared its RAM.
    pub hold_at_switch: Option<PathBuf>,
    /// Do without TLS: the product never does unless told to.
    pub plaintext: bool,
    /// Where agents show and hold the moments of a handover.
    pub moments: Option<PathBuf>,
    /// The bug that they are to have: they are another program then.
    pub plant: Option<Plant>,
    /// Use the eBPF meter; policies without it pace by queueing alone.
    pub meter: bool,
    /// Further lines for `policy.toml`.
    pub policy: String,
    /// Log filter.
    pub log: String,
    /// What of root they are left with.
    pub sandbox: Option<Sandbox>,
}

impl Default for AgentOptions {
    fn default() -> AgentOptions {
        AgentOptions {
            hold_at_switch: None,
            plaintext: false,
            moments: None,
            plant: None,
            meter: true,
            policy: String::new(),
            log: std::env::var("DROVER_LAB_LOG").unwrap_or_else(|_| "info".into()),
            sandbox: None,
        }
    }
}

/// Where an agent has its files.
#[derive(Debug, Clone)]
pub struct AgentFiles {
    /// `agent.toml`.
    pub config: PathBuf,
    /// `policy.toml`.
    pub policy: PathBuf,
    /// The API's Unix socket.
    pub socket: PathBuf,
    /// VM definitions.
    pub definitions: PathBuf,
    /// VMs' run directories.
    pub run_dir: PathBuf,
    /// VMs' RAM files.
    pub ram_dir: PathBuf,
    /// Sockets of VMs whose manager drives their migration.
    pub transport: PathBuf,
    /// What it logs.
    pub log: PathBuf,
}

impl AgentFiles {
    /// Of the agent on this host.
    pub fn of(host: &Host) -> AgentFiles {
        let at = |name: &str| host.run_dir.join(name);
        AgentFiles {
            config: at("agent.toml"),
            policy: at("policy.toml"),
            socket: at("agent.sock"),
            definitions: at("definitions"),
            run_dir: at("vms"),
            ram_dir: host.shm_dir.join("ram"),
            transport: at("transport"),
            log: at("agent.log"),
        }
    }

    /// The places of a VM that the agent started.
    pub fn places(&self, vm: &str) -> Places {
        let dir = self.run_dir.join(vm);
        let at = |name: &str| dir.join(name).display().to_string();
        Places {
            ram: self.ram_dir.join(format!("{vm}.ram")).display().to_string(),
            private: false,
            serial: at("serial.log"),
            control: at("ctl.sock"),
            qmp: at("lab.sock"),
        }
    }
}

/// Where the agent on this host keeps its journal.
pub fn state_dir(host: &Host) -> PathBuf {
    host.run_dir.join("state")
}

/// Writes everything the agent on `host` needs, and makes its folders.
///
/// # Errors
/// When a file cannot be written.
pub fn write(lab: &Lab, host: &Host, options: &AgentOptions) -> Result<AgentFiles> {
    let files = AgentFiles::of(host);
    let state = state_dir(host);
    for folder in [&files.definitions, &files.run_dir, &files.ram_dir, &state] {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    if !options.plaintext {
        let bundle = pki_dir(lab).join(pki::AGENTS_DIR).join(&host.name);
        if !bundle.exists() {
            pki::issue(&pki_dir(lab), &host.name, pki::AGENT_DAYS)?;
        }
        install(&bundle, host)?;
    }
    fs::write(&files.policy, policy(lab, options))?;
    fs::write(&files.config, config(lab, host, &files, &state, options))?;
    Ok(files)
}

fn config(
    lab: &Lab,
    host: &Host,
    files: &AgentFiles,
    state: &Path,
    options: &AgentOptions,
) -> String {
    let mut out = format!(
        "name = {:?}\nrack = {:?}\nlisten = \"{}:{PORT}\"\napi_socket = {:?}\nstate_dir = {:?}\n\
         run_dir = {:?}\nram_dir = {:?}\ntransport_dir = {:?}\nsecret_file = {:?}\nuplinks = [\"eth0\"]\n\
         rack_prefixes = [{:?}]\npolicy = {:?}\nvm_definitions = {:?}\nqemu_binaries = [{QEMU:?}]\n\
         data_memory = \"64 MiB\"\n\n[log]\nlevel = {:?}\n",
        host.name,
        host.rack_name(),
        host.addr,
        files.socket,
        state,
        files.run_dir,
        files.ram_dir,
        files.transport,
        pki_dir(lab).join(pki::SECRET_FILE),
        rack_prefix(host.rack),
        files.policy,
        files.definitions,
        options.log,
    );
    for peer in &lab.hosts {
        let _ = write!(
            out,
            "\n[[peer]]\nname = {:?}\nrack = {:?}\naddress = \"{}:{PORT}\"\n",
            peer.name,
            peer.rack_name(),
            peer.addr
        );
    }
    if options.plaintext {
        out.push_str("\n[tls]\nplaintext = true\n");
    } else {
        let _ = write!(
            out,
            "\n[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n",
            pki::CA_FILE,
            pki::CERT_FILE,
            pki::KEY_FILE
        );
    }
    out.push_str("\n[debug]\n");
    let dirs = [
        ("hold_at_switch", &options.hold_at_switch),
        ("moments", &options.moments),
    ];
    for (key, dir) in dirs {
        if let Some(dir) = dir {
            let _ = writeln!(out, "{key} = {dir:?}");
        }
    }
    out
}

fn policy(lab: &Lab, options: &AgentOptions) -> String {
    format!(
        "[core_link]\ncapacity_mbit = {}\n\n[meter]\nrequired = {}\n\n{}\n",
        lab.shape.rate_mbit, options.meter, options.policy
    )
}

/// Makes the cluster's authority and secret, the same for all agents of the
/// lab. A lab that has them keeps them.
///
/// # Errors
/// When they cannot be written.
pub fn write_pki(lab: &Lab) -> Result<()> {
    let dir = pki_dir(lab);
    if !dir.exists() {
        pki::init(&dir, "lab")?;
        ClusterSecret::create(&dir.join(pki::SECRET_FILE))?;
    }
    Ok(())
}

/// Where the lab's operator has the authority and the agents' bundles.
pub fn pki_dir(lab: &Lab) -> PathBuf {
    lab.run_dir().join("pki")
}

/// Copies an agent's bundle to its host, as an operator would.
///
/// # Errors
/// When it cannot be copied.
pub fn install(bundle: &Path, host: &Host) -> Result<()> {
    for file in [pki::CA_FILE, pki::CERT_FILE, pki::KEY_FILE] {
        let from = bundle.join(file);
        fs::copy(&from, host.run_dir.join(file)).with_context(|| from.display().to_string())?;
    }
    Ok(())
}

/// The definition of a VM. Besides the agent's monitor the VMM gets one for
/// the lab, which watches its stops there.
///
/// `private`: its RAM is the VMM's own.
pub fn definition(name: &str, domain: &str, guest: &Guest, private: bool) -> String {
    let places = Places {
        ram: if private { "" } else { "{ram}" }.into(),
        private,
        serial: "{serial}".into(),
        control: "{dir}/ctl.sock".into(),
        qmp: "{dir}/lab.sock".into(),
    };
    let mut args = vec!["-name".to_string(), "{name}".to_string()];
    args.extend(guest.args(&places));
    args.extend([
        "-qmp".to_string(),
        format!("unix:{},server=on,wait=off", places.qmp),
    ]);
    let args: Vec<String> = args.iter().map(|a| format!("{a:?}")).collect();
    format!(
        "name = {name:?}\ndomain = {domain:?}\nram = \"{}K\"\n\n[qemu]\nbinary = {QEMU:?}\nargs = [\n    {},\n]\n",
        guest.ram_bytes() >> 10,
        args.join(",\n    ")
    )
}

/// A plan: VM, source host, target host.
pub fn plan(gang: &str, moves: &[(String, String, String)]) -> String {
    let mut out = format!("gang = {gang:?}\n");
    for (vm, from, to) in moves {
        let _ = write!(
            out,
            "\n[[vm]]\nname = {vm:?}\nfrom = {from:?}\nto = {to:?}\n"
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover::gang::plan::Plan;
    use drover::vmm::definition::Definition;

    #[test]
    fn agents_understand_definitions_and_plans() {
        let guest = Guest::Kvm {
            elf: "/x/guest.elf".into(),
            ram_mib: 32,
            work: crate::guest::kvm::KvmWork::small(1),
        };
        let parsed = Definition::parse("vm1.toml", &definition("vm1", "lab", &guest, false))
            .expect("a right definition");
        assert_eq!((parsed.name.as_str(), parsed.ram_bytes), ("vm1", 32 << 20));
        assert!(parsed.has_ram_file());
        let private = definition("vm1", "lab", &guest, true);
        let private = Definition::parse("vm1.toml", &private).expect("a right definition");
        assert!(!private.has_ram_file());
        let text = plan("g", &[("vm1".into(), "r1h1".into(), "r2h1".into())]);
        let plan = Plan::parse(Path::new("plan.toml"), &text, Some(&["r1h1", "r2h1"]))
            .expect("a right plan");
        assert_eq!(plan.vms[0].to, "r2h1");
    }
}
