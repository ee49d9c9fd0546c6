//! Agents on the lab's hosts, and the `drover` command.

use crate::agentcfg::{self, AgentFiles, AgentOptions};
use crate::cache;
use crate::limit;
use crate::registry;
use crate::sandbox::Sandbox;
use crate::topology::{Host, Lab};
use anyhow::{Context, Result, bail};
use drover::api::types::{GangReport, StatusInfo};
use drover::gang::plant::{self, Plant};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const START: Duration = Duration::from_secs(20);
const STOP: Duration = Duration::from_secs(10);

/// The `drover` binary: `DROVER_BIN`, or the release build of this workspace.
///
/// # Errors
/// When it is not there, with what to run.
pub fn binary() -> Result<PathBuf> {
    let path = std::env::var_os("DROVER_BIN")
        .map_or_else(|| cache::target_dir().join("release/drover"), PathBuf::from);
    if !path.is_file() {
        bail!(
            "{} is missing: run `cargo xtask build`, or set DROVER_BIN",
            path.display()
        );
    }
    Ok(path)
}

/// The `drover` that can be told to have a bug: `DROVER_PLANTED_BIN`, or the one
/// that `cargo xtask` builds.
///
/// # Errors
/// When it is not there, with what to run.
pub fn planted_binary() -> Result<PathBuf> {
    let path = std::env::var_os("DROVER_PLANTED_BIN")
        .map_or_else(|| cache::target_dir().join("planted/drover"), PathBuf::from);
    if !path.is_file() {
        bail!(
            "{} is missing: run `cargo xtask build --planted`, or set DROVER_PLANTED_BIN",
            path.display()
        );
    }
    Ok(path)
}

/// One running agent. Dropping it ends the process.
#[derive(Debug)]
pub struct Agent {
    /// Its name: the host's.
    pub name: String,
    /// Its files.
    pub files: AgentFiles,
    plant: Option<Plant>,
    sandbox: Option<Sandbox>,
    program: PathBuf,
    child: Child,
    pidfd: OwnedFd,
}

impl Agent {
    fn spawn(
        host: &Host,
        files: AgentFiles,
        plant: Option<Plant>,
        sandbox: Option<Sandbox>,
    ) -> Result<Agent> {
        let program = match plant {
            Some(_) => planted_binary()?,
            None => binary()?,
        };
        let log = File::options().create(true).append(true).open(&files.log)?;
        let mut command = host.ns.command(&program);
        command.arg("agent").arg("--config").arg(&files.config);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .envs(plant.map(|bug| (plant::VARIABLE, bug.name())));
        if let Some(sandbox) = &sandbox {
            sandbox.apply(&mut command);
        }
        let child = command.spawn().context("cannot run drover agent")?;
        let pidfd = registry::pidfd(child.id() as i32)?;
        Ok(Agent {
            name: host.name.clone(),
            files,
            plant,
            sandbox,
            program,
            child,
            pidfd,
        })
    }

