//! Commands and options.

use crate::api::types::{Compress, MigrationOptions, Verify};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// Moves gangs of running VMs between racks, live.
#[derive(Debug, Parser)]
#[command(name = "drover", version, max_term_width = 80, after_help = EXIT_CODES)]
pub struct Cli {
    /// Socket of the agent to talk to.
    #[arg(
        long,
        global = true,
        env = "DROVER_SOCKET",
        hide_env_values = true,
        default_value = "/run/drover/agent.sock",
        value_name = "PATH"
    )]
    pub socket: PathBuf,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
    0  done; of a migration: every VM arrived
    1  not done, or some VM did not arrive
    2  the command line, a configuration or a plan is wrong
    3  no agent answers
    4  this user may not ask that of the agent
  130  interrupted, and so cancelled";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent of this host.
    Agent {
        /// The agent's configuration.
        #[arg(long, value_name = "FILE", default_value = "/etc/drover/agent.toml")]
        config: PathBuf,
    },
    /// Start, adopt, list and stop VMs of this host.
    Vm {
        /// What to do.
        #[command(subcommand)]
        command: VmCommand,
    },
    /// Move the VMs of a plan; waits until they have arrived.
    ///
    /// Ctrl-C cancels the migration and goes on waiting for its report: VMs
    /// that have passed the point of no return arrive, all others stay where
    /// they are. A second Ctrl-C leaves the agent to it at once.
    Migrate(Migrate),
    /// Show the agent, its peers and its migrations.
    Status {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Cancel a migration: VMs that have not switched stay where they are.
    Cancel {
        /// The gang's name, or the id of the run.
        gang: String,
        /// Cancel only this VM.
        #[arg(long, value_name = "NAME")]
        vm: Option<String>,
    },
    /// Take over a gang, or decide where a VM in doubt runs.
    Gang {
        /// What to do.
        #[command(subcommand)]
        command: GangCommand,
    },
    /// Check configurations.
    Config {
        /// What to do.
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Check pacing policies.
    Policy {
        /// What to do.
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// Make the cluster secret.
    Secret {
        /// What to do.
        #[command(subcommand)]
        command: SecretCommand,
    },
    /// Make, renew and show the certificates agents know each other by.
    Pki {
        /// What to do.
        #[command(subcommand)]
        command: PkiCommand,
    },
    /// Measure parts of Drover on this machine.
    Bench {
        /// What to measure.
        #[command(subcommand)]
        command: BenchCommand,
    },
}

/// `drover vm`
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Start a VM from its definition.
    Run {
        /// Name of the definition.
        name: String,
    },
    /// Take charge of a running VM.
    Adopt {
        /// Name of the definition it was started from.
        name: String,
        /// Its QMP socket; or the one that its VMM serves with drover-vmm.
        #[arg(long, visible_alias = "link", value_name = "PATH")]
        qmp: PathBuf,
    },
    /// List the VMs in the agent's charge.
    List {
        /// Print a JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Stop a VM: its VMM ends, its memory is given back.
    Stop {
        /// Name of the VM.
        name: String,
    },
}

/// `drover gang`
#[derive(Debug, Subcommand)]
pub enum GangCommand {
    /// Offer sockets to VMs whose manager (libvirt) drives their migration, wait
    /// until it has brought them, and move them as one gang; at the agent of the
    /// host they leave.
    ///
    /// Prints for each VM what `virsh migrate --migrateuri` is to be told, then
    /// waits. Ctrl-C withdraws the sockets, and later is heard as by `migrate`.
    #[command(
        override_usage = "drover gang open <GANG> --to <AGENT> --domain <NAME> --vm <NAME>..."
    )]
    Open(GangOpen),
    /// Take over a gang whose coordinator has died; at the agent of any of its
    /// hosts. Waits until its VMs have arrived; Ctrl-C is heard as by `migrate`.
    Resume {
        /// The gang's name, or the id of the run.
        gang: String,
        /// Print one JSON object at the end, nothing else on standard output.
        #[arg(long)]
        json: bool,
    },
    /// Decide where a VM in doubt runs. Look at both hosts first: if it runs on
    /// the other one, this would make it run twice.
    Resolve {
        /// The VM.
        #[arg(long, value_name = "NAME")]
        vm: String,
        /// Its source or its target host.
        #[arg(long, value_name = "HOST")]
        runs_on: String,
    },
}

/// `drover gang open`
#[derive(Debug, Args)]
pub struct GangOpen {
    /// The gang's name.
    pub gang: String,
    /// The agent of the host that the VMs go to.
    #[arg(long, value_name = "AGENT")]
    pub to: String,
    /// Dedup domain of the VMs: only VMs of one domain share pages.
    #[arg(long, value_name = "NAME")]
    pub domain: String,
    /// A VM to offer a socket to; give it once for each.
    #[arg(long = "vm", value_name = "NAME", required = true)]
    pub vms: Vec<String>,
    /// Go on when so many have come; the sockets of the others are withdrawn
    /// [default: all].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub wait_for: Option<u16>,
    /// How long to wait for them, like `90s` or `10m`.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub wait: Duration,
    /// A plan whose VMs, in the agents' charge, move in the same gang.
    #[arg(long, value_name = "PLAN.TOML")]
    pub with: Option<PathBuf>,
    /// How to move them.
    #[command(flatten)]
    pub how: HowToMove,
}

