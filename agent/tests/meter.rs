//! The eBPF meter against the kernel's own counters, on a real shaped link.
//! Needs root, iproute2 and an agent built with the eBPF object
//! (`cargo xtask build-ebpf`).

mod meter_net;

use drover::pace::meter::{Attach, Counters, Measure, Meter, MeterConfig, MeterError};
use drover_ebpf::{Counter, Direction};
use meter_net::{Net, UPLINK, Who};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

const DATA_PORT: u16 = 7470;
const TENANT_PORT: u16 = 8080;
/// Fast enough to be done soon, slow enough that frames are cut in segments
/// at the shaper; with a queue that holds everything.
const CORE: &str = "tbf rate 2gbit burst 128kb limit 40mb";

fn config(attach: Attach) -> MeterConfig {
    MeterConfig {
        uplinks: vec![UPLINK.into()],
        in_rack: vec![
            "10.77.1.0/24".parse().unwrap(),
            "fd77:1::/32".parse().unwrap(),
        ],
        across_core: vec![],
        agents: [Who::Host, Who::Peer, Who::Far]
            .into_iter()
            .flat_map(|who| [who.v4(), who.v6()])
            .collect(),
        ports: vec![DATA_PORT],
        mark: 0,
        attach,
    }
}

fn attach(net: &Net, config: MeterConfig) -> Result<Meter, MeterError> {
    net.enter(Who::Host, move || Meter::attach(&config))
        .join()
        .unwrap()
}

/// One kind of traffic, and where the meter has to count it.
struct Flow {
    name: &'static str,
    in_rack: bool,
    migration: bool,
    send: fn(&Net, u16),
    port: u16,
}

fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

const FLOWS: &[Flow] = &[
    Flow {
        name: "tenant, TCP bulk out, IPv4",
        in_rack: false,
        migration: false,
        port: TENANT_PORT,
        send: |net, port| {
            meter_net::tcp_bulk(net, Who::Host, at(Who::Far.v4(), port), Who::Far, 24 << 20)
        },
    },
    Flow {
        name: "tenant, TCP bulk in, IPv6",
        in_rack: false,
        migration: false,
        port: TENANT_PORT,
        send: |net, port| {
            meter_net::tcp_bulk(net, Who::Far, at(Who::Host.v6(), port), Who::Host, 24 << 20)
        },
    },
    Flow {
        name: "migration out, IPv4",
        in_rack: false,
        migration: true,
        port: DATA_PORT,
        send: |net, port| {
            meter_net::tcp_bulk(net, Who::Host, at(Who::Far.v4(), port), Who::Far, 24 << 20)
        },
    },
    Flow {
        name: "migration in, IPv6",
        in_rack: false,
        migration: true,
        port: DATA_PORT,
        send: |net, port| {
            meter_net::tcp_bulk(net, Who::Far, at(Who::Host.v6(), port), Who::Host, 24 << 20)
        },
    },
    Flow {
        name: "pages fetched inside the rack",
        in_rack: true,
        migration: true,
        port: DATA_PORT,
        send: |net, port| {
            meter_net::tcp_bulk(net, Who::Host, at(Who::Peer.v4(), port), Who::Peer, 8 << 20)
        },
    },
    Flow {
        name: "tenants inside the rack",
        in_rack: true,
        migration: false,
        port: TENANT_PORT,
        send: |net, port| {
            meter_net::tcp_bulk(net, Who::Peer, at(Who::Host.v6(), port), Who::Host, 8 << 20)
        },
    },
    Flow {
        name: "small UDP datagrams, IPv4",
        in_rack: false,
        migration: false,
        port: TENANT_PORT,
        send: |net, port| {
            meter_net::udp(
                net,
                Who::Host,
                at(Who::Far.v4(), port),
                Who::Far,
                80,
                4000,
                false,
            )
        },
    },
    Flow {
        name: "UDP with GSO, IPv6, on the agents' port number",
        in_rack: false,
        migration: false,
        port: DATA_PORT,
        send: |net, port| {
            meter_net::udp(
                net,
                Who::Host,
                at(Who::Far.v6(), port),
                Who::Far,
                1200,
                6000,
                true,
            )
        },
    },
    Flow {
        name: "UDP with GSO in, IPv4",
        in_rack: false,
        migration: false,
        port: TENANT_PORT,
        send: |net, port| {
            meter_net::udp(
                net,
                Who::Far,
                at(Who::Host.v4(), port),
                Who::Host,
                1200,
                6000,
                true,
            )
        },
    },
    Flow {
        name: "requests and responses",
        in_rack: false,
        migration: false,
        port: TENANT_PORT,
        send: |net, port| {
            let until = Instant::now() + Duration::from_secs(5);
            let times = meter_net::request_response(
                net,
                Who::Host,
                at(Who::Far.v4(), port),
                Who::Far,
                until,
                400,
            );
            assert!(!times.join().unwrap().is_empty());
        },
    },
];

