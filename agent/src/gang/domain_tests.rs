//! A tenant that guesses a page of another dedup domain learns nothing.
//!
//! The whole way of a page without sockets: claims, verdicts, frames as the lane
//! encodes them, and what the target makes of them. The attacker's VM and its
//! victim share source host, claim shard, lane and target host: nothing could
//! be closer. The same gang moves twice, once with the right guess in the
//! attacker's RAM and once with a wrong one; all that belongs to the
//! attacker's VM, to the byte, has to be the same. The same move inside one
//! domain shows that the guess is seen where it may be.

use crate::config::ClusterSecret;
use crate::dedup::claim::{ClaimAnswer, ClaimShard, ShardMap};
use crate::dedup::fingerprint::FingerprintKey;
use crate::dedup::resolve::{PageMemory, RefArrival, TargetConfig, TargetStore};
use crate::dedup::source::{Plan, ShardNote, SourceDedup, Verdict};
use crate::lane::decode::Decoder;
use crate::lane::encode::{EncodedFrame, Encoder, Progress};
use crate::lane::frame::{Direction, PROLOGUE_LEN, Prologue};
use crate::lane::{BatchId, BufferPool, EncodeConfig, Entries, Reference, StagedBatch};
use crate::types::{Class, GangId, Gfn, HolderId, PAGE_SIZE, Page, Round, VmIndex};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const GANG: GangId = GangId(3);
const VICTIM: usize = 0;
const ATTACKER: usize = 1;
const RAM_PAGES: u32 = 64;

/// Everything about a VM's move that its tenant could hope to see: what its
/// agent counts and tells, and what goes over the wire for it.
#[derive(Debug, Default, PartialEq, Eq, Clone)]
struct Seen {
    sent: u64,
    references: u64,
    zero: u64,
    unchanged: u64,
    answers: Vec<ClaimAnswer>,
    /// Bytes of each frame on the lane.
    frames: Vec<usize>,
    /// What the target had to do for each reference.
    settled: Vec<RefArrival>,
    /// What its shard is told afterwards: contents released, confirmed, taken over.
    notes: (usize, usize, usize),
    pending: u64,
}

#[derive(Clone)]
struct Ram(Arc<Mutex<Vec<Page>>>);

impl PageMemory for Ram {
    fn write(&self, gfn: Gfn, page: &Page) {
        self.0.lock().unwrap()[gfn.index()] = *page;
    }
    fn read(&self, gfn: Gfn, page: &mut Page) {
        *page = self.0.lock().unwrap()[gfn.index()];
    }
    fn zero(&self, gfn: Gfn, count: u32) {
        (gfn.0..gfn.0 + count).for_each(|gfn| self.write(Gfn(gfn), &[0; PAGE_SIZE]));
    }
}

struct Tenant {
    key: Arc<FingerprintKey>,
    target: usize,
    there: Ram,
    seen: Seen,
}

struct Hosts {
    source: SourceDedup,
    shard: ClaimShard,
    targets: Vec<TargetStore>,
    pool: BufferPool,
    encoder: Encoder,
    decoder: Decoder,
    tenants: [Tenant; 2],
    next_batch: u64,
}

struct Staged {
    who: usize,
    round: Round,
    pages: Vec<(Gfn, Page)>,
    plan: Plan,
}

impl Hosts {
    /// Both VMs on one source host; `targets` says to which target host each goes.
    fn new(domains: [&str; 2], targets: [usize; 2]) -> Self {
        let secret = ClusterSecret::from_bytes([5; 32]);
        let source = SourceDedup::new(ShardMap::new(&[1]), 2);
        let config = TargetConfig {
            side_cache_bytes: 1 << 20,
            ..TargetConfig::default()
        };
        let stores: Vec<TargetStore> = (0..2)
            .map(|me| TargetStore::new(HolderId(me), config, Box::new(|_, _| {})))
            .collect();
        let tenants = [VICTIM, ATTACKER].map(|who| {
            let key = Arc::new(FingerprintKey::derive(&secret, domains[who]));
            let (vm, target) = (VmIndex(who as u16), targets[who]);
            let there = Ram(Arc::new(Mutex::new(vec![
                [0; PAGE_SIZE];
                RAM_PAGES as usize
            ])));
            let holder = HolderId(target as u16);
            source.add_vm(vm, RAM_PAGES, holder, key.clone()).unwrap();
            stores[target]
                .add_vm(vm, RAM_PAGES, Box::new(there.clone()), key.clone())
                .unwrap();
            Tenant {
                key,
                target,
                there,
                seen: Seen::default(),
            }
        });
        let encode = EncodeConfig {
            window_log: 20,
            ..EncodeConfig::default()
        };
        Hosts {
            source,
            shard: ClaimShard::default(),
            targets: stores,
            pool: BufferPool::new(8).unwrap(),
            encoder: Encoder::new(encode),
            decoder: Decoder::new(20),
            tenants,
            next_batch: 0,
        }
    }

