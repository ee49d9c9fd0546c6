//! The bodies of all fuzz targets: bytes in, and what must hold for whatever a
//! parser makes of them. libFuzzer runs them through `fuzz_targets/*.rs`, and
//! `agent/tests/fuzz_corpus.rs` runs the same code over the corpus with the
//! stable toolchain.
//!
//! Each returns whether (one of) its parsers accepted the bytes, so that the
//! test can tell a seed that has gone stale.

#[path = "targets/stream.rs"]
pub mod stream;

use drover::api::types::{AdoptVm, Cancel, MigrationRequest, RunVm};
use drover::config::{
    AgentConfig, ByteSize, Checks, ClusterSecret, IpPrefix, Problems, TlsConfig, is_name,
};
use drover::gang::journal::parse_record;
use drover::gang::message::{GangRequest, GangResponse};
use drover::gang::plan::{MAX_VMS, Plan};
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
use drover::net::Hello;
use drover::net::frame::frame_len;
use drover::net::preamble::{
    ANSWER_FIXED, Answer, HELLO_FIXED, MAX_REASON, MembershipKey, Verdict,
};
use drover::net::rack::{MAX_CLAIM, MAX_FETCH, MAX_REPORT, wire};
use drover::net::rpc::{Envelope, RpcLimits};
use drover::pace::meter::{Counters, Prefix};
use drover::pace::policy::{self, ProfileName};
use drover::pace::report::{LoadReport, Patience, RackLoad};
use drover::pki::{AGENT_URI, Certificate, CertificateFile, TlsFiles};
use drover::types::PAGE_SIZE;
use drover::vmm::definition::{Definition, VmPaths, check_name, parse_size};
use drover::vmm::maps::parse_maps;
use drover::vmm::preflight::{parse_devices, parse_ramblocks};
use drover::vmm::process::{parse_stat, status_value};
use drover::vmm::qmp::proto::{LineCutter, LineError, MAX_LINE, Message, compose, parse_line};
use drover_ebpf::{CELLS, Counter, Direction as Way, frame};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

/// A target: its bytes, and whether a parser accepted them.
pub type Target = fn(&[u8]) -> bool;

/// Every target, by the name of its corpus directory.
pub const TARGETS: &[(&str, Target)] = &[
    ("lane_stream", lane_stream),
    ("lane_entries", lane_entries),
    ("lane_reverse", lane_reverse),
    ("lane_records", lane_records),
    ("certificates", certificates),
    ("preamble", preamble),
    ("rpc", rpc),
    ("rack", rack),
    ("config_files", config_files),
    ("vm_files", vm_files),
    ("values", values),
    ("json", json),
    ("host_text", host_text),
    ("ethernet", ethernet),
    ("map_values", map_values),
    ("stream_main", stream::stream_main),
    ("stream_multifd", stream::stream_multifd),
    ("stream_reply", stream::stream_reply),
];

/// Pages of the VM that lane targets pretend to fill: 1 GiB.
pub const RAM_PAGES: u32 = 1 << 18;

/// The key of the preambles in the corpus.
pub static KEY: LazyLock<MembershipKey> =
    LazyLock::new(|| MembershipKey::derive(&ClusterSecret::from_bytes([1; 32])));

/// The nonce that answers in the corpus belong to.
pub const NONCE: [u8; 16] = [7; 16];

/// TLS records of a lane, as they come from anybody and as they come from who
/// has the keys: one record of memory, and content comes out only of records
/// that say they have some.
pub fn lane_records(bytes: &[u8]) -> bool {
    fuzz_records(bytes)
}

/// Certificates: of a peer, which TLS has checked already, and PEM files.
pub fn certificates(bytes: &[u8]) -> bool {
    let parsed = Certificate::parse(bytes);
    if let Ok(certificate) = &parsed {
        let named = certificate.agent();
        assert_eq!(named.is_ok(), certificate.agents.len() == 1);
        assert!(named.is_err() || !certificate.agents[0].starts_with(AGENT_URI));
        assert_eq!(certificate.fingerprint_hex().len(), 64);
    }
    let file = CertificateFile::parse_pem(bytes);
    if let Ok((der, parsed)) = &file {
        assert!(!der.is_empty() && der.len() == parsed.len());
    }
    parsed.is_ok() || file.is_ok()
}

