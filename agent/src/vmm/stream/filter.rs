//! QEMU's stream taken apart: pages of the machine's RAM are reported, the rest
//! is kept for the target's QEMU.
//!
//! The target's stream is equivalent and shorter: what came before the first
//! pages, one last section of RAM with the newest pages of the small blocks
//! (video memory, ROMs), and what follows it. QEMU's sections of pre-copy are
//! slices of time and leave nothing behind. All of it is held until the last
//! section: a migration that is broken off before costs the target nothing.

use super::error::FilterError;
use super::feed::{Feed, FeedError};
use crate::types::{Gfn, PAGE_SIZE, Page};
use crate::vmm::qemu_stream::write::StreamWriter;
use crate::vmm::qemu_stream::{BlockId, FOOTER, Item, PageHead, Phase, Sink, SinkError};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;
use tokio::sync::mpsc::UnboundedSender;

/// Most bytes that are held for the target.
pub(super) const MOST_HELD: usize = 64 << 20;
/// Pages that are reported at once.
const BATCH: usize = 64;

/// What the target's QEMU gets, piece by piece.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::vmm) enum Chunk {
    /// Bytes.
    Bytes(Vec<u8>),
    /// The stream has ended, and where it may.
    End,
}

/// Where chunks go. They are not taken until all pages are in place.
#[derive(Debug)]
pub(in crate::vmm) struct Residue {
    pub(in crate::vmm) to: UnboundedSender<Chunk>,
    /// Bytes that nobody has taken yet.
    pub(in crate::vmm) held: Arc<AtomicUsize>,
}

impl Residue {
    /// Hands on a piece.
    pub(in crate::vmm) fn send(&self, bytes: Vec<u8>, what: &'static str) -> Result<(), SinkError> {
        if self.held.fetch_add(bytes.len(), Relaxed) + bytes.len() > MOST_HELD {
            return Err(too_much(what));
        }
        let sent = self.to.send(Chunk::Bytes(bytes));
        sent.map_err(|_| SinkError::Gone)
    }

    /// The stream has ended where it may.
    pub(in crate::vmm) fn end(&self) -> Result<(), SinkError> {
        let told = self.to.send(Chunk::End);
        told.map_err(|_| SinkError::Gone)
    }
}

/// The block whose pages are reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::vmm) struct MainBlock {
    /// As QEMU lists it.
    pub(in crate::vmm) name: String,
    /// Its length.
    pub(in crate::vmm) bytes: u64,
}

/// Where in the stream we are.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    /// Before the first pages.
    Head,
    /// In a section of pre-copy: nothing of it is kept.
    Section,
    /// At the end of one: a footer may follow.
    Ended,
    /// After that: commands may come.
    Between,
    /// In the last section, which begins with these bytes.
    Last(Vec<u8>),
    /// After it.
    Tail,
}

#[derive(Debug)]
enum Content {
    Page(Box<Page>),
    Fill(u8),
}

/// [`Sink`] of the main connection.
#[derive(Debug)]
pub(super) struct Filter {
    feed: Arc<Feed>,
    residue: Residue,
    main: MainBlock,
    main_id: Option<BlockId>,
    blocks: u16,
    writer: StreamWriter,
    part: Part,
    head: Vec<u8>,
    /// Newest pages of the other blocks.
    small: BTreeMap<(BlockId, u64), Content>,
    batch: Vec<Gfn>,
    /// Bytes that the batch has in the stream.
    batch_bytes: usize,
}

impl Filter {
    pub(super) fn new(feed: Arc<Feed>, main: MainBlock, residue: Residue) -> Filter {
        Filter {
            feed,
            residue,
            main,
            main_id: None,
            blocks: 0,
            writer: StreamWriter::default(),
            part: Part::Head,
            head: Vec::new(),
            small: BTreeMap::new(),
            batch: Vec::with_capacity(BATCH),
            batch_bytes: 0,
        }
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        if self.part == Part::Ended {
            self.part = Part::Between;
            if bytes.first() == Some(&FOOTER) {
                return Ok(());
            }
        }
        match &self.part {
            Part::Section | Part::Last(_) => Ok(()),
            Part::Head | Part::Ended | Part::Between => {
                self.head.extend_from_slice(bytes);
                match self.head.len() > MOST_HELD {
                    true => Err(too_much("the beginning of the stream")),
                    false => Ok(()),
                }
            }
            Part::Tail => self.residue.send(bytes.to_vec(), "device state"),
        }
    }