/// A time like `90s`, `10m` or `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no time: write it like 90s, 10m or 1h");
    let unit = match text.chars().next_back() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3600,
        _ => return Err(wrong()),
    };
    let count: u32 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    match count {
        0 => Err(wrong()),
        _ => Ok(Duration::from_secs(u64::from(count) * unit)),
    }
}

/// `drover migrate`
#[derive(Debug, Args)]
pub struct Migrate {
    /// The plan.
    #[arg(value_name = "PLAN.TOML")]
    pub plan: PathBuf,
    /// Check everything, move nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// How to move them.
    #[command(flatten)]
    pub how: HowToMove,
}

/// How a gang moves.
#[derive(Debug, Args)]
pub struct HowToMove {
    /// Pacing profile of the policy: background, normal, urgent or evacuate.
    #[arg(long, value_name = "NAME")]
    pub profile: Option<String>,
    /// Print one JSON object at the end, nothing else on standard output.
    #[arg(long)]
    pub json: bool,
    /// Longest stop of a guest to aim for [default: 300].
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub downtime_limit: Option<u64>,
    /// How each VM is verified at the switch.
    #[arg(long, value_name = "HOW", value_enum, default_value_t = VerifyArg::Digest)]
    pub verify: VerifyArg,
    /// Switch all VMs of the gang at the same time.
    #[arg(long)]
    pub align: bool,
    /// When to compress page content.
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = CompressArg::Auto)]
    pub compress: CompressArg,
}

/// `--verify`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VerifyArg {
    /// Compare digests of both sides' page fingerprints.
    Digest,
    /// Fingerprint all of guest RAM again on both sides first.
    Full,
}

impl HowToMove {
    /// In the API's terms.
    pub fn options(&self, dry_run: bool) -> MigrationOptions {
        MigrationOptions {
            profile: self.profile.clone(),
            dry_run,
            downtime_limit_ms: self.downtime_limit,
            verify: self.verify.into(),
            align: self.align,
            compress: self.compress.into(),
        }
    }
}

impl From<VerifyArg> for Verify {
    fn from(arg: VerifyArg) -> Self {
        match arg {
            VerifyArg::Digest => Verify::Digest,
            VerifyArg::Full => Verify::Full,
        }
    }
}

/// `--compress`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CompressArg {
    /// Send content without compression (blocks of zeroes are left out all the same).
    Never,
    /// When the core link is the limit, not the CPU.
    Auto,
    /// Whatever it costs.
    Always,
}

impl From<CompressArg> for Compress {
    fn from(arg: CompressArg) -> Self {
        match arg {
            CompressArg::Never => Compress::Never,
            CompressArg::Auto => Compress::Auto,
            CompressArg::Always => Compress::Always,
        }
    }
}

/// `drover config`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check an agent's configuration; reports every problem.
    Check {
        /// The configuration.
        #[arg(default_value = "/etc/drover/agent.toml")]
        file: PathBuf,
        /// Check the file alone, not the paths and interfaces of this host.
        #[arg(long)]
        file_only: bool,
    },
}

/// `drover policy`
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Check a pacing policy; reports every problem.
    Check {
        /// The policy.
        file: PathBuf,
    },
}

/// `drover secret`
#[derive(Debug, Subcommand)]
pub enum SecretCommand {
    /// Make a new cluster secret, readable for its owner only.
    Init {
        /// The file to make; must not exist.
        #[arg(default_value = "/etc/drover/secret")]
        file: PathBuf,
    },
}

/// `drover pki`
#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Make a cluster's authority, and its secret, in a new directory. Keep that
    /// away from the hosts: whoever has it can be any agent.
    Init {
        /// The directory to make.
        dir: PathBuf,
        /// The cluster's name, to tell authorities apart.
        #[arg(long, value_name = "NAME", default_value = "drover")]
        cluster: String,
    },
    /// Make the bundles of agents: certificate, key, the authority's
    /// certificate and the cluster secret, in DIR/agents/NAME, to be copied to
    /// /etc/drover of each host.
    Issue {
        /// The directory of `drover pki init`.
        dir: PathBuf,
        /// The agents, by the `name` of their agent.toml.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        /// How long the certificates are valid.
        #[arg(long, value_name = "DAYS", default_value_t = crate::pki::AGENT_DAYS, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
    },
    /// Make new certificates and keys for agents that have some, in the same
    /// place. Running agents take them over when they are copied to their hosts.
    Renew {
        /// The directory of `drover pki init`.
        dir: PathBuf,
        /// The agents; all if none is named.
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// How long the certificates are valid.
        #[arg(long, value_name = "DAYS", default_value_t = crate::pki::AGENT_DAYS, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
    },
    /// Show whose certificates these are, until when they are valid, and their
    /// fingerprints.
    Show {
        /// The directory of `drover pki init`, a bundle, or a certificate.
        #[arg(default_value = "/etc/drover")]
        path: PathBuf,
        /// Print a JSON array.
        #[arg(long)]
        json: bool,
    },
}

/// `drover bench`
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Fingerprinting of pages, one core.
    Fingerprint {
        /// Also write the rows to this file.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// One claim shard, one core.
    Claims {
        /// Also write the rows to this file.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// One lane over loopback.
    Lane {
        /// Also write the rows to this file.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}
