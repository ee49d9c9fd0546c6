//! How much of QEMU's own rate the relay leaves, and what it adds to a guest's
//! stop, told side by side: figures are printed, and decide nothing.

use crate::harness::*;
use crate::private::{Private, Role};
use drover::types::Gfn;
use drover::vmm::definition::{Definition, Role as VmmRole};
use drover::vmm::qemu_stream::{Limits, StreamRelay};
use drover::vmm::qmp::MigrationStatus;
use drover::vmm::stream::SourceVm;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const RAM_KIB: u64 = 320 << 10;
/// Nothing to deduplicate or compress; the rest of RAM is zero.
const NOISE: usize = 256 << 20;
/// Where it is.
const NOISE_AT: u64 = 32 << 20;
const REPS: usize = 2;

/// A reader that discards, and after the last byte says that it has all: how
/// many bytes a second came, from the first to the last.
fn discarding(at: &Path) -> JoinHandle<f64> {
    let listener = UnixListener::bind(at).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut buffer, mut bytes) = (vec![0; 1 << 20], 0);
        let mut first = None;
        let mut last = Instant::now();
        let mut said = false;
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    last = Instant::now();
                    first.get_or_insert(last);
                    bytes += n;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock && !said => {
                    stream.write_all(&[0, 1, 0, 4, 0, 0, 0, 0]).unwrap();
                    said = true;
                }
                Err(e) => panic!("{e}"),
            }
            // All noise is through: what is left comes at once.
            let patience = if bytes > NOISE && !said {
                Duration::from_millis(700)
            } else {
                LIMIT
            };
            stream.set_read_timeout(Some(patience)).unwrap();
        }
        assert!(bytes > NOISE, "{bytes}");
        bytes as f64 / last.duration_since(first.unwrap()).as_secs_f64()
    })
}

fn noise() -> Vec<u8> {
    let mut word = 1_u64;
    let noise = (0..NOISE / 8).flat_map(|_| {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word.to_le_bytes()
    });
    noise.collect()
}

/// The noise in a VM in stream mode: bytes a second of QEMU's stream that the
/// source takes, from the first of these pages to the last, if whoever sends pages
/// keeps up.
async fn into_stream_mode() -> f64 {
    let host = Host::new();
    let text = format!(
        "name = \"vm\"\ndomain = \"test\"\nram = \"{RAM_KIB}K\"\n[qemu]\n\
         binary = \"/usr/bin/qemu-system-x86_64\"\n\
         args = [\"-accel\", \"tcg\", \"-machine\", \"q35\", \"-m\", \"{{ram_size}}\", \
         \"-nodefaults\", \"-display\", \"none\", \"-kernel\", \"{{kernel}}\"]\n"
    );
    let definition = Definition::parse("test", &text).unwrap();
    let launched = host.launch(&definition, VmmRole::Run).await.unwrap();
    let vmm = launched.vmm().clone();
    let qmp = vmm.qmp().unwrap();
    qmp.stop().await.unwrap();
    let at = qmp.human("gpa2hva 0").await.unwrap();
    let at = u64::from_str_radix(at.rsplit_once("0x").unwrap().1.trim(), 16).unwrap();
    let memory = OpenOptions::new()
        .write(true)
        .open(vmm.process.proc_path("mem"))
        .unwrap();
    memory.write_all_at(&noise(), at + NOISE_AT).unwrap();
    let source = SourceVm::open(vmm).await.unwrap();
    let mut pages = source.pages();
    source.begin(&host.dir.join("out")).await.unwrap();
    let [first, last] = [0, NOISE as u64 - 4096].map(|at| Gfn(((NOISE_AT + at) / 4096) as u32));
    let taking = tokio::task::spawn_blocking(move || {
        let mut begun = None;
        loop {
            let taken = pages.take(LIMIT, u64::MAX).unwrap();
            pages.staged();
            if taken.pages.contains(first) {
                begun.get_or_insert_with(Instant::now);
            }
            if taken.pages.contains(last) {
                return begun.unwrap().elapsed();
            }
        }
    });
    let took = taking.await.unwrap();
    source.break_off();
    (NOISE + NOISE / 4096 * 8) as f64 / took.as_secs_f64()
}

