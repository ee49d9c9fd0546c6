//! Guest RAM in the memory of a QEMU that is not asked.
//!
//! QEMU maps a RAM block as one mapping of exactly its length, between a guard
//! page and whatever else; the advice it gives the kernel on it (huge pages, not
//! in core dumps, not to children) keeps the kernel from joining it with a
//! neighbour. So the block is the mapping of that length, if there is one only.

use super::error::ManagedError;
use crate::types::PAGE_SIZE;
use crate::vmm::maps::MapsRow;
use crate::vmm::process::VmProcess;
use crate::vmm::stream::ProcessRam;

/// The block of `bytes` in the memory of `process`.
pub(super) fn open(
    vm: &str,
    process: &VmProcess,
    bytes: u64,
    writable: bool,
) -> Result<ProcessRam, ManagedError> {
    let vm = || vm.to_owned();
    let rows = process.maps();
    let rows = rows.map_err(|source| ManagedError::Process { vm: vm(), source })?;
    let row = find(&rows, bytes).map_err(|why| ManagedError::NoRam {
        vm: vm(),
        pid: process.pid(),
        why,
    })?;
    let sparse = row.inode == 0 && !row.shared;
    let pages = (bytes / PAGE_SIZE as u64) as u32;
    let ram = ProcessRam::open(process, row.start, pages, writable, sparse);
    ram.map_err(|source| ManagedError::Ram { vm: vm(), source })
}

fn find(rows: &[MapsRow], bytes: u64) -> Result<&MapsRow, String> {
    let fits = |row: &&MapsRow| row.perms[0] && row.perms[1] && row.len() == bytes;
    let found: Vec<_> = rows.iter().filter(fits).collect();
    match found[..] {
        [row] => Ok(row),
        [] => Err(format!(
            "it has no mapping of {bytes} bytes: all guest RAM has to be one block, on one NUMA node"
        )),
        _ => Err(format!(
            "{} of its mappings have {bytes} bytes: give the VM another size",
            found.len()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::maps::parse_maps;

    const MAPS: &str = "\
7f0000000000-7f0000100000 rw-p 00000000 00:00 0 \n\
7f1000000000-7f1010000000 rw-p 00000000 00:00 0 \n\
7f1010000000-7f1010001000 ---p 00000000 00:00 0 \n\
7f2000000000-7f2000100000 r--p 00000000 00:00 0 \n\
7f3000000000-7f3008000000 rw-s 00000000 00:01 7 /memfd:pc.ram (deleted)\n";

    #[test]
    fn ram_is_the_only_writable_mapping_of_its_length() {
        let rows = parse_maps(MAPS).unwrap();
        let at = |bytes| find(&rows, bytes).map(|row| row.start);
        assert_eq!(at(256 << 20), Ok(0x7f10_0000_0000));
        assert_eq!(at(128 << 20), Ok(0x7f30_0000_0000));
        assert_eq!(at(1 << 20), Ok(0x7f00_0000_0000));
        assert!(at(2 << 20).unwrap_err().contains("no mapping"));
        let twice = parse_maps(&MAPS.replace("r--p", "rw-p")).unwrap();
        assert!(find(&twice, 1 << 20).unwrap_err().contains("another size"));
    }
}
