//! What QEMU, the kernel, API clients and the journal say on this host.

use super::step;
use drover::api::types::{AdoptVm, Cancel, MigrationRequest, RunVm};
use drover::gang::journal::parse_record;
use drover::pace::meter::Counters;
use drover::vmm::maps::parse_maps;
use drover::vmm::preflight::{parse_devices, parse_ramblocks};
use drover::vmm::process::{parse_stat, status_value};
use drover::vmm::qmp::proto::{LineCutter, LineError, MAX_LINE, Message, compose, parse_line};
use drover_ebpf::{CELLS, Counter, Direction, frame};
use serde::Serialize;
use serde::de::DeserializeOwned;

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
    for direction in [Direction::Egress, Direction::Ingress] {
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
