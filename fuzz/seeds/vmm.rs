//! Seeds of the protocol with VMMs.

use super::Add;
use drover_vmm::wire::{Answer, LogKind, Phase, Refusal, RegionInfo, Request, Status};

/// Adds them.
pub(crate) fn seeds(add: Add<'_>) {
    let requests = [
        Request::Hello,
        Request::Status,
        Request::StartLog,
        Request::Round,
        Request::StopLog,
        Request::Pause,
        Request::SaveState,
        Request::LoadState,
        Request::Chunk(b"registers"),
        Request::ChunksEnd(9),
        Request::Resume,
        Request::End,
    ];
    let mut all = Vec::new();
    for request in &requests {
        request.encode(&mut all);
    }
    add("vmm_link", "requests", all);

    let status = Status {
        phase: Phase::Live,
        running: true,
        logging: false,
    };
    let region = |gpa: u64, len: u64, offset: u64| RegionInfo {
        gpa,
        len,
        offset,
        fd: 0,
    };
    let mut welcome = Vec::new();
    Answer::Welcome {
        log: LogKind::ManualBitmap,
        status,
        fds: 1,
        regions: vec![region(0, 3 << 30, 0), region(4 << 30, 1 << 30, 3 << 30)],
    }
    .encode(&mut welcome);
    add("vmm_link", "welcome", welcome);

    let mut answers = Vec::new();
    Answer::encode_bits(&mut answers, 1, 128, &[1, 0, u64::MAX]);
    for answer in [
        Answer::RoundEnd(65),
        Answer::Status(status),
        Answer::Done,
        Answer::Paused(true),
        Answer::Chunk(b"registers"),
        Answer::ChunksEnd(9),
        Answer::Refused {
            why: Refusal::Vmm,
            text: "the vCPU has failed".into(),
        },
    ] {
        answer.encode(&mut answers);
    }
    add("vmm_link", "answers", answers);
}
