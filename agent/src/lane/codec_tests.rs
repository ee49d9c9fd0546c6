//! Properties of the codec: what goes in comes out, and no bytes from a peer
//! panic, loop or take memory.

use super::assemble::Assembler;
use super::decode::{DecodeError, Decoder, read_stream};
use super::encode::{
    Compress, EncodeConfig, EncodedFrame, Encoder, Progress, context_bytes_bound, looks_random,
};
use super::entries::{MAX_LIST_LEN, MAX_REFS, MAX_ZERO_RUNS};
use super::frame::*;
use super::testing::{GANG, VM, batch, page};
use super::*;
use crate::types::{Class, Fingerprint, GangId, Gfn, HolderId, PAGE_SIZE, Round, VmIndex};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use std::time::Duration;

fn encode(encoder: &mut Encoder, staged: StagedBatch, out: PoolBuf) -> EncodedFrame {
    let mut progress = encoder.start(staged, out).unwrap();
    loop {
        progress = match progress {
            Progress::Done(frame) => return frame,
            Progress::More(job) => encoder.step(job).unwrap(),
        };
    }
}

fn split(bytes: &[u8]) -> (Prologue, &[u8]) {
    let (prologue, body) = bytes.split_first_chunk::<PROLOGUE_LEN>().unwrap();
    (Prologue::parse(prologue, Direction::Forward).unwrap(), body)
}

/// Entries over distinct gfns, of every kind, in any order.
fn entries() -> impl Strategy<Value = Entries> {
    let gfns = prop_oneof![
        btree_set(0u32..600, 0..200),
        btree_set(any::<u32>(), 0..200),
        btree_set(u32::MAX - 300..=u32::MAX, 0..200),
    ];
    (
        gfns,
        vec((0u8..3, 0u16..4, any::<[u8; 16]>()), 200),
        any::<bool>(),
    )
        .prop_map(|(gfns, kinds, backward)| {
            let mut entries = Entries::default();
            let mut gfns: Vec<u32> = gfns.into_iter().collect();
            if backward {
                gfns.reverse();
            }
            for (gfn, (kind, holder, fp)) in gfns.into_iter().map(Gfn).zip(kinds) {
                match kind {
                    0 => assert!(entries.push_zero(gfn)),
                    1 if entries.pages.len() < 128 => entries.pages.push(gfn),
                    _ => entries.refs.push(Reference {
                        gfn,
                        holder: HolderId(holder * 0x1111),
                        fingerprint: Fingerprint(fp),
                    }),
                }
            }
            entries.normalize();
            entries
        })
}

