use super::*;
use crate::config::ClusterSecret;
use std::sync::Mutex;

const ME: HolderId = HolderId(1);
const OTHER: HolderId = HolderId(2);
const VM: VmIndex = VmIndex(3);

/// Pages behind a lock each, so that a reader sees torn pages only if the store
/// lets it read what is being written under another name.
struct Memory(Vec<Mutex<Page>>);

impl PageMemory for Arc<Memory> {
    fn write(&self, gfn: Gfn, page: &Page) {
        *self.0[gfn.index()].lock().expect("not poisoned") = *page;
    }
    fn read(&self, gfn: Gfn, page: &mut Page) {
        *page = *self.0[gfn.index()].lock().expect("not poisoned");
    }
    fn zero(&self, gfn: Gfn, count: u32) {
        for gfn in gfn.0..gfn.0 + count {
            self.write(Gfn(gfn), &[0; PAGE_SIZE]);
        }
    }
}

fn page(i: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    page[..8].copy_from_slice(&i.to_le_bytes());
    page[4088..].copy_from_slice(&i.to_be_bytes());
    page
}

fn key() -> Arc<FingerprintKey> {
    let secret = ClusterSecret::from_bytes([1; 32]);
    Arc::new(FingerprintKey::derive(&secret, "test"))
}

struct Bench {
    store: Arc<TargetStore>,
    vm: Arc<TargetVm>,
    memory: Arc<Memory>,
    key: Arc<FingerprintKey>,
    ready: Arc<Mutex<Vec<(u64, Fingerprint)>>>,
}

fn bench(pages: u32, config: TargetConfig) -> Bench {
    let ready = Arc::new(Mutex::new(Vec::new()));
    let sink = ready.clone();
    let on_ready = move |watcher, fp| sink.lock().expect("not poisoned").push((watcher, fp));
    let store = Arc::new(TargetStore::new(ME, config, Box::new(on_ready)));
    let memory = Arc::new(Memory((0..pages).map(|_| Mutex::new(page(0))).collect()));
    let key = key();
    let vm = store
        .add_vm(VM, pages, Box::new(memory.clone()), key.clone())
        .expect("first VM");
    Bench {
        store,
        vm,
        memory,
        key,
        ready,
    }
}

impl Bench {
    fn name(&self, i: u64) -> Fingerprint {
        self.key.fingerprint(&page(i))
    }
    fn full(&self, gfn: u32, round: u32, i: u64) -> Arrival {
        self.store
            .arrive_page(&self.vm, Gfn(gfn), Round(round), &page(i))
            .expect("in range")
    }
    fn refer(&self, gfn: u32, round: u32, i: u64, holder: HolderId) -> RefArrival {
        self.store
            .arrive_ref(&self.vm, Gfn(gfn), Round(round), self.name(i), holder)
            .expect("in range")
    }
    fn content(&self, gfn: u32) -> u64 {
        let mut out = page(0);
        self.memory.read(Gfn(gfn), &mut out);
        assert_eq!(
            out[..8],
            page(u64::from_le_bytes(out[..8].try_into().expect("8")))[..8]
        );
        u64::from_le_bytes(out[..8].try_into().expect("8 bytes"))
    }
}

#[test]
fn an_older_round_never_overwrites_a_newer_one_however_it_comes() {
    let b = bench(8, TargetConfig::default());
    assert_eq!(b.full(0, 3, 30), Arrival::Placed);
    assert_eq!(b.full(0, 2, 20), Arrival::Stale);
    assert_eq!(b.full(0, 3, 31), Arrival::Stale, "the same round again");
    assert_eq!(b.refer(0, 1, 10, OTHER), RefArrival::Stale);
    b.store
        .arrive_zero(&b.vm, Gfn(0), 1, Round(2))
        .expect("in range");
    assert_eq!(b.content(0), 30);
    // A fetch that comes after a newer round finds the page gone on.
    assert_eq!(b.refer(1, 4, 40, OTHER), RefArrival::Fetch);
    assert_eq!(b.full(1, 5, 50), Arrival::Placed);
    b.store.fetched(b.name(40), OTHER, &page(40));
    assert_eq!(b.content(1), 50);
    assert_eq!(b.vm.counts().pending, 0);
}

