//! Making and removing RAM files, and the room for them.

use super::{HUGETLBFS_MAGIC, RamError};
use crate::types::PAGE_SIZE;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A RAM file made by us; removed again on drop unless [`RamFile::keep`] was called.
#[derive(Debug)]
pub struct RamFile {
    path: PathBuf,
    armed: bool,
}

impl RamFile {
    /// Makes a sparse file of `len` bytes that must not exist yet, after
    /// checking that the file system could hold all of it.
    pub fn create(path: &Path, len: u64) -> Result<RamFile, RamError> {
        check_len(len)?;
        let dir = path.parent().unwrap_or(Path::new("/"));
        check_space(dir, len)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(|source| match source.kind() {
                io::ErrorKind::AlreadyExists => RamError::Exists {
                    path: path.to_owned(),
                },
                _ => RamError::File {
                    what: "creating RAM file",
                    path: path.to_owned(),
                    source,
                },
            })?;
        let ram_file = RamFile {
            path: path.to_owned(),
            armed: true,
        };
        file.set_len(len)
            .map_err(RamError::file("sizing RAM file", path))?;
        Ok(ram_file)
    }

    /// Takes responsibility for a file that exists.
    pub fn adopt(path: PathBuf) -> RamFile {
        RamFile { path, armed: true }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the file where it is: a VM lives in it.
    pub fn keep(mut self) -> PathBuf {
        self.armed = false;
        std::mem::take(&mut self.path)
    }
}

impl Drop for RamFile {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(path = %self.path.display(), %error, "RAM file could not be removed");
            }
            _ => {}
        }
    }
}

/// Refuses RAM sizes that gfns cannot count.
pub fn check_len(len: u64) -> Result<(), RamError> {
    if len == 0
        || !len.is_multiple_of(PAGE_SIZE as u64)
        || len / PAGE_SIZE as u64 > u64::from(u32::MAX)
    {
        return Err(RamError::BadSize { len });
    }
    Ok(())
}

/// Checks that `len` more bytes of RAM files fit in `dir`.
pub fn check_space(dir: &Path, len: u64) -> Result<(), RamError> {
    let free = free_bytes(dir)?;
    if free < len {
        return Err(RamError::NoSpace {
            path: dir.to_owned(),
            free_mib: free >> 20,
            need_mib: len.div_ceil(1 << 20),
        });
    }
    Ok(())
}

/// Bytes that RAM files in `dir` can still take: the room of the file system
/// and, for tmpfs (which may promise more than there is), the host's available
/// memory and swap; for hugetlbfs the free huge pages of its size.
pub fn free_bytes(dir: &Path) -> Result<u64, RamError> {
    use nix::sys::statfs::{TMPFS_MAGIC, statfs};
    let fs = statfs(dir).map_err(|e| RamError::file("asking for the space of", dir)(e.into()))?;
    let limited =
        (fs.blocks() > 0).then(|| fs.blocks_available().saturating_mul(fs.block_size() as u64));
    let pool = if fs.filesystem_type().0 as i64 == HUGETLBFS_MAGIC {
        let kib = fs.block_size() as u64 / 1024;
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/free_hugepages");
        let path = Path::new(&path);
        let text = std::fs::read_to_string(path).map_err(RamError::file("reading", path))?;
        text.trim()
            .parse::<u64>()
            .ok()
            .map(|pages| pages.saturating_mul(kib * 1024))
    } else if fs.filesystem_type() == TMPFS_MAGIC {
        Some(free_memory()?)
    } else {
        None
    };
    Ok(limited.unwrap_or(u64::MAX).min(pool.unwrap_or(u64::MAX)))
}

/// Bytes of memory and swap that the host can still give.
pub fn free_memory() -> Result<u64, RamError> {
    let path = Path::new("/proc/meminfo");
    let text = std::fs::read_to_string(path).map_err(RamError::file("reading", path))?;
    let kib = |key| crate::vmm::process::status_value(&text, key).and_then(parse_kib);
    Ok((kib("MemAvailable").unwrap_or(0) + kib("SwapFree").unwrap_or(0)) * 1024)
}

/// The number of KiB in `1234 kB`, as files of procfs have them.
pub fn parse_kib(value: &str) -> Option<u64> {
    value.trim_end_matches("kB").trim().parse().ok()
}
