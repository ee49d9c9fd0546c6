//! The short form of the fault matrix, and that it notices planted bugs: each
//! fault and each victim once, at moments that the seed decides. The whole of
//! it is `cargo xtask chaos`.

use anyhow::{Result, ensure};
use drover::gang::plant::Plant;
use drover_ebpf::fault::Fault;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;
use tests::chaos::cell::{self, Cell};
use tests::chaos::link::{self, Bad, Link, Way};
use tests::chaos::{Options, report::Report};
use tests::topology::{Lab, Shape};

/// Another one is as good; this one is always the same.
const SEED: u64 = 3;

fn run(cells: Vec<Cell>, plant: Option<Plant>) -> Result<Report> {
    let options = Options::of(SEED, cells, plant);
    let mut report = Report::new(&options);
    tests::chaos::run(&options, &mut report, &|line, _| {
        println!("{line}");
        Ok(())
    })?;
    Ok(report)
}

#[test]
fn every_fault_and_every_victim_once_and_every_invariant_holds() -> Result<()> {
    let report = run(cell::short(SEED), None)?;
    ensure!(report.ok(), "{}", report.markdown());
    Ok(())
}

/// Sends through the core link of a lab and says how it was received: whether
/// all came, and all of it right, within `limit`.
fn carried(lab: &Lab, bytes: usize, limit: Duration) -> Result<bool> {
    let (from, to) = (lab.host(1, 1), lab.host(2, 1));
    let listener = to
        .ns
        .inside(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7000))?))?;
    let content = |i: usize| (i * 31 % 251) as u8;
    let address = (to.addr, 7000);
    let mut sender = from.ns.inside(|| {
        let stream = TcpStream::connect_timeout(&address.into(), limit)?;
        Ok(stream)
    })?;
    let (mut receiver, _) = listener.accept()?;
    receiver.set_read_timeout(Some(limit))?;
    let sent = std::thread::spawn(move || {
        let all: Vec<u8> = (0..bytes).map(content).collect();
        sender.write_all(&all)
    });
    let mut received = Vec::new();
    let came = receiver.read_to_end(&mut received);
    drop(receiver);
    let _cut_off = sent.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
    ensure!(
        received
            .iter()
            .enumerate()
            .all(|(i, byte)| *byte == content(i)),
        "what TCP delivered is not what was sent"
    );
    Ok(came.is_ok() && received.len() == bytes)
}

#[test]
fn bad_links_are_bad_and_tcp_never_delivers_what_was_not_sent() -> Result<()> {
    let lab = Lab::up(Shape {
        hosts: 1,
        ..Shape::default()
    })?;
    for host in &lab.hosts {
        link::checksum_in_software(&host.ns)?;
    }
    const MANY: usize = 3 << 20;
    let long = Duration::from_secs(20);
    for (drop_ppm, corrupt_ppm) in [(0, 0), (50_000, 0), (0, 10_000)] {
        let fault = Fault {
            seed: SEED,
            drop_ppm,
            corrupt_ppm,
        };
        let bad = Bad::both_ways(&lab, fault)?;
        ensure!(carried(&lab, MANY, long)?, "{fault:?}: not all came");
        for side in &bad {
            let hits = side.hits()?;
            ensure!(hits.seen > 500, "{hits:?}: no frames were seen");
            ensure!((hits.dropped > 0) == (drop_ppm > 0), "{fault:?}: {hits:?}");
            ensure!(
                (hits.corrupted > 0) == (corrupt_ppm > 0),
                "{fault:?}: {hits:?}"
            );
        }
    }
    let short = Duration::from_millis(700);
    for way in [Way::Out, Way::In] {
        for link in [Link::Core(1), Link::Uplink { rack: 2, host: 1 }] {
            let deaf = Bad::deaf(&lab, link, way)?;
            ensure!(carried(&lab, 1, short).is_err(), "{link:?} {way:?} hears");
            drop(deaf);
            ensure!(carried(&lab, 1, long)?, "{link:?} {way:?} stays deaf");
        }
    }
    for link in [
        Link::Core(1),
        Link::Core(2),
        Link::Uplink { rack: 1, host: 1 },
    ] {
        let down = link::Down::new(&lab, link)?;
        ensure!(carried(&lab, 1, short).is_err(), "{link:?} is not down");
        drop(down);
        ensure!(carried(&lab, 1, long)?, "{link:?} stays down");
    }
    Ok(())
}

#[test]
fn the_matrix_notices_a_target_that_resumes_before_the_last_page() -> Result<()> {
    notices(
        Plant::EarlyResume,
        "core-link/loss/precopy",
        "differs at the switch",
    )
}

#[test]
fn the_matrix_notices_pages_that_a_lost_lane_takes_along() -> Result<()> {
    notices(
        Plant::SkipResend,
        "core-link/down3s/precopy",
        "pages at the target were wrong",
    )
}

/// A cell on agents with a bug is red for the right reason.
fn notices(bug: Plant, cell: &str, because: &str) -> Result<()> {
    let cell: Cell = cell.parse().map_err(anyhow::Error::msg)?;
    let report = run(vec![cell], Some(bug))?;
    let why = report.cells[0]
        .found
        .why
        .as_deref()
        .unwrap_or("nothing wrong");
    ensure!(why.contains(because), "{bug:?} went unnoticed: {why}");
    Ok(())
}
