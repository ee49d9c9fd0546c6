//! The seeds of the corpus: valid encodings of everything the targets read,
//! made by the project's own encoders. `agent/tests/fuzz_corpus.rs` checks
//! that they are in the corpus and still accepted, and writes them when asked.

#[path = "seeds/stream.rs"]
mod stream;

use super::targets_common::{KEY, NONCE};
use drover::api::types::{AdoptVm, Cancel, MigrationOptions, MigrationRequest, RunVm};
use drover::gang::handover::machine::{Whose, Word};
use drover::gang::journal::{Record, Side, Step};
use drover::gang::message::{
    CoreState, GangHost, GangRequest, GangResponse, GangSpec, GangVm, PageCounts, Phase,
    SourceFacts, StopTimes, VmState,
};
use drover::lane::encode::{Encoder, Progress};
use drover::lane::entries::MAX_LIST_LEN;
use drover::lane::frame::{Kind, Prologue, ReverseFrame};
use drover::lane::{
    BatchId, BufferPool, Compress, EncodeConfig, Entries, Reference, StagedBatch, ZeroRun,
};
use drover::net::preamble::{Answer, Verdict};
use drover::net::rack::wire::{Message, PageStatus};
use drover::net::rack::{ClaimAnswer, ClaimOp, ClaimReply, Wanted};
use drover::net::rpc::Envelope;
use drover::net::{Hello, Kind as Purpose};
use drover::pace::report::{Load, LoadReport};
use drover::types::{Class, Fingerprint, GangId, Gfn, HolderId, PAGE_SIZE, Page, Round, VmIndex};
use drover::vmm::preflight::DirectFacts;
use drover::vmm::qmp::Version;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// One seed.
#[derive(Debug)]
pub struct Seed {
    /// Its target.
    pub target: &'static str,
    /// Its file in the target's corpus directory.
    pub file: String,
    /// Its content.
    pub bytes: Vec<u8>,
}

const GANG: GangId = GangId(0x1122_3344_5566_7788);
const VM: VmIndex = VmIndex(3);

/// All seeds. `repository` is where `configs/` lies.
pub fn seeds(repository: &Path) -> Vec<Seed> {
    let mut seeds = Vec::new();
    let mut add = |target: &'static str, name: &str, bytes: Vec<u8>| {
        let file = format!("ok-{name}");
        seeds.push(Seed {
            target,
            file,
            bytes,
        });
    };
    lanes(&mut add);
    preambles(&mut add);
    rpc(&mut add);
    rack(&mut add);
    records(&mut add);
    for (target, file) in [
        ("config_files", "agent.toml"),
        ("config_files", "policy.toml"),
        ("vm_files", "plans/web.toml"),
        ("vm_files", "vms/web1.toml"),
    ] {
        let path = repository.join("configs").join(file);
        let name = path.file_name().expect("a file").to_string_lossy();
        let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        add(target, &name, text);
    }
    for (target, name, text) in TEXTS {
        add(target, name, text.as_bytes().to_vec());
    }
    json(&mut add);
    ethernet(&mut add);
    map_values(&mut add);
    stream::seeds(&mut add);
    seeds
}

