//! Loads an ELF file and enters it by PVH: 32-bit, flat, no paging.

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::kvm_segment;
use kvm_ioctls::VcpuFd;
use object::Endianness;
use object::elf::{FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Above what the guests use before they have read it.
const START_INFO: u64 = 0x9000;
const CMDLINE: u64 = 0x9100;
const CMDLINE_MOST: usize = 2048;
const START_MAGIC: u32 = 0x336e_c578;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PHYS32_ENTRY: u32 = 18;

/// Puts the guest into `ram` (gpa is file offset) and the vCPU at its entry.
pub(crate) fn load(kernel: &Path, cmdline: &str, ram: &File, vcpu: &VcpuFd) -> Result<()> {
    let elf = std::fs::read(kernel)?;
    let entry = load_elf(&elf, ram)?;
    ensure!(cmdline.len() < CMDLINE_MOST, "the command line is too long");
    ram.write_all_at(cmdline.as_bytes(), CMDLINE)?;
    let mut info = Vec::new();
    for word in [START_MAGIC, 1, 0, 0] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    // No modules; the command line; no ACPI tables.
    for address in [0, CMDLINE, 0] {
        info.extend_from_slice(&address.to_le_bytes());
    }
    ram.write_all_at(&info, START_INFO)?;
    enter(vcpu, entry)
}

fn load_elf(elf: &[u8], ram: &File) -> Result<u32> {
    let header = FileHeader64::<Endianness>::parse(elf)?;
    let endian = header.endian()?;
    let len = ram.metadata()?.len();
    let mut entry = None;
    for part in header.program_headers(endian, elf)? {
        let kind = part.p_type(endian);
        if kind == PT_LOAD {
            let content = part.data(endian, elf).ok().context("a truncated file")?;
            let at = part.p_paddr(endian);
            let end = at.checked_add(part.p_memsz(endian));
            ensure!(end.is_some_and(|end| end <= len), "it does not fit the RAM");
            ram.write_all_at(content, at)?;
        } else if kind == PT_NOTE {
            let mut notes = part.notes(endian, elf)?.context("no notes")?;
            while let Some(note) = notes.next()? {
                if note.name() == b"Xen" && note.n_type(endian) == PHYS32_ENTRY {
                    let value = note.desc().first_chunk().context("a note without entry")?;
                    entry = Some(u32::from_le_bytes(*value));
                }
            }
        }
    }
    match entry {
        Some(entry) => Ok(entry),
        None => bail!("no PVH entry in it"),
    }
}

fn enter(vcpu: &VcpuFd, entry: u32) -> Result<()> {
    let mut sregs = vcpu.get_sregs()?;
    let flat = |selector, kind| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = flat(8, 11);
    for data in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *data = flat(16, 3);
    }
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: 24,
        type_: 11,
        present: 1,
        ..kvm_segment::default()
    };
    sregs.cr0 = 1;
    sregs.cr4 = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rbx, regs.rflags) = (entry.into(), START_INFO, 2);
    Ok(vcpu.set_regs(&regs)?)
}
