//! QEMU's own migration through the relay, between real QEMUs with private RAM.

use crate::harness::*;
use crate::private::{Private, Role};
use drover::vmm::qemu_stream::main_channel::StreamParser;
use drover::vmm::qemu_stream::write::StreamWriter;
use drover::vmm::qemu_stream::{
    Fault, Limits, Parse, RawFrom, Refusal, RelayError, StreamRelay, StreamReport,
};
use drover::vmm::qmp::MigrationStatus;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

const LIMITS: Limits = Limits {
    connect: LIMIT,
    idle: LIMIT,
};

/// Bytes of a connection, there and back.
type Bytes = Arc<Mutex<[Vec<u8>; 2]>>;

/// Passes connections on and keeps what went through.
struct Tee {
    seen: Arc<Mutex<Vec<Bytes>>>,
    accepting: JoinHandle<()>,
}

impl Tee {
    fn new(at: &Path, to: PathBuf) -> Tee {
        let listener = UnixListener::bind(at).unwrap();
        let seen: Arc<Mutex<Vec<Bytes>>> = Arc::default();
        let all = seen.clone();
        let accepting = tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                // One after the other: the first is the main connection.
                let far = UnixStream::connect(&to).await.unwrap();
                let bytes = Bytes::default();
                all.lock().unwrap().push(bytes.clone());
                let (near_in, near_out) = near.into_split();
                let (far_in, far_out) = far.into_split();
                tokio::spawn(Tee::copy(near_in, far_out, bytes.clone(), 0));
                tokio::spawn(Tee::copy(far_in, near_out, bytes, 1));
            }
        });
        Tee { seen, accepting }
    }

    async fn copy(
        mut from: impl AsyncReadExt + Unpin,
        mut to: impl AsyncWriteExt + Unpin,
        seen: Bytes,
        way: usize,
    ) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from.read(&mut buffer).await {
            seen.lock().unwrap()[way].extend_from_slice(&buffer[..n]);
            if to.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    }

    /// What went through, by what the connections are: the main one, or the
    /// number of a multifd channel.
    async fn seen(self) -> BTreeMap<Option<u8>, [Vec<u8>; 2]> {
        self.accepting.abort();
        let _ = self.accepting.await;
        let all = std::mem::take(&mut *self.seen.lock().unwrap());
        let mut seen = BTreeMap::new();
        for bytes in all {
            let until = std::time::Instant::now() + LIMIT;
            // Both ways have ended when nobody else holds it.
            while Arc::strong_count(&bytes) > 1 {
                assert!(std::time::Instant::now() < until, "a connection stays open");
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
            let bytes = std::mem::take(&mut *bytes.lock().unwrap());
            let name = (!bytes[0].starts_with(b"QEVM")).then(|| bytes[0][24]);
            assert!(seen.insert(name, bytes).is_none());
        }
        seen
    }
}

type Relaying = JoinHandle<Result<StreamReport, RelayError>>;

/// A relay from the socket `relay` of the host to `to`.
fn relaying(host: &Host, to: &Path) -> (PathBuf, Relaying) {
    let at = host.dir.join("relay");
    let relay = StreamRelay::offer("vm", &at, LIMITS).unwrap();
    let to = to.to_owned();
    let running = tokio::spawn(async move { relay.run(&to).await });
    (at, running)
}

/// A main connection's bytes, taken apart and written again.
fn rewritten(bytes: &[u8]) -> Vec<u8> {
    let (mut parser, mut writer) = (StreamParser::default(), StreamWriter::default());
    let (mut at, mut out) = (0, Vec::with_capacity(bytes.len()));
    while let Some((item, used)) = parser.next(&bytes[at..]).unwrap() {
        at += used;
        writer.write(item, &mut out).unwrap();
    }
    parser.finish(bytes.len() - at).unwrap();
    out
}

/// What arrives is what was sent, and the guest lives on with it.
fn moves(accel: Accel, channels: Option<u8>) {
    run(async {
        let host = Host::new();
        let source = Private::start(&host, "source", accel, Role::Source).await;
        let target = Private::start(&host, "target", accel, Role::Target).await;
        source.at_work();
        for qemu in [&source, &target] {
            qemu.capabilities(&["return-path", "events"]).await;
            if let Some(channels) = channels {
                qemu.capabilities(&["multifd"]).await;
                qemu.parameter("multifd-channels", channels.into()).await;
            }
        }
        source.parameter("max-bandwidth", 1 << 40).await;
        let [near, far, incoming] = ["near", "far", "incoming"].map(|name| host.dir.join(name));
        target.listen(&incoming).await;
        let arriving = Tee::new(&far, incoming);
        let (relay, running) = relaying(&host, &far);
        let leaving = Tee::new(&near, relay);
        source.leave(&near).await;
        assert_eq!(source.over().await, MigrationStatus::Completed);
        assert_eq!(target.over().await, MigrationStatus::Completed);
        let report = running.await.unwrap().unwrap();
        println!("{accel:?} {channels:?}: {report:?}");

        let (sent, arrived) = (leaving.seen().await, arriving.seen().await);
        assert_eq!(sent.len(), 1 + usize::from(channels.unwrap_or(0)));
        for (name, [there, back]) in &sent {
            let [there_too, back_too] = &arrived[name];
            assert!(there == there_too, "{name:?}: {} bytes differ", there.len());
            assert_eq!(back, back_too, "{name:?}");
        }
        assert_eq!(arrived.len(), sent.len());
        let [there, back] = &sent[&None];
        assert!(rewritten(there) == *there, "items make other bytes");
        assert_eq!(report.main.bytes, there.len() as u64);
        assert_eq!(report.back, back.len() as u64);
        assert_eq!(report.raw, Some(RawFrom::DeviceState));
        // The noise, and the pages that are written: in a round at least.
        let pages: u64 = report
            .multifd
            .iter()
            .map(|channel| channel.tally.pages)
            .sum();
        let pages = match channels {
            None => report.main.tally.pages,
            Some(channels) => {
                assert_eq!(report.multifd.len(), usize::from(channels));
                pages
            }
        };
        assert!(pages >= 1024, "{report:?}");
        assert!(report.main.tally.zeros > 10_000, "{report:?}");

        assert_eq!(differing(&source.ram(), &target.ram()), [0_usize; 0]);
        target.qmp.cont().await.unwrap();
        target.wait_ticking();
        target.wait_ticking();
        assert_eq!(target.torn_pages(), 0);
        assert!(!source.is_running().await);
    });
}

