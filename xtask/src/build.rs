//! `cargo xtask build`: the eBPF programs, then the release binary with the
//! meter inside.
use crate::{build_ebpf, shell};
use anyhow::{Context, Result};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also the agent that can be told to have a bug, which tests of the tests need
    #[arg(long)]
    planted: bool,
}

/// The binary operators run.
pub(crate) fn binary() -> PathBuf {
    shell::target().join("release/drover")
}

pub(crate) fn from_args(args: &Args) -> Result<()> {
    if args.planted {
        planted()?;
    }
    run()
}

pub(crate) fn run() -> Result<()> {
    build_ebpf::run()?;
    agent(&[])?;
    eprintln!("build: {}", binary().display());
    Ok(())
}

/// Builds the agent that can have bugs, into a folder of its own: what is at
/// [`binary`] afterwards is to be made anew by [`run`].
pub(crate) fn planted() -> Result<()> {
    build_ebpf::run()?;
    agent(&["--features", "planted-bugs"])?;
    let folder = shell::target().join("planted");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    let to = folder.join("drover");
    std::fs::copy(binary(), &to).with_context(|| format!("cannot copy to {}", to.display()))?;
    Ok(())
}

fn agent(features: &[&str]) -> Result<()> {
    shell::run(
        shell::cargo()
            .args([
                "build",
                "--release",
                "--package",
                "drover",
                "--bin",
                "drover",
            ])
            .args(features),
    )
}
