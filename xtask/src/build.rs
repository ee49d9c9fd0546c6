//! `cargo xtask build`: the eBPF meter, then the release binary with it inside.
use crate::{build_ebpf, shell};
use anyhow::Result;
use std::path::PathBuf;

/// The binary operators run.
pub(crate) fn binary() -> PathBuf {
    shell::target().join("release/drover")
}

pub(crate) fn run() -> Result<()> {
    build_ebpf::run()?;
    shell::run(shell::cargo().args([
        "build",
        "--release",
        "--package",
        "drover",
        "--bin",
        "drover",
    ]))?;
    eprintln!("build: {}", binary().display());
    Ok(())
}