/// How long pieces are in which a stream is delivered a second time.
fn step(bytes: &[u8]) -> usize {
    1 + bytes.len() % 61
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

/// The first message of the caller, and the answer to it.
pub fn preamble(bytes: &[u8]) -> bool {
    let hello = Hello::decode_unproven(bytes);
    if let Ok(hello) = &hello {
        assert!(is_name(&hello.from) && is_name(&hello.to));
        assert_eq!(
            Hello::names_len(bytes).map(|names| HELLO_FIXED + names),
            Ok(bytes.len())
        );
        // All but the proof is as it came.
        let again = hello.encode(&KEY);
        assert_eq!(again[..40], bytes[..40]);
        assert_eq!(again[56..], bytes[56..]);
        assert_eq!(Hello::decode(&again, &KEY).as_ref(), Ok(hello));
        // Only one proof is the right one.
        assert_eq!(Hello::decode(bytes, &KEY).is_ok(), again == bytes);
    }
    let answer = Answer::decode(bytes, &KEY, &NONCE);
    if let Ok(answer) = &answer {
        assert_eq!(
            Answer::reason_len(bytes).map(|reason| ANSWER_FIXED + reason),
            Ok(bytes.len())
        );
        assert!(!answer.reason.contains(char::is_control));
        let again = answer.encode(&KEY, &NONCE);
        if answer.verdict == Verdict::Accepted {
            assert_eq!(again, bytes, "an acceptance cannot be forged");
        }
        // Bytes that are no UTF-8 become longer ones.
        if answer.reason.len() <= MAX_REASON {
            assert_eq!(Answer::decode(&again, &KEY, &NONCE).as_ref(), Ok(answer));
        }
    }
    hello.is_ok() || answer.is_ok()
}

/// A control connection: frames, envelopes in them, messages in those.
pub fn rpc(mut bytes: &[u8]) -> bool {
    let max = RpcLimits::default().max_frame;
    let mut messages = false;
    while let Ok(Some(whole)) = frame_len(bytes, max) {
        assert!((4..=4 + max).contains(&whole));
        let Some((frame, rest)) = bytes.split_at_checked(whole) else {
            break;
        };
        bytes = rest;
        let Ok(envelope) = Envelope::decode(&frame[4..]) else {
            return false;
        };
        let mut again = Vec::new();
        envelope.encode(&mut again);
        assert_eq!(again, frame[4..]);
        messages |= match envelope {
            Envelope::Request { body, .. } | Envelope::Notice { body } => {
                postcard_roundtrips::<GangRequest>(body)
            }
            Envelope::Response { body, .. } => postcard_roundtrips::<GangResponse>(body),
            Envelope::Fault { .. } | Envelope::Ping | Envelope::Pong => true,
        };
    }
    messages
}

/// What was accepted encodes to bytes that mean the same. Compared as bytes:
/// messages may hold numbers that are none.
fn postcard_roundtrips<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> bool {
    let Ok((message, rest)) = postcard::take_from_bytes::<T>(bytes) else {
        return false;
    };
    let once = postcard::to_stdvec(&message).expect("a decoded message encodes");
    assert!(once.len() <= bytes.len() - rest.len());
    let again: T = postcard::from_bytes(&once).expect("an encoded message decodes");
    let twice = postcard::to_stdvec(&again).expect("a decoded message encodes");
    assert_eq!(once, twice);
    rest.is_empty()
}

/// Claims, fetches and pages; a load report goes on to what adds them up.
pub fn rack(bytes: &[u8]) -> bool {
    let Ok(message) = wire::decode(bytes) else {
        return false;
    };
    let mut again = Vec::new();
    message.encode(&mut again);
    assert_eq!(again, bytes);
    match &message {
        wire::Message::Claim { op, .. } => assert!(op.fps().len() <= MAX_CLAIM),
        wire::Message::ClaimReply { .. } => {}
        wire::Message::Fetch { wanted, .. } => assert!(wanted.len() <= MAX_FETCH),
        wire::Message::Pages { pages, .. } => assert!(pages.len() <= MAX_FETCH),
        wire::Message::Report(report) => {
            assert!(report.len() <= MAX_REPORT);
            return load_reports(report);
        }
    }
    true
}

/// A series of load reports: no number in them makes a sum leave its bounds.
fn load_reports(mut bytes: &[u8]) -> bool {
    const CAPACITY: f64 = 50e6;
    let patience = Patience::for_interval(Duration::from_millis(50));
    let mut rack = RackLoad::default();
    let mut taken = 0;
    while let Ok((report, rest)) = postcard::take_from_bytes::<LoadReport>(bytes) {
        assert!(rest.len() < bytes.len());
        assert!(postcard_roundtrips::<LoadReport>(
            &bytes[..bytes.len() - rest.len()]
        ));
        bytes = rest;
        taken += 1;
        let now = Duration::from_millis(taken * 20);
        let named = [&report.host, &report.rack].map(|name| (1..=255).contains(&name.len()));
        assert_eq!(rack.receive(report, now).is_ok(), named == [true, true]);
        let sum = rack.sum(now, patience, CAPACITY);
        let most = sum.agents as f64 * CAPACITY;
        for flow in [sum.egress, sum.ingress] {
            assert!((0.0..=most).contains(&flow.migration));
            assert!((0.0..=taken as f64 * CAPACITY).contains(&flow.tenant));
        }
        assert!(
            sum.wanted
                .iter()
                .all(|want| (0.0..=CAPACITY).contains(want))
        );
        assert!(sum.stop_copy <= sum.agents && sum.agents as u64 <= taken);
    }
    taken > 0
}

/// `agent.toml` and `policy.toml`. Each reads the same text.
pub fn config_files(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    let config = AgentConfig::parse(Path::new("/etc/drover/agent.toml"), text, Checks::File);
    match &config {
        Ok(config) => check_config(config),
        Err(problems) => check_problems(problems, text),
    }
    let policy = policy::parse(text);
    match &policy {
        Ok(policy) => {
            assert!((1e5..=1.25e12).contains(&policy.capacity));
            for name in ProfileName::ALL {
                let profile = policy.profile(name);
                assert!((0.0..=1.0).contains(&profile.share) && profile.share > 0.0);
                assert!(profile.floor > 0.0 && profile.floor <= profile.share);
                assert!((0.0..=0.9).contains(&profile.headroom));
                assert!(profile.stop_copy > 0.0 && profile.stop_copy <= 1.0);
            }
            assert!(policy.limits.lanes_per_pair >= 1 && policy.rounds.max_rounds >= 1);
        }
        Err(problem) => {
            assert!((1..=text.lines().count() + 1).contains(&problem.line));
            assert!(!problem.remedy.is_empty() && !problem.to_string().is_empty());
        }
    }
    config.is_ok() || policy.is_ok()
}

fn check_config(config: &AgentConfig) {
    assert!(is_name(&config.name) && is_name(&config.rack));
    assert_ne!(config.listen.port(), 0);
    assert!(((32 << 20)..=(64 << 30)).contains(&config.data_memory));
    let tls = match &config.tls {
        TlsConfig::Files(TlsFiles { ca, cert, key }) => vec![ca, cert, key],
        TlsConfig::Plaintext => Vec::new(),
    };
    for path in [
        &config.api_socket,
        &config.state_dir,
        &config.run_dir,
        &config.ram_dir,
        &config.secret_file,
        &config.policy,
        &config.vm_definitions,
    ]
    .into_iter()
    .chain(tls)
    .chain(&config.qemu_binaries)
    .chain(&config.hold_at_switch)
    .chain(&config.moments)
    {
        assert!(path.is_absolute(), "{path:?}");
    }
    let names: BTreeSet<&str> = config.peers.iter().map(|peer| &*peer.name).collect();
    assert_eq!(names.len(), config.peers.len(), "no peer twice");
    assert!(!names.contains(&*config.name), "nobody is its own peer");
    assert!(
        config
            .peers
            .iter()
            .all(|p| is_name(&p.name) && is_name(&p.rack))
    );
    assert!(config.rack_peers().count() <= config.peers.len());
}

fn check_problems(problems: &Problems, text: &str) {
    assert!(!problems.problems.is_empty());
    assert!(problems.problems.is_sorted_by_key(|problem| problem.line));
    for problem in &problems.problems {
        assert!((1..=text.lines().count() + 1).contains(&problem.line));
        assert!(problem.column >= 1 && !problem.message.is_empty());
    }
    assert!(!problems.to_string().is_empty());
}

/// Plans and VM definitions. Each reads the same text.
pub fn vm_files(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    let plan = Plan::parse(Path::new("plan.toml"), text, None);
    match &plan {
        Ok(plan) => check_plan(plan, text),
        Err(problems) => check_problems(problems, text),
    }
    let definition = Definition::parse("vm.toml", text);
    match &definition {
        Ok(vm) => check_definition(vm),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    plan.is_ok() || definition.is_ok()
}

fn check_plan(plan: &Plan, text: &str) {
    assert!(is_name(&plan.gang) && (1..=MAX_VMS).contains(&plan.vms.len()));
    let names: BTreeSet<&str> = plan.vms.iter().map(|vm| &*vm.name).collect();
    assert_eq!(names.len(), plan.vms.len(), "no VM twice");
    let mut again = format!("gang = \"{}\"\n", plan.gang);
    for vm in &plan.vms {
        assert!(
            [&vm.name, &vm.from, &vm.to]
                .into_iter()
                .all(|name| is_name(name))
        );
        assert_ne!(vm.from, vm.to);
        let (name, from, to) = (&vm.name, &vm.from, &vm.to);
        again += &format!("[[vm]]\nname = \"{name}\"\nfrom = \"{from}\"\nto = \"{to}\"\n");
    }
    let parse =
        |text: &str, hosts: Option<&[&str]>| Plan::parse(Path::new("plan.toml"), text, hosts);
    assert_eq!(parse(&again, None).as_ref(), Ok(plan));
    assert_eq!(parse(text, Some(&plan.hosts())).as_ref(), Ok(plan));
    assert!(parse(text, Some(&[])).is_err(), "hosts nobody knows");
}

fn check_definition(vm: &Definition) {
    assert_eq!(
        &Definition::parse("again", &vm.text).expect("its own text"),
        vm
    );
    assert!(is_name(&vm.name), "a plan can name every VM: {:?}", vm.name);
    assert!(vm.binary.is_absolute());
    assert!(vm.ram_bytes > 0 && vm.ram_bytes.is_multiple_of(PAGE_SIZE as u64));
    let (run, ram) = (Path::new("/run/vms"), Path::new("/dev/shm/drover"));
    let paths = VmPaths::new(run, ram, &vm.name);
    assert_eq!(paths.dir.parent(), Some(run), "a name is no path");
    assert_eq!(paths.ram.parent(), Some(ram), "a name is no path");
    let known: BTreeMap<String, String> = vm
        .host_placeholders()
        .into_iter()
        .map(|name| (name.to_owned(), "{ram}".to_owned()))
        .collect();
    let args = vm
        .expand(&paths, &known)
        .expect("all placeholders are known");
    assert_eq!(args.len(), vm.args.len());
    let own_alone = vm.expand(&paths, &BTreeMap::new());
    assert_eq!(own_alone.is_ok(), known.is_empty());
}

/// Values inside files and on command lines: sizes, prefixes, names.
pub fn values(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    let mut accepted = false;
    if let Ok(size) = parse_size(text) {
        assert!(size.is_multiple_of(1024));
        assert_eq!(parse_size(&format!("{}K", size / 1024)), Ok(size));
        let unit = text.strip_suffix("iB").unwrap_or(text);
        let number = unit.strip_suffix(['K', 'M', 'G', 'T']);
        assert!(
            number.is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit())),
            "{text:?} is a size only to a parser that is too kind"
        );
        accepted = true;
    }
    if let Ok(size) = text.parse::<ByteSize>() {
        assert_eq!(size.0.to_string().parse(), Ok(size));
        accepted = true;
    }
    if let Ok(prefix) = text.parse::<IpPrefix>() {
        assert!(prefix.contains(prefix.address()));
        assert_eq!(prefix.to_string().parse(), Ok(prefix));
        // The meter's own prefix type reads what the configuration accepts.
        assert!(prefix.to_string().parse::<Prefix>().is_ok());
        accepted = true;
    }
    if let Ok(prefix) = text.parse::<Prefix>() {
        assert!(prefix.contains(prefix.address()));
        assert_eq!(prefix.to_string().parse(), Ok(prefix));
        accepted = true;
    }
    if check_name(text).is_ok() {
        assert!(is_name(text), "a plan can name every VM: {text:?}");
    }
    if is_name(text) {
        let file = PathBuf::from("/d").join(format!("{text}.toml"));
        assert_eq!(file.parent(), Some(Path::new("/d")), "a name is no path");
        accepted = true;
    }
    if let Ok(profile) = text.parse::<ProfileName>() {
        assert_eq!(profile.as_str(), text);
        accepted = true;
    }
    accepted
}