proptest! {
    #[test]
    fn entry_lists_come_back_as_they_were(entries in entries()) {
        let mut list = [0; MAX_LIST_LEN];
        let len = entries.encode(&mut list).unwrap();
        let back = Entries::decode(&list[..len], entries.pages.len()).unwrap();
        prop_assert_eq!(&back, &entries);
        prop_assert_eq!(back.check(u32::MAX).is_ok(), !entries.gfns().any(|g| g.0 == u32::MAX));
        prop_assert_eq!(back.gfns().count() as u64, back.page_count());
        // A list cut short, or with a byte behind it, is none.
        for cut in [0, len / 2, len - 1] {
            prop_assert!(Entries::decode(&list[..cut], entries.pages.len()).is_err());
        }
        prop_assert!(Entries::decode(&[&list[..len], &[0]].concat(), entries.pages.len()).is_err());
    }

    #[test]
    fn arbitrary_lists_never_panic(list in vec(any::<u8>(), 0..400), pages in 0usize..129) {
        if let Ok(entries) = Entries::decode(&list, pages) {
            prop_assert!(entries.refs.len() <= MAX_REFS && entries.zeros.len() <= MAX_ZERO_RUNS);
            prop_assert_eq!(entries.pages.len(), pages);
            let _ = entries.check(1 << 20);
        }
    }

    #[test]
    fn lists_damaged_in_one_byte_never_panic(
        entries in entries(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        let mut list = [0; MAX_LIST_LEN];
        let len = entries.encode(&mut list).unwrap();
        list[at.index(len)] = byte;
        if let Ok(back) = Entries::decode(&list[..len], entries.pages.len()) {
            let _ = back.check(u32::MAX);
        }
    }

    #[test]
    fn arbitrary_streams_never_panic_and_hold_at_most_one_frame(
        pieces in vec(vec(any::<u8>(), 0..60), 0..20), magic in any::<bool>(), forward in any::<bool>(),
    ) {
        let direction = if forward { Direction::Forward } else { Direction::Reverse };
        let mut assembler = Assembler::new(direction);
        let mut decoder = Decoder::new(20);
        if magic {
            let _ = assembler.push(b"DRVL\x01", |_, _| Ok::<(), FrameError>(()));
        }
        for piece in pieces {
            let outcome = assembler.push(&piece, |prologue, body| {
                assert_eq!(prologue.body_len, body.len());
                match direction {
                    Direction::Forward => { let _ = decoder.decode(prologue, body, |_| ()); }
                    Direction::Reverse => { let _ = ReverseFrame::parse(prologue, body); }
                }
                Ok::<(), FrameError>(())
            });
            prop_assert!(assembler.bytes() <= PROLOGUE_LEN + MAX_BATCH_BODY);
            if outcome.is_err() {
                break;
            }
        }
    }

    #[test]
    fn arbitrary_bodies_of_batches_never_panic(body in vec(any::<u8>(), 28..300), flags in 0u8..8) {
        let mut bytes = b"DRVL\x01\x01".to_vec();
        bytes.extend_from_slice(&[flags, 0]);
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&body);
        let _ = read_stream(&bytes, 1 << 16);
        // With a header that is plausible, the payload is looked at.
        bytes[PROLOGUE_LEN + 22..PROLOGUE_LEN + 28].copy_from_slice(&[0, 0, body[0], 0, 0, 0]);
        let _ = read_stream(&bytes, 1 << 16);
    }

    #[test]
    fn reverse_frames_come_back_whatever_the_pieces(
        ids in vec(any::<u64>(), 1..50), gfns in vec(any::<u32>(), 1..50),
        text in "\\PC{0,200}", piece in 1usize..40,
    ) {
        let frames = [
            ReverseFrame::Ack(ids.into_iter().map(BatchId).collect()),
            ReverseFrame::Ping,
            ReverseFrame::Need {
                gang: GangId(7), vm: VmIndex(9), gfns: gfns.into_iter().map(Gfn).collect(),
            },
            ReverseFrame::Error(text.chars().take(100).collect()),
        ];
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| frame.encode(&mut bytes));
        let mut assembler = Assembler::new(Direction::Reverse);
        let mut back = Vec::new();
        for piece in bytes.chunks(piece) {
            assembler.push(piece, |prologue, body| {
                back.push(ReverseFrame::parse(prologue, body)?);
                Ok::<(), FrameError>(())
            }).unwrap();
        }
        prop_assert!(!assembler.mid_frame());
        prop_assert_eq!(&back[..], &frames[..]);
    }

    #[test]
    fn damaged_zstd_frames_never_panic(
        at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>(),
    ) {
        let pool = BufferPool::new(2).unwrap();
        let mut encoder = Encoder::new(EncodeConfig { compress: Compress::Always, window_log: 20, level: 1 });
        let take = || pool.take(Duration::ZERO).unwrap();
        let frame = encode(&mut encoder, batch(&pool, 1, 0, 16, Class::Precopy), take());
        let mut bytes = frame.buf.bytes()[frame.from..frame.to].to_vec();
        let at = PROLOGUE_LEN + at.index(bytes.len() - PROLOGUE_LEN);
        let cut = PROLOGUE_LEN + cut.index(bytes.len() - PROLOGUE_LEN);
        let (prologue, body) = split(&bytes);
        prop_assert!(Decoder::new(20).decode(&prologue, &body[..cut - PROLOGUE_LEN], |_| ()).is_err());
        bytes[at] = byte;
        let (prologue, body) = split(&bytes);
        let _ = Decoder::new(20).decode(&prologue, body, |b| b.entries.check(1000));
    }
}

