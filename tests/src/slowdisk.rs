//! Holds a VMM's disk reads back in the kernel's block layer, so that its DMA
//! into guest RAM is under way for long: the pages are pinned, and are written
//! some hundred milliseconds later.

use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where version 1 and version 2 of the controller are usually mounted.
const V1: &str = "/sys/fs/cgroup/blkio";
const V2: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// A control group whose members read slowly. Its processes have to be gone
/// before it is dropped.
#[derive(Debug)]
pub struct SlowDisk {
    group: PathBuf,
}

impl SlowDisk {
    /// Slows reads of the disk that `file` is on to `bytes_per_s`, for the
    /// processes added.
    ///
    /// # Errors
    /// When this machine has no block I/O controller.
    pub fn new(name: &str, file: &Path, bytes_per_s: u64) -> Result<SlowDisk> {
        let device = fs::metadata(file)?.dev();
        let disk = whole_disk(nix::sys::stat::major(device), nix::sys::stat::minor(device))?;
        let (group, setting, value) = if Path::new(V1)
            .join("blkio.throttle.read_bps_device")
            .exists()
        {
            (
                Path::new(V1).join(name),
                "blkio.throttle.read_bps_device",
                format!("{disk} {bytes_per_s}"),
            )
        } else {
            let has_io = |dir: &&&str| {
                let file = Path::new(dir).join("cgroup.subtree_control");
                fs::read_to_string(file).is_ok_and(|t| t.split_whitespace().any(|c| c == "io"))
            };
            let Some(root) = V2.iter().find(has_io) else {
                bail!(
                    "no block I/O controller is mounted (cgroup blkio, or io in cgroup.subtree_control)"
                );
            };
            (
                Path::new(root).join(name),
                "io.max",
                format!("{disk} rbps={bytes_per_s}"),
            )
        };
        fs::create_dir(&group).with_context(|| group.display().to_string())?;
        let slow = SlowDisk { group };
        let file = slow.group.join(setting);
        fs::write(&file, value).with_context(|| file.display().to_string())?;
        Ok(slow)
    }

    /// Slows this process.
    ///
    /// # Errors
    /// When it is gone.
    pub fn add(&self, pid: i32) -> Result<()> {
        let file = self.group.join("cgroup.procs");
        fs::write(&file, pid.to_string()).with_context(|| format!("{pid} into {}", file.display()))
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // Members that have just ended leave the group a moment later.
        for _ in 0..200 {
            if fs::remove_dir(&self.group).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        eprintln!("{} could not be removed", self.group.display());
    }
}

/// The `major:minor` of the disk that a device or its partition belongs to.
fn whole_disk(major: u64, minor: u64) -> Result<String> {
    let device = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"))
        .context("the guests' disks are on no block device")?;
    let disk = if device.join("partition").exists() {
        device.parent().unwrap_or(&device)
    } else {
        &device
    };
    Ok(fs::read_to_string(disk.join("dev"))?.trim().to_string())
}