/// QMP as a stream of lines, journal records, requests of the HTTP API.
pub fn json(bytes: &[u8]) -> bool {
    let lines = check_lines(bytes);
    let mut accepted = false;
    for line in lines.iter().map(Vec::as_slice).chain([bytes]) {
        match parse_line(line) {
            Ok(Message::Event(event)) => {
                let line = compose(1, &event.name, &event.data);
                assert_eq!(line.iter().position(|b| *b == b'\n'), Some(line.len() - 1));
                accepted = true;
            }
            Ok(Message::Greeting(_) | Message::Reply { .. }) => accepted = true,
            Err(LineError::TooLong) => unreachable!("only the cutter counts bytes"),
            Err(LineError::Json(_) | LineError::Unknown) => {}
        }
    }
    if let Ok(record) = parse_record(bytes) {
        let again = serde_json::to_vec(&record).expect("a record encodes");
        assert_eq!(parse_record(&again).expect("its own text"), record);
        accepted = true;
    }
    accepted |= json_roundtrips::<RunVm>(bytes);
    accepted |= json_roundtrips::<AdoptVm>(bytes);
    accepted |= json_roundtrips::<MigrationRequest>(bytes);
    accepted |= json_roundtrips::<Cancel>(bytes);
    accepted
}

/// Lines come out the same however the bytes are cut.
fn check_lines(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut cutter = LineCutter::default();
    let mut lines = Vec::new();
    for piece in bytes.chunks(step(bytes)) {
        cutter.push(piece);
        match cutter.next_line() {
            Ok(line) => lines.extend(line),
            Err(_) => {
                assert!(bytes.len() > MAX_LINE);
                return lines;
            }
        }
    }
    while let Ok(Some(line)) = cutter.next_line() {
        lines.push(line);
    }
    let (ended, _) = bytes.split_at(bytes.iter().rposition(|b| *b == b'\n').unwrap_or(0));
    let expected: Vec<&[u8]> = ended
        .split(|b| *b == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .filter(|line| !line.is_empty())
        .collect();
    assert_eq!(lines, expected);
    lines
}

fn json_roundtrips<T>(bytes: &[u8]) -> bool
where
    T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let Ok(value) = serde_json::from_slice::<T>(bytes) else {
        return false;
    };
    let again = serde_json::to_vec(&value).expect("a request encodes");
    assert_eq!(
        serde_json::from_slice::<T>(&again).expect("its own text"),
        value
    );
    true
}

