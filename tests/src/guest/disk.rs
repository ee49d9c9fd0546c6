//! Disk images of the guests.

use crate::{cache, pattern};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Size of the disk whose content all guests share, in bytes.
pub const COMMON_BYTES: usize = 60 << 20;
/// Size of a stamped disk, in bytes.
pub const STAMPED_BYTES: usize = 64 << 20;

/// The disk with what an operator's guests have in common: programs,
/// libraries and text, each file starting on a page as in a page cache. It is
/// taken from the installed system once and then kept.
///
/// # Errors
/// When the system has no such files or the disk is full.
pub fn common() -> Result<PathBuf> {
    let dir = cache::built("common-disk", &[b"1"], |dir| {
        let mut image = Vec::with_capacity(COMMON_BYTES);
        let mut add = |folder: &str, wanted: fn(&str) -> bool, until: usize| -> Result<()> {
            for path in files(Path::new(folder), wanted)? {
                if image.len() >= until {
                    break;
                }
                let content = fs::read(&path)?;
                if content.len() <= 4 << 20 {
                    image.extend_from_slice(&content);
                    image.resize(image.len().next_multiple_of(4096), 0);
                }
            }
            Ok(())
        };
        add(
            "/usr/lib/x86_64-linux-gnu",
            |n| n.contains(".so."),
            40 << 20,
        )?;
        add(
            "/usr/share",
            |n| n.ends_with(".pm") || n.ends_with(".txt") || n.ends_with(".html"),
            50 << 20,
        )?;
        if image.len() < 20 << 20 {
            bail!(
                "found only {} bytes of libraries and text below /usr to share between guests",
                image.len()
            );
        }
        let mut line = 0;
        while image.len() < COMMON_BYTES {
            line += 1;
            let word = pattern::mix(line);
            writeln!(
                image,
                "{line:08} host{} service{} status={:x} took {} us",
                word % 40,
                word % 7,
                word,
                word >> 44
            )?;
        }
        image.truncate(COMMON_BYTES);
        Ok(fs::write(dir.join("common.img"), image)?)
    })?;
    Ok(dir.join("common.img"))
}

/// The regular files below `folder` whose names are wanted, sorted by path.
fn files(folder: &Path, wanted: fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for e in
            fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?
        {
            let e = e?;
            let kind = e.file_type()?;
            if kind.is_dir() {
                folders.push(e.path());
            } else if kind.is_file() && wanted(&e.file_name().to_string_lossy()) {
                found.push(e.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Disk number `disk` (1 or 2) with its stamp on every sector. It lies in the
/// cache folder, on a file system that can do O_DIRECT, not on tmpfs.
///
/// # Errors
/// When it cannot be written.
pub fn stamped(disk: u8) -> Result<PathBuf> {
    let name = format!("stamped-disk-{disk}");
    let dir = cache::built(&name, &[b"1"], |dir| {
        let mut out = BufWriter::new(fs::File::create(dir.join("stamped.img"))?);
        let mut words = [0u64; pattern::SECTOR / 8];
        for lba in 0..(STAMPED_BYTES / pattern::SECTOR) as u64 {
            pattern::stamp_sector(disk, lba, &mut words);
            for w in words {
                out.write_all(&w.to_le_bytes())?;
            }
        }
        Ok(out.flush()?)
    })?;
    Ok(dir.join("stamped.img"))
}
