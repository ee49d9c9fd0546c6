//! The lab keeps its own promises: what it counts is what crossed the core
//! link, and it leaves nothing behind.

use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};
use tests::guest::disk;
use tests::qemu::{Places, Workload};
use tests::serial::Serial;
use tests::slowdisk::SlowDisk;
use tests::topology::{Host, Lab, Shape};
use tests::{check, registry, save};

const PATIENCE: Duration = Duration::from_secs(40);

/// Sends `bytes` from one host to another over TCP.
fn send(from: &Host, to: &Host, bytes: usize) -> Result<()> {
    let listener = to.ns.inside(|| Ok(TcpListener::bind((to.addr, 0))?))?;
    let port = listener.local_addr()?.port();
    std::thread::scope(|s| {
        let reader = s.spawn(move || -> Result<usize> {
            let (mut stream, _) = listener.accept()?;
            let (mut got, mut buf) = (0, vec![0; 1 << 16]);
            loop {
                match stream.read(&mut buf)? {
                    0 => return Ok(got),
                    n => got += n,
                }
            }
        });
        from.ns.inside(|| {
            let mut stream = TcpStream::connect((to.addr, port))?;
            Ok(stream.write_all(&vec![7; bytes])?)
        })?;
        assert_eq!(reader.join().expect("the reader does not panic")?, bytes);
        Ok(())
    })
}

/// Segments that TCP on this host has sent more than once.
fn sent_again(host: &Host) -> Result<u64> {
    host.ns.inside(|| {
        let text = std::fs::read_to_string("/proc/thread-self/net/snmp")?;
        let mut tcp = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
        let names = tcp.next().context("no names of TCP's counters")?;
        let values = tcp.next().context("no TCP counters")?;
        let mut both = names.split(' ').zip(values.split(' '));
        let (_, count) = both
            .find(|(name, _)| *name == "RetransSegs")
            .context("no RetransSegs")?;
        Ok(count.parse()?)
    })
}

#[test]
fn core_counts_what_crosses_it_and_nothing_else() -> Result<()> {
    const SENT: usize = 20 << 20;
    let lab = Lab::up(Shape {
        rate_mbit: 2000,
        ..Shape::default()
    })?;
    let id = lab.id().to_string();
    let start = lab.core()?;
    let sender = lab.host(1, 1);
    send(sender, lab.host(1, 2), SENT)?;
    let in_rack = lab.core()?.since(&start);
    assert!(
        in_rack.total() < 1000,
        "traffic inside a rack reached the core: {in_rack:?}"
    );

    let before = sent_again(sender)?;
    send(sender, lab.host(2, 1), SENT)?;
    let again = sent_again(sender)? - before;
    let across = lab.core()?.since(&start);
    // 66 bytes of headers (54 and timestamps) for each segment of 1448 bytes.
    let on_wire = SENT as f64 * (1.0 + 66.0 / 1448.0);
    // TCP sends some segments twice when a queue is full or a processor busy;
    // those of them that were not lost count twice.
    let most = on_wire * 1.01 + (again * 1514) as f64;
    assert!(
        (on_wire * 0.99..most).contains(&(across.sent[0] as f64)),
        "{} bytes counted for {on_wire} on the wire and {again} segments sent again",
        across.sent[0]
    );

    drop(lab);
    assert_eq!(registry::leftovers(&id), Vec::<String>::new());
    Ok(())
}

#[test]
fn three_racks_meet_at_a_spine() -> Result<()> {
    let lab = Lab::up(Shape {
        racks: 3,
        hosts: 1,
        ..Shape::default()
    })?;
    let before = lab.core()?;
    send(lab.host(1, 1), lab.host(3, 1), 1 << 20)?;
    let sent = lab.core()?.since(&before).sent;
    assert!(
        sent[0] > 1 << 20 && sent[1] < 1000 && sent[2] < 100_000,
        "{sent:?}"
    );
    Ok(())
}

#[test]
fn a_panic_leaves_nothing() {
    let mut id = String::new();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let lab = Lab::up(Shape::default()).expect("the lab comes up");
        id = lab.id().to_string();
        let host = lab.host(1, 1);
        let mut sleep = host.ns.command("sh");
        let out = sleep
            .args(["-c", "sleep 1000 >/dev/null 2>&1 &"])
            .status()
            .expect("sh runs");
        assert!(out.success());
        assert_eq!(registry::processes(&host.ns).expect("readable").len(), 1);
        panic!("on purpose");
    }));
    assert!(panicked.is_err() && !id.is_empty());
    assert_eq!(registry::leftovers(&id), Vec::<String>::new());
}

