use super::*;
use crate::dedup::table::tests::fp;
use proptest::prelude::*;
use std::collections::HashMap;

const A: HolderId = HolderId(0);
const B: HolderId = HolderId(7);

fn held(holder: HolderId, arrived: bool) -> ClaimAnswer {
    ClaimAnswer::Held { holder, arrived }
}

fn one(shard: &ClaimShard, name: u64, me: HolderId) -> ClaimAnswer {
    shard.claim(&[fp(name)], me)[0]
}

#[test]
fn the_first_claimant_sends_and_the_others_refer() {
    let shard = ClaimShard::default();
    let fps: Vec<_> = (0..1000).map(fp).collect();
    assert!(
        shard
            .claim(&fps, A)
            .iter()
            .all(|a| *a == ClaimAnswer::Yours)
    );
    assert!(shard.claim(&fps, B).iter().all(|a| *a == held(A, false)));
    shard.confirm(&fps[..500], A);
    shard.confirm(&fps[500..], B);
    let answers = shard.claim(&fps, B);
    assert!(answers[..500].iter().all(|a| *a == held(A, true)));
    assert!(
        answers[500..].iter().all(|a| *a == held(A, false)),
        "B confirmed what is A's"
    );
}

#[test]
fn the_same_content_twice_in_a_batch_is_sent_once() {
    let shard = ClaimShard::default();
    let answers = shard.claim(&[fp(1), fp(1)], A);
    assert_eq!(answers, [ClaimAnswer::Yours, held(A, false)]);
}

#[test]
fn a_reassigned_claim_is_the_new_holders_and_not_arrived() {
    let shard = ClaimShard::default();
    one(&shard, 1, A);
    shard.confirm(&[fp(1)], A);
    shard.reassign(&[fp(1), fp(2)], B);
    assert_eq!(one(&shard, 1, A), held(B, false));
    assert_eq!(one(&shard, 2, A), held(B, false), "recorded though unknown");
}

#[test]
fn only_unarrived_claims_of_the_same_holder_are_released() {
    let shard = ClaimShard::default();
    shard.claim(&[fp(1), fp(2), fp(3)], A);
    shard.confirm(&[fp(2)], A);
    shard.release(&[fp(1), fp(2), fp(4)], A);
    shard.release(&[fp(3)], B);
    assert_eq!(one(&shard, 1, B), ClaimAnswer::Yours);
    assert_eq!(one(&shard, 2, B), held(A, true));
    assert_eq!(one(&shard, 3, B), held(A, false));
}

#[test]
fn what_a_lost_holder_had_is_sent_anew() {
    let shard = ClaimShard::default();
    one(&shard, 1, A);
    one(&shard, 2, B);
    shard.forget_holder(A);
    assert_eq!(one(&shard, 1, B), ClaimAnswer::Yours);
    assert_eq!(one(&shard, 1, HolderId(3)), held(B, false));
    assert_eq!(one(&shard, 9, A), ClaimAnswer::Yours);
    assert_eq!(
        one(&shard, 9, B),
        ClaimAnswer::Yours,
        "claims of the lost are not kept"
    );
}

#[test]
fn a_full_shard_answers_yours_and_stays_as_it_is() {
    let config = ClaimConfig {
        max_entries: 100,
        ..ClaimConfig::default()
    };
    let shard = ClaimShard::new(config);
    let fps: Vec<_> = (0..1000).map(fp).collect();
    shard.claim(&fps, A);
    let size = shard.memory_bytes();
    let answers = shard.claim(&fps, B);
    assert!(answers[..100].iter().all(|a| *a == held(A, false)));
    assert!(answers[100..].iter().all(|a| *a == ClaimAnswer::Yours));
    assert_eq!((shard.len(), shard.memory_bytes()), (100, size));
}

#[test]
fn holders_that_do_not_fit_zero_pages_and_hostile_ids_are_not_recorded() {
    let shard = ClaimShard::default();
    for me in [MAX_HOLDERS, u16::MAX] {
        assert_eq!(one(&shard, 1, HolderId(me)), ClaimAnswer::Yours);
        shard.confirm(&[fp(1)], HolderId(me));
        shard.reassign(&[fp(1)], HolderId(me));
        shard.release(&[fp(1)], HolderId(me));
        shard.forget_holder(HolderId(me));
    }
    shard.claim(&[Fingerprint::ZERO, UNSENT], A);
    assert_eq!(shard.len(), 0);
    let last = HolderId(MAX_HOLDERS - 1);
    assert_eq!(one(&shard, 1, last), ClaimAnswer::Yours);
    assert_eq!(one(&shard, 1, A), held(last, false));
}

