use super::channel::{Kind, kind};
use super::cut::Parse;
use super::error::{Fault, Refusal, StreamError};
use super::fuzz::{fuzz_main, fuzz_multifd, fuzz_reply};
use super::item::{Item, RawFrom, Tally};
use super::main_channel::StreamParser;
use super::multifd::{PacketItem, PacketParser};
use super::reply::ReplyParser;
use super::samples::{self, BLOCKS, ID, PAGE, Ram, Record, Stream};
use crate::types::Gfn;
use proptest::prelude::*;

/// Reads all of `bytes` at once.
fn parse<P: Parse>(
    mut parser: P,
    bytes: &[u8],
    mut each: impl FnMut(P::Item<'_>),
) -> (P, Result<(), StreamError>) {
    let mut at = 0;
    let result = loop {
        match parser.next(&bytes[at..]) {
            Ok(Some((item, used))) => {
                each(item);
                at += used;
            }
            Ok(None) => break parser.finish(bytes.len() - at),
            Err(error) => break Err(error),
        }
    };
    (parser, result)
}

/// Why a main connection's stream is not carried.
fn fault(stream: Stream) -> Fault {
    let (parser, result) = parse(StreamParser::default(), &stream.0, |_| ());
    let error = result.unwrap_err();
    assert!(error.offset <= parser.offset());
    fuzz_main(&stream.0, 7);
    error.fault
}

fn begun() -> Stream {
    Stream::new()
        .configuration(b"pc-q35-7.2")
        .return_path()
        .ram(ID, &BLOCKS, false)
        .footer(ID)
}

fn page(page: u64, named: bool) -> Record {
    Record::Page(b"pc.ram".to_vec(), page, 1, named)
}

#[test]
fn the_samples_are_whole_streams_and_come_out_as_they_are() {
    for (name, bytes) in samples::streams() {
        assert!(fuzz_main(&bytes, 1), "{name}");
    }
    for (name, bytes) in samples::multifd() {
        assert!(fuzz_multifd(&bytes, 1), "{name}");
    }
    for (name, bytes) in samples::replies() {
        assert!(fuzz_reply(&bytes, 1), "{name}");
    }
}

#[test]
fn pages_are_found_with_their_blocks_and_sections() {
    let (_, plain) = &samples::streams()[0];
    let mut seen = Vec::new();
    let (parser, result) = parse(StreamParser::default(), plain, |item| match item {
        Item::Section(phase, _) => seen.push(format!("{phase:?}")),
        Item::Page(head, content) => seen.push(format!(
            "{} {:#x} {}",
            head.block.0, head.offset, content[1]
        )),
        Item::Zero(head, 0) => seen.push(format!("{} {:#x} zero", head.block.0, head.offset)),
        Item::SectionEnd(phase) => seen.push(format!("end {phase:?}")),
        _ => {}
    });
    result.unwrap();
    let wanted = [
        "Setup",
        "end Setup",
        "Precopy",
        "0 0x0 5",
        "1 0x3000 zero",
        "1 0x4000 zero",
        "end Precopy",
        "Precopy",
        "1 0x5000 zero",
        "end Precopy",
        "StopCopy",
        "0 0x3fff000 5",
        "end StopCopy",
    ];
    assert_eq!(seen, wanted);
    assert_eq!(parser.raw(), Some(&RawFrom::DeviceState));
    assert_eq!(parser.tally(), Tally { pages: 2, zeros: 3 });
    let blocks = parser.blocks();
    assert_eq!(blocks.pages(), Gfn((64 << 8) + 0x20));
    let rom = blocks.find(b"/rom@etc/acpi/tables").unwrap();
    assert_eq!(blocks.gfn(rom, 0x1000), Some(Gfn((64 << 8) + 1)));
    assert_eq!(blocks.gfn(rom, 0x2_0000), None);
}

#[test]
fn what_cannot_be_delimited_is_passed_on_and_named() {
    for (name, section) in [
        ("dirty-bitmap", begun().start(1, 5, b"dirty-bitmap", 1)),
        ("ram", Stream::new().return_path().start(1, 5, b"ram", 5)),
        (
            "virtio-mem",
            Stream::new().return_path().start(4, 5, b"virtio-mem", 1),
        ),
        (
            "configuration/x",
            Stream::new()
                .configuration(b"m")
                .subsection(b"configuration/x"),
        ),
    ] {
        let stream = section.add(&[0x40; 10_000]);
        let (parser, result) = parse(StreamParser::default(), &stream.0, |_| ());
        result.unwrap();
        assert!(fuzz_main(&stream.0, 100), "{name}");
        let Some(raw @ RawFrom::Unknown { name: found, .. }) = parser.raw() else {
            panic!("{name}: {:?}", parser.raw());
        };
        assert_eq!(found, name);
        assert!(raw.to_string().contains("unread"), "{raw}");
    }
}

/// A name from the stream is no terminal control sequence in a report.
#[test]
fn names_are_shown_escaped() {
    let stream = begun().start(1, 5, b"\x1b[31mred", 1);
    let (parser, _) = parse(StreamParser::default(), &stream.0, |_| ());
    assert!(parser.raw().unwrap().to_string().contains(r"\x1b[31mred"));
}

#[test]
fn other_kinds_of_migration_are_refused_with_what_to_switch_off() {
    let record = |word: u64| {
        begun()
            .add(&[2, 0, 0, 0, 2])
            .add(&word.to_be_bytes())
            .add(&[0; 20])
    };
    for (stream, refusal, switch) in [
        (
            Stream::new().command(3, &[0; 16]),
            Refusal::Postcopy,
            "postcopy-ram",
        ),
        (begun().command(4, &[]), Refusal::Postcopy, "postcopy-ram"),
        (begun().command(7, &[0; 4]), Refusal::Packaged, "x-colo"),
        (Stream::new().command(8, &[]), Refusal::Colo, "x-colo"),
        (record(0x1000 | 0x40 | 0x20), Refusal::Xbzrle, "xbzrle"),
        (record(0x1000 | 0x100), Refusal::Compressed, "compress"),
        (record(0x80), Refusal::Rdma, "unix:"),
        (
            Stream::new()
                .configuration(b"m")
                .capabilities(&[b"mapped-ram"]),
            Refusal::MappedRam,
            "mapped-ram",
        ),
        (
            Stream::new()
                .configuration(b"m")
                .subsection(b"configuration/target-page-bits")
                .add(&[0, 0, 0, 16]),
            Refusal::PageSize { bits: 16 },
            "4 KiB",
        ),
        (
            Stream::new().ram(ID, &BLOCKS, false),
            Refusal::NoReturnPath,
            "return-path",
        ),
    ] {
        assert_eq!(fault(stream), Fault::Refused(refusal));
        assert!(refusal.to_string().contains(switch), "{refusal}");
    }
    assert_eq!(kind([0x16, 3, 1, 2]), Err(Fault::Refused(Refusal::Tls)));
    assert_eq!(kind(*b"QEVM"), Ok(Kind::Main));
    assert_eq!(kind([0x11, 0x22, 0x33, 0x44]), Ok(Kind::Multifd));
    assert!(kind(*b"GET ").is_err());
    for (flags, refusal) in [
        (2 << 1, Refusal::MultifdCompression),
        (1 << 6, Refusal::MultifdDeviceState),
    ] {
        let bytes = [samples::init(0), samples::packet(flags, &[1], &[])].concat();
        let (_, result) = parse(PacketParser::default(), &bytes, |_| ());
        assert_eq!(result.unwrap_err().fault, Fault::Refused(refusal));
    }
    let bytes = samples::message(4, &[0; 12]);
    let (_, result) = parse(ReplyParser::default(), &bytes, |_| ());
    assert_eq!(result.unwrap_err().fault, Fault::Refused(Refusal::Postcopy));
}

#[test]
fn lengths_counts_and_orders_are_not_believed() {
    let many: Vec<Vec<u8>> = (0..1100).map(|i: u32| i.to_be_bytes().to_vec()).collect();
    let many: Vec<Ram<'_>> = many.iter().map(|name| (&name[..], PAGE as u64)).collect();
    let list = |blocks: &[Ram<'_>]| Stream::new().return_path().ram(ID, blocks, false);
    let pages = |records: &[Record]| begun().part(2, ID, records);
    let named = |name: &[u8]| Record::Page(name.to_vec(), 0, 0, true);
    for (stream, words) in [
        (Stream::default().add(b"QEVN\0\0\0\x03"), "magic"),
        (Stream::default().add(b"QEVM\0\0\0\x02"), "version 3"),
        (Stream::new().configuration(&[b'm'; 256]), "machine type"),
        (
            Stream::new()
                .configuration(b"m")
                .subsection(b"configuration/capabilities")
                .add(&[0xff; 4]),
            "number of capabilities",
        ),
        (Stream::new().add(&[9]), "type of a section"),
        (
            Stream::new().configuration(b"m").configuration(b"m"),
            "type of a section",
        ),
        (Stream::new().uuid(), "type of a section"),
        (Stream::new().footer(2), "type of a section"),
        (Stream::new().command(0, &[]), "expected a command"),
        (Stream::new().command(2, &[0; 5]), "PING"),
        (list(&many), "number of RAM blocks"),
        (list(&[(b"a", 0x1800), (b"b", 0x800)]), "whole pages"),
        (list(&[(b"a", 1 << 44)]), "length of all RAM blocks"),
        (list(&[(b"a", 0x1000), (b"a", 0x1000)]), "twice"),
        (
            Stream::new()
                .return_path()
                .start(1, ID, b"ram", 4)
                .add(&(0x1000_u64 | 4).to_be_bytes())
                .add(b"\x01a\0\0\0\0\0\0\x20\0"),
            "length of a RAM block",
        ),
        (pages(&[page(1, false)]), "names its RAM block"),
        (pages(&[named(b"pc.rom")]), "pc.rom"),
        (pages(&[page(64 << 8, true)]), "within the"),
        (begun().part(2, 3, &[]), "id of the section"),
        (
            begun().part(3, ID, &[]).part(2, ID, &[]),
            "RAM being complete",
        ),
        (
            begun().add(&[2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4]),
            "a record of RAM",
        ),
        (
            begun().add(&[2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0x18]),
            "a record of RAM",
        ),
        (
            begun().add(&[2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1]),
            "QEMU 2.0",
        ),
        (begun(), "connection ended where a section"),
        (pages(&[]).add(&[2, 0]), "connection ended where a section"),
    ] {
        let text = fault(stream).to_string();
        assert!(text.contains(words), "{text}: not {words}");
    }
}

#[test]
fn multifd_packets_are_not_believed_either() {
    let good = samples::packet(0, &[1, 2], &[]);
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        [samples::init(0), bad].concat()
    };
    for (bytes, words) in [
        (with(0, &[0]), "magic"),
        (with(7, &[2]), "version 1"),
        (with(11, &[0x80]), "flags"),
        (with(16, &[0xff; 4]), "number of pages"),
        (with(32, &[0xff; 4]), "number of pages"),
        (with(23, &[1]), "length of a multifd packet's pages"),
        (with(64, &[b'x'; 256]), "name of a RAM block"),
        (with(327, &[1]), "whole page"),
        (good[..40].to_vec(), "multifd's first packet"),
        (with(0, &[])[..2000].to_vec(), "pages of a multifd packet"),
        (with(0, &[])[..100].to_vec(), "rest of a multifd packet"),
    ] {
        let (_, result) = parse(PacketParser::default(), &bytes, |_| ());
        let text = result.unwrap_err().fault.to_string();
        assert!(text.contains(words), "{text}: not {words}");
        fuzz_multifd(&bytes, 3);
    }
}

#[test]
fn packets_tell_their_pages() {
    let bytes = [samples::init(3), samples::packet(1, &[6], &[7, 8])].concat();
    let mut seen = Vec::new();
    let (parser, result) = parse(PacketParser::default(), &bytes, |item| match item {
        PacketItem::Init(init) => seen.push(u64::from(init.id())),
        PacketItem::Packet(packet) => {
            assert!(packet.is_sync());
            assert_eq!(packet.block(), b"pc.ram");
            seen.extend(packet.offsets().chain(packet.zero_offsets()));
        }
        PacketItem::Page { offset, content } => seen.extend([offset, u64::from(content[9])]),
    });
    result.unwrap();
    assert_eq!(seen, [3, 0x6000, 0x7000, 0x8000, 0x6000, 6]);
    assert_eq!(parser.tally(), Tally { pages: 1, zeros: 2 });
}

#[test]
fn a_return_path_without_shut_is_no_success() {
    let pong = samples::message(2, &[0; 4]);
    assert!(!fuzz_reply(&pong, 1));
    assert!(!fuzz_reply(&[], 1));
    let shut = samples::message(1, &[0; 4]);
    assert!(!fuzz_reply(&shut[..7], 1));
    assert!(fuzz_reply(&shut, 3));
    assert!(!fuzz_reply(&[shut.clone(), pong].concat(), 3));
    let (parser, _) = parse(ReplyParser::default(), &shut, |_| ());
    assert_eq!(parser.shut(), Some(0));
    assert!(!fuzz_reply(&samples::message(1, &[0; 5]), 2));
    assert!(!fuzz_reply(&samples::message(0, &[]), 2));
}

/// RAM blocks; records say which by their place.
fn blocks() -> impl Strategy<Value = Vec<(Vec<u8>, u64)>> {
    let name = prop::collection::vec(any::<u8>(), 0..=255);
    prop::collection::btree_map(name, 1..=40_u64, 1..=6).prop_map(|blocks| {
        let bytes = |(name, pages)| (name, pages * PAGE as u64);
        blocks.into_iter().map(bytes).collect()
    })
}

fn stream() -> impl Strategy<Value = Vec<u8>> {
    let record = (
        any::<prop::sample::Index>(),
        0..40_u64,
        any::<u8>(),
        0..5_u8,
    );
    let sections = prop::collection::vec(prop::collection::vec(record, 0..12), 1..5);
    let about = (any::<bool>(), any::<bool>(), any::<bool>(), 0..600_usize);
    (blocks(), sections, about).prop_map(|(blocks, sections, about)| {
        let (footers, shared, configured, tail) = about;
        let footer = |stream: Stream| if footers { stream.footer(ID) } else { stream };
        let mut stream = Stream::new();
        if configured || shared {
            stream = stream.configuration(b"pc-q35-9.1").uuid();
        }
        if shared {
            stream = stream.capabilities(&[b"x-ignore-shared", b"other"]);
        }
        let list: Vec<Ram<'_>> = blocks.iter().map(|(name, len)| (&name[..], *len)).collect();
        stream = footer(stream.return_path().ram(ID, &list, shared));
        let mut last: Option<&[u8]> = None;
        for (i, section) in sections.iter().enumerate() {
            let mut records = Vec::new();
            for (which, page, fill, sort) in section {
                let (name, bytes) = which.get(&blocks);
                let page = page % (bytes / PAGE as u64);
                let named = last != Some(name) || *sort == 0;
                last = Some(name);
                records.push(match sort {
                    4 => Record::Zero(name.clone(), page, *fill, named),
                    _ => Record::Page(name.clone(), page, *fill, named),
                });
            }
            records.push(Record::Flush);
            let kind = if i + 1 == sections.len() { 3 } else { 2 };
            stream = footer(stream.part(kind, ID, &records)).command(2, &[0; 4]);
        }
        stream.devices().add(&vec![0x7e; tail]).0
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_stream_cut_anyhow_comes_out_as_it_went_in(bytes in stream(), step in 1..9000_usize) {
        prop_assert!(fuzz_main(&bytes, step));
    }

    #[test]
    fn truncated_and_flipped_streams_are_faults_or_raw(
        bytes in stream(),
        at in any::<prop::sample::Index>(),
        flip in any::<u8>(),
        step in 1..5000_usize,
    ) {
        let at = at.index(bytes.len());
        fuzz_main(&bytes[..at], step);
        let mut bytes = bytes;
        bytes[at] ^= flip;
        fuzz_main(&bytes, step);
    }

    #[test]
    fn any_packets_come_out_as_they_went_in(
        packets in prop::collection::vec((any::<bool>(), 0..5_u64, 0..5_u64), 0..5),
        at in any::<prop::sample::Index>(),
        flip in any::<u8>(),
        step in 1..9000_usize,
    ) {
        let mut bytes = samples::init(1);
        for (sync, pages, zeros) in packets {
            let (pages, zeros): (Vec<_>, Vec<_>) = ((0..pages).collect(), (9..9 + zeros).collect());
            bytes.extend(samples::packet(u32::from(sync), &pages, &zeros));
        }
        prop_assert!(fuzz_multifd(&bytes, step));
        let at = at.index(bytes.len());
        fuzz_multifd(&bytes[..at], step);
        bytes[at] ^= flip;
        fuzz_multifd(&bytes, step);
    }

    #[test]
    fn any_bytes_at_all_are_survived(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        step in 1..40_usize,
    ) {
        fuzz_main(&bytes, step);
        fuzz_main(&[b"QEVM\0\0\0\x03", &bytes[..]].concat(), step);
        fuzz_multifd(&bytes, step);
        fuzz_reply(&bytes, step);
    }
}
