//! What lanes do when a peer, or the way to it, fails.

use super::frame::ReverseFrame;
use super::testing::*;
use super::tests::{Gated, LIMIT, assert_pages, until};
use super::*;
use crate::types::Class;
use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Forwards connections and cuts each of the first `cuts` after `after` bytes.
fn cutting_proxy(to: std::net::SocketAddr, cuts: usize, after: usize) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for (n, source) in listener.incoming().enumerate() {
            let (source, target) = (source.unwrap(), connect(to).unwrap());
            let budget = if n < cuts { after } else { usize::MAX };
            let (s, t) = (source.try_clone().unwrap(), target.try_clone().unwrap());
            std::thread::spawn(move || pump(t, s, usize::MAX));
            std::thread::spawn(move || pump(source, target, budget));
        }
    });
    address
}

fn pump(mut from: TcpStream, mut to: TcpStream, mut budget: usize) {
    let mut buf = vec![0; 1 << 16];
    while let Ok(n @ 1..) = from.read(&mut buf) {
        let n = n.min(budget);
        if to.write_all(&buf[..n]).is_err() {
            break;
        }
        budget -= n;
        if budget == 0 {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[test]
fn a_broken_lane_reports_lost_reopens_and_everything_arrives_after_resubmission() {
    let ram = Arc::new(Ram::default());
    let target = Target::start(ram.clone());
    // Each cut is in the middle of the second or third frame.
    let address = cutting_proxy(target.address, 3, 1_300_000);
    let pool = BufferPool::new(8).unwrap();
    let mut config = config(Compress::Never);
    config.lanes = 2;
    let set = LaneSet::start(config, &pool, Arc::new(Unpaced), sealed_to(address)).unwrap();
    let mut waiting: HashSet<u64> = (0..24).collect();
    let mut to_send: Vec<u64> = (0..24).rev().collect();
    let (mut lost_count, mut downs) = (0, 0);
    let end = Instant::now() + LIMIT;
    while !waiting.is_empty() {
        assert!(Instant::now() < end, "{waiting:?} never arrived");
        if let Some(&n) = to_send.last()
            && pool.available() > 0
        {
            let staged = batch(&pool, n, n as u32 * 200, 128, Class::Precopy);
            if set.submit(staged, Duration::from_millis(20)).is_ok() {
                to_send.pop();
            }
        }
        while let Ok(event) = set.events().recv_timeout(Duration::from_millis(1)) {
            match event {
                LaneEvent::Placed { batches, .. } => {
                    batches.iter().for_each(|id| assert!(waiting.remove(&id.0)));
                }
                LaneEvent::Lost { batches } => {
                    lost_count += batches.len();
                    for lost in batches {
                        assert_eq!(lost.entries.pages.len(), 128);
                        to_send.push(lost.head.batch.0);
                    }
                }
                LaneEvent::LaneDown { .. } => downs += 1,
                LaneEvent::LaneUp { .. } => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }
    assert!(
        downs >= 3 && lost_count >= 3,
        "{downs} breaks, {lost_count} lost"
    );
    assert!(set.close(LIMIT));
    assert_pages(&ram, (0..24).flat_map(|n| n * 200..n * 200 + 128));
    assert_eq!(pool.available(), 8);
}

#[test]
fn a_target_that_stalls_is_noticed_within_two_seconds() {
    // Accepts and never reads nor answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let pool = BufferPool::new(4).unwrap();
    let mut config = config(Compress::Never);
    config.lanes = 1;
    let set = LaneSet::start(config, &pool, Arc::new(Unpaced), sealed_to(address)).unwrap();
    let _held = listener.accept().unwrap();
    until(&set, |event| matches!(event, LaneEvent::LaneUp { .. }));
    let start = Instant::now();
    set.submit(batch(&pool, 7, 0, 128, Class::Precopy), LIMIT)
        .unwrap();
    let mut lost = Vec::new();
    until(&set, |event| match event {
        LaneEvent::Lost { batches } => {
            lost.extend(batches.iter().map(|b| b.head.batch));
            false
        }
        LaneEvent::LaneDown { why, .. } => {
            assert!(
                why.contains("no sign of life") && why.contains("test target"),
                "{why}"
            );
            true
        }
        _ => false,
    });
    assert!(
        start.elapsed() < Duration::from_millis(2100),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(lost, [BatchId(7)]);
    drop(set);
    assert_eq!(pool.available(), 4);
}

#[test]
fn a_silent_source_is_noticed_within_two_seconds() {
    let target = Target::start_plain(Arc::new(Ram::default()));
    let _source = connect(target.address).unwrap();
    let start = Instant::now();
    target.await_receivers(1);
    let receivers = target.receivers.lock().unwrap();
    let end = receivers[0].wait(LIMIT);
    assert!(
        matches!(end, Some(LaneEnd::Broken(ReceiveError::Silent(_)))),
        "{end:?}"
    );
    // Half a second of last words included.
    assert!(
        start.elapsed() < Duration::from_millis(2700),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn garbage_closes_the_lane_and_the_sender_is_told_why() {
    let target = Target::start_plain(Arc::new(Ram::default()));
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: drover\r\n\r\n"[..],
        // A prologue that promises 4 GiB.
        b"DRVL\x01\x01\x00\x00\xff\xff\xff\xff",
        // An Ack, which does not travel forward.
        b"DRVL\x01\x10\x00\x00\x08\x00\x00\x00\0\0\0\0\0\0\0\0",
        // The right prologue, then a zstd stream of nonsense.
        b"DRVL\x01\x01\x03\x00\x20\x00\x00\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\x05\0\0\0xxxx",
    ] {
        let before = target.receivers.lock().unwrap().len();
        let mut source = connect(target.address).unwrap();
        source.set_read_timeout(Some(LIMIT)).unwrap();
        source.write_all(garbage).unwrap();
        let mut answer = Vec::new();
        source.read_to_end(&mut answer).unwrap();
        drop(source);
        target.await_receivers(before + 1);
        let text = String::from_utf8_lossy(&answer);
        assert!(text.contains("sent a b"), "{garbage:?} was answered with {text:?}");
        let receivers = target.receivers.lock().unwrap();
        let end = receivers[before].wait(LIMIT);
        assert!(matches!(
            end,
            Some(LaneEnd::Broken(ReceiveError::Frame(_) | ReceiveError::Decode(_)))
        ));
        let memory = receivers[before].stats().memory_bytes as usize;
        assert!(memory <= ReceiveConfig::new("").bytes(), "{memory} bytes");
    }
}

#[test]
fn pages_beyond_ram_and_unknown_vms_are_refused() {
    for (first, vm, want) in [
        (RAM_PAGES - 10, VM, "beyond the VM's"),
        (0, crate::types::VmIndex(9), "is not being received here"),
    ] {
        let ram = Arc::new(Ram::default());
        let target = Target::start(ram.clone());
        let pool = BufferPool::new(2).unwrap();
        let mut config = config(Compress::Always);
        config.lanes = 1;
        let set = LaneSet::start(config, &pool, Arc::new(Unpaced), target.connector()).unwrap();
        let mut staged = batch(&pool, 1, first, 20, Class::Precopy);
        staged.vm = vm;
        set.submit(staged, LIMIT).unwrap();
        until(&set, |event| match event {
            LaneEvent::LaneDown { why, .. } => {
                assert!(why.contains(want), "{why}");
                true
            }
            _ => false,
        });
        assert!(ram.pages.lock().unwrap().is_empty());
    }
}

#[test]
fn a_peer_that_cannot_be_reached_fails_once_and_submit_returns_the_batch() {
    let pool = BufferPool::new(2).unwrap();
    let mut config = config(Compress::Never);
    config.give_up_after = Duration::from_millis(300);
    let refused = || Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
    let set = LaneSet::start(config, &pool, Arc::new(Unpaced), Arc::new(refused)).unwrap();
    let error = set
        .submit(batch(&pool, 1, 0, 4, Class::Precopy), LIMIT)
        .unwrap_err();
    assert!(matches!(error.why, Refusal::PeerFailed(_)), "{error}");
    assert_eq!(error.batch.batch, BatchId(1));
    until(&set, |event| matches!(event, LaneEvent::PeerFailed { .. }));
    assert!(set.close(LIMIT));
    assert!(set.events().try_iter().next().is_none());
}

#[test]
fn a_batch_acknowledged_before_it_was_sent_is_not_believed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let pool = BufferPool::new(4).unwrap();
    let mut config = config(Compress::Never);
    config.lanes = 1;
    let set = LaneSet::start(config, &pool, Arc::new(Gated::default()), plain_to(address)).unwrap();
    let (mut target, _) = listener.accept().unwrap();
    until(&set, |event| matches!(event, LaneEvent::LaneUp { .. }));
    set.submit(batch(&pool, 7, 0, 20, Class::Precopy), LIMIT)
        .unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let mut ack = Vec::new();
    ReverseFrame::Ack(vec![BatchId(7)]).encode(&mut ack);
    target.write_all(&ack).unwrap();
    let mut lost = false;
    until(&set, |event| match event {
        LaneEvent::Placed { .. } => panic!("believed"),
        LaneEvent::Lost { batches } => {
            lost = batches[0].head.batch == BatchId(7);
            false
        }
        LaneEvent::LaneDown { why, .. } => {
            assert!(why.contains("acknowledged batch 7"), "{why}");
            true
        }
        _ => false,
    });
    assert!(lost);
}
