//! `cargo xtask demo`, `lab` and `bench`: build what they run, then hand over
//! to the `lab` program of the `tests` package, or to the agent itself.
use crate::{build, setup, shell};
use anyhow::{Result, bail};
use std::process::Command;

/// Arguments that are not ours.
#[derive(clap::Args)]
pub(crate) struct Passed {
    /// Passed on; `--help` tells what they can be
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, num_args = 0..)]
    pub(crate) args: Vec<String>,
}

/// Benchmarks that need neither root nor a lab: the agent runs them itself.
const ALONE: &[&str] = &["fingerprint", "claims", "lane"];

pub(crate) fn run(subcommand: Option<&str>, passed: &Passed) -> Result<()> {
    let help = passed.args.iter().any(|arg| arg == "--help" || arg == "-h");
    if !help {
        if !shell::is_root() {
            bail!(
                "a lab makes network namespaces and starts agents, which needs root: run this as root"
            );
        }
        setup::everything()?;
        build::run()?;
        // The lab's own VMM as well, which `run` would not build.
        let build = ["build", "--release", "--quiet", "--package", "tests"];
        shell::run(shell::cargo().args(build).arg("--bins"))?;
    }
    shell::run(
        shell::cargo()
            .args([
                "run",
                "--release",
                "--quiet",
                "--package",
                "tests",
                "--bin",
                "lab",
                "--",
            ])
            .args(subcommand)
            .args(&passed.args),
    )
}

pub(crate) fn bench(passed: &Passed) -> Result<()> {
    match passed.args.first() {
        Some(name) if ALONE.contains(&name.as_str()) => {
            build::run()?;
            shell::run(
                Command::new(build::binary())
                    .arg("bench")
                    .args(&passed.args),
            )
        }
        _ => run(Some("bench"), passed),
    }
}
