use super::*;
use crate::config::ClusterSecret;
use crate::dedup::{claim::ClaimShard, table::tests::fp};

const A: VmIndex = VmIndex(0);
const B: VmIndex = VmIndex(1);
const HOST_A: HolderId = HolderId(0);
const HOST_B: HolderId = HolderId(1);
const NO_WAIT: Duration = Duration::ZERO;

fn key() -> Arc<FingerprintKey> {
    let secret = ClusterSecret::from_bytes([1; 32]);
    Arc::new(FingerprintKey::derive(&secret, "test"))
}

fn dedup() -> SourceDedup {
    let dedup = SourceDedup::new(ShardMap::new(&[1, 2]), 4);
    dedup.add_vm(A, 100, HOST_A, key()).expect("first");
    dedup.add_vm(B, 100, HOST_B, key()).expect("second");
    dedup
}

fn plan(dedup: &SourceDedup, vm: VmIndex, class: Class, round: u32, pages: &[(u32, u64)]) -> Plan {
    let pages: Vec<_> = pages
        .iter()
        .map(|(gfn, i)| {
            let name = if *i == 0 { Fingerprint::ZERO } else { fp(*i) };
            (Gfn(*gfn), name)
        })
        .collect();
    dedup
        .plan(vm, class, Round(round), &pages)
        .expect("pages of the VM")
}

/// Plans, has all claims answered in one way, settles.
fn send(
    dedup: &SourceDedup,
    vm: VmIndex,
    class: Class,
    round: u32,
    pages: &[(u32, u64)],
    answer: ClaimAnswer,
) -> SentBatch {
    let mut plan = plan(dedup, vm, class, round, pages);
    for batch in 0..plan.claims().len() {
        let answers = vec![answer; plan.claims()[batch].fps.len()];
        dedup
            .answer(&mut plan, batch, &answers)
            .expect("as many as claims");
    }
    dedup.settle(plan, NO_WAIT)
}

fn verdicts(batch: &SentBatch) -> Vec<Verdict> {
    batch.pages.iter().map(|page| page.verdict).collect()
}

const fn refer(holder: HolderId) -> Verdict {
    Verdict::Reference { holder }
}

const YOURS: ClaimAnswer = ClaimAnswer::Yours;

#[test]
fn content_is_claimed_once_and_then_known_to_all_vms_of_the_host() {
    let dedup = dedup();
    let first = send(
        &dedup,
        A,
        Class::Precopy,
        1,
        &[(0, 5), (1, 5), (2, 0), (3, 6)],
        YOURS,
    );
    // A fresh target is zero already.
    let expect = [
        Verdict::Send,
        refer(HOST_A),
        Verdict::Unchanged,
        Verdict::Send,
    ];
    assert_eq!(verdicts(&first), expect);
    let second = plan(&dedup, B, Class::Precopy, 1, &[(0, 5), (1, 6), (2, 7)]);
    assert_eq!(
        second.claims().iter().map(|c| c.fps.len()).sum::<usize>(),
        1
    );
    let second = dedup.settle(second, NO_WAIT);
    assert_eq!(
        verdicts(&second),
        [refer(HOST_A), refer(HOST_A), Verdict::Send]
    );
    let third = send(
        &dedup,
        A,
        Class::Precopy,
        2,
        &[(0, 5), (1, 0), (3, 7)],
        YOURS,
    );
    assert_eq!(
        verdicts(&third),
        [Verdict::Unchanged, Verdict::Zero, refer(HOST_B)]
    );
    dedup.assert_consistent();
}

#[test]
fn what_another_host_holds_is_referred_to() {
    let dedup = dedup();
    let held = ClaimAnswer::Held {
        holder: HolderId(3),
        arrived: false,
    };
    let batch = send(&dedup, A, Class::Precopy, 1, &[(0, 5)], held);
    assert_eq!(verdicts(&batch), [refer(HolderId(3))]);
    // An answer that names no host of the gang is no answer.
    let held = ClaimAnswer::Held {
        holder: HolderId(4),
        arrived: true,
    };
    let batch = send(&dedup, A, Class::Precopy, 1, &[(1, 6)], held);
    assert_eq!(verdicts(&batch), [Verdict::Send]);
}

