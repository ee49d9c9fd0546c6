//! Where a VM's RAM lies, as its configuration says.

use super::error::Fault;
use super::wire::MemoryRange;
use crate::types::{Gfn, PAGE_SIZE};
use serde::Deserialize;

/// Most mappings taken: the slots of KVM on x86 are no more.
pub const MAX_MAPPINGS: usize = 1024;

/// One run of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// KVM's slot.
    pub slot: u32,
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Its length in bytes, whole pages.
    pub bytes: u64,
    /// Its first page among the VM's: mappings lie one after the other in the
    /// order of their addresses.
    pub first: Gfn,
}

/// All RAM of a VM, in the order of addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    mappings: Vec<Mapping>,
    pages: u32,
}

#[derive(Deserialize)]
struct Config {
    memory_manager_data: MemoryManager,
}

#[derive(Deserialize)]
struct MemoryManager {
    guest_ram_mappings: Vec<RawMapping>,
}

#[derive(Deserialize)]
struct RawMapping {
    slot: u32,
    gpa: u64,
    size: u64,
}

impl Layout {
    /// Finds the layout in the payload of *Config*; the rest of it is not
    /// looked at.
    ///
    /// # Errors
    /// When it is not JSON, has no mappings, or such as no VM has: of broken
    /// pages, one over the other, more than [`MAX_MAPPINGS`], or over 16 TiB.
    pub fn of_config(json: &[u8]) -> Result<Layout, Fault> {
        let fault = |what: String| Fault::Config { what };
        let config: Config = serde_json::from_slice(json).map_err(|e| fault(e.to_string()))?;
        let mut raw = config.memory_manager_data.guest_ram_mappings;
        if raw.is_empty() || raw.len() > MAX_MAPPINGS {
            let n = raw.len();
            return Err(fault(format!(
                "{n} mappings of RAM; 1 to {MAX_MAPPINGS} are taken"
            )));
        }
        raw.sort_by_key(|mapping| mapping.gpa);
        let mut layout = Layout::default();
        for RawMapping { slot, gpa, size } in raw {
            let at = |what: &str| fault(format!("RAM of {size:#x} bytes at {gpa:#x} {what}"));
            let range = MemoryRange { gpa, bytes: size };
            if !range.is_pages() {
                return Err(at("is not whole pages"));
            }
            if gpa.checked_add(size).is_none() {
                return Err(at("goes beyond all addresses"));
            }
            let before = layout.mappings.last();
            if before.is_some_and(|m| m.gpa + m.bytes > gpa) {
                return Err(at("lies over other RAM"));
            }
            if layout.mappings.iter().any(|m| m.slot == slot) {
                return Err(at("has the slot of other RAM"));
            }
            let pages = u32::try_from(size / PAGE_SIZE as u64).ok();
            let end = pages.and_then(|pages| layout.pages.checked_add(pages));
            let end = end.ok_or_else(|| at("makes more than 16 TiB in all"))?;
            layout.mappings.push(Mapping {
                slot,
                gpa,
                bytes: size,
                first: Gfn(layout.pages),
            });
            layout.pages = end;
        }
        Ok(layout)
    }

    /// The mappings, in the order of addresses.
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Number of pages; gfns run from 0 to this.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// The first page of `range`, whose pages then follow each other.
    ///
    /// # Errors
    /// When it is not whole pages within one mapping.
    pub fn gfn(&self, range: MemoryRange) -> Result<Gfn, Fault> {
        let MemoryRange { gpa, bytes } = range;
        let fault = |what| Fault::Range { gpa, bytes, what };
        if !range.is_pages() {
            return Err(fault("not whole pages"));
        }
        let outside = fault("not within one mapping of the VM's RAM");
        let Some(end) = gpa.checked_add(bytes) else {
            return Err(outside);
        };
        let after = self.mappings.partition_point(|m| m.gpa <= gpa);
        match after.checked_sub(1).map(|at| self.mappings[at]) {
            Some(m) if end <= m.gpa + m.bytes => {
                let page = (gpa - m.gpa) / PAGE_SIZE as u64;
                Ok(Gfn(m.first.0 + page as u32))
            }
            _ => Err(outside),
        }
    }
}