#[test]
fn a_reference_is_settled_by_whatever_brings_the_content() {
    let b = bench(8, TargetConfig::default());
    assert_eq!(b.refer(0, 1, 7, OTHER), RefArrival::Fetch);
    assert_eq!(b.refer(1, 1, 7, OTHER), RefArrival::Joined);
    assert_eq!(b.store.complete(&b.vm).pending, 2);
    assert_eq!(b.full(2, 1, 7), Arrival::Placed);
    assert_eq!((b.content(0), b.content(1)), (7, 7));
    assert_eq!(b.store.complete(&b.vm).pending, 0);
    assert_eq!(
        b.store.fetched(b.name(7), OTHER, &page(7)),
        Fetched::Unwanted
    );
    assert_eq!(b.refer(3, 1, 7, OTHER), RefArrival::Placed, "known by now");
    let digest = b.key.digest(&[7, 7, 7, 7, 0, 0, 0, 0].map(|i| b.name(i)));
    assert_eq!(b.store.complete(&b.vm).digest, digest);
}

#[test]
fn content_that_comes_too_late_for_its_page_still_serves_those_who_wait() {
    let b = bench(8, TargetConfig::default());
    let mut out = page(0);
    assert_eq!(
        b.store.serve_or_watch(&b.name(5), &mut out, 77),
        Served::NotYet
    );
    assert_eq!(b.refer(1, 1, 5, ME), RefArrival::Await);
    assert_eq!(b.full(0, 9, 90), Arrival::Placed);
    assert_eq!(b.full(0, 1, 5), Arrival::Stale);
    assert_eq!((b.content(0), b.content(1)), (90, 5));
    assert_eq!(*b.ready.lock().expect("one thread"), [(77, b.name(5))]);
    assert_eq!(b.store.serve(&b.name(5), &mut out), Served::Page);
    assert_eq!(out, page(5));
}

#[test]
fn stale_content_is_kept_for_a_watcher_alone() {
    let b = bench(8, TargetConfig::default());
    let mut out = page(0);
    b.full(0, 9, 90);
    assert_eq!(
        b.store.serve_or_watch(&b.name(5), &mut out, 1),
        Served::NotYet
    );
    b.full(0, 1, 5);
    assert_eq!(b.ready.lock().expect("one thread").len(), 1);
    assert_eq!(b.store.serve(&b.name(5), &mut out), Served::Page);
}

#[test]
fn wrong_content_is_refused_and_its_sender_named() {
    let b = bench(8, TargetConfig::default());
    b.refer(0, 1, 5, OTHER);
    let wrong = b.store.fetched(b.name(5), OTHER, &page(6));
    let need = Need {
        vm: VM,
        gfn: Gfn(0),
        fp: b.name(5),
    };
    let expect = Fetched::Wrong {
        holder: OTHER,
        needs: vec![need],
    };
    assert_eq!(wrong, expect);
    assert_eq!((b.content(0), b.vm.counts().pending), (0, 1));
    assert_eq!(b.vm.pending_pages(9), [Gfn(0)]);
    assert_eq!(
        b.full(0, 1, 5),
        Arrival::Placed,
        "in full, in the same round"
    );
    assert_eq!((b.content(0), b.vm.counts().pending), (5, 0));
}

#[test]
fn only_pages_that_still_wait_are_asked_for_in_full() {
    let b = bench(8, TargetConfig::default());
    b.refer(0, 1, 5, OTHER);
    b.refer(1, 1, 5, OTHER);
    b.full(1, 2, 6);
    let needs = b.store.not_fetched(b.name(5), NotFetched::Gone);
    assert_eq!(needs.iter().map(|n| n.gfn).collect::<Vec<_>>(), [Gfn(0)]);
    assert_eq!(b.store.not_fetched(b.name(5), NotFetched::Late), []);
}

