use super::*;
use crate::net::testing::{LONG, cluster};
use crate::net::{ConnectionHandler, Hello, Incoming, Listener, Roster};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

const GANG: GangId = GangId(9);

/// A host's shard and pages: a page is there once put there.
#[derive(Default)]
struct Host {
    claims: Mutex<HashMap<Fingerprint, HolderId>>,
    pages: Mutex<HashMap<Fingerprint, u8>>,
    /// Claims wait for this to be over.
    stall: Mutex<()>,
    lie: AtomicBool,
    handled: AtomicU32,
}

impl ClaimServer for Host {
    fn handle(&self, gang: GangId, from: &str, op: ClaimOp) -> Result<ClaimReply, NotOfTheGang> {
        assert_eq!(gang, GANG);
        outsiders(gang, from)?;
        drop(self.stall.lock().unwrap());
        self.handled.fetch_add(1, Ordering::Relaxed);
        let ClaimOp::Claim { fps, holder } = op else {
            return Ok(ClaimReply::Done);
        };
        let mut claims = self.claims.lock().unwrap();
        let mut answers: Vec<ClaimAnswer> = fps
            .iter()
            .map(|fp| match claims.get(fp) {
                Some(&holder) => ClaimAnswer::Held {
                    holder,
                    arrived: false,
                },
                None => {
                    claims.insert(*fp, holder);
                    ClaimAnswer::Yours
                }
            })
            .collect();
        if self.lie.load(Ordering::Relaxed) {
            answers.pop();
        }
        Ok(ClaimReply::Claims(answers))
    }
}

/// Agents named so have no part in any gang.
fn outsiders(gang: GangId, from: &str) -> Result<(), NotOfTheGang> {
    match from {
        "outsider" => Err(NotOfTheGang { gang, what: "ask" }),
        _ => Ok(()),
    }
}

impl PageServer for Host {
    fn admit(&self, gang: GangId, from: &str) -> Result<(), NotOfTheGang> {
        outsiders(gang, from)
    }

    fn serve(&self, _: GangId, wanted: &Wanted, page: &mut Page) -> Served {
        if wanted.domain == 66 {
            return Served::Gone;
        }
        match self.pages.lock().unwrap().get(&wanted.fp) {
            Some(fill) => {
                page.fill(*fill);
                Served::Page
            }
            None => Served::NotYet,
        }
    }
}

struct ToRack(Rc<RackService>);

impl ConnectionHandler for ToRack {
    fn admit(&self, hello: &Hello) -> Result<(), String> {
        self.0.admit(hello)
    }

    fn handle(&self, incoming: Incoming) {
        self.0.adopt(incoming).unwrap();
    }
}