#[test]
fn a_reference_costs_seventeen_bytes_in_a_run_and_nineteen_scattered() {
    let reference = |n: u32, holder: u16| Reference {
        gfn: Gfn(1_000_000 + n),
        holder: HolderId(holder),
        fingerprint: Fingerprint([n as u8; 16]),
    };
    let mut list = [0; MAX_LIST_LEN];
    let run = Entries {
        refs: (0..384).map(|n| reference(n, 1)).collect(),
        ..Default::default()
    };
    let len = run.encode(&mut list).unwrap();
    assert!(len <= 384 * 17 + 12, "{len}");
    let mut scattered = Entries {
        refs: (0..384).map(|n| reference(n * 5, (n % 7) as u16)).collect(),
        ..Default::default()
    };
    scattered.normalize();
    let len = scattered.encode(&mut list).unwrap();
    assert!(len <= 384 * 19, "{len}");
}

#[test]
fn the_longest_list_fits_the_header_room() {
    let far = |n: usize| {
        Gfn(if n.is_multiple_of(2) {
            n as u32
        } else {
            u32::MAX - n as u32
        })
    };
    let entries = Entries {
        zeros: (0..MAX_ZERO_RUNS)
            .map(|n| ZeroRun {
                first: far(n * 9),
                count: 1,
            })
            .collect(),
        pages: (0..128).map(|n| far(n * 9 + 3)).collect(),
        refs: (0..MAX_REFS)
            .map(|n| Reference {
                gfn: far(n * 9 + 6),
                holder: HolderId(u16::MAX - n as u16),
                fingerprint: Fingerprint([0xff; 16]),
            })
            .collect(),
    };
    entries.check(u32::MAX).unwrap();
    let mut list = [0; MAX_LIST_LEN];
    let len = entries.encode(&mut list).unwrap();
    assert_eq!(Entries::decode(&list[..len], 128).unwrap(), entries);
}

#[test]
fn a_page_twice_or_beyond_ram_is_refused() {
    let pages = |pages: &[u32]| Entries {
        pages: pages.iter().map(|&g| Gfn(g)).collect(),
        ..Default::default()
    };
    assert_eq!(
        pages(&[1, 2, 1]).check(10),
        Err(FrameError::PageTwice { gfn: 1 })
    );
    assert_eq!(
        pages(&[1, 10]).check(10),
        Err(FrameError::BeyondRam {
            gfn: 10,
            ram_pages: 10
        })
    );
    let mut overlap = pages(&[5]);
    overlap.zeros.push(ZeroRun {
        first: Gfn(3),
        count: 3,
    });
    assert_eq!(overlap.check(10), Err(FrameError::PageTwice { gfn: 5 }));
    overlap.zeros[0].count = u32::MAX;
    assert!(overlap.check(10).is_err());
    assert_eq!(pages(&[9, 0]).check(10), Ok(()));
}

#[test]
fn prologues_that_are_not_ours_are_refused() {
    let good = Prologue::control(Kind::Ping, 0).encode();
    let parse = |at: usize, byte: u8, direction| {
        let mut bytes = good;
        bytes[at] = byte;
        Prologue::parse(&bytes, direction)
    };
    use Direction::*;
    assert!(Prologue::parse(&good, Forward).is_ok() && Prologue::parse(&good, Reverse).is_ok());
    assert!(matches!(
        parse(0, b'X', Forward),
        Err(FrameError::BadMagic(_))
    ));
    assert_eq!(parse(4, 2, Forward), Err(FrameError::BadVersion(2)));
    assert_eq!(parse(5, 0, Forward), Err(FrameError::BadKind(0)));
    assert_eq!(parse(5, 1, Reverse), Err(FrameError::BadKind(1)));
    assert_eq!(parse(5, 16, Forward), Err(FrameError::BadKind(16)));
    assert_eq!(parse(6, 1, Forward), Err(FrameError::BadFlags(1)));
    assert_eq!(parse(7, 1, Forward), Err(FrameError::BadClass(1)));
    assert_eq!(
        parse(8, 1, Forward),
        Err(FrameError::BadLength { kind: 3, len: 1 })
    );
}

