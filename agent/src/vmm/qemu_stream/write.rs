//! Items back into bytes.

use super::blocks::Blocks;
use super::error::{Fault, shown};
use super::item::{Item, PageHead};
use super::main_channel::flag;

/// Writes the main connection's stream. It learns the names of blocks from the
/// [`Item::Block`]s that it writes.
#[derive(Debug, Default)]
pub struct StreamWriter {
    blocks: Blocks,
}

impl StreamWriter {
    /// Appends an item to `out`: a record at most, or its bytes.
    pub fn write(&mut self, item: Item<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
        match item {
            Item::Bytes(bytes) | Item::Section(_, bytes) | Item::Raw(bytes) => {
                out.extend_from_slice(bytes);
            }
            Item::Block {
                name,
                bytes,
                address,
            } => {
                self.blocks.add(name, bytes, address)?;
                counted(name, out);
                out.extend_from_slice(&bytes.to_be_bytes());
                if let Some(address) = address {
                    out.extend_from_slice(&address.to_be_bytes());
                }
            }
            Item::Page(head, content) => {
                self.head(head, flag::PAGE, out)?;
                out.extend_from_slice(content);
            }
            Item::Zero(head, fill) => {
                self.head(head, flag::ZERO, out)?;
                out.push(fill);
            }
            Item::SectionEnd(_) => out.extend_from_slice(&flag::EOS.to_be_bytes()),
        }
        Ok(())
    }

    /// The blocks written so far.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    fn head(&self, head: PageHead, kind: u64, out: &mut Vec<u8>) -> Result<(), Fault> {
        let Some(block) = self.blocks.get(head.block) else {
            let name = format!("number {}", head.block.0);
            return Err(Fault::UnknownBlock { name });
        };
        if self.blocks.gfn(head.block, head.offset).is_none() {
            return Err(Fault::Beyond {
                block: shown(&block.name),
                bytes: block.bytes,
                offset: head.offset,
            });
        }
        let cont = if head.named { 0 } else { flag::CONTINUE };
        out.extend_from_slice(&(head.offset | kind | cont).to_be_bytes());
        if head.named {
            counted(&block.name, out);
        }
        Ok(())
    }
}

/// Names are 255 bytes at most: [`Blocks::add`] checked.
fn counted(name: &[u8], out: &mut Vec<u8>) {
    out.push(name.len() as u8);
    out.extend_from_slice(name);
}