#[test]
fn shards_are_balanced_and_a_leaving_member_moves_only_its_own() {
    let members: Vec<u64> = (0..7).map(|i| i * 0x1234_5678_9abc + 1).collect();
    let map = ShardMap::new(&members);
    let rest = &members[..6];
    let mut count = [0u32; 7];
    for i in 0..70_000 {
        let owner = map.shard_of(&fp(i));
        assert_eq!(owner, shard_of(&fp(i), &members));
        count[owner] += 1;
        let without_last = shard_of(&fp(i), rest);
        assert!(owner == 6 || owner == without_last);
    }
    assert!(
        count.iter().all(|n| (9_000..11_000).contains(n)),
        "{count:?}"
    );
    let mut turned = members.clone();
    turned.reverse();
    assert_eq!(6 - shard_of(&fp(1), &turned), shard_of(&fp(1), &members));
}

#[derive(Debug, Clone)]
enum Op {
    Claim(Vec<u64>, u16),
    Confirm(Vec<u64>, u16),
    Reassign(Vec<u64>, u16),
    Release(Vec<u64>, u16),
    Forget(u16),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let names = || proptest::collection::vec(0..4000u64, 0..200);
    let op = prop_oneof![
        8 => (names(), 0..5u16).prop_map(|(n, h)| Op::Claim(n, h)),
        2 => (names(), 0..5u16).prop_map(|(n, h)| Op::Confirm(n, h)),
        1 => (names(), 0..5u16).prop_map(|(n, h)| Op::Reassign(n, h)),
        4 => (names(), 0..5u16).prop_map(|(n, h)| Op::Release(n, h)),
        1 => (100..105u16).prop_map(Op::Forget),
    ];
    proptest::collection::vec(op, 0..60)
}

proptest! {
    /// Against a map of the tags: with few tag bits, contents that share a tag
    /// share an entry, and nothing worse.
    #[test]
    fn the_shard_behaves_like_a_map_of_tags(ops in ops(), tag_bits in prop_oneof![Just(4u32), Just(9), Just(48)]) {
        let shard = ClaimShard::new(ClaimConfig { tag_bits, ..ClaimConfig::default() });
        let key = |name: &u64| {
            let (lo, hi) = halves(&fp(*name));
            ((lo >> 20) & 1023, hi >> (64 - tag_bits))
        };
        let mut model: HashMap<(u64, u64), (u16, bool)> = HashMap::new();
        let mut forgotten = Vec::new();
        let fps = |names: &[u64]| names.iter().map(|n| fp(*n)).collect::<Vec<_>>();
        for op in ops {
            match op {
                Op::Claim(names, me) => {
                    let answers = shard.claim(&fps(&names), HolderId(me));
                    for (name, answer) in names.iter().zip(answers) {
                        let expect = match model.get(&key(name)) {
                            Some((h, arrived)) if !forgotten.contains(h) => held(HolderId(*h), *arrived),
                            _ => {
                                if !forgotten.contains(&me) {
                                    model.insert(key(name), (me, false));
                                }
                                ClaimAnswer::Yours
                            }
                        };
                        prop_assert_eq!(answer, expect);
                    }
                }
                Op::Confirm(names, me) => {
                    shard.confirm(&fps(&names), HolderId(me));
                    for name in &names {
                        if let Some(entry) = model.get_mut(&key(name)) && entry.0 == me {
                            entry.1 = true;
                        }
                    }
                }
                Op::Reassign(names, me) => {
                    shard.reassign(&fps(&names), HolderId(me));
                    for name in &names {
                        if model.contains_key(&key(name)) || !forgotten.contains(&me) {
                            model.insert(key(name), (me, false));
                        }
                    }
                }
                Op::Release(names, me) => {
                    shard.release(&fps(&names), HolderId(me));
                    for name in &names {
                        if model.get(&key(name)) == Some(&(me, false)) {
                            model.remove(&key(name));
                        }
                    }
                }
                Op::Forget(me) => {
                    shard.forget_holder(HolderId(me - 100));
                    forgotten.push(me - 100);
                }
            }
            prop_assert_eq!(shard.len(), model.len());
        }
        let inner = shard.lock();
        for sub in &inner.subs {
            let filled: Vec<u64> = sub.slots.iter().copied().filter(|e| *e != 0).collect();
            prop_assert!(filled.is_sorted());
            prop_assert_eq!(filled.len(), sub.entries);
        }
    }
}
