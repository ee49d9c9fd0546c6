//! What agents send each other on all other connections.

use super::super::targets::{KEY, NONCE};
use super::{Add, GANG, VM, page};
use drover::gang::handover::machine::{Whose, Word};
use drover::gang::message::{
    CoreState, GangHost, GangRequest, GangResponse, GangSpec, GangVm, PageCounts, Phase,
    SourceFacts, StopTimes, VmState,
};
use drover::net::preamble::{Answer, Verdict};
use drover::net::rack::wire::{Message, PageStatus};
use drover::net::rack::{ClaimAnswer, ClaimOp, ClaimReply, Wanted};
use drover::net::rpc::Envelope;
use drover::net::{Hello, Kind};
use drover::pace::report::{Load, LoadReport};
use drover::types::{Fingerprint, HolderId, PAGE_SIZE};
use drover::vmm::kinds::VmFacts;
use drover::vmm::kvm_log::{LinkedFacts, RamPart};
use drover::vmm::preflight::QemuFacts;
use drover::vmm::qmp::Version;
use serde::Serialize;

pub(super) fn seeds(add: Add<'_>) {
    preambles(add);
    rpc(add);
    rack(add);
}

fn preambles(add: Add<'_>) {
    for (name, kind) in [
        ("control", Kind::Control),
        ("rack", Kind::Rack),
        ("lane", Kind::Lane),
        ("device", Kind::DeviceState),
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
        unfit: Vec::new(),
        vmm: VmFacts::QemuDirect(QemuFacts {
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
        }),
        data_bytes: 300 << 20,
        definition: "name = \"web1\"\n".to_owned(),
    }
}

fn linked_facts() -> SourceFacts {
    let part = |gpa, offset| RamPart {
        gpa,
        len: 1 << 30,
        offset,
    };
    SourceFacts {
        unfit: Vec::new(),
        vmm: VmFacts::KvmLog(LinkedFacts {
            name: "k1".to_owned(),
            ram_bytes: 2 << 30,
            parts: vec![part(0, 0), part(1 << 32, 1 << 30)],
        }),
        data_bytes: 300 << 20,
        definition: "name = \"k1\"\n".to_owned(),
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
        ("source-linked", GangResponse::Source(linked_facts())),
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