#[test]
fn stop_and_copy_refers_only_to_what_has_arrived() {
    let dedup = dedup();
    let held = |arrived| ClaimAnswer::Held {
        holder: HolderId(3),
        arrived,
    };
    let sent = send(&dedup, A, Class::Precopy, 1, &[(0, 5)], YOURS);
    let stop = |round, pages: &[(u32, u64)], answer| {
        verdicts(&send(&dedup, B, Class::StopCopy, round, pages, answer))
    };
    assert_eq!(stop(1, &[(0, 5)], YOURS), [Verdict::Send], "on its way");
    let notes = dedup.placed(&sent);
    assert_eq!(notes.iter().map(|n| n.confirm.len()).sum::<usize>(), 1);
    assert_eq!(stop(2, &[(1, 5)], YOURS), [refer(HOST_A)], "acknowledged");
    assert_eq!(stop(3, &[(2, 6)], held(false)), [Verdict::Send]);
    assert_eq!(stop(4, &[(3, 7)], held(true)), [refer(HolderId(3))]);
    assert_eq!(
        stop(5, &[(4, 7)], YOURS),
        [refer(HolderId(3))],
        "still known"
    );
}

#[test]
fn a_claim_under_way_is_waited_for_and_not_made_twice() {
    let dedup = Arc::new(dedup());
    let mut first = plan(&dedup, A, Class::Precopy, 1, &[(0, 5)]);
    let second = plan(&dedup, B, Class::Precopy, 1, &[(0, 5)]);
    assert!(second.claims().is_empty() && !dedup.is_ready(&second));
    let other = dedup.clone();
    let waiter = std::thread::spawn(move || other.settle(second, Duration::from_secs(20)));
    std::thread::sleep(Duration::from_millis(20));
    let held = ClaimAnswer::Held {
        holder: HolderId(2),
        arrived: true,
    };
    dedup.answer(&mut first, 0, &[held]).expect("one answer");
    let second = waiter.join().expect("no panic");
    assert_eq!(verdicts(&second), [refer(HolderId(2))]);
    assert_eq!(
        verdicts(&dedup.settle(first, NO_WAIT)),
        [refer(HolderId(2))]
    );
    // Waiting ends: then the page is sent.
    let third = plan(&dedup, A, Class::Precopy, 1, &[(1, 6)]);
    let fourth = plan(&dedup, B, Class::Precopy, 1, &[(1, 6)]);
    assert_eq!(verdicts(&dedup.settle(fourth, NO_WAIT)), [Verdict::Send]);
    dedup.settle(third, NO_WAIT);
}

#[test]
fn a_dead_shard_or_a_bad_answer_means_send() {
    let dedup = dedup();
    let mut batch = plan(&dedup, A, Class::Precopy, 1, &[(0, 5)]);
    let err = dedup.answer(&mut batch, 0, &[]).expect_err("no answers");
    assert!(err.to_string().contains("0 of 1"), "{err}");
    dedup.no_answer(&mut batch, 0);
    // An answer that comes after all that changes nothing.
    let late = ClaimAnswer::Held {
        holder: HOST_B,
        arrived: true,
    };
    dedup.answer(&mut batch, 0, &[late]).expect("one answer");
    assert_eq!(verdicts(&dedup.settle(batch, NO_WAIT)), [Verdict::Send]);
}

#[test]
fn lost_pages_are_sent_again_without_asking_the_shard_that_would_say_held() {
    let dedup = dedup();
    let lost = send(
        &dedup,
        A,
        Class::Precopy,
        1,
        &[(0, 5), (1, 6), (2, 5)],
        YOURS,
    );
    dedup.lost(&lost);
    assert_eq!(dedup.outstanding(A).expect("VM"), 3);
    assert_eq!(dedup.take_resends(A).expect("VM"), [0, 1, 2].map(Gfn));
    assert_eq!(dedup.take_resends(A).expect("VM"), [], "handed out once");
    // Page 1 has other content now: the claim of what it had is given back.
    let held = ClaimAnswer::Held {
        holder: HOST_A,
        arrived: false,
    };
    let again = send(
        &dedup,
        A,
        Class::Precopy,
        2,
        &[(0, 5), (1, 7), (2, 5)],
        held,
    );
    assert_eq!(
        verdicts(&again),
        [Verdict::Send, refer(HOST_A), refer(HOST_A)]
    );
    let released: Vec<_> = again.notes.iter().flat_map(|n| n.release.clone()).collect();
    assert_eq!(released, [fp(6)]);
    assert_eq!(dedup.outstanding(A).expect("VM"), 0);
}

#[test]
fn a_batch_lost_after_newer_content_was_sent_changes_nothing() {
    let dedup = dedup();
    let old = send(&dedup, A, Class::Precopy, 1, &[(0, 5)], YOURS);
    send(&dedup, A, Class::Precopy, 2, &[(0, 6)], YOURS);
    dedup.lost(&old);
    assert_eq!(dedup.outstanding(A).expect("VM"), 0);
    assert_eq!(dedup.last_sent(A, Gfn(0)).expect("VM"), fp(6));
}