    fn block(&mut self, item: Item<'_>, name: &[u8], bytes: u64) -> Result<(), SinkError> {
        if name == self.main.name.as_bytes() {
            if bytes != self.main.bytes {
                return Err(self.other_main(format!("one of {bytes} bytes")));
            }
            self.main_id = Some(BlockId(self.blocks));
        }
        // The parser takes no more than fit.
        self.blocks += 1;
        Ok(self.writer.write(item, &mut self.head)?)
    }

    fn page(&mut self, head: PageHead, content: Content) -> Result<(), SinkError> {
        let Some(main) = self.main_id else {
            return Err(self.other_main("none of that name".to_owned()));
        };
        if head.block == main {
            self.batch_bytes += match content {
                Content::Page(_) => PAGE_SIZE,
                Content::Fill(_) => 1,
            };
            self.batch
                .push(Gfn((head.offset / PAGE_SIZE as u64) as u32));
            return match self.batch.len() < BATCH {
                true => Ok(()),
                false => self.report(),
            };
        }
        self.small.insert((head.block, head.offset), content);
        match self.small.len() > MOST_HELD / PAGE_SIZE {
            true => Err(too_much("what RAM blocks besides the machine's hold")),
            false => Ok(()),
        }
    }

    fn other_main(&self, found: String) -> SinkError {
        refused(FilterError::MainBlock {
            main: self.main.name.clone(),
            wanted: self.main.bytes,
            found,
        })
    }

    fn report(&mut self) -> Result<(), SinkError> {
        let reported = match self.batch.is_empty() {
            true => Ok(()),
            false => self.feed.report(&self.batch, self.batch_bytes),
        };
        self.batch.clear();
        self.batch_bytes = 0;
        // Whoever failed has told why.
        reported.map_err(|_: FeedError| SinkError::Gone)
    }

    /// The guest's last page is through: all that was held goes on.
    fn last(&mut self, section: &[u8], end: Item<'_>) -> Result<(), SinkError> {
        self.report()?;
        let mut out = std::mem::take(&mut self.head);
        out.extend_from_slice(section);
        let mut block = None;
        for ((id, offset), content) in std::mem::take(&mut self.small) {
            let head = PageHead {
                block: id,
                offset,
                named: block.replace(id) != Some(id),
            };
            let item = match &content {
                Content::Page(page) => Item::Page(head, page),
                Content::Fill(fill) => Item::Zero(head, *fill),
            };
            self.writer.write(item, &mut out)?;
        }
        self.writer.write(end, &mut out)?;
        self.residue
            .send(out, "what RAM blocks besides the machine's hold")?;
        self.feed.complete();
        Ok(())
    }
}

impl Sink<Item<'_>> for Filter {
    fn take(&mut self, item: Item<'_>) -> Result<(), SinkError> {
        match item {
            Item::Bytes(bytes) => self.bytes(bytes),
            Item::Block { name, bytes, .. } => self.block(item, name, bytes),
            Item::Section(Phase::Setup, bytes) => self.bytes(bytes),
            Item::Section(Phase::Precopy, _) => {
                self.part = Part::Section;
                Ok(())
            }
            Item::Section(Phase::StopCopy, bytes) => {
                // Where nobody else tells.
                self.feed.stands_still(Instant::now());
                self.part = Part::Last(bytes.to_vec());
                Ok(())
            }
            Item::Page(head, page) => self.page(head, Content::Page(Box::new(*page))),
            Item::Zero(head, fill) => self.page(head, Content::Fill(fill)),
            Item::SectionEnd(_) => match std::mem::replace(&mut self.part, Part::Ended) {
                Part::Last(section) => {
                    self.part = Part::Tail;
                    self.last(&section, item)
                }
                Part::Section => Ok(()),
                // Of the list of blocks.
                part => {
                    self.part = part;
                    Ok(self.writer.write(item, &mut self.head)?)
                }
            },
            Item::Raw(bytes) if self.part == Part::Tail => self.bytes(bytes),
            Item::Raw(_) => Err(refused(FilterError::Undelimited)),
        }
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        self.report()
    }

    fn end(self) -> Result<(), SinkError> {
        self.residue.end()
    }
}

fn refused(error: FilterError) -> SinkError {
    SinkError::Refused(Box::new(error))
}

fn too_much(what: &'static str) -> SinkError {
    refused(FilterError::TooMuch {
        what,
        most: MOST_HELD,
    })
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
