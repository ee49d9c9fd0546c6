use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

/// A fingerprint as good as random, from a number.
pub(crate) fn fp(i: u64) -> Fingerprint {
    let mix = |x: u64| {
        let x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        let x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        x ^ (x >> 33)
    };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&mix(2 * i + 1).to_le_bytes());
    bytes[8..].copy_from_slice(&mix(2 * i + 2).to_le_bytes());
    Fingerprint(bytes)
}

#[test]
fn arrays_start_as_zero_pages_and_keep_what_is_written() {
    let array = FingerprintArray::new(1000);
    assert!(array.iter().all(|fp| fp == Fingerprint::ZERO));
    array.set(Gfn(999), fp(1));
    array.set(Gfn(0), fp(2));
    assert_eq!((array.get(Gfn(999)), array.get(Gfn(0))), (fp(1), fp(2)));
    assert_eq!(array.iter().count(), 1000);
}

#[test]
fn one_vm_leaving_takes_its_pages_and_no_others() {
    let index = ContentIndex::new();
    let mut ranges = Vec::new();
    for vm in 0..4u16 {
        let array = Arc::new(FingerprintArray::new(5000));
        let range = index.add_vm(VmIndex(vm), array.clone()).expect("room");
        for gfn in 0..5000 {
            let name = fp(u64::from(vm) * 5000 + u64::from(gfn));
            array.set(Gfn(gfn), name);
            assert!(index.list(&name, range.id(Gfn(gfn))));
        }
        ranges.push((range, array));
    }
    index.remove_vm(ranges[1].0);
    assert_eq!(index.len(), 15_000);
    for i in 0..20_000u64 {
        let expect =
            (i / 5000 != 1).then_some((VmIndex((i / 5000) as u16), Gfn((i % 5000) as u32)));
        assert_eq!(index.lookup(&fp(i), |vm, gfn| (vm, gfn)), expect);
    }
    assert!(!index.list(&fp(5001), ranges[1].0.id(Gfn(1))), "VM is gone");
    // Its page ids are given to the next VM that fits.
    let small = Arc::new(FingerprintArray::new(4000));
    small.set(Gfn(7), fp(1 << 40));
    let again = index.add_vm(VmIndex(9), small).expect("room");
    assert_eq!(again.id(Gfn(0)), ranges[1].0.id(Gfn(0)));
    assert!(index.list(&fp(1 << 40), again.id(Gfn(7))));
    assert_eq!(
        index.lookup(&fp(1 << 40), |vm, gfn| (vm, gfn)),
        Some((VmIndex(9), Gfn(7)))
    );
}

#[test]
fn more_pages_than_ids_are_refused_and_gaps_are_used() {
    let range = |base, pages| PageRange { base, pages };
    let taken = [range(0, 10), range(30, 1 << 31)];
    let free = |pages| free_range(taken.iter().copied(), pages);
    assert_eq!(free(20), Some((1, 10)));
    assert_eq!(free(21), Some((2, 30 + (1 << 31))));
    assert_eq!(free(1 << 31), None);
    assert!(IndexError::Full { pages: 1 }.to_string().contains("16 TiB"));
}

#[test]
fn an_array_digests_like_the_list_of_its_entries() {
    use crate::config::ClusterSecret;
    let secret = ClusterSecret::from_bytes([1; 32]);
    let key = FingerprintKey::derive(&secret, "a");
    for pages in [1u32, 4095, 4096, 4097, 20_000] {
        let array = FingerprintArray::new(pages);
        let list = || array.iter().collect::<Vec<_>>();
        assert_eq!(array.digest(&key), key.digest(&list()), "fresh, {pages}");
        let mut digests = vec![array.digest(&key)];
        for (step, gfn) in [0, pages - 1, pages / 2, 0].into_iter().enumerate() {
            array.set(Gfn(gfn), fp(step as u64));
            assert_eq!(array.digest(&key), key.digest(&list()), "{step} of {pages}");
            assert_eq!(array.digest(&key), array.digest(&key));
            digests.push(array.digest(&key));
        }
        let before = digests.len();
        digests.sort_unstable();
        digests.dedup();
        assert_eq!(digests.len(), before, "every change is seen");
    }
}