#[test]
fn the_rate_into_stream_mode_and_through_the_relay_is_told_beside_that_without() {
    run(async {
        let host = Host::new();
        let role = Role::Still { ram_kib: RAM_KIB };
        let source = Private::start(&host, "source", Accel::Tcg, role).await;
        source.write(NOISE_AT, &noise());
        source.capabilities(&["return-path", "events"]).await;
        source.parameter("max-bandwidth", 1 << 40).await;
        let (far, near) = (host.dir.join("far"), host.dir.join("near"));
        let mut best = [0.0_f64; 2];
        for rep in 0..2 * REPS {
            let reader = discarding(&far);
            let relaying = (rep % 2 == 1).then(|| {
                let (connect, idle) = (LIMIT, LIMIT);
                let relay = StreamRelay::offer("vm", &near, Limits { connect, idle }).unwrap();
                let far = far.clone();
                tokio::spawn(async move { relay.run(&far).await })
            });
            let at = if relaying.is_some() { &near } else { &far };
            source.leave(at).await;
            assert_eq!(source.over().await, MigrationStatus::Completed);
            let rate = reader.join().unwrap() / 1e9;
            if let Some(relaying) = relaying {
                let report = relaying.await.unwrap().unwrap();
                assert!(
                    report.main.tally.pages >= (NOISE / 4096) as u64,
                    "{report:?}"
                );
            }
            std::fs::remove_file(&far).unwrap();
            // From where a migration has left it, QEMU begins no other.
            source.qmp.cont().await.unwrap();
            source.qmp.stop().await.unwrap();
            best[rep % 2] = best[rep % 2].max(rate);
        }
        drop(source);
        let mut streamed = 0.0_f64;
        for _ in 0..REPS {
            streamed = streamed.max(into_stream_mode().await / 1e9);
        }
        let [without, with] = best;
        println!(
            "best of {REPS}: QEMU into a reader that discards {without:.2} GB/s, into stream mode {streamed:.2}: {:.0} %, through the relay {with:.2}: {:.0} %",
            100.0 * streamed / without,
            100.0 * with / without
        );
    });
}

/// One migration of a guest that writes all the while: how long it stood still,
/// as the source says, in ms.
async fn stop(through_the_relay: bool) -> u64 {
    let host = Host::new();
    let source = Private::start(&host, "source", Accel::Tcg, Role::Source).await;
    let target = Private::start(&host, "target", Accel::Tcg, Role::Target).await;
    source.at_work();
    for qemu in [&source, &target] {
        qemu.capabilities(&["return-path", "events"]).await;
    }
    source.parameter("max-bandwidth", 1 << 40).await;
    let (near, far) = (host.dir.join("near"), host.dir.join("far"));
    target.listen(&far).await;
    let relaying = through_the_relay.then(|| {
        let (connect, idle) = (LIMIT, LIMIT);
        let relay = StreamRelay::offer("vm", &near, Limits { connect, idle }).unwrap();
        let far = far.clone();
        tokio::spawn(async move { relay.run(&far).await })
    });
    let at = if through_the_relay { &near } else { &far };
    source.leave(at).await;
    assert_eq!(source.over().await, MigrationStatus::Completed);
    assert_eq!(target.over().await, MigrationStatus::Completed);
    if let Some(relaying) = relaying {
        relaying.await.unwrap().unwrap();
    }
    let info = source
        .qmp
        .execute("query-migrate", serde_json::Value::Null)
        .await;
    info.unwrap()["downtime"].as_u64().unwrap()
}

#[test]
fn the_stop_through_the_relay_is_told_beside_that_without() {
    run(async {
        let mut stops = [Vec::new(), Vec::new()];
        for rep in 0..6 {
            stops[rep % 2].push(stop(rep % 2 == 1).await);
        }
        stops.iter_mut().for_each(|stops| stops.sort_unstable());
        let [without, with] = stops;
        println!("stops in ms: {without:?} without the relay, {with:?} through it");
    });
}