/// A guest that never says CORRUPT would make every test pass.
#[test]
fn restored_guests_find_their_data_and_notice_when_it_is_wrong() -> Result<()> {
    let idle = save::linux(1, Workload::Idle)?.remove(0);
    let dma = save::linux(1, Workload::Dma)?.remove(0);
    let kvm = save::kvm(1)?.remove(0);
    let lab = Lab::up(Shape {
        hosts: 1,
        ..Shape::default()
    })?;
    for (name, saved) in [("idle", idle), ("dma", dma), ("kvm", kvm)] {
        let host = lab.host(1, 1);
        let at = Places::of(name, &host.run_dir, &host.shm_dir);
        let mut vmm = saved.restore(Some(&host.ns), name, &at)?;
        vmm.qmp.execute("cont", serde_json::json!({}))?;
        vmm.tell_guest("verify")?;
        let serial = Serial::new(&at.serial);
        serial.wait("VERIFIED", PATIENCE, |t| t.contains("VERIFIED"))?;
        assert_eq!(check::vmms_of(&lab, name)?, [vmm.pid()]);

        // One byte of every page that is nowhere zero, behind the guest's back.
        vmm.qmp.execute("stop", serde_json::json!({}))?;
        spoil(Path::new(&at.ram))?;
        vmm.qmp.execute("cont", serde_json::json!({}))?;
        vmm.tell_guest("verify")?;
        let noticed = serial.wait("VERIFIED 2", PATIENCE, |t| t.contains("VERIFIED 2"));
        let said = format!("{:#}", noticed.expect_err("the guest must notice"));
        assert!(said.contains("CORRUPT"), "{name}: {said}");
    }
    Ok(())
}

/// The test of the DMA hazard rests on reads that are under way for long.
#[test]
fn slow_disk_holds_reads_back() -> Result<()> {
    let saved = save::linux(1, Workload::Dma)?.remove(0);
    let lab = Lab::up(Shape {
        hosts: 1,
        ..Shape::default()
    })?;
    let slow = SlowDisk::new(
        &format!("drover-lab-{}", lab.id()),
        &disk::stamped(1)?,
        8 << 20,
    )?;
    let host = lab.host(1, 1);
    let at = Places::of("dma", &host.run_dir, &host.shm_dir);
    let mut vmm = saved.restore(Some(&host.ns), "dma", &at)?;
    slow.add(vmm.pid())?;
    vmm.qmp.execute("cont", serde_json::json!({}))?;
    let serial = Serial::new(&at.serial);
    serial.ticks_on(2, PATIENCE)?;
    let (start, before) = (Instant::now(), serial.value("r")?.unwrap_or(0));
    serial.ticks_on(10, PATIENCE)?;
    let reads = (serial.value("r")?.unwrap_or(0) - before) as f64;
    let mib_per_s = reads / 8.0 / start.elapsed().as_secs_f64();
    assert!(
        (2.0..12.0).contains(&mib_per_s),
        "{mib_per_s} MiB/s at a limit of 8"
    );
    drop(vmm);
    drop(slow);
    Ok(())
}

/// Changes pages of random bytes: guests' own data. Code and structures of the
/// guest's kernel, which would crash instead of complaining, are far from even.
fn spoil(ram: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(ram)?;
    let mut page = [0; 4096];
    let mut spoilt = 0;
    for at in (0..file.metadata()?.len()).step_by(4096) {
        file.read_exact_at(&mut page, at)?;
        if looks_random(&page) {
            file.write_all_at(&[!page[2000]], at + 2000)?;
            spoilt += 1;
        }
    }
    assert!(spoilt > 0, "no page to spoil");
    Ok(())
}

/// Whether the 256 values are as even as chance makes them: Pearson's χ² of
/// random bytes is 255 with a deviation of 23, of machine code many thousands.
fn looks_random(page: &[u8; 4096]) -> bool {
    let mut counts = [0_i32; 256];
    for byte in page {
        counts[usize::from(*byte)] += 1;
    }
    let squares: i32 = counts.iter().map(|n| (n - 16).pow(2)).sum();
    squares / 16 < 400
}