    /// Captures pages and has them claimed.
    fn plan(&mut self, who: usize, round: u32, pages: &[(u32, Page)]) -> Staged {
        let tenant = &mut self.tenants[who];
        let pages: Vec<(Gfn, Page)> = pages.iter().map(|(g, p)| (Gfn(*g), *p)).collect();
        let captured: Vec<_> = pages
            .iter()
            .map(|(gfn, page)| (*gfn, tenant.key.fingerprint(page)))
            .collect();
        let (vm, round) = (VmIndex(who as u16), Round(round));
        let mut plan = self
            .source
            .plan(vm, Class::Precopy, round, &captured)
            .unwrap();
        for batch in 0..plan.claims().len() {
            let fps = plan.claims()[batch].fps.clone();
            let answers = self.shard.claim(&fps, HolderId(tenant.target as u16));
            tenant.seen.answers.extend(&answers);
            self.source.answer(&mut plan, batch, &answers).unwrap();
        }
        Staged {
            who,
            round,
            pages,
            plan,
        }
    }

    /// Sends what was captured and has it placed.
    fn send(&mut self, staged: Staged) {
        let Staged {
            who, round, pages, ..
        } = &staged;
        let (who, round) = (*who, *round);
        let pages = pages.clone();
        let mut batch = self.source.settle(staged.plan, Duration::ZERO);
        let notes = std::mem::take(&mut batch.notes);
        self.tell(who, notes);
        let mut content = self.pool.take(Duration::from_secs(5)).unwrap();
        let mut entries = Entries::default();
        let seen = &mut self.tenants[who].seen;
        for (page, (_, bytes)) in batch.pages.iter().zip(&pages) {
            match page.verdict {
                Verdict::Unchanged => seen.unchanged += 1,
                Verdict::Zero => {
                    seen.zero += 1;
                    assert!(entries.push_zero(page.gfn), "few runs");
                }
                Verdict::Send => {
                    seen.sent += 1;
                    *content.page_mut(entries.pages.len()) = *bytes;
                    entries.pages.push(page.gfn);
                }
                Verdict::Reference { holder } => {
                    seen.references += 1;
                    entries.refs.push(Reference {
                        gfn: page.gfn,
                        holder,
                        fingerprint: page.fp,
                    });
                }
            }
        }
        entries.normalize();
        self.next_batch += 1;
        let staged = StagedBatch {
            gang: GANG,
            vm: VmIndex(who as u16),
            batch: BatchId(self.next_batch),
            round,
            class: Class::Precopy,
            domain: self.tenants[who].key.domain_number(),
            entries,
            content: Some(content),
        };
        let frame = self.encode(staged);
        self.tenants[who].seen.frames.push(frame.to - frame.from);
        self.arrive(who, round, &frame);
        let notes = self.source.placed(&batch);
        self.tell(who, notes);
    }

    fn encode(&mut self, staged: StagedBatch) -> EncodedFrame {
        let spare = self.pool.take(Duration::from_secs(5)).unwrap();
        let mut progress = self.encoder.start(staged, spare).unwrap();
        loop {
            match progress {
                Progress::Done(frame) => return frame,
                Progress::More(job) => progress = self.encoder.step(job).unwrap(),
            }
        }
    }

    fn arrive(&mut self, who: usize, round: Round, frame: &EncodedFrame) {
        let bytes = &frame.buf.bytes()[frame.from..frame.to];
        let (prologue, body) = bytes.split_first_chunk::<PROLOGUE_LEN>().unwrap();
        let prologue = Prologue::parse(prologue, Direction::Forward).unwrap();
        let tenant = &mut self.tenants[who];
        let targets = &self.targets;
        self.decoder
            .decode(&prologue, body, |batch| {
                let store = &targets[tenant.target];
                let vm = store.vm(batch.head.vm).unwrap();
                for run in &batch.entries.zeros {
                    store.arrive_zero(&vm, run.first, run.count, round).unwrap();
                }
                for (gfn, page) in batch.pages() {
                    store.arrive_page(&vm, gfn, round, page).unwrap();
                }
                for r in &batch.entries.refs {
                    let arrival = store
                        .arrive_ref(&vm, r.gfn, round, r.fingerprint, r.holder)
                        .unwrap();
                    if arrival == RefArrival::Fetch {
                        let mut page = [0; PAGE_SIZE];
                        targets[usize::from(r.holder.0)].serve(&r.fingerprint, &mut page);
                        store.fetched(r.fingerprint, r.holder, &page);
                    }
                    tenant.seen.settled.push(arrival);
                }
            })
            .unwrap();
    }

