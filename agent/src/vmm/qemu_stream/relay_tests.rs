//! The relay between a source and a target that the tests play themselves.

use super::error::{Fault, Refusal};
use super::relay::{Limits, RelayError, StreamRelay, StreamReport};
use super::samples;
use super::session::MAX_MULTIFD;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tempfile::TempDir;

const LIMITS: Limits = Limits {
    connect: Duration::from_secs(20),
    idle: Duration::from_secs(20),
};

/// A relay that runs in a thread of its own, and both sides of it.
struct Play {
    dir: TempDir,
    target: UnixListener,
    relay: JoinHandle<Result<StreamReport, RelayError>>,
    give_up: tokio::sync::oneshot::Sender<()>,
}

impl Play {
    fn new(limits: Limits) -> Play {
        let dir = tempfile::tempdir().unwrap();
        let target = UnixListener::bind(dir.path().join("target")).unwrap();
        let (near, far) = (dir.path().join("source"), dir.path().join("target"));
        let (offered, ready) = mpsc::channel();
        let (give_up, given_up) = tokio::sync::oneshot::channel();
        let relay = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let relay = StreamRelay::offer("web1", &near, limits).unwrap();
                offered.send(()).unwrap();
                tokio::select! {
                    outcome = relay.run(&far) => outcome,
                    Ok(()) = given_up => Err(RelayError::Closed { vm: "web1".into() }),
                }
            })
        });
        ready.recv_timeout(LIMITS.connect).unwrap();
        Play {
            dir,
            target,
            relay,
            give_up,
        }
    }

    fn near(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.near()).unwrap();
        limited(stream)
    }

    fn accept(&self) -> UnixStream {
        limited(self.target.accept().unwrap().0)
    }

    /// How it ended; nothing is left of it.
    fn outcome(self) -> Result<StreamReport, RelayError> {
        let outcome = self.relay.join().unwrap();
        assert!(!self.dir.path().join("source").exists());
        outcome
    }

    /// Why it failed, as operators see it.
    fn error(self) -> String {
        let error = self.outcome().unwrap_err();
        let mut text = error.to_string();
        let mut at: &dyn std::error::Error = &error;
        while let Some(source) = at.source() {
            text += &format!(": {source}");
            at = source;
        }
        assert!(text.contains("VM web1"), "{text}");
        text
    }
}

fn limited(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(LIMITS.idle)).unwrap();
    stream.set_write_timeout(Some(LIMITS.idle)).unwrap();
    stream
}

fn plain() -> Vec<u8> {
    samples::streams().swap_remove(0).1
}

fn shut(value: u32) -> Vec<u8> {
    samples::message(1, &value.to_be_bytes())
}