/// One agent on a thread of its own, as a process would be.
struct Agent {
    host: Arc<Host>,
    claims: ClaimClient,
    fetches: FetchClient,
    wake: Box<dyn Fn()>,
    reports: Receiver<(String, Vec<u8>)>,
    publish: tokio::sync::mpsc::UnboundedSender<Vec<u8>>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

fn start(make: impl FnOnce() -> (Arc<Roster>, Listener) + Send + 'static) -> Agent {
    let host = Arc::new(Host::default());
    let (reports_in, reports) = channel();
    let reports_in = Mutex::new(reports_in);
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let (publish, mut to_publish) = tokio::sync::mpsc::unbounded_channel::<Vec<u8>>();
    let (ready, made) = channel();
    let offer = host.clone();
    let thread = std::thread::spawn(move || {
        tokio_uring::start(async move {
            let (roster, listener) = make();
            let sink: ReportSink = Box::new(move |from, bytes| {
                let report = (from.to_owned(), bytes.to_vec());
                reports_in.lock().unwrap().send(report).unwrap();
            });
            let limits = RackLimits::default();
            let rack = RackService::start(roster.clone(), offer.clone(), offer, sink, limits);
            let rack = Rc::new(rack.unwrap());
            let wake = rack.waker();
            ready.send((rack.claims(), rack.fetches(), wake)).unwrap();
            let handler = Rc::new(ToRack(rack.clone()));
            tokio::select! {
                () = listener.run(roster, handler) => {}
                _ = stopped => {}
                () = async {
                    while let Some(report) = to_publish.recv().await {
                        assert!(rack.publish(&report));
                    }
                    std::future::pending().await
                } => {}
            }
        });
    });
    let (claims, fetches, wake) = made.recv_timeout(LONG).unwrap();
    Agent {
        host,
        claims,
        fetches,
        wake: Box::new(wake),
        reports,
        publish,
        stop: Some(stop),
        thread: Some(thread),
    }
}

/// Rosters and addresses are made once, each agent binds its own again.
fn agents<const N: usize>(names: [(&str, &str); N]) -> [Agent; N] {
    let made = tokio_uring::start(async { cluster(names) });
    made.map(|(roster, listener)| {
        let address = roster.me().address;
        // The port is free again for the agent's own runtime.
        drop(listener);
        start(move || {
            let limits = crate::net::ListenerLimits::default();
            (roster, Listener::bind(address, limits).unwrap())
        })
    })
}

fn fps(n: u32) -> Vec<Fingerprint> {
    let fp = |i: u32| {
        let mut bytes = [0xaa; 16];
        bytes[..4].copy_from_slice(&i.to_le_bytes());
        Fingerprint(bytes)
    };
    (0..n).map(fp).collect()
}

fn wanted(fps: &[Fingerprint]) -> Vec<Wanted> {
    fps.iter().map(|fp| Wanted { fp: *fp, domain: 0 }).collect()
}

fn claim(
    from: &Agent,
    shard: &str,
    fps: Vec<Fingerprint>,
    holder: u16,
    limit: Duration,
) -> ClaimOutcome {
    let (done, outcome) = crossbeam_channel::bounded(1);
    let holder = HolderId(holder);
    let op = ClaimOp::Claim { fps, holder };
    from.claims.submit_to(shard, GANG, op, limit, 7, &done);
    let done = outcome.recv_timeout(LONG).unwrap();
    assert_eq!(done.ticket, 7);
    done.outcome
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Got {
    Page(u8),
    Late,
    Gone,
}

fn fetch(
    from: &Agent,
    holder: &str,
    wanted: Vec<Wanted>,
    limit: Duration,
) -> Receiver<(usize, Got)> {
    let (send, got) = channel();
    let send: Sender<(usize, Got)> = send;
    from.fetches.fetch(
        holder,
        GANG,
        wanted,
        limit,
        Box::new(move |index, fetched| {
            let got = match fetched {
                Fetched::Page(page) => {
                    assert!(page.iter().all(|b| *b == page[0]));
                    Got::Page(page[0])
                }
                Fetched::NotInTime => Got::Late,
                Fetched::Gone => Got::Gone,
            };
            send.send((index, got)).unwrap();
        }),
    );
    got
}

/// All answers of a fetch, by index: each page exactly once.
fn collect(got: &Receiver<(usize, Got)>, n: usize) -> Vec<Got> {
    let mut all = vec![None; n];
    loop {
        match got.recv_timeout(LONG) {
            Ok((index, got)) => assert_eq!(all[index].replace(got), None, "page {index} twice"),
            // The sink is dropped after the last page.
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => panic!("the sink is never dropped"),
        }
    }
    all.into_iter().map(Option::unwrap).collect()
}

const SOON: Duration = Duration::from_millis(150);

#[test]
fn the_first_claim_wins_wherever_it_comes_from() {
    let [a1, a2] = agents([("a1", "A"), ("a2", "A")]);
    let (both, first) = (fps(300), fps(200));
    // a1 is the shard: it asks itself, a2 asks over the network.
    let mine = claim(&a1, "a1", first, 1, LONG).answers(200);
    assert!(mine.iter().all(|a| *a == ClaimAnswer::Yours));
    let theirs = claim(&a2, "a1", both, 2, LONG).answers(300);
    let held = ClaimAnswer::Held {
        holder: HolderId(1),
        arrived: false,
    };
    assert!(theirs[..200].iter().all(|a| *a == held));
    assert!(theirs[200..].iter().all(|a| *a == ClaimAnswer::Yours));
    let (done, outcome) = crossbeam_channel::bounded(1);
    let holder = HolderId(1);
    let op = ClaimOp::Forget { holder };
    a2.claims.submit_to("a1", GANG, op, LONG, 1, &done);
    let outcome = outcome.recv_timeout(LONG).unwrap().outcome;
    assert_eq!(outcome, ClaimOutcome::Replied(ClaimReply::Done));
}

#[test]
fn an_agent_outside_the_gang_gets_neither_claims_nor_pages() {
    let [a1, outsider] = agents([("a1", "A"), ("outsider", "A")]);
    let known = fps(2);
    a1.host.pages.lock().unwrap().insert(known[0], 7);
    claim(&a1, "a1", known.clone(), 1, LONG);
    let before = a1.host.handled.load(Ordering::Relaxed);
    let outcome = claim(&outsider, "a1", known.clone(), 2, LONG);
    assert_eq!(outcome, ClaimOutcome::NotInTime);
    let pages = fetch(&outsider, "a1", wanted(&known), LONG);
    assert_eq!(collect(&pages, 2), [Got::Late, Got::Late]);
    assert_eq!(a1.host.handled.load(Ordering::Relaxed), before);
}

#[test]
fn pipelined_claims_are_all_answered() {
    let [a1, a2] = agents([("a1", "A"), ("a2", "A")]);
    let (done, outcomes) = crossbeam_channel::bounded(500);
    let all = fps(100_000);
    let start = Instant::now();
    for (ticket, part) in all.chunks(200).enumerate() {
        let op = ClaimOp::Claim {
            fps: part.to_vec(),
            holder: HolderId(3),
        };
        a2.claims
            .submit_to("a1", GANG, op, LONG, ticket as u64, &done);
    }
    let mut seen = vec![false; 500];
    for _ in 0..500 {
        let done = outcomes.recv_timeout(LONG).unwrap();
        assert!(!std::mem::replace(&mut seen[done.ticket as usize], true));
        let answers = done.outcome.answers(200);
        assert!(answers.iter().all(|a| *a == ClaimAnswer::Yours));
    }
    let took = start.elapsed();
    println!("100 000 claims over loopback: {took:?}");
    assert_eq!(a1.host.claims.lock().unwrap().len(), 100_000);
}

#[test]
fn a_shard_that_does_not_answer_in_time_means_yours_and_then_costs_nothing() {
    let [a1, a2] = agents([("a1", "A"), ("a2", "A")]);
    claim(&a2, "a1", fps(1), 1, LONG);
    let stalled = a1.host.stall.lock().unwrap();
    let start = Instant::now();
    let outcome = claim(&a2, "a1", fps(10), 2, SOON);
    assert!(
        start.elapsed() >= SOON && start.elapsed() < SOON * 40,
        "{:?}",
        start.elapsed()
    );
    assert_eq!(outcome, ClaimOutcome::NotInTime);
    assert_eq!(outcome.answers(10), vec![ClaimAnswer::Yours; 10]);
    // Some more, and the shard is taken for dead: no more waiting.
    let give_up = Instant::now();
    while give_up.elapsed() < Duration::from_secs(5) {
        let start = Instant::now();
        claim(&a2, "a1", fps(10), 2, SOON);
        if start.elapsed() < SOON / 3 {
            break;
        }
    }
    assert!(
        give_up.elapsed() < Duration::from_secs(3),
        "{:?}",
        give_up.elapsed()
    );
    // And when it comes back, it is used again.
    drop(stalled);
    let start = Instant::now();
    while claim(&a2, "a1", fps(10), 2, LONG) == ClaimOutcome::NotInTime {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_dead_or_unknown_or_lying_shard_means_yours() {
    let [a1, a2, b1] = agents([("a1", "A"), ("a2", "A"), ("b1", "B")]);
    for shard in ["b1", "nobody"] {
        let start = Instant::now();
        assert_eq!(claim(&a1, shard, fps(3), 1, LONG), ClaimOutcome::NotInTime);
        assert!(start.elapsed() < SOON, "{shard}");
    }
    assert_eq!(
        b1.host.handled.load(Ordering::Relaxed),
        0,
        "claims stay inside the rack"
    );
    a1.host.lie.store(true, Ordering::Relaxed);
    assert_eq!(claim(&a2, "a1", fps(3), 1, LONG), ClaimOutcome::NotInTime);
    let too_many = fps(MAX_CLAIM as u32 + 1);
    assert_eq!(claim(&a2, "a2", too_many, 1, LONG), ClaimOutcome::NotInTime);
    drop(a1);
    let start = Instant::now();
    assert_eq!(claim(&a2, "a1", fps(3), 1, LONG), ClaimOutcome::NotInTime);
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[test]
fn pages_are_fetched_in_any_number_and_holders_say_what_is_gone() {
    let [b1, b2] = agents([("b1", "B"), ("b2", "B")]);
    let all = fps(3000);
    for (i, fp) in all.iter().enumerate() {
        b1.host.pages.lock().unwrap().insert(*fp, i as u8);
    }
    let mut want = wanted(&all);
    want[17].domain = 66;
    want[2999].domain = 66;
    for reader in [&b1, &b2] {
        let got = collect(&fetch(reader, "b1", want.clone(), LONG), 3000);
        for (i, got) in got.into_iter().enumerate() {
            let expected = match i {
                17 | 2999 => Got::Gone,
                _ => Got::Page(i as u8),
            };
            assert_eq!(got, expected, "page {i}");
        }
    }
}

#[test]
fn a_page_on_its_way_is_waited_for_until_the_deadline_only() {
    let [b1, b2] = agents([("b1", "B"), ("b2", "B")]);
    let all = fps(4);
    b1.host.pages.lock().unwrap().insert(all[0], 10);
    for reader in [&b1, &b2] {
        let start = Instant::now();
        let got = fetch(reader, "b1", wanted(&all), Duration::from_millis(600));
        assert_eq!(got.recv_timeout(LONG).unwrap(), (0, Got::Page(10)));
        assert!(got.recv_timeout(Duration::from_millis(100)).is_err());
        b1.host.pages.lock().unwrap().insert(all[2], 12);
        (b1.wake)();
        let woken = Instant::now();
        assert_eq!(got.recv_timeout(LONG).unwrap(), (2, Got::Page(12)));
        assert!(woken.elapsed() < SOON);
        let mut late: Vec<_> = (0..2).map(|_| got.recv_timeout(LONG).unwrap()).collect();
        late.sort_by_key(|(i, _)| *i);
        assert_eq!(late, [(1, Got::Late), (3, Got::Late)]);
        let took = start.elapsed();
        assert!(
            took > Duration::from_millis(400) && took < Duration::from_secs(2),
            "{took:?}"
        );
        b1.host.pages.lock().unwrap().remove(&all[2]);
    }
}

#[test]
fn a_holder_that_dies_while_it_is_asked_is_not_waited_for() {
    let [b1, b2] = agents([("b1", "B"), ("b2", "B")]);
    let got = fetch(&b2, "b1", wanted(&fps(2000)), LONG);
    std::thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    drop(b1);
    assert_eq!(collect(&got, 2000), vec![Got::Late; 2000]);
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[test]
fn the_end_of_the_service_answers_everything() {
    let [b1] = agents([("b1", "B")]);
    let got = fetch(&b1, "b1", wanted(&fps(5)), LONG);
    std::thread::sleep(Duration::from_millis(50));
    let fetches = b1.fetches.clone();
    drop(b1);
    assert_eq!(collect(&got, 5), vec![Got::Late; 5]);
    let (send, got) = channel();
    fetches.fetch(
        "b1",
        GANG,
        wanted(&fps(1)),
        LONG,
        Box::new(move |_, fetched| send.send(fetched == Fetched::NotInTime).unwrap()),
    );
    assert!(got.recv_timeout(LONG).unwrap());
}

#[test]
fn load_reports_reach_the_rack_and_nobody_else() {
    let [a1, a2, b1] = agents([("a1", "A"), ("a2", "A"), ("b1", "B")]);
    a1.publish.send(b"load 1".to_vec()).unwrap();
    let report = a2.reports.recv_timeout(LONG).unwrap();
    assert_eq!(report, ("a1".to_owned(), b"load 1".to_vec()));
    assert!(b1.reports.recv_timeout(SOON).is_err());
    assert!(a1.reports.try_recv().is_err());
}