    /// Waits until the API answers.
    fn ready(&mut self) -> Result<()> {
        let until = Instant::now() + START;
        loop {
            if cache::run(&mut self.command(&["status", "--json"])?).is_ok() {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("agent {} ended ({status}):\n{}", self.name, self.log_tail());
            }
            if Instant::now() > until {
                bail!(
                    "agent {} does not answer within {START:?}:\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The `drover` command, talking to this agent.
    ///
    /// # Errors
    /// When the binary is missing.
    pub fn command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(&self.program);
        command
            .arg("--socket")
            .arg(&self.files.socket)
            .args(args)
            .stdin(Stdio::null());
        Ok(command)
    }

    /// Runs the `drover` command against this agent.
    ///
    /// # Errors
    /// When it fails; the message holds what it and the agent said.
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        cache::run(&mut self.command(args)?)
            .with_context(|| format!("agent {}:\n{}", self.name, self.log_tail()))
    }

    /// As [`Agent::run`], but the command may fail.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn try_run(&self, args: &[&str]) -> Result<Output> {
        cache::output(&mut self.command(args)?)
    }

    /// What the agent says of itself.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<StatusInfo> {
        let output = self.run(&["status", "--json"])?;
        serde_json::from_slice(&output.stdout).context("drover status --json")
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.files.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Starts it again on `host`, its process having ended; its files stay.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_again(&mut self, host: &Host) -> Result<()> {
        let (files, sandbox) = (self.files.clone(), self.sandbox.clone());
        *self = Agent::spawn(host, files, self.plant, sandbox)?;
        self.ready()
    }

    /// As [`Agent::start_again`], with other rights from now on.
    ///
    /// # Errors
    /// When it does not come up; the message holds its log.
    pub fn start_again_in(&mut self, host: &Host, sandbox: Sandbox) -> Result<()> {
        self.sandbox = Some(sandbox);
        self.start_again(host)
    }

    /// Kills it, as a crash would.
    pub fn kill(&mut self) {
        registry::kill(&self.pidfd);
        let _ = self.child.wait();
    }

    /// Has it stand still until what is returned is dropped.
    pub fn freeze(&self) -> Result<Frozen> {
        let pidfd = self.pidfd.try_clone()?;
        registry::send_signal(&pidfd, libc::SIGSTOP);
        Ok(Frozen(pidfd))
    }

    /// Ends it as a service manager does.
    ///
    /// # Errors
    /// When it does not end by itself.
    pub fn stop(&mut self) -> Result<()> {
        registry::send_signal(&self.pidfd, libc::SIGTERM);
        let until = Instant::now() + STOP;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > until {
                self.kill();
                bail!(
                    "agent {} did not end within {STOP:?} of SIGTERM:\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A process that stands still until this is dropped.
#[derive(Debug)]
pub struct Frozen(OwnedFd);

impl Drop for Frozen {
    fn drop(&mut self) {
        registry::send_signal(&self.0, libc::SIGCONT);
    }
}

/// The agents of all hosts of a lab.
#[derive(Debug)]
pub struct Cluster {
    /// In the order of the lab's hosts.
    pub agents: Vec<Agent>,
    /// How they were set up.
    pub options: AgentOptions,
    /// Whether `drover migrate` shows its progress on this process's stderr.
    pub progress: bool,
}

/// How a `drover migrate` ended.
#[derive(Debug)]
pub struct Migrated {
    /// Whether its exit status was 0.
    pub success: bool,
    /// The report it printed.
    pub report: GangReport,
    /// What it said besides.
    pub stderr: String,
}

/// How a `drover migrate` ended that may have been refused.
#[derive(Debug)]
pub struct Ended {
    /// Whether its exit status was 0.
    pub success: bool,
    /// Its exit status, unless a signal ended it.
    pub code: Option<i32>,
    /// The report, unless it was refused before anything began.
    pub report: Option<GangReport>,
    /// Everything it printed.
    pub said: String,
}

impl Cluster {
    /// Starts an agent on every host and waits until all answer.
    ///
    /// # Errors
    /// When one does not come up; the message holds its log.
    pub fn start(lab: &Lab, options: AgentOptions) -> Result<Cluster> {
        agentcfg::write_pki(lab)?;
        let mut agents = Vec::new();
        for host in &lab.hosts {
            let files = agentcfg::write(lab, host, &options)?;
            let sandbox = options.sandbox.clone();
            agents.push(Agent::spawn(host, files, options.plant, sandbox)?);
        }
        for agent in &mut agents {
            agent.ready()?;
        }
        Ok(Cluster {
            agents,
            options,
            progress: false,
        })
    }

    /// The agent of this host.
    ///
    /// # Panics
    /// When there is none.
    pub fn agent(&self, host: &str) -> &Agent {
        let found = self.agents.iter().find(|a| a.name == host);
        found.unwrap_or_else(|| panic!("no agent {host} in the lab"))
    }

    /// As [`Cluster::agent`], to stop or kill it.
    ///
    /// # Panics
    /// When there is none.
    pub fn agent_mut(&mut self, host: &str) -> &mut Agent {
        let found = self.agents.iter_mut().find(|a| a.name == host);
        found.unwrap_or_else(|| panic!("no agent {host} in the lab"))
    }

    /// Starts `drover migrate PLAN --json` at the first source host's agent.
    ///
    /// # Errors
    /// When the plan cannot be written or the binary is missing.
    pub fn start_migration(
        &self,
        lab: &Lab,
        gang: &str,
        moves: &[(String, String, String)],
        args: &[&str],
    ) -> Result<Migration> {
        let coordinator = &moves.first().context("a plan moves at least one VM")?.1;
        self.start_migration_at(coordinator, lab, gang, moves, args)
    }

    /// As [`Cluster::start_migration`], at the agent `coordinator`.
    ///
    /// # Errors
    /// As [`Cluster::start_migration`].
    pub fn start_migration_at(
        &self,
        coordinator: &str,
        lab: &Lab,
        gang: &str,
        moves: &[(String, String, String)],
        args: &[&str],
    ) -> Result<Migration> {
        let plan = lab.run_dir().join(format!("{gang}.toml"));
        fs::write(&plan, agentcfg::plan(gang, moves))?;
        let agent = self.agent(coordinator);
        let stderr = if self.progress {
            Stdio::inherit()
        } else {
            Stdio::piped()
        };
        let mut command = agent.command(&["migrate"])?;
        command
            .arg(&plan)
            .arg("--json")
            .args(args)
            .stdout(Stdio::piped())
            .stderr(stderr);
        let child = command.spawn().context("cannot run drover migrate")?;
        Ok(Migration {
            child: Some(child),
            logs: self.agents.iter().map(|a| a.files.log.clone()).collect(),
        })
    }

    /// Runs `drover migrate PLAN --json` to its end.
    ///
    /// # Errors
    /// When it prints no report; the message holds what it and the agents said.
    pub fn migrate(
        &self,
        lab: &Lab,
        gang: &str,
        moves: &[(String, String, String)],
        args: &[&str],
    ) -> Result<Migrated> {
        self.start_migration(lab, gang, moves, args)?.wait()
    }

    /// Ends all agents as a service manager does.
    ///
    /// # Errors
    /// When one does not end.
    pub fn stop(mut self) -> Result<()> {
        self.agents.iter_mut().try_for_each(Agent::stop)
    }
}

/// A `drover migrate` that runs. Dropping it ends the command.
#[derive(Debug)]
pub struct Migration {
    child: Option<Child>,
    logs: Vec<PathBuf>,
}

impl Migration {
    /// Waits for its end, whatever it is.
    ///
    /// # Errors
    /// When the command does not end within [`limit::COMMAND`].
    pub fn end(mut self) -> Result<Ended> {
        let child = self.child.take().context("waited for already")?;
        let output = limit::output(child, limit::COMMAND).context("drover migrate")?;
        Ok(Ended {
            success: output.status.success(),
            code: output.status.code(),
            report: serde_json::from_slice(&output.stdout).ok(),
            said: format!(
                "{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            ),
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it prints no report.
    pub fn wait(self) -> Result<Migrated> {
        let logs = self.logs.clone();
        let ended = self.end()?;
        match ended.report {
            Some(report) => Ok(Migrated {
                success: ended.success,
                report,
                stderr: ended.said,
            }),
            None => bail!(
                "drover migrate printed no report: {}\n{}",
                ended.said,
                tails(&logs)
            ),
        }
    }

    /// Sends it what Ctrl-C sends.
    ///
    /// # Errors
    /// When it has ended.
    pub fn interrupt(&self) -> Result<()> {
        let child = self.child.as_ref().context("waited for already")?;
        registry::send_signal(&registry::pidfd(child.id() as i32)?, libc::SIGINT);
        Ok(())
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When the process cannot be asked.
    pub fn running(&mut self) -> Result<bool> {
        match &mut self.child {
            Some(child) => Ok(child.try_wait()?.is_none()),
            None => Ok(false),
        }
    }
}

impl Drop for Migration {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The last lines of several logs.
fn tails(logs: &[PathBuf]) -> String {
    let tail = |path: &Path| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!(
            "--- {}\n{}",
            path.display(),
            lines[lines.len().saturating_sub(12)..].join("\n")
        )
    };
    logs.iter().map(|l| tail(l)).collect::<Vec<_>>().join("\n")
}
