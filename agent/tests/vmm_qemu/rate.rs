//! How much of QEMU's own rate the relay leaves, and what it adds to a guest's
//! stop, told side by side: figures are printed, and decide nothing.

use crate::harness::*;
use crate::private::{Private, Role};
use drover::vmm::qemu_stream::{Limits, StreamRelay};
use drover::vmm::qmp::MigrationStatus;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const RAM_KIB: u64 = 320 << 10;
/// Nothing to deduplicate or compress; the rest of RAM is zero.
const NOISE: usize = 256 << 20;
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

#[test]
fn the_rate_through_the_relay_is_told_beside_that_without() {
    run(async {
        let host = Host::new();
        let role = Role::Still { ram_kib: RAM_KIB };
        let source = Private::start(&host, "source", Accel::Tcg, role).await;
        let mut word = 1_u64;
        let noise = (0..NOISE / 8).flat_map(|_| {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            word.to_le_bytes()
        });
        source.write(32 << 20, &noise.collect::<Vec<u8>>());
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
        let [without, with] = best;
        println!(
            "best of {REPS}: QEMU into a reader that discards {without:.2} GB/s, through the relay {with:.2} GB/s: {:.0} %",
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
