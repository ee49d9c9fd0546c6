//! `cargo xtask dist`: a tarball with the binary, example configuration, the
//! systemd unit and the documents.
use crate::{build, shell};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory to put the tarball in
    #[arg(long)]
    out: Option<PathBuf>,
}

/// What goes beside the binary, as far as it is there.
const BESIDE: &[&str] = &[
    "configs",
    "docs",
    "README.md",
    "LICENSE-APACHE",
    "LICENSE-MIT",
];

pub(crate) fn run(args: &Args) -> Result<()> {
    build::run()?;
    let name = format!(
        "drover-{}-{}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH
    );
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| shell::target().join("dist"));
    let stage = out.join(&name);
    if stage.exists() {
        std::fs::remove_dir_all(&stage)?;
    }
    std::fs::create_dir_all(&stage)
        .with_context(|| format!("cannot create {}", stage.display()))?;
    copy(&build::binary(), &stage.join("drover"))?;
    for entry in BESIDE {
        let from = shell::root().join(entry);
        if from.exists() {
            copy(&from, &stage.join(entry))?;
        }
    }
    let tarball = out.join(format!("{name}.tar.gz"));
    shell::run(
        Command::new("tar")
            .args([
                "--create",
                "--gzip",
                "--sort=name",
                "--owner=0",
                "--group=0",
                "--file",
            ])
            .arg(&tarball)
            .arg("--directory")
            .arg(&out)
            .arg(&name),
    )?;
    std::fs::remove_dir_all(&stage)?;
    eprintln!("dist: {}", tarball.display());
    Ok(())
}

/// Copies a file, or a directory with all that is in it.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        std::fs::create_dir_all(to)?;
        for entry in std::fs::read_dir(from)? {
            let entry = entry?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    std::fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