fn since(now: &Counters, then: &Counters, direction: Direction, in_rack: bool, m: bool) -> Counter {
    let (now, then) = (
        now.get(direction, in_rack, m),
        then.get(direction, in_rack, m),
    );
    Counter {
        bytes: now.bytes - then.bytes,
        packets: now.packets - then.packets,
    }
}

/// Counters of the shaper at both ends of the core link: (out, in).
fn shaped(net: &Net) -> [(u64, u64); 2] {
    [net.qdisc(None), net.qdisc(Some(Who::Far))]
}

/// Waits until what was sent has left the shapers.
fn drained(net: &Net) -> [(u64, u64); 2] {
    let mut last = shaped(net);
    let begun = Instant::now();
    loop {
        std::thread::sleep(Duration::from_millis(60));
        let now = shaped(net);
        if now == last {
            return now;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "never quiet");
        last = now;
    }
}

fn check_flows(attach_as: Attach) {
    let net = Net::new("f", CORE);
    let mut meter = attach(&net, config(attach_as)).unwrap();
    for flow in FLOWS {
        let before = (meter.counters().unwrap(), drained(&net));
        (flow.send)(&net, flow.port);
        let after = (drained(&net), meter.counters().unwrap());
        for (i, direction) in [Direction::Egress, Direction::Ingress]
            .into_iter()
            .enumerate()
        {
            let cell =
                |in_rack, migration| since(&after.1, &before.0, direction, in_rack, migration);
            let name = flow.name;
            let own = cell(flow.in_rack, flow.migration);
            for (in_rack, migration) in [(false, false), (false, true), (true, false), (true, true)]
            {
                // Neighbours' chatter goes on: tenants', inside the rack.
                if (in_rack, migration) == (flow.in_rack, flow.migration)
                    || (in_rack, migration) == (true, false)
                {
                    continue;
                }
                let other = cell(in_rack, migration);
                assert_eq!(
                    other,
                    Counter::default(),
                    "{name}: counted elsewhere too, {direction:?}"
                );
            }
            if flow.in_rack {
                assert!(own.bytes > 1000, "{name}: not counted, {direction:?}");
                continue;
            }
            let wire = after.0[i].0 - before.1[i].0;
            let off = own.bytes as f64 - wire as f64;
            println!(
                "{name}, {direction:?}: meter {} B, shaper {wire} B, off by {off}",
                own.bytes
            );
            // The bridge's multicast reports, 90 bytes each, pass the shaper too.
            let allowed = (wire as f64 * 0.005).max(360.0);
            assert!(
                off.abs() <= allowed,
                "{name}, {direction:?}: off by {off} B"
            );
        }
    }
    net.enter(Who::Host, move || drop(meter)).join().unwrap();
    let left = net.attached(Who::Host);
    assert!(!left.contains("drover"), "still attached: {left}");
}

#[test]
fn bytes_match_the_shaper_and_each_flow_is_counted_where_it_belongs() {
    check_flows(Attach::Tcx);
}

#[test]
fn the_same_holds_with_clsact() {
    check_flows(Attach::Clsact);
}

#[test]
fn filters_of_a_killed_agent_are_replaced() {
    let net = Net::new("k", CORE);
    // With clsact nothing but the agent itself removes them.
    std::mem::forget(attach(&net, config(Attach::Clsact)).unwrap());
    let count = |net: &Net| net.attached(Who::Host).matches("drover_egress").count();
    let left = count(&net);
    assert!(left > 0);
    let meter = attach(&net, config(Attach::Clsact)).unwrap();
    assert_eq!(count(&net), left);
    net.enter(Who::Host, move || drop(meter)).join().unwrap();
    assert_eq!(count(&net), 0);
}

