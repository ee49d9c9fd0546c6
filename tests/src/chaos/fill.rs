//! File systems that are full, for one agent alone.
//!
//! An agent's state directory and RAM directory get a small tmpfs each before
//! it starts; a file that takes what is left makes them full.

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::statvfs;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The file that takes the space. Agents have no business with its name.
const FILLER: &str = ".filled-by-the-lab";
/// How often it is tried to be quicker than somebody who takes space as well.
const ATTEMPTS: u32 = 1000;

/// Mounts a tmpfs of `mib` MiB over `dir`, which it makes. It goes with the
/// lab, which unmounts what is below its folders.
///
/// # Errors
/// When it cannot be mounted.
pub fn small_tmpfs(dir: &Path, mib: u32) -> Result<()> {
    fs::create_dir_all(dir)?;
    let size = format!("size={mib}m");
    mount(
        Some("drover-lab"),
        dir,
        Some("tmpfs"),
        MsFlags::empty(),
        Some(size.as_str()),
    )
    .with_context(|| format!("a tmpfs over {}", dir.display()))
}

/// A file system without space until this is dropped.
#[derive(Debug)]
pub struct Full {
    filler: PathBuf,
}

impl Full {
    /// Takes all the space there is below `dir` but `keep_free` bytes.
    ///
    /// # Errors
    /// When the space cannot be taken.
    pub fn new(dir: &Path, keep_free: u64) -> Result<Full> {
        let filler = dir.join(FILLER);
        let file = File::create(&filler).with_context(|| filler.display().to_string())?;
        let full = Full { filler };
        for attempt in 1.. {
            let stat = statvfs(dir)?;
            let free = stat.blocks_available() as u64 * stat.fragment_size() as u64;
            let take = free.saturating_sub(keep_free);
            if take == 0 {
                break;
            }
            match fallocate(&file, FallocateFlags::empty(), 0, i64::try_from(take)?) {
                Ok(()) => break,
                // A VM that is arriving there has taken some of it meanwhile.
                Err(Errno::ENOSPC) if attempt < ATTEMPTS => {}
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("taking {take} bytes of {}", dir.display()));
                }
            }
        }
        Ok(full)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.filler) {
            eprintln!("{} stays: {error}", self.filler.display());
        }
    }
}

/// Whether a file is the lab's own.
pub fn is_filler(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == FILLER)
}