fn exactly(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// All that comes, up to an end that may be a reset.
fn rest(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

#[test]
fn a_migration_goes_through_byte_by_byte_and_so_does_the_answer() {
    let play = Play::new(LIMITS);
    let (main, packets) = (plain(), samples::multifd().swap_remove(0).1);
    let mut source = play.connect();
    // The others may speak before the main connection does, yet come after it.
    let mut others: Vec<UnixStream> = (0..2).map(|_| play.connect()).collect();
    for other in &mut others {
        other.write_all(&packets).unwrap();
    }
    for piece in main.chunks(1000) {
        source.write_all(piece).unwrap();
    }
    let mut target = play.accept();
    assert_eq!(exactly(&mut target, main.len()), main);
    let mut arrived: Vec<UnixStream> = others.iter().map(|_| play.accept()).collect();
    for one in &mut arrived {
        assert_eq!(exactly(one, packets.len()), packets);
    }
    let pong = samples::message(2, &[0, 0, 0, 1]);
    target.write_all(&pong).unwrap();
    assert_eq!(exactly(&mut source, pong.len()), pong);
    target.write_all(&shut(0)).unwrap();
    drop(target);
    assert_eq!(rest(&mut source), shut(0));
    drop((source, others));
    for one in &mut arrived {
        assert!(rest(one).is_empty());
    }
    let report = play.outcome().unwrap();
    assert_eq!(report.main.bytes, main.len() as u64);
    assert_eq!(report.back, 16);
    let bytes: Vec<u64> = report.multifd.iter().map(|channel| channel.bytes).collect();
    assert_eq!(bytes, [packets.len() as u64; 2]);
    assert_eq!(report.multifd[0].tally.pages, 2);
}

/// PING waits for its PONG: what is before a half record must not wait for the
/// other half.
#[test]
fn what_was_sent_is_not_held_back() {
    let play = Play::new(LIMITS);
    let main = plain();
    let mut source = play.connect();
    for byte in main.chunks(1).take(70) {
        source.write_all(byte).unwrap();
    }
    // The magic, the configuration with its UUID, OPEN_RETURN_PATH; of PING, two bytes.
    let wanted = 8 + 15 + 40 + 5;
    let mut target = play.accept();
    assert_eq!(exactly(&mut target, wanted), main[..wanted]);
    drop(source);
    assert!(play.error().contains("the connection ended where"));
}

/// The channels of a section wait for each other in QEMU, not in the relay.
#[test]
fn a_connection_that_is_not_read_holds_up_no_other() {
    let play = Play::new(LIMITS);
    let main = plain();
    let mut source = play.connect();
    source.write_all(&main[..100]).unwrap();
    let mut target = play.accept();
    let mut slow = play.connect();
    let pages: Vec<u64> = (0..128).collect();
    let packets = [samples::init(0), samples::packet(0, &pages, &[]).repeat(8)].concat();
    let sent = packets.clone();
    let sending = thread::spawn(move || {
        slow.write_all(&sent).unwrap();
        slow
    });
    let mut stuck = play.accept();
    // Much more than all buffers on the way hold.
    thread::sleep(Duration::from_millis(100));
    assert!(!sending.is_finished());
    source.write_all(&main[100..]).unwrap();
    assert_eq!(exactly(&mut target, main.len()), main);
    assert_eq!(exactly(&mut stuck, packets.len()), packets);
    drop(sending.join().unwrap());
    target.write_all(&shut(0)).unwrap();
    assert_eq!(exactly(&mut source, 8), shut(0));
    drop((source, target));
    play.outcome().unwrap();
}

#[test]
fn a_source_that_breaks_off_ends_both_sides() {
    let main = plain();
    // Within a page, between sections, within device state.
    for len in [1000, 300, main.len() - 1] {
        let play = Play::new(LIMITS);
        let mut source = play.connect();
        source.write_all(&main[..len]).unwrap();
        source.shutdown(Shutdown::Write).unwrap();
        let mut target = play.accept();
        let arrived = rest(&mut target);
        assert!(main.starts_with(&arrived) && arrived.len() <= len);
        drop(target);
        assert!(rest(&mut source).is_empty(), "an answer was made up");
        let error = play.error();
        assert!(
            error.contains("connection ended") || error.contains("before it had confirmed"),
            "{error}"
        );
    }
}

#[test]
fn a_target_that_closes_early_is_no_answer() {
    let play = Play::new(LIMITS);
    let main = plain();
    let mut source = play.connect();
    source.write_all(&main[..5000]).unwrap();
    let mut target = play.accept();
    exactly(&mut target, 4);
    drop(target);
    assert!(rest(&mut source).is_empty());
    let error = play.error();
    assert!(error.to_lowercase().contains("its log says why"), "{error}");
}

#[test]
fn a_target_that_says_it_failed_is_heard() {
    let play = Play::new(LIMITS);
    let main = plain();
    let mut source = play.connect();
    source.write_all(&main).unwrap();
    let mut target = play.accept();
    exactly(&mut target, main.len());
    target.write_all(&shut(1)).unwrap();
    drop(target);
    assert_eq!(rest(&mut source), shut(1));
    assert!(play.error().contains("SHUT with 1"));
}

#[test]
fn what_is_not_carried_is_refused_before_the_target_hears_of_it() {
    let tls = [&[0x16, 3, 1, 2, 0][..], &[0; 512]].concat();
    let postcopy = samples::Stream::new().command(3, &[0; 16]).0;
    for (bytes, refusal) in [(tls, Refusal::Tls), (postcopy, Refusal::Postcopy)] {
        let play = Play::new(LIMITS);
        let mut source = play.connect();
        source.write_all(&bytes).unwrap();
        assert!(rest(&mut source).is_empty());
        let error = play.outcome().unwrap_err();
        assert_eq!(error.fault(), Some(&Fault::Refused(refusal)));
    }
}

#[test]
fn a_second_migration_and_too_many_connections_are_refused() {
    let play = Play::new(LIMITS);
    let mut source = play.connect();
    source.write_all(b"QEVM").unwrap();
    let _target = play.accept();
    let mut second = play.connect();
    second.write_all(b"QEVM").unwrap();
    assert!(rest(&mut source).is_empty());
    assert!(play.error().contains("a second migration"));

    let play = Play::new(LIMITS);
    let mut source = play.connect();
    let others: Vec<UnixStream> = (0..=MAX_MULTIFD).map(|_| play.connect()).collect();
    assert!(rest(&mut source).is_empty());
    drop(others);
    assert!(play.error().contains("multifd-channels"));
}

#[test]
fn every_wait_has_a_limit_and_says_what_was_waited_for() {
    let short = Duration::from_millis(100);
    let (connect, idle) = (short, short);
    let play = Play::new(Limits { connect, ..LIMITS });
    assert!(play.error().contains("did not connect to"));

    let play = Play::new(Limits { idle, ..LIMITS });
    let mut source = play.connect();
    // It may be over already when this thread gets to run.
    let _ = source.write_all(&plain()[..5000]);
    assert!(rest(&mut source).is_empty());
    assert!(play.error().contains("stood still for 100ms"));

    // Nothing is said at all.
    let play = Play::new(Limits { idle, ..LIMITS });
    let mut source = play.connect();
    assert!(rest(&mut source).is_empty());
    assert!(play.error().contains("stood still"));
}

#[test]
fn a_target_that_is_not_there_is_named() {
    let play = Play::new(LIMITS);
    std::fs::remove_file(play.dir.path().join("target")).unwrap();
    let mut source = play.connect();
    source.write_all(b"QEVM").unwrap();
    assert!(rest(&mut source).is_empty());
    let error = play.error();
    assert!(error.contains("-incoming unix:"), "{error}");
}

#[test]
fn giving_up_ends_everything() {
    let play = Play::new(LIMITS);
    let mut source = play.connect();
    let mut other = play.connect();
    source.write_all(&plain()[..5000]).unwrap();
    let mut target = play.accept();
    exactly(&mut target, 100);
    let Play {
        give_up,
        relay,
        dir,
        ..
    } = play;
    give_up.send(()).unwrap();
    assert!(matches!(
        relay.join().unwrap(),
        Err(RelayError::Closed { .. })
    ));
    for end in [&mut source, &mut other, &mut target] {
        rest(end);
    }
    assert!(!dir.path().join("source").exists());
}
