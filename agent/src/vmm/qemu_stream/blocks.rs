//! The RAM blocks of a VM, as the stream lists them.

use super::error::{Fault, shown};
use crate::types::{Gfn, PAGE_SIZE};

/// Most RAM blocks of a VM: QEMU plugs 256 memory devices at most, and each
/// device's ROM and video memory are blocks as well.
pub const MAX_BLOCKS: usize = 1024;

/// A block's place in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u16);

/// One RAM block: guest RAM, a ROM, video memory, …
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// QEMU's name of it: `pc.ram`, `0000:00:02.0/vga.vram`, …
    pub name: Box<[u8]>,
    /// Its length in use.
    pub bytes: u64,
    /// Guest-physical address; only in streams with `x-ignore-shared`.
    pub address: Option<u64>,
    /// Where it begins when all blocks are laid out one after the other.
    pub first: Gfn,
}

/// The list of RAM blocks: they are laid out one after the other, in its order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blocks(Vec<Block>);

impl Blocks {
    /// Adds the next block of the list. At most [`MAX_BLOCKS`], of 16 TiB together.
    pub fn add(&mut self, name: &[u8], bytes: u64, address: Option<u64>) -> Result<BlockId, Fault> {
        const PAGE: u64 = PAGE_SIZE as u64;
        let first = self.pages();
        if self.0.len() == MAX_BLOCKS {
            return Err(Fault::TooMany {
                what: "the number of RAM blocks",
                found: MAX_BLOCKS as u64 + 1,
                most: MAX_BLOCKS as u64,
            });
        }
        if name.len() > usize::from(u8::MAX) {
            return Err(Fault::TooMany {
                what: "the length of a RAM block's name",
                found: name.len() as u64,
                most: u64::from(u8::MAX),
            });
        }
        if !bytes.is_multiple_of(PAGE) {
            return Err(Fault::Expected {
                expected: "a RAM block of whole pages",
                found: bytes,
            });
        }
        if bytes / PAGE > u64::from(u32::MAX - first.0) {
            return Err(Fault::TooMany {
                what: "the length of all RAM blocks",
                found: bytes.saturating_add(u64::from(first.0) * PAGE),
                most: u64::from(u32::MAX) * PAGE,
            });
        }
        if self.find(name).is_some() {
            return Err(Fault::BlockTwice { name: shown(name) });
        }
        // At most MAX_BLOCKS, as checked.
        let id = BlockId(self.0.len() as u16);
        self.0.push(Block {
            name: name.into(),
            bytes,
            address,
            first,
        });
        Ok(id)
    }

    /// Pages of all blocks; the frame number behind the last.
    pub fn pages(&self) -> Gfn {
        self.0.last().map_or(Gfn(0), |last| {
            // Within 32 bits, as `add` checked.
            Gfn(last.first.0 + (last.bytes / PAGE_SIZE as u64) as u32)
        })
    }

    /// A block.
    pub fn get(&self, id: BlockId) -> Option<&Block> {
        self.0.get(usize::from(id.0))
    }

    /// The block of this name.
    pub fn find(&self, name: &[u8]) -> Option<BlockId> {
        let at = self.0.iter().position(|block| *block.name == *name)?;
        Some(BlockId(at as u16))
    }

    /// The page at `offset` of block `id` in the layout of all blocks.
    pub fn gfn(&self, id: BlockId, offset: u64) -> Option<Gfn> {
        let block = self.get(id)?;
        let within = offset < block.bytes && offset.is_multiple_of(PAGE_SIZE as u64);
        within.then(|| Gfn(block.first.0 + (offset / PAGE_SIZE as u64) as u32))
    }

    /// All blocks, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Block> {
        self.0.iter()
    }
}
