//! Encrypted lanes: what others on the way can see, and what they can do.

use super::testing::*;
use super::tests::{LIMIT, assert_pages, until};
use super::*;
use crate::types::Class;
use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What somebody on the way does with bytes: which connection, forward or
/// back, the bytes, their offset.
type Meddle = Arc<dyn Fn(usize, bool, &mut [u8], usize) + Send + Sync>;

/// Forwards connections to `to`, showing `meddle` everything.
fn on_the_way(to: SocketAddr, meddle: Meddle) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // Ends with the test process; holds nothing but connections.
    std::thread::spawn(move || {
        for (n, source) in listener.incoming().enumerate() {
            let (source, target) = (source.unwrap(), connect(to).unwrap());
            let (s, t) = (source.try_clone().unwrap(), target.try_clone().unwrap());
            let (there, back) = (meddle.clone(), meddle.clone());
            std::thread::spawn(move || pump(source, target, |b, at| there(n, true, b, at)));
            std::thread::spawn(move || pump(t, s, |b, at| back(n, false, b, at)));
        }
    });
    address
}

fn pump(mut from: TcpStream, mut to: TcpStream, meddle: impl Fn(&mut [u8], usize)) {
    let mut buf = vec![0; 1 << 16];
    let mut at = 0;
    while let Ok(n @ 1..) = from.read(&mut buf) {
        meddle(&mut buf[..n], at);
        at += n;
        if to.write_all(&buf[..n]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// Sends `count` batches, again and again where they are lost, until all are
/// acknowledged. Returns the reasons for which lanes went down.
fn send_all(set: &LaneSet, pool: &BufferPool, count: u64) -> Vec<String> {
    let mut waiting: HashSet<u64> = (0..count).collect();
    let mut to_send: Vec<u64> = (0..count).rev().collect();
    let mut downs = Vec::new();
    let end = Instant::now() + LIMIT;
    while !waiting.is_empty() {
        assert!(
            Instant::now() < end,
            "{waiting:?} never arrived, {to_send:?} to be sent, {} buffers free: {downs:?}, {:?}",
            pool.available(),
            set.stats()
        );
        if let Some(&n) = to_send.last()
            && pool.available() > 0
        {
            let staged = batch(pool, n, n as u32 * 200, 128, Class::Precopy);
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
                    to_send.extend(batches.iter().map(|lost| lost.head.batch.0));
                }
                LaneEvent::LaneDown { why, .. } => downs.push(why),
                LaneEvent::LaneUp { .. } => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }
    downs
}

fn one_lane(compress: Compress) -> LaneSetConfig {
    let mut config = config(compress);
    config.lanes = 1;
    config
}

#[test]
fn nothing_of_a_page_or_frame_is_on_the_wire() {
    // A piece of page 2 (text) and of page 0 (noise), and a frame's magic.
    let secrets: Vec<Vec<u8>> = vec![
        page(2)[64..96].to_vec(),
        page(0)[64..80].to_vec(),
        b"DRVL".to_vec(),
    ];
    for (sealed, compress) in [
        (false, Compress::Never),
        (true, Compress::Never),
        (true, Compress::Always),
    ] {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&seen);
        let meddle: Meddle = Arc::new(move |_, forward, bytes, _| {
            let mut seen = keep.lock().unwrap();
            if forward {
                seen.extend_from_slice(bytes);
            } else {
                assert!(!sealed || !bytes.windows(4).any(|w| w == b"DRVL"));
            }
        });
        let ram = Arc::new(Ram::default());
        let (target, to): (_, fn(SocketAddr) -> Connector) = match sealed {
            true => (Target::start(ram.clone()), sealed_to),
            false => (Target::start_plain(ram.clone()), plain_to),
        };
        let connector = to(on_the_way(target.address, meddle));
        let pool = BufferPool::new(4).unwrap();
        let set = LaneSet::start(one_lane(compress), &pool, Arc::new(Unpaced), connector).unwrap();
        assert_eq!(send_all(&set, &pool, 4), Vec::<String>::new());
        assert!(set.close(LIMIT));
        assert_pages(&ram, 0..128);
        let seen = seen.lock().unwrap();
        for secret in &secrets {
            let found = seen.windows(secret.len()).any(|w| w == secret);
            // That they can be found at all is what the lane in the clear shows.
            assert_eq!(found, !sealed, "{secret:?}, {compress:?}");
        }
    }
}

#[test]
fn a_bit_changed_on_the_way_breaks_the_lane_and_everything_arrives_after_it() {
    for forward in [true, false] {
        let changed = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&changed);
        // One bit in each of the first two connections.
        let meddle: Meddle = Arc::new(move |n, direction, bytes, at| {
            let when = if forward { 700_000 } else { 30 };
            if n < 2 && direction == forward && at <= when && when < at + bytes.len() {
                bytes[when - at] ^= 0x10;
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        let ram = Arc::new(Ram::default());
        let target = Target::start(ram.clone());
        let address = on_the_way(target.address, meddle);
        let pool = BufferPool::new(4).unwrap();
        let config = one_lane(Compress::Never);
        let set = LaneSet::start(config, &pool, Arc::new(Unpaced), sealed_to(address)).unwrap();
        let downs = send_all(&set, &pool, 8);
        assert_eq!(changed.load(Ordering::Relaxed), 2);
        assert_eq!(downs.len(), 2, "{downs:?}");
        // The source knows, or the target (whose last words may get lost).
        let ends = target.receivers.lock().unwrap();
        let forged = ends.iter().filter(|receiver| {
            let end = receiver.wait(Duration::ZERO);
            matches!(
                end,
                Some(LaneEnd::Broken(ReceiveError::Record(RecordError::Forged(
                    _
                ))))
            )
        });
        match forward {
            true => assert_eq!(forged.count(), 2),
            false => assert!(
                downs.iter().all(|w| w.contains("cannot be authenticated")),
                "{downs:?}"
            ),
        }
        drop(ends);
        assert!(set.close(LIMIT));
        assert_pages(&ram, (0..8).flat_map(|n| n * 200..n * 200 + 128));
        assert_eq!(pool.available(), 4);
    }
}

#[test]
fn a_lane_whose_keys_are_worn_goes_on_with_fresh_ones_and_loses_nothing() {
    let ram = Arc::new(Ram::default());
    let target = Target::start(ram.clone());
    let pool = BufferPool::new(4).unwrap();
    let mut config = one_lane(Compress::Never);
    // Two frames of half a megabyte have more records.
    config.key_records = 40;
    let set = LaneSet::start(config, &pool, Arc::new(Unpaced), target.connector()).unwrap();
    assert_eq!(send_all(&set, &pool, 16), Vec::<String>::new());
    assert!(set.close(LIMIT));
    let stats = set.stats()[0];
    assert!(stats.connections >= 3, "{stats:?}");
    assert_eq!((stats.batches, stats.batches_lost), (16, 0));
    assert_pages(&ram, (0..16).flat_map(|n| n * 200..n * 200 + 128));
    for receiver in target.receivers.lock().unwrap().iter() {
        assert!(matches!(receiver.wait(LIMIT), Some(LaneEnd::Orderly)));
    }
}

#[test]
fn who_does_not_have_the_keys_is_hung_up_on() {
    let ram = Arc::new(Ram::default());
    let target = Target::start(ram.clone());
    let pool = BufferPool::new(2).unwrap();
    let config = one_lane(Compress::Never);
    let connector = plain_to(target.address);
    let set = LaneSet::start(config, &pool, Arc::new(Unpaced), connector).unwrap();
    set.submit(batch(&pool, 1, 0, 20, Class::Precopy), LIMIT)
        .unwrap();
    until(&set, |event| matches!(event, LaneEvent::LaneDown { .. }));
    assert!(ram.pages.lock().unwrap().is_empty());
    target.await_receivers(1);
    let receivers = target.receivers.lock().unwrap();
    let end = receivers[0].wait(LIMIT);
    assert!(
        matches!(end, Some(LaneEnd::Broken(ReceiveError::Record(_)))),
        "{end:?}"
    );
}
