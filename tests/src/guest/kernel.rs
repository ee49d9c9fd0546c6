//! Debian's kernel for the guests: downloaded and unpacked, never installed.

use crate::cache;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The bzImage.
    pub vmlinuz: PathBuf,
    /// The folder with `kernel/drivers/…` below it.
    pub modules: PathBuf,
}

/// The kernel of the cache, downloaded by apt the first time. The lab keeps
/// the version it once got, so that saved guests and figures stay comparable.
///
/// # Errors
/// When apt cannot find or download the package.
pub fn ensure() -> Result<Kernel> {
    let dir = cache::built("kernel", &[b"linux-image-cloud-amd64"], |dir| {
        let package = newest_package()?;
        // apt's own sandbox user cannot write here; root may download itself.
        cache::run(Command::new("apt-get").current_dir(dir).args([
            "-o",
            "APT::Sandbox::User=root",
            "download",
            &package,
        ]))
        .with_context(|| format!("downloading {package}; `apt-get update` may help"))?;
        let deb = entry(dir, "linux-image-", ".deb")?;
        cache::run(Command::new("dpkg").arg("-x").arg(&deb).arg(dir))?;
        Ok(fs::remove_file(deb)?)
    })?;
    Ok(Kernel {
        vmlinuz: entry(&dir.join("boot"), "vmlinuz-", "")?,
        modules: entry(&dir.join("lib/modules"), "", "")?,
    })
}

/// The versioned package that Debian's meta package stands for today.
fn newest_package() -> Result<String> {
    let out = cache::run(Command::new("apt-cache").args([
        "depends",
        "--no-recommends",
        "linux-image-cloud-amd64",
    ]))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.split_whitespace()
        .find(|w| {
            w.starts_with("linux-image-")
                && w.ends_with("-cloud-amd64")
                && *w != "linux-image-cloud-amd64"
        })
        .map(str::to_string)
        .with_context(|| {
            format!("apt-cache names no kernel for linux-image-cloud-amd64; it said: {text}")
        })
}

/// The one entry of `dir` with this prefix and suffix.
fn entry(dir: &Path, prefix: &str, suffix: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for e in fs::read_dir(dir).with_context(|| format!("{} is missing", dir.display()))? {
        let e = e?;
        let name = e.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) && name.ends_with(suffix) {
            found.push(e.path());
        }
    }
    match found.len() {
        1 => Ok(found.remove(0)),
        n => bail!(
            "{} has {n} entries {prefix}*{suffix} instead of one",
            dir.display()
        ),
    }
}
