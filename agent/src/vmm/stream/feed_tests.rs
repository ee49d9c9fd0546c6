//! The queue between the reader of the stream and the scan thread.

use super::*;
use crate::vmm::stream::testing::NoRam;
use std::sync::mpsc::channel;

const LIMIT: Duration = Duration::from_secs(20);
const SOON: Duration = Duration::from_millis(30);

fn feed() -> (Arc<Feed>, StreamPages) {
    let feed = Arc::new(Feed::new("web1", 64));
    let pages = StreamPages::new(feed.clone(), Arc::new(NoRam(64)), false);
    (feed, pages)
}

fn gfns(list: &[u32]) -> Vec<Gfn> {
    list.iter().copied().map(Gfn).collect()
}

fn taken(pages: &mut StreamPages) -> (Vec<u32>, Progress) {
    let taken = pages.take(SOON, 4).unwrap();
    (
        taken.pages.iter().map(|gfn| gfn.0).collect(),
        taken.progress,
    )
}

#[test]
fn a_page_that_is_reported_again_is_taken_again() {
    let (feed, mut pages) = feed();
    feed.report(&gfns(&[1, 2, 3]), 0).unwrap();
    feed.report(&gfns(&[3]), 0).unwrap();
    assert_eq!(taken(&mut pages).0, [1, 2, 3]);
    pages.staged();
    feed.report(&gfns(&[3]), 0).unwrap();
    assert_eq!(taken(&mut pages).0, [3]);
}

#[test]
fn the_reader_waits_until_enough_is_staged() {
    let (feed, mut pages) = feed();
    // From now on 4 pages may wait.
    assert_eq!(taken(&mut pages).0, [0_u32; 0]);
    feed.report(&gfns(&[0, 1, 2, 3]), 0).unwrap();
    let (done, is_done) = channel();
    let reader = {
        let feed = feed.clone();
        std::thread::spawn(move || {
            feed.report(&gfns(&[4]), 0).unwrap();
            done.send(()).unwrap();
        })
    };
    assert!(is_done.recv_timeout(SOON).is_err());
    // Taken is not staged.
    assert_eq!(taken(&mut pages).0, [0, 1, 2, 3]);
    assert!(is_done.recv_timeout(SOON).is_err());
    pages.staged();
    is_done.recv_timeout(LIMIT).unwrap();
    reader.join().unwrap();
    assert_eq!(taken(&mut pages).0, [4]);
}

#[test]
fn a_guest_that_stands_still_is_not_kept_waiting() {
    let (feed, mut pages) = feed();
    taken(&mut pages);
    feed.report(&gfns(&[0, 1, 2, 3]), 0).unwrap();
    feed.stands_still(Instant::now());
    feed.report(&gfns(&[4, 5, 6, 7]), 0).unwrap();
    feed.complete();
    let (list, progress) = taken(&mut pages);
    assert_eq!(list, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert!(progress.still && progress.complete);
}

#[test]
fn passes_are_counted_by_their_wrapping_round() {
    let (feed, mut pages) = feed();
    feed.report(&gfns(&[0, 1, 2]), 0).unwrap();
    assert_eq!(taken(&mut pages).1.passes, 0);
    pages.staged();
    feed.report(&gfns(&[1]), 0).unwrap();
    let progress = taken(&mut pages).1;
    assert_eq!((progress.passes, progress.last_pass), (1, 3));
    pages.staged();
    feed.report(&gfns(&[60, 0]), 0).unwrap();
    let progress = taken(&mut pages).1;
    assert_eq!((progress.passes, progress.last_pass), (2, 2));
}

#[test]
fn whoever_waits_hears_of_the_end() {
    let (feed, mut pages) = feed();
    taken(&mut pages);
    feed.report(&gfns(&[0, 1, 2, 3]), 0).unwrap();
    let reader = {
        let feed = feed.clone();
        std::thread::spawn(move || feed.report(&gfns(&[4]), 0))
    };
    std::thread::sleep(SOON);
    feed.fail("its QEMU has ended");
    feed.fail("a consequence of that");
    let error = reader.join().unwrap().unwrap_err();
    assert!(error.to_string().contains("web1") && error.why == "its QEMU has ended");
    assert_eq!(pages.take(LIMIT, 4).unwrap_err(), error);
    assert_eq!(
        *feed.stand().borrow(),
        Stand::Over("its QEMU has ended".to_owned())
    );
}

/// What QEMU thinks it can send in the downtime is never more than can be, nor
/// more than is left of the first pass: so it stops no guest too early.
#[test]
fn a_qemu_that_stops_the_guest_by_itself_is_not_read_too_fast() {
    let pace = Pace {
        bytes_per_s: 64e6,
        downtime: Duration::from_millis(300),
    };
    let takes_for_sendable = |left: u64| pace.rate(left) * pace.downtime.as_secs_f64();
    for left in [1 << 40, 64 << 30, 1 << 30, 200 << 20] {
        assert!(takes_for_sendable(left) < left as f64 / 3.0, "{left}");
    }
    for left in [0, 1 << 20, 50 << 20] {
        assert_eq!(takes_for_sendable(left), 64e6 * 0.3, "{left}");
    }

    // A second of reading in pieces takes its second, but not when the guest
    // stands still.
    let feed = Arc::new(Feed::paced("web1", 64));
    let mut pages = StreamPages::new(feed.clone(), Arc::new(NoRam(64)), false);
    assert!(pages.stops_alone());
    pages.set_pace(Pace {
        bytes_per_s: 4e6,
        downtime: Duration::from_millis(300),
    });
    taken(&mut pages);
    let begun = Instant::now();
    for piece in 0..4u32 {
        feed.report(&gfns(&[60 + piece]), 100_000).unwrap();
        taken(&mut pages);
        pages.staged();
    }
    // The first is free.
    assert!(
        begun.elapsed() >= Duration::from_millis(70),
        "{:?}",
        begun.elapsed()
    );
    feed.report(&gfns(&[63]), 400_000_000).unwrap();
    feed.stands_still(Instant::now());
    feed.report(&gfns(&[63]), 1).unwrap();
}