#[test]
fn a_stream_arrives_byte_for_byte_tcg() {
    moves(Accel::Tcg, None);
}

#[test]
fn a_stream_arrives_byte_for_byte_kvm() {
    moves(Accel::Kvm, None);
}

#[test]
fn multifd_streams_arrive_byte_for_byte_kvm() {
    moves(Accel::Kvm, Some(3));
}

/// Whatever breaks, the VM runs on at its source, and no target believes that it
/// has a whole VM.
#[test]
fn a_stream_that_breaks_leaves_the_vm_at_its_source() {
    run(async {
        let host = Host::new();
        let mut source = Private::start(&host, "source", Accel::Tcg, Role::Source).await;
        source.at_work();
        source.capabilities(&["return-path", "events"]).await;
        // So slow that every one of these breaks it half way.
        source.parameter("max-bandwidth", 1 << 20).await;
        for breaks in ["the operator cancels", "the target dies", "the source dies"] {
            let mut target = Private::start(&host, "target", Accel::Tcg, Role::Target).await;
            target.capabilities(&["return-path", "events"]).await;
            let incoming = host.dir.join("incoming");
            target.listen(&incoming).await;
            let (relay, running) = relaying(&host, &incoming);
            source.leave(&relay).await;
            source.under_way().await;
            match breaks {
                "the operator cancels" => source.qmp.migrate_cancel().await.unwrap(),
                "the target dies" => target.kill(),
                _ => source.kill(),
            }
            let error = running.await.unwrap().unwrap_err();
            println!("{breaks}: {}", full(&error));
            assert!(error.to_string().contains("VM vm"), "{error}");
            match breaks {
                "the operator cancels" => {
                    assert_eq!(source.over().await, MigrationStatus::Cancelled);
                }
                "the target dies" => assert_eq!(source.over().await, MigrationStatus::Failed),
                _ => {}
            }
            if breaks != "the target dies" {
                assert!(!target.ended().success());
            }
            if breaks != "the source dies" {
                assert!(source.is_running().await);
                source.wait_ticking();
                assert_eq!(source.torn_pages(), 0);
            }
            drop(target);
            for file in ["incoming", "target.qmp"] {
                let _ = std::fs::remove_file(host.dir.join(file));
            }
        }
    });
}

/// With real QEMUs: the first record that cannot be carried ends it, and what to
/// switch off is said.
#[test]
fn kinds_of_migration_that_are_not_carried_are_refused() {
    run(async {
        let host = Host::new();
        let source = Private::start(&host, "source", Accel::Tcg, Role::Source).await;
        source.at_work();
        let nowhere = host.dir.join("target");
        let _target = UnixListener::bind(&nowhere).unwrap();
        for (capability, refusal) in [
            // First: after a failed migration with a return path, QEMU 7.2 opens one
            // even where it was switched off.
            ("events", Refusal::NoReturnPath),
            ("postcopy-ram", Refusal::Postcopy),
            ("compress", Refusal::Compressed),
        ] {
            let return_path = (capability != "events").then_some("return-path");
            let names: Vec<&str> = [Some(capability), return_path]
                .into_iter()
                .flatten()
                .collect();
            source.capabilities(&names).await;
            let (relay, running) = relaying(&host, &nowhere);
            source.leave(&relay).await;
            let error = running.await.unwrap().unwrap_err();
            assert_eq!(
                error.fault(),
                Some(&Fault::Refused(refusal)),
                "{}",
                full(&error)
            );
            assert!(
                full(&error).contains("VM vm: main connection"),
                "{}",
                full(&error)
            );
            assert_eq!(source.over().await, MigrationStatus::Failed);
            assert!(source.is_running().await);
            let off: Vec<(&str, bool)> = names.iter().map(|name| (*name, false)).collect();
            source.qmp.set_migration_capabilities(&off).await.unwrap();
        }
        source.wait_ticking();
    });
}