#[test]
fn a_needed_page_is_sent_in_full_and_its_claim_moves_here() {
    let dedup = dedup();
    let held = ClaimAnswer::Held {
        holder: HolderId(3),
        arrived: true,
    };
    send(&dedup, A, Class::Precopy, 1, &[(0, 5)], held);
    dedup.needed(A, Gfn(0), fp(5)).expect("VM's page");
    assert_eq!(dedup.take_resends(A).expect("VM"), [Gfn(0)]);
    let planned = plan(&dedup, A, Class::Precopy, 2, &[(0, 5)]);
    assert!(planned.claims().is_empty());
    let batch = dedup.settle(planned, NO_WAIT);
    assert_eq!(verdicts(&batch), [Verdict::Send]);
    let moved: Vec<_> = batch
        .notes
        .iter()
        .flat_map(|n| n.reassign.clone())
        .collect();
    assert_eq!((moved, batch.holder), (vec![fp(5)], HOST_A));
    // And from then on it is known to be there.
    let next = send(&dedup, B, Class::Precopy, 1, &[(9, 5)], YOURS);
    assert_eq!(verdicts(&next), [refer(HOST_A)]);
    assert!(dedup.needed(A, Gfn(100), fp(1)).is_err());
}

#[test]
fn an_abandoned_plan_gives_its_claims_back_and_its_pages_are_captured_again() {
    let dedup = dedup();
    let shards = [ClaimShard::default(), ClaimShard::default()];
    let planned = plan(&dedup, A, Class::Precopy, 1, &[(0, 5), (1, 6)]);
    for claims in planned.claims() {
        shards[claims.shard].claim(&claims.fps, HOST_A);
    }
    for note in dedup.abandon(planned) {
        shards[note.shard].release(&note.release, HOST_A);
    }
    assert!(shards.iter().all(ClaimShard::is_empty));
    assert_eq!(dedup.take_resends(A).expect("VM"), [Gfn(0), Gfn(1)]);
}

#[test]
fn rounds_are_planned_one_after_the_other() {
    let dedup = dedup();
    let open = plan(&dedup, A, Class::Precopy, 2, &[(0, 5)]);
    let try_plan = |round| dedup.plan(A, Class::Precopy, Round(round), &[]);
    assert!(matches!(
        try_plan(3),
        Err(SourceError::RoundOrder { open: 1, .. })
    ));
    dedup.settle(open, NO_WAIT);
    assert!(matches!(
        try_plan(1),
        Err(SourceError::RoundOrder { open: 0, .. })
    ));
    dedup.settle(try_plan(3).expect("in order"), NO_WAIT);
}

#[test]
fn a_vm_that_left_is_forgotten_and_late_reports_of_it_do_nothing() {
    let dedup = dedup();
    let sent = send(&dedup, A, Class::Precopy, 1, &[(0, 5)], YOURS);
    dedup.remove_vm(A);
    dedup.lost(&sent);
    assert!(dedup.placed(&sent).is_empty());
    assert!(matches!(
        dedup.outstanding(A),
        Err(SourceError::NoVm { .. })
    ));
    let planned = plan(&dedup, B, Class::Precopy, 1, &[(0, 5)]);
    assert_eq!(planned.claims().len(), 1, "its content is asked for anew");
    dedup.settle(planned, NO_WAIT);
    dedup.assert_consistent();
}

#[test]
fn scan_threads_of_many_vms_send_each_content_once() {
    // Four VMs with the same contents in other orders, a thread each, real shards.
    let shards = [ClaimShard::default(), ClaimShard::default()];
    let dedup = SourceDedup::new(ShardMap::new(&[1, 2]), 4);
    let pages = 2000u32;
    for vm in 0..4u16 {
        dedup
            .add_vm(VmIndex(vm), pages, HolderId(vm), key())
            .expect("new");
    }
    let sent = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for vm in 0..4u32 {
            let (dedup, shards, sent) = (&dedup, &shards, &sent);
            scope.spawn(move || {
                let index = VmIndex(vm as u16);
                for from in (0..pages).step_by(100) {
                    let captured: Vec<_> = (from..from + 100)
                        .map(|gfn| {
                            let content = (gfn + vm * 500) % pages / 2;
                            (Gfn(gfn), fp(u64::from(content)))
                        })
                        .collect();
                    let mut plan = dedup
                        .plan(index, Class::Precopy, Round(1), &captured)
                        .expect("pages of the VM");
                    for batch in 0..plan.claims().len() {
                        let claims = &plan.claims()[batch];
                        let answers = shards[claims.shard].claim(&claims.fps, HolderId(vm as u16));
                        dedup.answer(&mut plan, batch, &answers).expect("as many");
                    }
                    let batch = dedup.settle(plan, Duration::from_secs(20));
                    let full = batch.pages.iter().filter(|p| p.verdict == Verdict::Send);
                    sent.fetch_add(full.count() as u64, Relaxed);
                }
            });
        }
    });
    assert_eq!(sent.into_inner(), u64::from(pages / 2));
    dedup.assert_consistent();
}