/// What the kernel and QEMU's human monitor write. Each reads the same text.
pub fn host_text(bytes: &[u8]) -> bool {
    // As it is read from /proc: file names there may hold any bytes.
    let text = String::from_utf8_lossy(bytes);
    let mut accepted = false;
    match parse_maps(&text) {
        Ok(rows) => {
            assert_eq!(rows.len(), text.lines().count());
            for row in &rows {
                assert_eq!(row.end.checked_sub(row.start), Some(row.len()));
                let flag = |on, letter| if on { letter } else { '-' };
                let [r, w, x] = row.perms;
                let line = format!(
                    "{:x}-{:x} {}{}{}{} {:08x} {:02x}:{:02x} {} {}",
                    row.start,
                    row.end,
                    flag(r, 'r'),
                    flag(w, 'w'),
                    flag(x, 'x'),
                    if row.shared { 's' } else { 'p' },
                    row.offset,
                    row.dev.0,
                    row.dev.1,
                    row.inode,
                    row.path
                );
                assert_eq!(parse_maps(&line).as_deref(), Ok(std::slice::from_ref(row)));
            }
            accepted |= !rows.is_empty();
        }
        Err(error) => assert!((1..=text.lines().count()).contains(&error.line)),
    }
    if let Some((state, start)) = parse_stat(&text) {
        if state != ')' {
            let line = format!("1 (a) b) {state}{} {start} 0", " 0".repeat(18));
            assert_eq!(parse_stat(&line), Some((state, start)));
        }
        accepted = true;
    }
    for key in ["Name", "State", "TracerPid", "VmLck"] {
        if let Some(value) = status_value(&text, key) {
            assert!(!value.contains('\n') && value.trim() == value);
            assert_eq!(status_value(&format!("{key}:\t{value}"), key), Some(value));
            accepted = true;
        }
    }
    if let Ok(blocks) = parse_ramblocks(&text) {
        assert!(blocks.len() < text.lines().count());
        let mut again = "Block Name PSize Offset Used Total\n".to_owned();
        for block in &blocks {
            let (name, used, total) = (&block.name, block.used, block.total);
            again += &format!("{name} 4 KiB 0x0 {used:#x} {total:#x}\n");
        }
        assert_eq!(parse_ramblocks(&again).as_ref(), Ok(&blocks));
        accepted = true;
    }
    let devices = parse_devices(&text);
    assert!(devices.len() <= text.lines().count());
    accepted | !devices.is_empty()
}

