//! What sources and targets send each other on lanes.

use super::{Add, GANG, VM, page};
use drover::lane::encode::{Encoder, Progress};
use drover::lane::entries::MAX_LIST_LEN;
use drover::lane::frame::{Kind, Prologue, ReverseFrame};
use drover::lane::{
    BatchId, BufferPool, Compress, EncodeConfig, Entries, Reference, StagedBatch, ZeroRun,
};
use drover::types::{Class, Fingerprint, Gfn, HolderId, Round};
use std::time::Duration;

pub(super) fn seeds(add: Add<'_>) {
    frames(add);
    records(add);
}

/// Entries of every kind.
fn entries() -> Entries {
    let reference = |gfn, holder, byte| Reference {
        gfn: Gfn(gfn),
        holder: HolderId(holder),
        fingerprint: Fingerprint([byte; 16]),
    };
    let mut entries = Entries {
        zeros: vec![
            ZeroRun {
                first: Gfn(0),
                count: 16,
            },
            ZeroRun {
                first: Gfn(100_000),
                count: 1,
            },
        ],
        pages: [40, 41, 42, 7000, 20].map(Gfn).to_vec(),
        refs: vec![
            reference(50, 1, 5),
            reference(51, 1, 6),
            reference(200_000, 0, 7),
        ],
    };
    entries.normalize();
    entries
}

fn frames(add: Add<'_>) {
    let mut list = vec![5];
    list.resize(1 + MAX_LIST_LEN, 0);
    let len = entries().encode(&mut list[1..]).expect("it fits");
    list.truncate(1 + len);
    add("lane_entries", "every-kind", list);
    add("lane_entries", "none", vec![0, 0, 0, 0]);

    let bye = Prologue::control(Kind::Bye, 0).encode();
    let ping = Prologue::control(Kind::Ping, 0).encode();
    for (name, compress, class) in [
        ("raw", Compress::Never, Class::Precopy),
        ("sparse", Compress::Never, Class::Precopy),
        ("zstd", Compress::Always, Class::StopCopy),
    ] {
        let pool = BufferPool::new(4).expect("memory for four buffers");
        let take = || pool.take(Duration::from_secs(1)).expect("a free buffer");
        let mut encoder = Encoder::new(EncodeConfig {
            compress,
            level: 1,
            window_log: 17,
        });
        let mut stream = ping.to_vec();
        // The second batch continues the zstd stream of the first.
        for batch in 0..2 {
            let entries = if compress == Compress::Never {
                Entries {
                    pages: vec![Gfn(30)],
                    ..entries()
                }
            } else {
                entries()
            };
            let mut content = take();
            for slot in 0..entries.pages.len() {
                *content.page_mut(slot) = page(slot);
                if name == "sparse" {
                    content.page_mut(slot)[200..4000].fill(0);
                }
            }
            let staged = StagedBatch {
                gang: GANG,
                vm: VM,
                batch: BatchId(batch),
                round: Round(2),
                class,
                domain: 0,
                entries,
                content: Some(content),
            };
            let mut progress = encoder.start(staged, take()).expect("it encodes");
            let frame = loop {
                progress = match progress {
                    Progress::Done(frame) => break frame,
                    Progress::More(job) => encoder.step(job).expect("it encodes"),
                };
            };
            stream.extend_from_slice(&frame.buf.bytes()[frame.from..frame.to]);
        }
        stream.extend_from_slice(&bye);
        add("lane_stream", name, stream);
    }

    let mut reverse = Vec::new();
    for frame in [
        ReverseFrame::Ack(vec![BatchId(1), BatchId(u64::MAX)]),
        ReverseFrame::Ping,
        ReverseFrame::Need {
            gang: GANG,
            vm: VM,
            gfns: vec![Gfn(1), Gfn(u32::MAX)],
        },
        ReverseFrame::Error("no such gang: «web»".to_owned()),
    ] {
        let mut alone = Vec::new();
        frame.encode(&mut alone);
        reverse.extend_from_slice(&alone);
        let name = match frame {
            ReverseFrame::Ack(_) => "ack",
            ReverseFrame::Ping => "ping",
            ReverseFrame::Need { .. } => "need",
            ReverseFrame::Error(_) => "error",
        };
        add("lane_reverse", name, alone);
    }
    add("lane_reverse", "all", reverse);
}

/// Contents of records that get sealed; the first two bytes say so, and how
/// they are cut.
fn records(add: Add<'_>) {
    let record = |kind: u8, content: &[u8]| [&[kind, content.len() as u8], content].concat();
    let frames = [&[1, 6][..], &record(23, b"a frame"), &record(23, &[])].concat();
    add("lane_records", "frames", frames);
    let padded = [&[1, 200][..], &record(0, b"a frame\x17\0\0")].concat();
    add("lane_records", "padded", padded);
    let end = [&[1, 0][..], &record(23, b"last"), &record(21, &[1, 0])].concat();
    add("lane_records", "end", end);
}
