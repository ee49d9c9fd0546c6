//! What a Cloud Hypervisor sends, put together byte by byte for the tests and
//! for the seeds of the fuzz target: no code of the parser or the sender.

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// RAM as samples have it: slot, guest-physical address, bytes. The second
/// lies beyond the gap for devices.
pub(crate) const RAM: [(u32, u64, u64); 2] =
    [(0, 0, 16 * PAGE as u64), (5, 1 << 32, 8 * PAGE as u64)];

/// The configuration of a VM with [`RAM`], with members that nobody here reads.
pub(crate) fn config() -> Vec<u8> {
    let mappings: Vec<String> = RAM
        .iter()
        .map(|(slot, gpa, size)| {
            format!(
                r#"{{"slot":{slot},"gpa":{gpa},"size":{size},"zone_id":"mem0","virtio_mem":false,"file_offset":0}}"#
            )
        })
        .collect();
    format!(
        r#"{{"vm_config":{{"cpus":{{"boot_vcpus":1}}}},"memory_manager_data":{{"guest_ram_mappings":[{}],"boot_ram":98304}}}}"#,
        mappings.join(",")
    )
    .into_bytes()
}

/// What the sample's devices are like.
pub(crate) const STATE: &[u8] = br#"{"id":"vm","snapshots":{"cpu-manager":{}}}"#;

/// A command: number, the first two bytes of its header, payload.
pub(crate) fn command(number: u16, header: u16, length: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.extend(header.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(length.to_le_bytes());
    bytes.extend(payload);
    bytes
}

fn whole(number: u16, payload: &[u8]) -> Vec<u8> {
    command(number, 0, payload.len() as u64, payload)
}

pub(crate) fn start() -> Vec<u8> {
    whole(1, &[])
}

pub(crate) fn configured() -> Vec<u8> {
    whole(2, &config())
}

pub(crate) fn state() -> Vec<u8> {
    whole(3, STATE)
}

pub(crate) fn complete() -> Vec<u8> {
    whole(5, &[])
}

pub(crate) fn abandon() -> Vec<u8> {
    whole(6, &[])
}

pub(crate) fn slot(slot: u32) -> Vec<u8> {
    whole(7, &slot.to_le_bytes())
}

pub(crate) fn complete_paused() -> Vec<u8> {
    whole(8, &[])
}

/// A memory table of (address, bytes) with its contents.
pub(crate) fn memory(ranges: &[(u64, u64)], contents: &[u8]) -> Vec<u8> {
    let table: Vec<u8> = ranges
        .iter()
        .flat_map(|(gpa, bytes)| [gpa.to_le_bytes(), bytes.to_le_bytes()].concat())
        .collect();
    [whole(4, &table), contents.to_vec()].concat()
}

/// A page of the byte `fill`.
pub(crate) fn page(fill: u8) -> Vec<u8> {
    vec![fill; PAGE]
}

/// Whole migrations.
pub(crate) fn migrations() -> Vec<(&'static str, Vec<u8>)> {
    let round = memory(
        &[(0, 2 * PAGE as u64), (1 << 32, PAGE as u64)],
        &[page(1), page(2), page(3)].concat(),
    );
    // A range that comes twice: the later content counts.
    let last = memory(
        &[(0, PAGE as u64), (0, PAGE as u64)],
        &[page(4), page(5)].concat(),
    );
    vec![
        (
            "live",
            [
                start(),
                configured(),
                round,
                memory(&[], &[]),
                last.clone(),
                state(),
                complete(),
            ]
            .concat(),
        ),
        (
            "paused",
            [start(), configured(), last, state(), complete_paused()].concat(),
        ),
        (
            "local",
            [start(), slot(0), slot(5), configured(), state(), complete()].concat(),
        ),
        ("given-up", [start(), configured(), abandon()].concat()),
    ]
}