/// Ethernet frames, read as the eBPF programs read them.
pub fn ethernet(bytes: &[u8]) -> bool {
    let one = frame::parse(&bytes, false);
    let many = frame::parse(&bytes, true);
    if let Some(read) = one {
        // What follows the headers does not change what they say.
        let longer = [bytes, &[0xff; 64]].concat();
        assert_eq!(frame::parse(&&longer[..], false), Some(read));
    }
    // Segments in a tunnel repeat more headers; nothing else differs.
    if let (Some(one), Some(many)) = (one, many) {
        assert_eq!(
            (one.addresses, one.tcp_ports),
            (many.addresses, many.tcp_ports)
        );
        assert!(many.header_len >= one.header_len);
    }
    for read in one.into_iter().chain(many) {
        let len = bytes.len() as u32;
        // Every header but the last lies inside the frame, and none is longer
        // than an IPv6 extension can be.
        assert!(read.header_len >= 34 && read.header_len <= len + 256 * 8 + 8);
        for segment in [0, 1, 1448] {
            let (on_wire, segments) = frame::on_wire(len, read.header_len, segment);
            assert!(on_wire >= u64::from(len) && segments >= 1);
        }
    }
    one.is_some()
}

/// Values of the meter's map, as the kernel gives them: for each cell a counter
/// of 16 bytes a CPU. The first byte says how many CPUs there are; two readings
/// follow. Sums do not depend on the order of CPUs, and differences are never
/// more than what was read last, nor anything at all where it went backwards.
pub fn map_values(bytes: &[u8]) -> bool {
    let Some((cpus, bytes)) = bytes.split_first() else {
        return false;
    };
    let cpus = 1 + usize::from(cpus % 64);
    let (words, _) = bytes.as_chunks::<8>();
    let (pairs, _) = words.as_chunks::<2>();
    let counters = pairs.iter().map(|[bytes, packets]| Counter {
        bytes: u64::from_le_bytes(*bytes),
        packets: u64::from_le_bytes(*packets),
    });
    let values: Vec<Counter> = counters.collect();
    let mut readings = values.chunks(cpus * CELLS as usize).map(|values| {
        let (mut one, mut other) = (Counters::default(), Counters::default());
        for (cell, cpus) in values.chunks(cpus).enumerate() {
            assert!(one.add_cpus(cell as u32, cpus.iter().copied()));
            assert!(other.add_cpus(cell as u32, cpus.iter().rev().copied()));
        }
        assert_eq!(one, other);
        assert!(!one.add_cpus(CELLS, []));
        one
    });
    let (Some(before), Some(after)) = (readings.next(), readings.next()) else {
        return false;
    };
    for direction in [Way::Egress, Way::Ingress] {
        for (in_rack, migration) in [(false, false), (false, true), (true, false), (true, true)] {
            let [was, is] = [&before, &after].map(|c| c.get(direction, in_rack, migration).bytes);
            let since = after.bytes_since(&before, direction, in_rack, migration);
            assert!(since <= is);
            assert_eq!(since > 0, is > was);
            assert_eq!(after.bytes_since(&after, direction, in_rack, migration), 0);
        }
    }
    true
}
