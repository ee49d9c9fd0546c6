//! The freestanding guest for real KVM: compiled C, wrapped into an ELF64
//! that VMMs enter by PVH.

use crate::cache;
use anyhow::Result;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// Where the image is linked to and entered.
const BASE: u64 = 0x10_0000;
/// Offset of the image in the ELF file.
const IMAGE_AT: usize = 0x1000;
const NOTE_AT: u64 = 64 + 2 * 56;

/// What the guest does; sizes in MiB, together at least 1 and at least 4 less
/// than the guest's RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmWork {
    /// Decides the content that is not common.
    pub seed: u32,
    /// Content that is the same in all guests.
    pub common_mib: u32,
    /// Content of its own that stays.
    pub own_mib: u32,
    /// Content that is written over and over.
    pub ws_mib: u32,
    /// Rate of that, in KB (1000 bytes) a second.
    pub rate_kb: u32,
}

impl KvmWork {
    /// A guest of little work: 4 MiB common, 2 own, 4 written at 4 MB/s.
    pub fn small(seed: u32) -> KvmWork {
        KvmWork {
            seed,
            common_mib: 4,
            own_mib: 2,
            ws_mib: 4,
            rate_kb: 4000,
        }
    }

    /// RAM that this needs, in MiB: the data begins at 4 MiB.
    pub fn needs_mib(&self) -> u32 {
        4 + self.common_mib + self.own_mib + self.ws_mib
    }

    /// The guest's command line.
    pub fn cmdline(&self) -> String {
        let KvmWork {
            seed,
            common_mib,
            own_mib,
            ws_mib,
            rate_kb,
        } = self;
        format!("seed={seed} common={common_mib} own={own_mib} ws={ws_mib} rate={rate_kb}")
    }
}

/// Builds (or finds) the guest's ELF file.
///
/// # Errors
/// When the C compiler is missing or fails.
pub fn ensure() -> Result<PathBuf> {
    compiled("guest")
}

/// Builds (or finds) the guest that writes what it is told to.
///
/// # Errors
/// When the C compiler is missing or fails.
pub fn writer() -> Result<PathBuf> {
    compiled("writer")
}

fn compiled(name: &str) -> Result<PathBuf> {
    let folder = cache::workspace().join("tests/guests/kvm");
    let source = folder.join(format!("{name}.c"));
    let script = folder.join("guest.lds");
    let dir = cache::built(
        &format!("kvm-{name}"),
        &[&fs::read(&source)?, &fs::read(&script)?],
        |dir| {
            let flat = dir.join("guest.bin");
            let flags = "-m32 -march=i686 -O2 -ffreestanding -fno-pic -fno-pie -fno-stack-protector \
                     -fno-asynchronous-unwind-tables -mno-sse -nostdlib -static -Wall -Wextra -Werror";
            let linker = format!(
                "-Wl,-T,{},--build-id=none,--oformat=binary",
                script.display()
            );
            cache::run(
                Command::new("cc")
                    .args(flags.split_whitespace())
                    .arg(linker)
                    .arg(&source)
                    .arg("-o")
                    .arg(&flat),
            )?;
            Ok(fs::write(dir.join("guest.elf"), elf64(&fs::read(flat)?))?)
        },
    )?;
    Ok(dir.join("guest.elf"))
}

/// Wraps a flat image for [`BASE`] into an ELF64 executable with the Xen note
/// that tells VMMs the 32-bit entry point.
fn elf64(image: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(IMAGE_AT + image.len());
    out.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2u16, 62] {
        out.extend_from_slice(&half.to_le_bytes()); // ET_EXEC, x86-64
    }
    out.extend_from_slice(&1u32.to_le_bytes());
    for word in [BASE, 64, 0] {
        out.extend_from_slice(&word.to_le_bytes()); // entry, program headers, no sections
    }
    out.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 2, 64, 0, 0] {
        out.extend_from_slice(&half.to_le_bytes());
    }
    let len = image.len() as u64;
    let headers: [(u32, u32, [u64; 6]); 2] = [
        (1, 7, [IMAGE_AT as u64, BASE, BASE, len, len, 0x1000]),
        (4, 4, [NOTE_AT, 0, 0, 24, 24, 4]),
    ];
    for (kind, flags, words) in headers {
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&flags.to_le_bytes());
        for word in words {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }
    for word in [4u32, 8, 18] {
        out.extend_from_slice(&word.to_le_bytes()); // name and value sizes, PHYS32_ENTRY
    }
    out.extend_from_slice(b"Xen\0");
    out.extend_from_slice(&BASE.to_le_bytes());
    out.resize(IMAGE_AT, 0);
    out.extend_from_slice(image);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn note_lies_where_its_header_says() {
        let elf = elf64(&[0x90; 16]);
        let at = NOTE_AT as usize;
        assert_eq!(&elf[at + 12..at + 16], b"Xen\0");
        assert_eq!(elf[at + 8], 18);
        assert_eq!(elf.len(), IMAGE_AT + 16);
    }
}
