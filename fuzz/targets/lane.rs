//! What comes on lanes.

use super::{RAM_PAGES, step};
use drover::lane::assemble::Assembler;
use drover::lane::decode::{DecodeError, Decoder, read_stream};
use drover::lane::entries::{MAX_LIST_LEN, MAX_REFS, MAX_ZERO_RUNS};
use drover::lane::frame::{
    BATCH_PREFIX, Direction, FrameError, Kind, MAX_ACKS, MAX_BATCH_BODY, MAX_ERROR_TEXT, MAX_NEEDS,
    MAX_REVERSE_BODY, PROLOGUE_LEN, Prologue, ReverseFrame,
};
use drover::lane::open::fuzz_records;
use drover::lane::pool::PAGES_PER_BUF;
use drover::lane::{Encoding, Entries};
use drover::types::PAGE_SIZE;
use std::collections::BTreeSet;

/// TLS records of a lane, as they come from anybody and as they come from who
/// has the keys: one record of memory, and content comes out only of records
/// that say they have some.
pub fn lane_records(bytes: &[u8]) -> bool {
    fuzz_records(bytes)
}

/// What a source sends on a lane. It is read the same however it is cut, and
/// takes no more memory than one batch and one zstd window.
pub fn lane_stream(bytes: &[u8]) -> bool {
    let whole = read_stream(bytes, RAM_PAGES);

    let mut assembler = Assembler::new(Direction::Forward);
    let mut decoder = Decoder::new(20);
    let mut batches = 0;
    let mut in_pieces = Ok(());
    for piece in bytes.chunks(step(bytes)) {
        in_pieces = assembler.push(piece, |prologue, body| {
            if prologue.kind == Kind::Batch {
                decoder.decode(prologue, body, |batch| {
                    assert_eq!(batch.content.len(), batch.entries.pages.len() * PAGE_SIZE);
                    assert_eq!(batch.pages().len(), batch.entries.pages.len());
                    assert_eq!(batch.wire_len, PROLOGUE_LEN + body.len());
                    if batch.encoding == Encoding::Raw {
                        assert!(batch.content.len() < body.len());
                    }
                    batch.entries.check(RAM_PAGES)
                })??;
                batches += 1;
            }
            Ok::<(), DecodeError>(())
        });
        assert!(assembler.bytes() <= PROLOGUE_LEN + MAX_BATCH_BODY);
        // One plain batch, the window of 1 MiB, zstd's own tables.
        assert!(decoder.bytes() <= MAX_LIST_LEN + PAGES_PER_BUF * PAGE_SIZE + 1 + (2 << 20));
        if in_pieces.is_err() {
            break;
        }
    }
    assert_eq!(in_pieces.map(|()| batches), whole);
    whole.is_ok_and(|batches| {
        assert!(batches <= bytes.len() / BATCH_PREFIX);
        batches > 0
    })
}

/// The entry list of a batch; the first byte is the header's count of pages.
pub fn lane_entries(bytes: &[u8]) -> bool {
    let Some((&pages, list)) = bytes.split_first() else {
        return false;
    };
    let Ok(entries) = Entries::decode(list, usize::from(pages)) else {
        return false;
    };
    assert_eq!(entries.pages.len(), usize::from(pages));
    assert!(entries.pages.len() <= PAGES_PER_BUF);
    assert!(entries.refs.len() <= MAX_REFS && entries.zeros.len() <= MAX_ZERO_RUNS);
    // Whatever was accepted can be written, within the cap, and is the same.
    let mut again = vec![0; MAX_LIST_LEN];
    let len = entries.encode(&mut again).expect("decoded entries encode");
    assert!(len <= list.len(), "the encoder writes the shortest form");
    assert_eq!(
        Entries::decode(&again[..len], entries.pages.len()).as_ref(),
        Ok(&entries)
    );
    if entries.check(RAM_PAGES).is_ok() {
        assert!(entries.page_count() <= u64::from(RAM_PAGES));
        let gfns: BTreeSet<u32> = entries.gfns().map(|gfn| gfn.0).collect();
        assert_eq!(gfns.len() as u64, entries.page_count(), "no page twice");
        assert!(gfns.last().is_none_or(|&gfn| gfn < RAM_PAGES));
    }
    true
}

/// Prologues of both directions, and what a target sends back on a lane.
pub fn lane_reverse(bytes: &[u8]) -> bool {
    if let Some(first) = bytes.first_chunk::<PROLOGUE_LEN>() {
        for (direction, most) in [
            (Direction::Forward, MAX_BATCH_BODY),
            (Direction::Reverse, MAX_REVERSE_BODY),
        ] {
            if let Ok(prologue) = Prologue::parse(first, direction) {
                assert!(prologue.body_len <= most);
                assert_eq!(prologue.encode(), *first);
            }
        }
    }
    let (whole, frames) = reverse_frames(bytes, bytes.len().max(1));
    assert_eq!(
        reverse_frames(bytes, step(bytes)),
        (whole.clone(), frames.clone())
    );
    whole.is_ok() && !frames.is_empty()
}

type Whole = Result<(), String>;

fn reverse_frames(bytes: &[u8], step: usize) -> (Whole, Vec<ReverseFrame>) {
    let mut assembler = Assembler::new(Direction::Reverse);
    let mut frames = Vec::new();
    for piece in bytes.chunks(step) {
        let pushed = assembler.push(piece, |prologue, body| {
            let frame = ReverseFrame::parse(prologue, body)?;
            let mut again = Vec::new();
            frame.encode(&mut again);
            match &frame {
                ReverseFrame::Ack(ids) => assert!(ids.len() <= MAX_ACKS),
                ReverseFrame::Need { gfns, .. } => assert!(gfns.len() <= MAX_NEEDS),
                ReverseFrame::Error(text) => {
                    assert!(text.len() <= MAX_ERROR_TEXT && !text.contains(char::is_control));
                }
                ReverseFrame::Ping => {}
            }
            if !matches!(frame, ReverseFrame::Error(_)) {
                assert_eq!(again, [&prologue.encode()[..], body].concat());
            }
            let (head, tail) = again.split_first_chunk().expect("a prologue");
            let head = Prologue::parse(head, Direction::Reverse)?;
            assert_eq!(ReverseFrame::parse(&head, tail)?, frame);
            frames.push(frame);
            Ok::<(), FrameError>(())
        });
        assert!(assembler.bytes() <= PROLOGUE_LEN + MAX_REVERSE_BODY);
        if let Err(error) = pushed {
            return (Err(error.to_string()), frames);
        }
    }
    (Ok(()), frames)
}