type Add<'a> = &'a mut dyn FnMut(&'static str, &str, Vec<u8>);

/// An agent's certificate; nobody has its key.
const AGENT_PEM: &str = "\
-----BEGIN CERTIFICATE-----\n\
MIIBxjCCAW6gAwIBAgIUD2GvNjf4ZswAfnBPKxs94zCqD8swCgYIKoZIzj0EAwIw\n\
GjEYMBYGA1UEAwwPRHJvdmVyIGFnZW50IGExMB4XDTI2MTEyNjEyMDY1N1oXDTM2\n\
MTEyMzEyMDY1N1owGjEYMBYGA1UEAwwPRHJvdmVyIGFnZW50IGExMFkwEwYHKoZI\n\
zj0CAQYIKoZIzj0DAQcDQgAEHZt5zqEgK2RwrsFbEKkpE6TqokWIT73fbWDhNuv8\n\
6s3ITKnC2BC3a1r2Qciwv63tPYBlEs+0HRgQbjXRAJ+nhqOBkTCBjjAdBgNVHQ4E\n\
FgQUMWJ3fdEdE/kCrlGMafPgsvxOEMcwHwYDVR0jBBgwFoAUMWJ3fdEdE/kCrlGM\n\
afPgsvxOEMcwDwYDVR0TAQH/BAUwAwEB/zAcBgNVHREEFTAThhFkcm92ZXI6Ly9h\n\
Z2VudC9hMTAdBgNVHSUEFjAUBggrBgEFBQcDAQYIKwYBBQUHAwIwCgYIKoZIzj0E\n\
AwIDRgAwQwIgEX0EanFxeKdsJdohhzCUjuVNIQFKzchF7NbdI4cBQ/YCH2cB2/Zr\n\
UTijVW7zxF0rLKL8qSuDwbUFxBz3BAG7Sw4=\n\
-----END CERTIFICATE-----\n\
";

const TEXTS: &[(&str, &str, &str)] = &[
    ("certificates", "agent.pem", AGENT_PEM),
    (
        "config_files",
        "agent-plaintext.toml",
        "name = \"a\"\nrack = \"A\"\nlisten = \"[::1]:7400\"\nstate_dir = \"s\"\nrun_dir = \"r\"\nram_dir = \"m\"\n\
         secret_file = \"k\"\npolicy = \"p\"\nvm_definitions = \"v\"\n[tls]\nplaintext = true\n",
    ),
    (
        "vm_files",
        "vm-json-argument.toml",
        "name = \"w.1\"\ndomain = \"t\"\nkind = \"qemu-direct\"\nram = \"64M\"\n[qemu]\nbinary = \"/q\"\n\
         args = ['{\"qom-type\":\"x\",\"path\":\"{ram}\"}', \"{nic_0}\"]\n",
    ),
    ("values", "size", "262136K"),
    ("values", "size-unit", "4GiB"),
    ("values", "bytes", "256 MiB"),
    ("values", "prefix-4", "10.1.0.0/16"),
    ("values", "prefix-6", "fd00:1::/64"),
    ("values", "host", "255.255.255.255"),
    ("values", "name", "web-1.b_2"),
    ("values", "profile", "evacuate"),
    (
        "json",
        "qmp-greeting",
        "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, \"package\": \"Debian\"}, \
         \"capabilities\": [\"oob\"]}}\r\n{\"return\": {}, \"id\": 1}\r\n",
    ),
    (
        "json",
        "qmp-event",
        "{\"timestamp\": {\"seconds\": 5, \"microseconds\": 7}, \"event\": \"MIGRATION\", \
         \"data\": {\"status\": \"completed\"}}\r\n\r\n{\"return\": null}\n",
    ),
    (
        "json",
        "qmp-error",
        "{\"id\": 1, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}",
    ),
    (
        "host_text",
        "maps",
        "7f5e40000000-7f5e50000000 rw-s 00010000 00:1a 4711   /dev/shm/vm one.ram (deleted)\n\
         7fff12345000-7fff12347000 r-xp 00000000 00:00 0                          [vdso]\n\
         55d0c0000000-55d0c0021000 rw-p 00000000 fe:01 99 \n",
    ),
    (
        "host_text",
        "stat",
        "7 (a) b (c) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4242 9 9\n",
    ),
    (
        "host_text",
        "status",
        "Name:\tqemu-system-x86\nState:\tS (sleeping)\nTracerPid:\t0\nVmLck:\t       0 kB\n",
    ),
    (
        "host_text",
        "ramblocks",
        "              Block Name    PSize              Offset               Used              Total\r\n\
         \x20                    ram    4 KiB  0x0000000000000000 0x0000000001000000 0x0000000001000000\r\n\
         \x20   /rom@etc/acpi/tables    2 MiB  0x0000000001080000 0x0000000000020000 0x0000000000200000\r\n",
    ),
    (
        "host_text",
        "qtree",
        "bus: main-system-bus\r\n  type System\r\n  dev: q35-pcihost, id \"\"\r\n    bus: pcie.0\r\n\
         \x20     dev: vfio-pci, id \"gpu 1\"\r\n        addr = 02.0\r\n",
    ),
];

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

/// Page `n`: words that compress, each page another one.
fn page(n: usize) -> Page {
    std::array::from_fn(|at| b"drover \n"[at % 8] ^ (n * (at / 512)) as u8)
}

fn lanes(add: Add<'_>) {
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

fn preambles(add: Add<'_>) {
    for (name, kind) in [
        ("control", Purpose::Control),
        ("rack", Purpose::Rack),
        ("lane", Purpose::Lane),
        ("device", Purpose::DeviceState),
    ] {
        let hello = Hello {
            kind,
            gang: GANG,
            tag: 2,
            nonce: NONCE,
            from: "a1".to_owned(),
            to: "b1.rack-b".to_owned(),
        };
        add("preamble", &format!("hello-{name}"), hello.encode(&KEY));
    }
    for (name, verdict, reason) in [
        ("accepted", Verdict::Accepted, ""),
        ("secret", Verdict::Secret, "another secret"),
        ("busy", Verdict::Busy, "64 connections are open"),
    ] {
        let reason = reason.to_owned();
        let bytes = Answer { verdict, reason }.encode(&KEY, &NONCE);
        add("preamble", &format!("answer-{name}"), bytes);
    }
}

fn framed(envelopes: &[Envelope<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for envelope in envelopes {
        let mut payload = Vec::new();
        envelope.encode(&mut payload);
        bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&payload);
    }
    bytes
}

fn facts() -> SourceFacts {
    SourceFacts {
        direct: DirectFacts {
            name: "web1".to_owned(),
            ram_bytes: 2 << 30,
            backend: "ram".to_owned(),
            machine: "pc-q35-7.2".to_owned(),
            version: Version {
                major: 7,
                minor: 2,
                micro: 22,
            },
            kvm: true,
            state_ram_bytes: 16 << 20,
            running: true,
        },
        data_bytes: 300 << 20,
        definition: "name = \"web1\"\n".to_owned(),
    }
}

fn rpc(add: Add<'_>) {
    let host = |name: &str, rack: &str| GangHost {
        name: name.to_owned(),
        rack: rack.to_owned(),
    };
    let spec = GangSpec {
        id: GANG,
        name: "web".to_owned(),
        coordinator: "a1".to_owned(),
        hosts: vec![host("a1", "a"), host("b1", "b")],
        vms: vec![GangVm {
            name: "web1".to_owned(),
            from: "a1".to_owned(),
            to: "b1".to_owned(),
        }],
        profile: "normal".to_owned(),
        compress: Default::default(),
        verify: Default::default(),
        downtime_limit_ms: 300,
        align: false,
    };
    let (gang, vm) = (GANG, VM);
    let requests = [
        (
            "check-source",
            GangRequest::CheckSource {
                vm: "web1".to_owned(),
            },
        ),
        (
            "check-target",
            GangRequest::CheckTarget {
                vm: "web1".to_owned(),
                facts: facts(),
            },
        ),
        ("open", GangRequest::Open(spec)),
        (
            "prepare",
            GangRequest::PrepareTarget {
                gang,
                vm,
                facts: facts(),
            },
        ),
        ("start", GangRequest::StartSource { gang, vm }),
        (
            "seal",
            GangRequest::Seal {
                gang,
                vm,
                digest: [9; 16],
                full: true,
                wait_ms: 500,
            },
        ),
        (
            "resume",
            GangRequest::Resume {
                gang,
                vm: "web1".to_owned(),
                run: true,
            },
        ),
        (
            "whose",
            GangRequest::WhoseIs {
                gang,
                vm: "web1".to_owned(),
            },
        ),
        (
            "settled",
            GangRequest::Settled {
                gang,
                vm: "web1".to_owned(),
            },
        ),
        ("take-over", GangRequest::TakeOver { gang }),
        (
            "abort",
            GangRequest::Abort {
                gang,
                vm: "web1".to_owned(),
                why: "cancelled".to_owned(),
            },
        ),
    ];
    for (name, request) in requests {
        let body = postcard(&request);
        let bytes = framed(&[Envelope::Request { id: 5, body: &body }, Envelope::Ping]);
        add("rpc", &format!("request-{name}"), bytes);
    }
    let state = VmState {
        vm,
        phase: Phase::Precopy,
        round: 3,
        dirty_pages_per_s: 120.5,
        left_pages: 77,
        sent_bytes: 1 << 30,
        pages: PageCounts {
            total: 1 << 18,
            zero: 5,
            ..PageCounts::default()
        },
        downtime_ms: Some(41.5),
        journal_ms: Some(1.5),
        stop: StopTimes {
            pause_ms: 1.25,
            resume_ms: 2.5,
            ..StopTimes::default()
        },
        verified: true,
        error: Some("lane lost".to_owned()),
    };
    let responses = [
        ("done", GangResponse::Done),
        ("source", GangResponse::Source(facts())),
        ("progress", GangResponse::Progress(vec![state])),
        (
            "sealed",
            GangResponse::Sealed {
                equal: true,
                pending: 2,
            },
        ),
        (
            "landed",
            GangResponse::Landed {
                word: Word::Here,
                journal_us: 900,
            },
        ),
        ("whose", GangResponse::Whose(Whose::Yours { run: true })),
        (
            "core",
            GangResponse::Core(CoreState {
                metered: true,
                ..CoreState::default()
            }),
        ),
        ("failed", GangResponse::Failed("no room".to_owned())),
    ];
    for (name, response) in responses {
        let body = postcard(&response);
        let bytes = framed(&[Envelope::Pong, Envelope::Response { id: 5, body: &body }]);
        add("rpc", &format!("response-{name}"), bytes);
    }
    let notice = postcard(&GangRequest::Core);
    let bytes = framed(&[
        Envelope::Notice { body: &notice },
        Envelope::Fault {
            id: 1,
            why: b"too many",
        },
    ]);
    add("rpc", "notice-and-fault", bytes);
}

fn postcard(message: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(message).expect("it encodes")
}

fn rack(add: Add<'_>) {
    let (ticket, gang, holder) = (9, GANG, HolderId(1));
    let fps = vec![Fingerprint([3; 16]), Fingerprint([4; 16])];
    let claim = |op| Message::Claim { ticket, gang, op };
    let held = |arrived| ClaimAnswer::Held { holder, arrived };
    let wanted = fps.iter().map(|fp| Wanted { fp: *fp, domain: 2 }).collect();
    let content = page(3);
    let report = |seq: u64| LoadReport {
        host: "a1".to_owned(),
        rack: "a".to_owned(),
        boot: 7,
        seq,
        at_us: seq * 50_000,
        metered: true,
        egress: Load {
            migration: seq * 1_000_000,
            tenant: seq * 500_000,
        },
        ingress: Load::default(),
        wanted: 40_000_000,
        stop_copy: seq == 2,
        lanes: 2,
    };
    let reports = [postcard(&report(1)), postcard(&report(2))].concat();
    for (name, message) in [
        (
            "claim",
            claim(ClaimOp::Claim {
                fps: fps.clone(),
                holder,
            }),
        ),
        (
            "confirm",
            claim(ClaimOp::Confirm {
                fps: fps.clone(),
                holder,
            }),
        ),
        (
            "reassign",
            claim(ClaimOp::Reassign {
                fps: fps.clone(),
                holder,
            }),
        ),
        ("release", claim(ClaimOp::Release { fps, holder })),
        ("forget", claim(ClaimOp::Forget { holder })),
        (
            "answers",
            Message::ClaimReply {
                ticket,
                reply: ClaimReply::Claims(vec![ClaimAnswer::Yours, held(false), held(true)]),
            },
        ),
        (
            "done",
            Message::ClaimReply {
                ticket,
                reply: ClaimReply::Done,
            },
        ),
        (
            "fetch",
            Message::Fetch {
                ticket,
                gang,
                limit_ms: 500,
                wanted,
            },
        ),
        (
            "pages",
            Message::Pages {
                ticket,
                pages: vec![
                    (0, PageStatus::Gone),
                    (1, PageStatus::Page(&content)),
                    (2, PageStatus::NotInTime),
                ],
            },
        ),
        ("report", Message::Report(&reports)),
    ] {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        assert!(bytes.len() < 2 * PAGE_SIZE);
        add("rack", name, bytes);
    }
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

fn text(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("it encodes")
}

fn json(add: Add<'_>) {
    let name = "web1".to_owned();
    let record = Record {
        gang: GANG,
        vm: name.clone(),
        side: Side::Target,
        step: Step::Committed,
        peer: "a1".to_owned(),
        run: true,
    };
    add("json", "journal", text(&record));
    add("json", "api-run", text(&RunVm { name: name.clone() }));
    let qmp = "/run/web1.sock".into();
    add(
        "json",
        "api-adopt",
        text(&AdoptVm {
            name: name.clone(),
            qmp,
        }),
    );
    add("json", "api-cancel", text(&Cancel { vm: Some(name) }));
    let request = MigrationRequest {
        plan_file: "web.toml".to_owned(),
        plan: "gang = \"web\"\n".to_owned(),
        options: MigrationOptions::default(),
    };
    add("json", "api-migrate", text(&request));
}

fn map_values(add: Add<'_>) {
    let reading = |cpus: u64, bytes: u64| {
        let cells = u64::from(drover_ebpf::CELLS);
        (0..cells * cpus)
            .flat_map(|i| {
                [
                    bytes.wrapping_add(i * 1514).to_le_bytes(),
                    (i + 1).to_le_bytes(),
                ]
                .concat()
            })
            .collect::<Vec<u8>>()
    };
    let two = [reading(2, 1 << 30), reading(2, (1 << 30) + 77_777)].concat();
    add("map_values", "two-cpus", [&[1][..], &two].concat());
    // A counter that wraps, and one that an agent's restart set back.
    let odd = [reading(1, u64::MAX - (1 << 20)), reading(1, 0)].concat();
    add("map_values", "set-back", [&[0][..], &odd].concat());
}

fn ethernet(add: Add<'_>) {
    let mac = [0u8; 12];
    let ip4 = |protocol: u8| {
        let mut header = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0];
        header.extend([10, 1, 0, 1, 10, 2, 0, 2]);
        header
    };
    let ip6 = |next: u8| {
        let mut header = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        header.extend([[0xfd; 16], [0xfe; 16]].concat());
        header
    };
    let tcp = [
        &[0x1d, 0x2e, 0x1f, 0x90, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x10][..],
        &[0; 18],
    ]
    .concat();
    let udp = |port: u16| [&[0, 1][..], &port.to_be_bytes(), &[0; 4]].concat();
    let (v4, v6) = ([0x08, 0x00], [0x86, 0xdd]);
    add("ethernet", "tcp4", [&mac[..], &v4, &ip4(6), &tcp].concat());
    let tags = [0x88, 0xa8, 0, 5, 0x81, 0, 0, 7];
    add(
        "ethernet",
        "vlan-tcp6",
        [&mac[..], &tags, &v6, &ip6(6), &tcp].concat(),
    );
    let options = [
        &[60, 1][..],
        &[0; 14],
        &[51, 0, 0, 0, 0, 0, 0, 0],
        &[6, 4],
        &[0; 22],
    ]
    .concat();
    add(
        "ethernet",
        "extensions",
        [&mac[..], &v6, &ip6(0), &options, &tcp].concat(),
    );
    let fragment = [6, 0, 1, 0, 0, 0, 0, 0];
    add(
        "ethernet",
        "fragment",
        [&mac[..], &v6, &ip6(44), &fragment, &tcp].concat(),
    );
    let inner = [&mac[..], &v6, &ip6(6), &tcp].concat();
    let vxlan = [&mac[..], &v4, &ip4(17), &udp(4789), &[0; 8], &inner].concat();
    add("ethernet", "vxlan", vxlan);
    let geneve = [&mac[..], &v4, &ip4(17), &udp(6081), &[2; 16], &inner].concat();
    add("ethernet", "geneve", geneve);
}
