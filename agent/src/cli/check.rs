//! Commands that need no running agent: checks, the secret, and the agent
//! itself.

use super::error::with_causes;
use super::{CliError, ExitCode};
use crate::config::{AgentConfig, Checks, ClusterSecret, LogConfig, LogFormat};
use crate::net::Security;
use crate::pace::policy::{self, PolicyError};
use std::path::Path;
use std::time::SystemTime;

/// `drover agent`
pub(super) fn run_agent(file: &Path) -> Result<ExitCode, CliError> {
    let config = AgentConfig::load(file, Checks::Host)?;
    init_log(&config.log)?;
    match crate::agent::run(config) {
        Ok(()) => Ok(ExitCode::Ok),
        Err(error) => Err(CliError::failed(
            format!("the agent cannot run: {}", with_causes(&error)),
            "",
        )),
    }
}

fn init_log(log: &LogConfig) -> Result<(), CliError> {
    let filter = log.level.parse::<tracing_subscriber::EnvFilter>();
    let filter = filter.map_err(|e| CliError::usage(format!("log level: {e}"), ""))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

/// `drover config check`
pub(super) fn config(file: &Path, file_only: bool) -> Result<ExitCode, CliError> {
    let checks = if file_only {
        Checks::File
    } else {
        Checks::Host
    };
    let config = AgentConfig::load(file, checks)?;
    println!(
        "{}: good: agent {} in rack {}, {} peers",
        file.display(),
        config.name,
        config.rack,
        config.peers.len()
    );
    // Good enough to run, but to be told.
    if checks == Checks::Host
        && let Ok(security) = Security::open(&config.tls, &config.name)
    {
        for warning in security.warnings(SystemTime::now()) {
            println!("WARNING: {warning}");
        }
    }
    Ok(ExitCode::Ok)
}

/// `drover policy check`
pub(super) fn policy(file: &Path) -> Result<ExitCode, CliError> {
    let wrong = |error: PolicyError| CliError::usage(with_causes(&error), "");
    let policy = policy::load(file).map_err(wrong)?;
    policy::check_meter(&policy, file).map_err(wrong)?;
    println!(
        "{}: good: profile {}, core link {:.0} Mbit/s",
        file.display(),
        policy.profile,
        policy.capacity * 8.0 / 1e6
    );
    Ok(ExitCode::Ok)
}

/// `drover secret init`
pub(super) fn secret(file: &Path) -> Result<ExitCode, CliError> {
    let made = ClusterSecret::create(file);
    made.map_err(|e| CliError::failed(with_causes(&e), ""))?;
    println!(
        "{}: made, mode 0600; copy it to every host of the cluster",
        file.display()
    );
    Ok(ExitCode::Ok)
}
