//! Where a VMM has its guest RAM mapped.

use super::{RamError, check_len};
use crate::types::PAGE_SIZE;
use crate::vmm::maps::MapsRow;
use crate::vmm::process::VmProcess;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A stretch of the RAM file in the VMM's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamMapping {
    /// Address in the VMM.
    pub va: u64,
    /// Bytes into the RAM file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Where the RAM of a VM is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    /// Bytes of guest RAM: the file's size, a multiple of the page size.
    pub len: u64,
    /// `st_dev` and `st_ino` of the RAM file.
    pub file_id: (u64, u64),
    /// Path of the RAM file as the VMM was given it.
    pub path: PathBuf,
    /// Its mappings in the VMM, by rising file offset, covering all of it, no
    /// overlap.
    pub mappings: Vec<RamMapping>,
}

impl RamLayout {
    /// Number of pages; gfns run from 0 to this.
    pub fn pages(&self) -> u32 {
        (self.len / PAGE_SIZE as u64) as u32
    }
}

/// Finds the RAM file among the VMM's mappings. `path` is the file the VMM
/// was given; the file itself is what the process has mapped, so it may have
/// been unlinked, or the path may mean another file in our mount namespace.
pub fn find_layout(process: &VmProcess, path: &Path) -> Result<RamLayout, RamError> {
    let rows = process.maps()?;
    let not_mapped = |why| RamError::NotMapped {
        pid: process.pid(),
        path: path.to_owned(),
        why,
    };
    let name = path.to_string_lossy();
    let first = rows
        .iter()
        .find(|r| r.inode != 0 && r.path.trim_end_matches(" (deleted)") == name)
        .ok_or_else(|| not_mapped("no mapping of this path"))?;
    let file_id = (libc::makedev(first.dev.0, first.dev.1), first.inode);
    let file = open_mapped(process, first, file_id, false)?;
    let len = file
        .metadata()
        .map_err(RamError::file("looking at RAM file", path))?
        .len();
    check_len(len)?;
    let mappings = cover(&rows, file_id, len).map_err(not_mapped)?;
    Ok(RamLayout {
        len,
        file_id,
        path: path.to_owned(),
        mappings,
    })
}

/// The mappings of a file that cover `0..len` once, adjacent ones joined.
pub(super) fn cover(
    rows: &[MapsRow],
    id: (u64, u64),
    len: u64,
) -> Result<Vec<RamMapping>, &'static str> {
    let mut mine: Vec<&MapsRow> = rows.iter().filter(|r| r.is_file(id.0, id.1)).collect();
    mine.sort_by_key(|r| (r.offset, r.start));
    let mut out: Vec<RamMapping> = Vec::new();
    for row in mine {
        if !row.shared {
            return Err("it is mapped private (share=off)");
        }
        if !row.perms[1] {
            return Err("it is mapped read-only");
        }
        let at = out.last().map_or(0, |m| m.offset + m.len);
        if row.offset < at {
            return Err("it is mapped more than once");
        }
        if row.offset > at {
            return Err("part of it is not mapped");
        }
        match out.last_mut() {
            Some(last) if last.va + last.len == row.start => last.len += row.len(),
            _ => out.push(RamMapping {
                va: row.start,
                offset: row.offset,
                len: row.len(),
            }),
        }
    }
    // The last mapping may be rounded up to a huge page.
    match out.last() {
        Some(last) if last.offset + last.len >= len => Ok(out),
        _ => Err("part of it is not mapped"),
    }
}

/// Opens the very file that a mapping shows, whatever its path has become.
pub(super) fn open_mapped(
    process: &VmProcess,
    row: &MapsRow,
    id: (u64, u64),
    write: bool,
) -> Result<File, RamError> {
    let path = process
        .proc_path("map_files")
        .join(format!("{:x}-{:x}", row.start, row.end));
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .open(&path)
        .map_err(RamError::file("opening the VMM's mapping", &path))?;
    let meta = file
        .metadata()
        .map_err(RamError::file("looking at", &path))?;
    if (meta.dev(), meta.ino()) != id {
        return Err(RamError::NotMapped {
            pid: process.pid(),
            path: PathBuf::from(&row.path),
            why: "the mapping changed while it was looked at",
        });
    }
    Ok(file)
}