#[test]
fn overwritten_content_is_served_from_the_side_cache_until_it_is_evicted() {
    let b = bench(600, TargetConfig::default());
    b.full(0, 1, 5);
    b.full(0, 2, 6);
    let mut out = page(0);
    assert_eq!(b.store.serve(&b.name(5), &mut out), Served::Page);
    assert_eq!(out, page(5));
    assert_eq!(b.store.counts().served_from_side_cache, 1);
    assert_eq!(
        b.refer(9, 1, 5, OTHER),
        RefArrival::Placed,
        "here, not there"
    );

    let config = TargetConfig {
        side_cache_bytes: 0,
        ..TargetConfig::default()
    };
    let b = bench(8, config);
    b.full(0, 1, 5);
    b.full(1, 1, 5);
    b.full(0, 2, 6);
    assert_eq!(b.store.serve(&b.name(5), &mut out), Served::Gone);
    assert_eq!(b.store.counts().gone, 1);
}

#[test]
fn nothing_is_written_after_the_seal_and_changed_pages_are_not_served() {
    let b = bench(8, TargetConfig::default());
    b.full(0, 1, 5);
    b.full(1, 1, 6);
    b.store.seal(&b.vm);
    assert_eq!(b.full(0, 9, 90), Arrival::Stale);
    assert_eq!(b.refer(0, 9, 6, OTHER), RefArrival::Stale);
    b.store
        .arrive_zero(&b.vm, Gfn(0), 8, Round(9))
        .expect("in range");
    assert_eq!((b.content(0), b.content(1)), (5, 6));
    // The guest runs and writes.
    b.memory.write(Gfn(0), &page(99));
    let mut out = page(0);
    assert_eq!(b.store.serve(&b.name(5), &mut out), Served::Gone);
    assert_eq!(b.store.serve(&b.name(6), &mut out), Served::Page);
    assert_eq!(out, page(6));
}

#[test]
fn zero_pages_come_in_runs_and_replace_what_was_there() {
    let b = bench(300, TargetConfig::default());
    for gfn in [0, 63, 64, 200] {
        b.full(gfn, 1, 5 + u64::from(gfn));
    }
    b.refer(100, 1, 1000, OTHER);
    b.full(201, 3, 7);
    b.store
        .arrive_zero(&b.vm, Gfn(0), 300, Round(2))
        .expect("in range");
    let left: Vec<u32> = (0..300).filter(|gfn| b.content(*gfn) != 0).collect();
    assert_eq!(left, [201]);
    let counts = b.vm.counts();
    assert_eq!((counts.zero, counts.same, counts.stale), (5, 294, 1));
    assert_eq!(counts.pending, 0);
    // A page of zeroes in full is a zero page too.
    assert_eq!(b.full(201, 4, 0), Arrival::Placed);
    assert_eq!(b.vm.fps.get(Gfn(201)), Fingerprint::ZERO);
}

#[test]
fn what_a_message_says_is_checked() {
    let b = bench(8, TargetConfig::default());
    let arrive = |gfn, round| b.store.arrive_page(&b.vm, Gfn(gfn), Round(round), &page(1));
    assert!(matches!(arrive(8, 1), Err(ArriveError::OutOfRange { .. })));
    assert!(matches!(arrive(0, 0), Err(ArriveError::BadRound { .. })));
    assert!(matches!(
        arrive(0, 1 << 30),
        Err(ArriveError::BadRound { .. })
    ));
    for (gfn, count) in [(0, 9), (8, 1), (7, u32::MAX), (u32::MAX, 1)] {
        let zero = b.store.arrive_zero(&b.vm, Gfn(gfn), count, Round(1));
        assert!(matches!(zero, Err(ArriveError::OutOfRange { .. })));
    }
    assert!(matches!(
        b.store.vm(VmIndex(0)),
        Err(ArriveError::NoVm { .. })
    ));
    let unsent = b.store.arrive_ref(&b.vm, Gfn(0), Round(1), UNSENT, OTHER);
    assert_eq!(unsent.expect("in range"), RefArrival::Need);
    assert_eq!(b.store.serve(&UNSENT, &mut page(0)), Served::Gone);
}

