//! What is read on this host: the journal, requests of the API, packets, the
//! meter's map.

use super::{Add, GANG};
use drover::api::types::{AdoptVm, Cancel, MigrationOptions, MigrationRequest, RunVm};
use drover::gang::journal::{Record, Side, Step};
use serde::Serialize;

pub(super) fn seeds(add: Add<'_>) {
    json(add);
    ethernet(add);
    map_values(add);
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
