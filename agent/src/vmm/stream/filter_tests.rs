//! Streams in, reports and the target's stream out.

use super::*;
use crate::vmm::qemu_stream::main_channel::StreamParser;
use crate::vmm::qemu_stream::samples::{self, BLOCKS, ID, Record, Stream};
use crate::vmm::qemu_stream::{Parse, RawFrom};
use crate::vmm::stream::testing::NoRam;
use crate::vmm::stream::{Progress, StreamPages};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Of the machine's block.
const PAGES: u32 = (BLOCKS[0].1 / PAGE_SIZE as u64) as u32;

struct Filtered {
    /// What was reported, in rising order.
    reported: Vec<u32>,
    progress: Progress,
    /// What the target's QEMU gets.
    target: Vec<u8>,
    /// Whether it gets the end of it.
    whole: bool,
}

fn filter(bytes: &[u8], main: &str) -> Result<Filtered, SinkError> {
    let feed = Arc::new(Feed::new("web1", PAGES));
    let (to, mut chunks) = unbounded_channel();
    let residue = Residue {
        to,
        held: Arc::default(),
    };
    let main = MainBlock {
        name: main.to_owned(),
        bytes: BLOCKS[0].1,
    };
    let mut filter = Filter::new(feed.clone(), main, residue);
    let mut parser = StreamParser::default();
    let mut at = 0;
    while let Some((item, used)) = parser.next(&bytes[at..]).unwrap() {
        at += used;
        filter.take(item)?;
        // However it is cut into pieces.
        filter.flush()?;
    }
    filter.end()?;
    let mut pages = StreamPages::new(feed, Arc::new(NoRam(PAGES)), false);
    let taken = pages.take(Duration::ZERO, 1).unwrap();
    let (target, whole) = all(&mut chunks);
    Ok(Filtered {
        reported: taken.pages.iter().map(|gfn| gfn.0).collect(),
        progress: taken.progress,
        target,
        whole,
    })
}

fn all(chunks: &mut UnboundedReceiver<Chunk>) -> (Vec<u8>, bool) {
    let (mut target, mut whole) = (Vec::new(), false);
    while let Ok(chunk) = chunks.try_recv() {
        match chunk {
            Chunk::Bytes(bytes) => target.extend(bytes),
            Chunk::End => whole = true,
        }
    }
    (target, whole)
}

fn begun() -> Stream {
    Stream::new()
        .configuration(b"pc-q35-7.2")
        .return_path()
        .ram(ID, &BLOCKS, false)
        .footer(ID)
}

fn ram(page: u64, named: bool) -> Record {
    Record::Page(b"pc.ram".to_vec(), page, 1, named)
}

fn rom(page: u64, fill: u8, named: bool) -> Record {
    Record::Page(b"/rom@etc/acpi/tables".to_vec(), page, fill, named)
}

fn rom_zero(page: u64, named: bool) -> Record {
    Record::Zero(b"/rom@etc/acpi/tables".to_vec(), page, 0, named)
}

#[test]
fn pages_are_reported_and_the_target_gets_the_rest_with_the_newest_of_each_small_page() {
    let stream = begun()
        .part(
            2,
            ID,
            &[
                ram(0, true),
                ram(7, false),
                rom(3, 1, true),
                rom_zero(4, false),
            ],
        )
        .footer(ID)
        .command(2, &[0, 0, 0, 3])
        // Data that looks like a footer.
        .command(90, &[0x7e, 0, 0, 0, 2])
        .part(
            2,
            ID,
            &[
                rom(3, 2, false),
                Record::Zero(b"pc.ram".to_vec(), 9, 0, true),
            ],
        )
        .footer(ID)
        .part(3, ID, &[rom_zero(1, true), ram(7, true)])
        .footer(ID)
        .devices();
    let filtered = filter(&stream.0, "pc.ram").unwrap();
    assert_eq!(filtered.reported, [0, 7, 9]);
    assert!(filtered.progress.complete && filtered.whole);
    // Page 7 came once more, behind 9.
    assert_eq!(filtered.progress.passes, 1);
    let wanted = begun()
        .command(2, &[0, 0, 0, 3])
        .command(90, &[0x7e, 0, 0, 0, 2])
        .part(
            3,
            ID,
            &[rom_zero(1, true), rom(3, 2, false), rom_zero(4, false)],
        )
        .footer(ID)
        .devices();
    assert_eq!(filtered.target, wanted.0);
}

#[test]
fn what_the_target_gets_is_a_whole_stream_without_pages_of_the_machine() {
    for (name, bytes) in samples::streams() {
        if ["dirty-bitmap", "ignore-shared"].contains(&name) {
            continue;
        }
        let filtered = filter(&bytes, "pc.ram").unwrap();
        let mut parser = StreamParser::default();
        let mut at = 0;
        while let Some((item, used)) = parser.next(&filtered.target[at..]).unwrap() {
            at += used;
            if let Item::Page(head, _) | Item::Zero(head, _) = item {
                assert_eq!(head.block, BlockId(1), "{name}");
            }
        }
        assert_eq!(parser.finish(filtered.target.len() - at), Ok(()), "{name}");
        assert_eq!(parser.raw(), Some(&RawFrom::DeviceState), "{name}");
    }
}

#[test]
fn nothing_goes_to_the_target_before_the_last_section() {
    let stream = begun()
        .part(2, ID, &[ram(0, true), rom(3, 1, true)])
        .footer(ID);
    let filtered = filter(&stream.0, "pc.ram").unwrap();
    assert_eq!(filtered.target, b"");
    assert!(!filtered.progress.complete);
}

#[test]
fn what_cannot_be_told_apart_is_refused() {
    let why = |bytes: &[u8], main: &str| filter(bytes, main).err().map(|e| e.to_string());
    let (_, bitmap) = samples::streams().pop().unwrap();
    assert!(why(&bitmap, "pc.ram").is_some_and(|why| why.contains("dirty-bitmaps")));
    let no_such = begun().part(2, ID, &[ram(0, true)]);
    assert!(why(&no_such.0, "ram0").is_some_and(|why| why.contains("`ram0`")));
    let shorter = Stream::new()
        .return_path()
        .ram(ID, &[(b"pc.ram", 4096)], false);
    assert!(why(&shorter.0, "pc.ram").is_some_and(|why| why.contains("4096 bytes")));
}