/// The worst bytes an index entry takes while the index grows to `most` pages.
fn worst_index_bytes(most: u32) -> f64 {
    let index = ContentIndex::new();
    let fixed = index.memory_bytes();
    let array = Arc::new(FingerprintArray::new(most));
    let range = index.add_vm(VmIndex(0), array.clone()).expect("room");
    let mut worst = 0f64;
    for gfn in 0..most {
        array.set(Gfn(gfn), fp(gfn.into()));
        index.list(&fp(gfn.into()), range.id(Gfn(gfn)));
        // Over one octave: everything later repeats it at twice the size.
        if gfn > most / 2 && gfn % (most / 64) == 0 {
            let bytes = (index.memory_bytes() - fixed) as f64;
            worst = worst.max(bytes / f64::from(gfn));
        }
    }
    worst
}

#[test]
fn tables_take_at_most_one_percent_of_guest_ram() {
    use crate::dedup::claim::{ClaimConfig, ClaimShard};
    use crate::types::HolderId;
    // All pages distinct and every size within an octave: the worst there is.
    let pages = 1 << 21;
    let index = worst_index_bytes(pages);
    let shard = ClaimShard::new(ClaimConfig::default());
    let fixed = shard.memory_bytes();
    let mut claim = 0f64;
    for from in (0..u64::from(pages)).step_by(4096) {
        let batch: Vec<_> = (from..from + 4096).map(fp).collect();
        shard.claim(&batch, HolderId(1));
        if from > u64::from(pages) / 2 {
            let bytes = (shard.memory_bytes() - fixed) as f64;
            claim = claim.max(bytes / shard.len() as f64);
        }
    }
    let source = 16.0 + 2.0 + index + claim;
    let target = 16.0 + 4.0 + index;
    println!("index {index:.2} claim {claim:.2} source {source:.2} target {target:.2} B a page");
    assert!(index < 8.7 && claim < 12.1, "index {index}, claim {claim}");
    assert!(source < 40.96 && target < 40.96, "{source} {target}");
}

#[derive(Debug, Clone)]
enum Op {
    /// Page gets content: unlisted under the old name, listed under the new one.
    Set(u16, u64),
    Lookup(u64),
    Unlist(u16),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        (0..300u16, 0..100u64).prop_map(|(page, content)| Op::Set(page, content)),
        (0..100u64).prop_map(Op::Lookup),
        (0..300u16).prop_map(Op::Unlist),
    ];
    proptest::collection::vec(op, 0..2000)
}

proptest! {
    #[test]
    fn the_index_behaves_like_a_map(ops in ops()) {
        let index = ContentIndex::new();
        let arrays = [100u32, 200].map(|pages| Arc::new(FingerprintArray::new(pages)));
        let ranges = [0, 1].map(|i| index.add_vm(VmIndex(i), arrays[i as usize].clone()).expect("room"));
        let place = |page: u16| match page {
            0..100 => (0, Gfn(page.into())),
            _ => (1, Gfn(u32::from(page) - 100)),
        };
        let mut model: HashMap<u64, u16> = HashMap::new();
        let mut content: HashMap<u16, u64> = HashMap::new();
        for op in ops {
            match op {
                Op::Set(page, new) => {
                    let (vm, gfn) = place(page);
                    let id = ranges[vm].id(gfn);
                    if let Some(old) = content.insert(page, new) {
                        let listed = model.get(&old) == Some(&page);
                        prop_assert_eq!(index.unlist(&fp(old), id), listed);
                        if listed {
                            model.remove(&old);
                        }
                    }
                    arrays[vm].set(gfn, fp(new));
                    prop_assert_eq!(index.list(&fp(new), id), !model.contains_key(&new));
                    model.entry(new).or_insert(page);
                }
                Op::Lookup(name) => {
                    let found = index.lookup(&fp(name), |vm, gfn| (usize::from(vm.0), gfn));
                    prop_assert_eq!(found, model.get(&name).map(|page| place(*page)));
                }
                Op::Unlist(page) => {
                    let (vm, gfn) = place(page);
                    if let Some(name) = content.get(&page) {
                        let listed = model.get(name) == Some(&page);
                        prop_assert_eq!(index.unlist(&fp(*name), ranges[vm].id(gfn)), listed);
                        if listed {
                            model.remove(name);
                        }
                    }
                }
            }
            prop_assert_eq!(index.len(), model.len());
        }
    }
}