#[test]
fn a_frame_is_readable_without_this_code() {
    // The diagram of docs/protocol.md, byte by byte.
    let pool = BufferPool::new(2).unwrap();
    let mut staged = batch(&pool, 0x0102_0304, 64, 1, Class::StopCopy);
    staged.entries.zeros.clear();
    staged.entries.refs.clear();
    staged.round = Round(5);
    let mut encoder = Encoder::new(EncodeConfig {
        compress: Compress::Never,
        ..Default::default()
    });
    let frame = encode(&mut encoder, staged, pool.take(Duration::ZERO).unwrap());
    let bytes = &frame.buf.bytes()[frame.from..frame.to];
    let mut want = b"DRVL\x01\x01\x00\x01".to_vec();
    want.extend_from_slice(&(28u32 + 6 + 4096).to_le_bytes());
    want.extend_from_slice(&GANG.0.to_le_bytes());
    want.extend_from_slice(b"\x04\x03\x02\x01\0\0\0\0\x05\0\0\0\x03\0\x01\0\x06\0\0\0");
    // No zero runs; one page run at +64 (zigzag 128, two bytes) of 1; no refs.
    want.extend_from_slice(b"\0\x01\x80\x01\0\0");
    want.extend_from_slice(&page(64));
    assert_eq!(VM, VmIndex(3));
    assert!(bytes == want);
}

/// Pages of many batches through one encoder and decoder.
fn through(config: EncodeConfig, levels: &[i32]) -> usize {
    let pool = BufferPool::new(2).unwrap();
    let mut encoder = Encoder::new(config);
    let mut decoder = Decoder::new(config.window_log);
    let mut wire = 0;
    for (n, &level) in levels.iter().enumerate() {
        encoder.set_level(level);
        let staged = batch(&pool, n as u64, n as u32 * 50, 128, Class::Precopy);
        let entries = {
            let mut e = staged.entries.clone();
            e.normalize();
            e
        };
        let mut staged = staged;
        staged.entries.normalize();
        let frame = encode(&mut encoder, staged, pool.take(Duration::ZERO).unwrap());
        let bytes = &frame.buf.bytes()[frame.from..frame.to];
        wire += bytes.len();
        let (prologue, body) = split(bytes);
        decoder
            .decode(&prologue, body, |batch| {
                assert_eq!(batch.entries, &entries);
                assert_eq!(batch.wire_len, bytes.len());
                for (gfn, content) in batch.pages() {
                    assert!(*content == page(gfn.0.into()), "{gfn}");
                }
                assert_eq!(batch.pages().len(), 128);
            })
            .unwrap();
        assert!(encoder.context_bytes() <= context_bytes_bound(&config));
        assert!(decoder.bytes() <= (1 << config.window_log) + (2 << 20));
    }
    wire
}

#[test]
fn history_makes_later_frames_smaller_and_levels_may_change() {
    for window_log in [20, 23, 26] {
        let config = EncodeConfig {
            compress: Compress::Always,
            level: 3,
            window_log,
        };
        // Each batch repeats 78 pages of the one before.
        let stream = through(config, &[3; 12]);
        let alone: usize = (0..12).map(|_| through(config, &[3])).sum();
        assert!(
            stream * 10 < alone * 6,
            "{stream} in a stream, {alone} alone"
        );
        through(config, &[3, 3, 1, 1, 0, 0, 1, 3, 0, 3]);
    }
}

#[test]
fn a_window_beyond_the_receivers_limit_is_an_error() {
    let pool = BufferPool::new(2).unwrap();
    let mut encoder = Encoder::new(EncodeConfig {
        compress: Compress::Always,
        level: 3,
        window_log: 24,
    });
    let frame = encode(
        &mut encoder,
        batch(&pool, 1, 1, 50, Class::Precopy),
        pool.take(Duration::ZERO).unwrap(),
    );
    let (prologue, body) = split(&frame.buf.bytes()[frame.from..frame.to]);
    let error = Decoder::new(20)
        .decode(&prologue, body, |_| ())
        .unwrap_err();
    assert!(matches!(error, DecodeError::Zstd(_)), "{error}");
}

#[test]
fn a_compressed_frame_that_holds_more_or_less_than_it_says_is_an_error() {
    let pool = BufferPool::new(2).unwrap();
    for (at, by) in [(22, 1u8), (22, 255), (24, 1), (24, 255)] {
        let mut encoder = Encoder::new(EncodeConfig {
            compress: Compress::Always,
            level: 1,
            window_log: 20,
        });
        let frame = encode(
            &mut encoder,
            batch(&pool, 1, 1, 50, Class::Precopy),
            pool.take(Duration::ZERO).unwrap(),
        );
        let mut bytes = frame.buf.bytes()[frame.from..frame.to].to_vec();
        let field = &mut bytes[PROLOGUE_LEN + at];
        *field = field.wrapping_add(by);
        let (prologue, body) = split(&bytes);
        let error = Decoder::new(20)
            .decode(&prologue, body, |_| ())
            .unwrap_err();
        assert!(matches!(error, DecodeError::Length { .. }), "{error}");
    }
}