    fn tell(&mut self, who: usize, notes: Vec<ShardNote>) {
        let holder = HolderId(self.tenants[who].target as u16);
        let told = &mut self.tenants[who].seen.notes;
        for note in notes {
            told.0 += note.release.len();
            told.1 += note.confirm.len();
            told.2 += note.reassign.len();
            self.shard.release(&note.release, holder);
            self.shard.confirm(&note.confirm, holder);
            self.shard.reassign(&note.reassign, holder);
        }
    }

    /// Ends the moves; what the attacker saw.
    fn finish(mut self, expected: &[(u32, Page)]) -> Seen {
        let tenant = &self.tenants[ATTACKER];
        let store = &self.targets[tenant.target];
        let pending = store.complete(&store.vm(VmIndex(1)).unwrap()).pending;
        for (gfn, page) in expected {
            assert!(tenant.there.0.lock().unwrap()[*gfn as usize] == *page);
        }
        let seen = &mut self.tenants[ATTACKER].seen;
        seen.pending = pending;
        std::mem::take(seen)
    }
}

/// A page with text-like content that compresses, number `n`.
fn page(n: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut x = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for (at, word) in page.chunks_exact_mut(8).enumerate() {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let value = if at % 2 == 0 { x } else { at as u64 / 8 };
        word.copy_from_slice(&value.to_le_bytes());
    }
    page
}

/// A page with one word that the attacker guesses, as a password would be: for
/// compression, right and wrong guesses look alike but for their history.
fn secret(word: u64) -> Page {
    let mut page = page(1000);
    page[2048..2056].copy_from_slice(&word.to_le_bytes());
    page
}

const GUESS: u64 = 7;

/// How close attacker and victim come.
#[derive(Debug, Clone, Copy)]
struct Scene {
    targets: [usize; 2],
    /// The attacker's pages are claimed while the victim's are under way.
    at_once: bool,
}

/// Moves the gang; the attacker's guess is `secret(GUESS)`. That it is always
/// the same, and the victim's page another, makes each byte comparable.
fn attack(domains: [&str; 2], scene: Scene, victims: u64) -> Seen {
    let mut hosts = Hosts::new(domains, scene.targets);
    let mut victim: Vec<(u32, Page)> = (0..20).map(|i| (i, page(u64::from(i)))).collect();
    victim.push((20, secret(victims)));
    let mut attacker: Vec<(u32, Page)> = (0..10).map(|i| (i, page(500 + u64::from(i)))).collect();
    attacker.push((10, secret(GUESS)));
    attacker.push((11, [0; PAGE_SIZE]));
    let first = hosts.plan(VICTIM, 1, &victim);
    if scene.at_once {
        let attackers = hosts.plan(ATTACKER, 1, &attacker);
        hosts.send(first);
        hosts.send(attackers);
    } else {
        hosts.send(first);
        let attackers = hosts.plan(ATTACKER, 1, &attacker);
        hosts.send(attackers);
    }
    // The victim's page moves about; the attacker tries again, twice.
    let moved = hosts.plan(VICTIM, 2, &[(30, secret(victims)), (20, page(77))]);
    hosts.send(moved);
    let again = [
        (12, secret(GUESS)),
        (13, secret(GUESS)),
        (10, secret(GUESS)),
    ];
    let attackers = hosts.plan(ATTACKER, 2, &again);
    hosts.send(attackers);
    attacker.extend(again);
    hosts.finish(&attacker)
}

const SCENES: [Scene; 4] = [
    Scene {
        targets: [0, 0],
        at_once: false,
    },
    Scene {
        targets: [0, 0],
        at_once: true,
    },
    Scene {
        targets: [0, 1],
        at_once: false,
    },
    Scene {
        targets: [0, 1],
        at_once: true,
    },
];

#[test]
fn a_guess_across_domains_tells_the_attacker_nothing() {
    for scene in SCENES {
        let wrong = attack(["victim", "attacker"], scene, GUESS + 1);
        let right = attack(["victim", "attacker"], scene, GUESS);
        assert_eq!(wrong.pending, 0);
        assert!(wrong.sent > 0 && !wrong.frames.is_empty());
        assert_eq!(right, wrong, "{scene:?}");
    }
}

#[test]
fn the_same_guess_inside_one_domain_is_seen() {
    for scene in SCENES {
        let wrong = attack(["one", "one"], scene, GUESS + 1);
        let right = attack(["one", "one"], scene, GUESS);
        assert!(right.references > wrong.references, "{scene:?}");
        assert!(right.sent < wrong.sent, "{scene:?}");
        assert_ne!(right.frames, wrong.frames, "{scene:?}");
    }
}
