//! What holds for whatever bytes come: the bodies of the fuzz targets, and of
//! the property tests.

use super::blocks::MAX_BLOCKS;
use super::cut::Parse;
use super::error::StreamError;
use super::item::{Item, PageHead, Phase};
use super::main_channel::StreamParser;
use super::multifd::{MAX_PAGES, PacketItem, PacketParser};
use super::reply::{Reply, ReplyParser};
use super::sink::ITEM_BYTES;
use super::write::StreamWriter;

/// An item that is more than bytes to pass on.
#[derive(Debug, PartialEq, Eq)]
enum Mark {
    Section(Phase),
    Block,
    Page(PageHead),
    Zero(PageHead, u8),
    SectionEnd(Phase),
    Init(u8),
    Packet(u32, u32),
    PacketPage(u64),
    Shut(u32),
    Pong(u32),
}

/// What was made of a stream.
#[derive(Debug, Default, PartialEq, Eq)]
struct Read {
    written: Vec<u8>,
    marks: Vec<(usize, Mark)>,
    failure: Option<StreamError>,
    /// Why it may not end where it did.
    end: Option<StreamError>,
}

/// Reads `bytes`, `step` at a time. Returns whether it is a whole stream.
fn read<P: Parse>(
    mut parser: P,
    bytes: &[u8],
    step: usize,
    mut write: impl FnMut(P::Item<'_>, &mut Vec<u8>) -> Option<Mark>,
) -> (P, Read) {
    let (mut start, mut end) = (0, 0);
    let mut read = Read::default();
    loop {
        match parser.next(&bytes[start..end]) {
            Ok(Some((item, used))) => {
                let at = read.written.len();
                if let Some(mark) = write(item, &mut read.written) {
                    read.marks.push((at, mark));
                }
                assert!((1..=ITEM_BYTES).contains(&used) && used <= end - start);
                start += used;
                assert_eq!(parser.offset(), start as u64);
                assert_eq!(read.written.len(), start, "not what was read");
            }
            Ok(None) if end < bytes.len() => {
                assert!(end - start < P::MAX_RECORD, "waits for ever");
                end = bytes.len().min(end.saturating_add(step));
            }
            Ok(None) => {
                read.end = parser.finish(end - start).err();
                break;
            }
            Err(failure) => {
                assert_eq!(failure.offset, start as u64);
                read.failure = Some(failure);
                break;
            }
        }
    }
    assert_eq!(read.written, bytes[..start], "not what was read");
    (parser, read)
}

/// The stream of a main connection: what is written is what was read, items do
/// not depend on how it is cut, and lists stay within their caps. Returns
/// whether it is whole.
pub fn fuzz_main(bytes: &[u8], step: usize) -> bool {
    let run = |step| {
        let mut writer = StreamWriter::default();
        let (parser, read) = read(StreamParser::default(), bytes, step, |item, out| {
            if let Err(fault) = writer.write(item, out) {
                panic!("{item:?} is not written: {fault}");
            }
            match item {
                Item::Bytes(_) | Item::Raw(_) => None,
                Item::Section(phase, _) => Some(Mark::Section(phase)),
                Item::Block { .. } => Some(Mark::Block),
                Item::Page(head, _) => Some(Mark::Page(head)),
                Item::Zero(head, fill) => Some(Mark::Zero(head, fill)),
                Item::SectionEnd(phase) => Some(Mark::SectionEnd(phase)),
            }
        });
        assert_eq!(parser.blocks(), writer.blocks());
        assert!(parser.blocks().iter().len() <= MAX_BLOCKS);
        for (_, mark) in &read.marks {
            if let Mark::Page(head) | Mark::Zero(head, _) = mark {
                let gfn = parser.blocks().gfn(head.block, head.offset);
                assert!(gfn.is_some_and(|gfn| gfn < parser.blocks().pages()));
            }
        }
        (read, parser.raw().cloned(), parser.tally())
    };
    let whole = run(bytes.len().max(1));
    assert_eq!(run(step.max(1)), whole);
    whole.0.failure.is_none() && whole.0.end.is_none()
}

/// A multifd connection: as [`fuzz_main`].
pub fn fuzz_multifd(bytes: &[u8], step: usize) -> bool {
    let run = |step| {
        let (_, read) = read(PacketParser::default(), bytes, step, |item, out| {
            item.write(out);
            match item {
                PacketItem::Init(init) => Some(Mark::Init(init.id())),
                PacketItem::Packet(packet) => {
                    let (pages, zeros) = (packet.pages(), packet.zeros());
                    assert!(pages + zeros <= MAX_PAGES);
                    assert_eq!(packet.offsets().len(), pages as usize);
                    assert_eq!(packet.zero_offsets().len(), zeros as usize);
                    assert!(packet.block().len() <= 255 || pages + zeros == 0);
                    Some(Mark::Packet(pages, zeros))
                }
                PacketItem::Page { offset, .. } => Some(Mark::PacketPage(offset)),
            }
        });
        read
    };
    let whole = run(bytes.len().max(1));
    assert_eq!(run(step.max(1)), whole);
    whole.failure.is_none() && whole.end.is_none()
}

/// A return path: as [`fuzz_main`]. It is whole only with SHUT at its end.
pub fn fuzz_reply(bytes: &[u8], step: usize) -> bool {
    let run = |step| {
        let (parser, read) = read(ReplyParser::default(), bytes, step, |reply, out| {
            out.extend_from_slice(reply.bytes());
            match reply {
                Reply::Shut(value, _) => Some(Mark::Shut(value)),
                Reply::Pong(value, _) => Some(Mark::Pong(value)),
                Reply::Bytes(_) => None,
            }
        });
        (read, parser.shut())
    };
    let (whole, shut) = run(bytes.len().max(1));
    assert_eq!(run(step.max(1)).0, whole);
    let accepted = whole.failure.is_none() && whole.end.is_none();
    assert!(!accepted || shut.is_some());
    accepted
}