/// All flows at once, both ways, against both shapers.
#[test]
fn a_mixed_load_matches_the_shaper_and_costs_little() {
    let net = Net::new("m", CORE);
    let mut meter = attach(&net, config(Attach::Auto)).unwrap();
    let timing = Meter::measure_cost().unwrap();
    let before = (meter.counters().unwrap(), drained(&net));
    std::thread::scope(|scope| {
        for (i, flow) in FLOWS.iter().enumerate() {
            // Migration is known by its port; the others get their own.
            let port = if flow.migration {
                flow.port
            } else {
                9000 + i as u16
            };
            let net = &net;
            scope.spawn(move || (flow.send)(net, port));
        }
    });
    let after = (drained(&net), meter.counters().unwrap());
    for (i, direction) in [Direction::Egress, Direction::Ingress]
        .into_iter()
        .enumerate()
    {
        let bytes = [false, true].map(|m| since(&after.1, &before.0, direction, false, m).bytes);
        let (wire, metered) = (after.0[i].0 - before.1[i].0, bytes.iter().sum::<u64>());
        let off = (metered as f64 - wire as f64) / wire as f64 * 100.0;
        println!("mixed, {direction:?}: meter {metered} B, shaper {wire} B, off by {off:.4} %");
        assert!(off.abs() < 0.5, "{direction:?}: off by {off} %");
        assert!(bytes.iter().all(|b| *b > 20 << 20), "{bytes:?}");
    }
    let packets = |d| {
        let cells = [(false, false), (false, true), (true, false), (true, true)];
        cells
            .iter()
            .map(|(r, m)| since(&after.1, &before.0, d, *r, *m).packets)
            .sum::<u64>()
    };
    for (cost, direction) in meter
        .cost()
        .unwrap()
        .iter()
        .zip([Direction::Egress, Direction::Ingress])
    {
        let a_run = cost.time.as_nanos() as f64 / cost.runs as f64;
        let a_packet = cost.time.as_nanos() as f64 / packets(direction) as f64;
        println!(
            "cost, {direction:?}: {} runs, {a_run:.0} ns a run, {a_packet:.0} ns a packet",
            cost.runs
        );
        assert!(cost.runs > 1000);
        assert!(a_run < 5000.0, "{direction:?}: {a_run} ns a run");
    }
    drop(timing);
}

#[test]
fn changed_prefixes_and_ports_are_followed() {
    let net = Net::new("c", CORE);
    let mut config = config(Attach::Auto);
    let mut meter = attach(&net, config.clone()).unwrap();
    config.in_rack.push("10.77.2.0/24".parse().unwrap());
    meter.set_places(&config).unwrap();
    meter.set_ports(&[TENANT_PORT]).unwrap();
    let before = meter.counters().unwrap();
    let send =
        |port| meter_net::tcp_bulk(&net, Who::Host, at(Who::Far.v4(), port), Who::Far, 1 << 20);
    send(TENANT_PORT);
    let after = meter.counters().unwrap();
    assert!(since(&after, &before, Direction::Egress, true, true).bytes > 1 << 20);

    config.in_rack.pop();
    meter.set_places(&config).unwrap();
    send(DATA_PORT);
    let last = meter.counters().unwrap();
    assert!(since(&last, &after, Direction::Egress, false, false).bytes > 1 << 20);
    assert_eq!(since(&last, &after, Direction::Egress, true, true).bytes, 0);
}

#[test]
fn wrong_uplinks_are_refused_with_what_is_there() {
    let net = Net::new("w", CORE);
    let with = |uplinks: &[&str]| MeterConfig {
        uplinks: uplinks.iter().map(|name| (*name).to_owned()).collect(),
        ..config(Attach::Auto)
    };
    let error = attach(&net, with(&["eth7"])).err().unwrap().to_string();
    assert!(error.contains("eth7") && error.contains(UPLINK), "{error}");
    let error = attach(&net, with(&["lo"])).err().unwrap();
    assert!(matches!(error, MeterError::NotEthernet { .. }), "{error}");
    let error = attach(&net, with(&[])).err().unwrap();
    assert!(matches!(error, MeterError::NoUplink), "{error}");
    assert!(!net.attached(Who::Host).contains("drover"));
}