#[test]
fn what_is_not_compressed_travels_without_its_zeroes() {
    let pool = BufferPool::new(2).unwrap();
    let mut encoder = Encoder::new(EncodeConfig {
        compress: Compress::Never,
        ..EncodeConfig::default()
    });
    let mut staged = batch(&pool, 1, 0, 8, Class::Precopy);
    let pages: Vec<_> = (0..8)
        .map(|n| {
            let mut page = page(n * 3);
            page[n as usize * 512..].fill(0);
            page
        })
        .collect();
    for (slot, page) in pages.iter().enumerate() {
        *staged.content.as_mut().unwrap().page_mut(slot) = *page;
    }
    let frame = encode(&mut encoder, staged, pool.take(Duration::ZERO).unwrap());
    assert_eq!(frame.encoding, Encoding::Sparse);
    let kept: usize = (0..8).map(|n| n * 512 + sparse::MAP).sum();
    assert!(frame.to - frame.from < kept + BATCH_PREFIX + 100);

    let bytes = &frame.buf.bytes()[frame.from..frame.to];
    let (prologue, body) = split(bytes);
    let mut decoder = Decoder::new(20);
    decoder
        .decode(&prologue, body, |batch| {
            assert_eq!(batch.content, pages.concat());
        })
        .unwrap();
    for cut in [body.len() - 1, body.len() - sparse::BLOCK, 40, 28] {
        let error = decoder.decode(&prologue, &body[..cut], |_| ()).unwrap_err();
        assert_eq!(error, DecodeError::Frame(FrameError::BadSparse), "{cut}");
    }
}

#[test]
fn random_pages_are_told_from_others() {
    let pages = |kind: u64, count: u64| -> Vec<u8> {
        (0..count).flat_map(|n| page(n * 3 + kind)).collect()
    };
    for count in [1, 7, 128] {
        assert!(looks_random(&pages(0, count)), "{count} random pages");
        assert!(!looks_random(&pages(1, count)), "{count} code-like pages");
        assert!(!looks_random(&pages(2, count)), "{count} text pages");
    }
    assert!(!looks_random(&[]));
}

#[test]
fn random_pages_of_round_one_stay_out_of_the_history() {
    let pool = BufferPool::new(2).unwrap();
    let mut encoder = Encoder::new(EncodeConfig {
        compress: Compress::Always,
        level: 3,
        window_log: 20,
    });
    for (round, raw) in [(1, true), (2, false)] {
        let mut staged = batch(&pool, 1, 0, 8, Class::Precopy);
        for n in 0..8 {
            *staged.content.as_mut().unwrap().page_mut(n) = page(n as u64 * 3);
        }
        staged.round = Round(round);
        let frame = encode(&mut encoder, staged, pool.take(Duration::ZERO).unwrap());
        assert_eq!(frame.encoding == Encoding::Raw, raw);
        assert!(frame.to - frame.from <= 8 * PAGE_SIZE + 200);
    }
}

#[test]
fn the_history_of_another_domain_does_not_show_in_a_frames_length() {
    let pool = BufferPool::new(2).unwrap();
    // What is sent before, and whether it is of the same dedup domain.
    let length_after = |before: u32, same: bool| {
        let mut encoder = Encoder::new(EncodeConfig {
            compress: Compress::Always,
            level: 3,
            window_log: 20,
        });
        let frames = [(before, 1), (1, if same { 1 } else { 2 })].map(|(first, domain)| {
            let mut staged = batch(&pool, 1, first, 1, Class::Precopy);
            staged.domain = domain;
            staged.round = Round(2);
            let frame = encode(&mut encoder, staged, pool.take(Duration::ZERO).unwrap());
            (frame.to - frame.from, frame.encoding)
        });
        let fresh = frames[1].1 == Encoding::Zstd { fresh: true };
        assert_eq!(fresh, !same, "a fresh stream for another domain");
        frames[1].0
    };
    assert!(length_after(1, true) < length_after(4, true));
    assert_eq!(length_after(1, false), length_after(4, false));
}
