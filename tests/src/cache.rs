//! What is built once and kept: `target/lab/<name>-<digest of the inputs>`.

use crate::limit;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The workspace's folder.
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

/// Cargo's target folder.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// The folder everything of the lab is kept in, made if need be.
///
/// # Errors
/// When it cannot be made.
pub fn dir() -> Result<PathBuf> {
    let dir = target_dir().join("lab");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// Identifies a file's content cheaply: path, size and time of change.
///
/// # Errors
/// When the file is not there.
pub fn stamp(path: &Path) -> Result<String> {
    let meta = fs::metadata(path).with_context(|| format!("{} is missing", path.display()))?;
    let changed = meta.modified()?.duration_since(std::time::UNIX_EPOCH)?;
    Ok(format!(
        "{} {} {}",
        path.display(),
        meta.len(),
        changed.as_nanos()
    ))
}

/// The folder `name-<digest of inputs>`, built by `build` unless it is there.
/// `build` gets an empty folder, which gets its name only when it succeeded:
/// what has the name is complete. Processes that want the same wait for each
/// other.
///
/// # Errors
/// What `build` returns, or when folders cannot be made.
pub fn built(
    name: &str,
    inputs: &[&[u8]],
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    inputs.hash(&mut hasher);
    let dir = dir()?;
    let done = dir.join(format!("{name}-{:016x}", hasher.finish()));
    if done.exists() {
        return Ok(done);
    }
    let lock = File::create(dir.join(format!("{name}.lock")))?;
    lock.lock()
        .with_context(|| format!("cannot lock the build of {name}"))?;
    if done.exists() {
        return Ok(done);
    }
    let half = dir.join(format!("{name}.building"));
    if half.exists() {
        fs::remove_dir_all(&half)?;
    }
    fs::create_dir_all(&half)?;
    build(&half).with_context(|| format!("building {name} for the lab"))?;
    fs::rename(&half, &done)?;
    remove_older(&dir, name, &done);
    Ok(done)
}

/// Removes what was built of other inputs under the same name: a saved guest
/// takes as much disk as it has RAM in use.
fn remove_older(dir: &Path, name: &str, newest: &Path) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for path in entries.flatten().map(|e| e.path()).filter(|p| p != newest) {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let digest = file
            .strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('-'));
        if digest.is_some_and(|d| d.len() == 16 && d.bytes().all(|b| b.is_ascii_hexdigit())) {
            // What cannot be removed is only disk space.
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// Runs a command to its end and returns what it printed.
///
/// # Errors
/// When it cannot be started or fails; the message holds its stderr.
pub fn run(command: &mut Command) -> Result<Output> {
    let out = output(command)?;
    if !out.status.success() {
        bail!(
            "{command:?} failed ({}): {}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(out)
}

/// Runs a command to its end, be it a failure, and returns what it printed.
///
/// # Errors
/// When it cannot be started or does not end within [`limit::COMMAND`].
pub fn output(command: &mut Command) -> Result<Output> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}: is it installed?"))?;
    limit::output(child, limit::COMMAND).with_context(|| format!("{command:?}"))
}
