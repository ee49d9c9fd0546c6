//! The lab's guests, built on demand into the cache.

pub mod disk;
pub mod initrd;
pub mod kernel;
pub mod kvm;

use anyhow::Result;
use std::path::PathBuf;

/// RAM of a Linux guest in KiB: 256 MiB less 8 KiB. QEMU 7.2 under TCG loses
/// dirty pages in its own pre-copy when the size is a multiple of 256 KiB,
/// and a baseline must not be compared against when it is corrupt.
pub const LINUX_RAM_KIB: u64 = 262_136;

/// The files a Linux guest is started from.
#[derive(Debug, Clone)]
pub struct LinuxFiles {
    /// Debian's kernel.
    pub kernel: PathBuf,
    /// The small initial RAM disk with the lab's init.
    pub initrd: PathBuf,
    /// The disk all guests read into their page caches.
    pub common: PathBuf,
    /// Disks with a stamp on every sector, for the readers of workload `dma`.
    pub stamped: [PathBuf; 2],
}

/// Builds (or finds) everything a Linux guest needs.
///
/// # Errors
/// When the kernel package cannot be had or a tool is missing.
pub fn linux_files() -> Result<LinuxFiles> {
    let kernel = kernel::ensure()?;
    Ok(LinuxFiles {
        initrd: initrd::ensure(&kernel)?,
        common: disk::common()?,
        stamped: [disk::stamped(1)?, disk::stamped(2)?],
        kernel: kernel.vmlinuz,
    })
}