#[test]
fn waiting_is_bounded() {
    let config = TargetConfig {
        max_waiting: 2,
        ..TargetConfig::default()
    };
    let b = bench(8, config);
    assert_eq!(b.refer(0, 1, 5, OTHER), RefArrival::Fetch);
    assert_eq!(b.refer(1, 1, 6, OTHER), RefArrival::Fetch);
    assert_eq!(b.refer(2, 1, 7, OTHER), RefArrival::Need);
    let mut out = page(0);
    assert_eq!(
        b.store.serve_or_watch(&b.name(9), &mut out, 1),
        Served::Gone
    );
    b.full(3, 1, 5);
    assert_eq!(
        b.store.serve_or_watch(&b.name(9), &mut out, 1),
        Served::NotYet
    );
    b.store.unwatch(&b.name(9), 1);
    assert_eq!(b.store.counts().waiting, 1);
}

#[test]
fn domains_do_not_share_content() {
    let b = bench(8, TargetConfig::default());
    let secret = ClusterSecret::from_bytes([1; 32]);
    let other = Arc::new(FingerprintKey::derive(&secret, "other"));
    let memory = Arc::new(Memory((0..8).map(|_| Mutex::new(page(0))).collect()));
    let vm = b
        .store
        .add_vm(VmIndex(4), 8, Box::new(memory), other)
        .expect("second VM");
    b.full(0, 1, 5);
    // A reference made with the other domain's name for the content.
    let outcome = b.store.arrive_ref(&vm, Gfn(0), Round(1), b.name(5), OTHER);
    assert_eq!(outcome.expect("in range"), RefArrival::Need);
    assert_eq!(vm.counts().pending, 1);
}

#[test]
fn a_removed_vm_is_neither_served_nor_written() {
    let b = bench(8, TargetConfig::default());
    b.full(0, 1, 5);
    b.refer(1, 1, 6, OTHER);
    b.store.remove_vm(VM);
    assert_eq!(
        b.store.fetched(b.name(6), OTHER, &page(6)),
        Fetched::Unwanted
    );
    assert_eq!(b.store.serve(&b.name(5), &mut page(0)), Served::Gone);
    assert_eq!(b.full(2, 1, 7), Arrival::Stale);
    assert_eq!((b.content(1), b.content(2)), (0, 0));
    b.store.assert_consistent();
}

#[test]
fn lane_threads_fetches_and_servers_may_run_at_once() {
    let pages = 512u32;
    let contents = 64u64;
    let config = TargetConfig {
        side_cache_bytes: 20 * 5000 * 16,
        ..TargetConfig::default()
    };
    let b = Arc::new(bench(pages, config));
    // What is right at the end: the content of the last round of each page.
    let content = |gfn: u32, round: u32| (u64::from(gfn) * 7 + u64::from(round) * 13) % contents;
    let rounds = 20u32;
    std::thread::scope(|scope| {
        for lane in 0..3u32 {
            let b = b.clone();
            scope.spawn(move || {
                // Each lane brings every page in its own order of rounds.
                for step in 0..rounds {
                    let round = 1 + (step * 7 + lane * 5) % rounds;
                    for gfn in 0..pages {
                        let i = content(gfn, round);
                        if (gfn + round) % 3 != lane {
                            b.full(gfn, round, i);
                        } else if b.refer(gfn, round, i, OTHER) == RefArrival::Fetch
                            && step % 2 == 0
                        {
                            b.store.fetched(b.name(i), OTHER, &page(i));
                        }
                    }
                }
            });
        }
        let b = b.clone();
        scope.spawn(move || {
            let mut out = page(0);
            for i in 0..40_000u64 {
                let i = i % contents;
                if b.store.serve(&b.name(i), &mut out) == Served::Page {
                    assert_eq!(out, page(i));
                }
            }
        });
    });
    b.store.assert_consistent();
    for gfn in b.vm.pending_pages(usize::MAX) {
        let fp = b.vm.fps.get(gfn);
        b.store.not_fetched(fp, NotFetched::Late);
        b.full(gfn.0, rounds, content(gfn.0, rounds));
    }
    for gfn in 0..pages {
        assert_eq!(b.content(gfn), content(gfn, rounds), "page {gfn}");
    }
    assert_eq!(b.store.complete(&b.vm).pending, 0);
}
