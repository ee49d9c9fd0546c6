//! The simulated racks: hosts, guests, what is on the wire, and what must hold.

use super::{
    Rng,
    network::{Message, Parked},
    vm::{Phase, SimMemory, Vm},
};
use crate::{
    config::ClusterSecret,
    dedup::{
        claim::{ClaimConfig, ClaimShard, ShardMap},
        fingerprint::FingerprintKey,
        resolve::{TargetConfig, TargetStore},
        source::SourceDedup,
    },
    types::{Fingerprint, HolderId, PAGE_SIZE, Page, VmIndex},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, OnceLock},
};

/// What may go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Faults {
    /// Messages overtake each other, and that is all; guests do not write.
    None,
    /// Everything.
    All,
}

/// Content of a page, by number; 0 is the zero page.
pub(super) type Content = u32;

/// A page of this content, the same everywhere.
pub(super) fn page_of(content: Content) -> Page {
    let mut page = [0; PAGE_SIZE];
    page[..4].copy_from_slice(&content.to_le_bytes());
    page[4000..4004].copy_from_slice(&content.to_be_bytes());
    page
}

/// How often what happened.
#[derive(Debug, Default, Clone)]
pub(super) struct Tally {
    pub(super) delivered: u64,
    pub(super) lost: u64,
    pub(super) doubled: u64,
    pub(super) batches_resent: u64,
    pub(super) batches_given_up: u64,
    pub(super) claims_unanswered: u64,
    pub(super) references: u64,
    pub(super) full: u64,
    pub(super) unchanged: u64,
    pub(super) needs: u64,
    pub(super) lies: u64,
    pub(super) gone: u64,
    pub(super) parked: u64,
    pub(super) fetch_timeouts: u64,
    pub(super) side_cache_served: u64,
    pub(super) stale: u64,
    pub(super) stop_copy_references: u64,
    pub(super) vms_failed: u64,
    pub(super) shards_died: u64,
}

impl Tally {
    pub(super) fn all(&self) -> [(&'static str, u64); 19] {
        [
            ("delivered", self.delivered),
            ("lost", self.lost),
            ("doubled", self.doubled),
            ("batches_resent", self.batches_resent),
            ("batches_given_up", self.batches_given_up),
            ("claims_unanswered", self.claims_unanswered),
            ("references", self.references),
            ("full", self.full),
            ("unchanged", self.unchanged),
            ("needs", self.needs),
            ("lies", self.lies),
            ("gone", self.gone),
            ("parked", self.parked),
            ("fetch_timeouts", self.fetch_timeouts),
            ("side_cache_served", self.side_cache_served),
            ("stale", self.stale),
            ("stop_copy_references", self.stop_copy_references),
            ("vms_failed", self.vms_failed),
            ("shards_died", self.shards_died),
        ]
    }

    pub(super) fn add(&mut self, other: &Tally) {
        let fields = [
            &mut self.delivered,
            &mut self.lost,
            &mut self.doubled,
            &mut self.batches_resent,
            &mut self.batches_given_up,
            &mut self.claims_unanswered,
            &mut self.references,
            &mut self.full,
            &mut self.unchanged,
            &mut self.needs,
            &mut self.lies,
            &mut self.gone,
            &mut self.parked,
            &mut self.fetch_timeouts,
            &mut self.side_cache_served,
            &mut self.stale,
            &mut self.stop_copy_references,
            &mut self.vms_failed,
            &mut self.shards_died,
        ];
        for (field, (_, more)) in fields.into_iter().zip(other.all()) {
            *field += more;
        }
    }
}

pub(super) struct Target {
    pub(super) store: TargetStore,
    /// Watchers the store has called, to be answered.
    pub(super) ready: Arc<Mutex<Vec<u64>>>,
    pub(super) parked: BTreeMap<u64, Parked>,
    /// Answers fetches with other content.
    pub(super) lies: bool,
    /// Does not answer fetches.
    pub(super) mute: bool,
}

pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) faults: Faults,
    pub(super) keys: [Arc<FingerprintKey>; 2],
    pub(super) sources: Vec<SourceDedup>,
    pub(super) shards: Vec<ClaimShard>,
    pub(super) dead: BTreeSet<usize>,
    pub(super) targets: Vec<Target>,
    pub(super) vms: Vec<Vm>,
    pub(super) wire: Vec<Message>,
    /// Fetches under way: (asking host, content).
    pub(super) fetches: BTreeSet<(usize, Fingerprint)>,
    /// Content that ever reached a target host in full.
    pub(super) arrived: BTreeSet<(usize, Fingerprint)>,
    /// Whether claims are never mixed up: tags are long enough.
    pub(super) exact_claims: bool,
    pub(super) next_id: u64,
    pub(super) tally: Tally,
    step: u64,
}

/// Steps with faults; after them, only delay and order stay random.
const STORM: u64 = 3_000;
/// Steps in which a gang must have moved.
const LIMIT: u64 = 200_000;

fn keys() -> [Arc<FingerprintKey>; 2] {
    static KEYS: OnceLock<[Arc<FingerprintKey>; 2]> = OnceLock::new();
    KEYS.get_or_init(|| {
        let secret = ClusterSecret::from_bytes([5; 32]);
        ["tenant a", "tenant b"].map(|domain| Arc::new(FingerprintKey::derive(&secret, domain)))
    })
    .clone()
}

impl World {
    pub(super) fn new(seed: u64, faults: Faults) -> Self {
        let mut rng = Rng::new(seed);
        let stormy = faults == Faults::All;
        let sources = 1 + rng.below(3);
        let targets = 1 + rng.below(3);
        let members: Vec<u64> = (0..sources as u64).map(|i| i * 77 + 5).collect();
        let map = ShardMap::new(&members);
        let tag_bits = if stormy {
            rng.pick(&[1, 3, 48, 48])
        } else {
            48
        };
        let max_entries = if stormy {
            rng.pick(&[5, 1 << 20])
        } else {
            1 << 20
        };
        let config = TargetConfig {
            // None, one page a shard, plenty.
            side_cache_bytes: rng.pick(&[0, 17 * 5000, 1 << 20]),
            max_waiting: if stormy {
                rng.pick(&[2, 1 << 16])
            } else {
                1 << 16
            },
        };
        let mut world = Self {
            faults,
            keys: keys(),
            sources: (0..sources)
                .map(|_| SourceDedup::new(map.clone(), targets as u16))
                .collect(),
            shards: (0..sources)
                .map(|_| {
                    ClaimShard::new(ClaimConfig {
                        tag_bits,
                        max_entries,
                    })
                })
                .collect(),
            dead: BTreeSet::new(),
            targets: (0..targets)
                .map(|me| {
                    let ready = Arc::new(Mutex::new(Vec::new()));
                    let sink = ready.clone();
                    let on_ready = move |watcher, _| sink.lock().expect("one thread").push(watcher);
                    Target {
                        store: TargetStore::new(HolderId(me as u16), config, Box::new(on_ready)),
                        ready,
                        parked: BTreeMap::new(),
                        lies: stormy && rng.percent(15),
                        mute: stormy && rng.percent(10),
                    }
                })
                .collect(),
            vms: Vec::new(),
            wire: Vec::new(),
            fetches: BTreeSet::new(),
            arrived: BTreeSet::new(),
            exact_claims: tag_bits == 48,
            next_id: 0,
            tally: Tally::default(),
            step: 0,
            rng,
        };
        for _ in 0..1 + world.rng.below(5) {
            world.add_vm();
        }
        world
    }

    fn add_vm(&mut self) {
        let index = VmIndex(self.vms.len() as u16);
        let rng = &mut self.rng;
        let source = rng.below(self.sources.len());
        let target = rng.below(self.targets.len());
        let pages = 1 + rng.below(40);
        let domain = usize::from(rng.percent(20));
        // Few contents, so that pages share them.
        let variety = rng.pick(&[4, 20, 200]);
        let ram: Vec<Content> = (0..pages).map(|_| rng.below(variety) as Content).collect();
        let rounds = match self.faults {
            Faults::None => 1,
            Faults::All => 1 + rng.below(4) as u32,
        };
        let memory = Arc::new(SimMemory::new(pages));
        let key = self.keys[domain].clone();
        self.targets[target]
            .store
            .add_vm(index, pages as u32, Box::new(memory.clone()), key.clone())
            .expect("a new VM");
        self.sources[source]
            .add_vm(index, pages as u32, HolderId(target as u16), key.clone())
            .expect("a new VM");
        let vm = Vm::new(index, source, target, domain, key, ram, rounds, memory);
        self.vms.push(vm);
    }

    /// Whether things still go wrong.
    pub(super) fn storm(&self) -> bool {
        self.faults == Faults::All && self.step < STORM
    }

    /// Whether waiting may end before an answer.
    pub(super) fn impatient(&self) -> bool {
        self.faults == Faults::All
    }

    pub(super) fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Runs until every VM has moved or failed, and what is left on the wire has
    /// been delivered.
    pub(super) fn run(&mut self) {
        let settled = |vm: &Vm| matches!(vm.phase, Phase::Moved | Phase::Failed);
        while !self.vms.iter().all(settled) {
            self.step += 1;
            assert!(
                self.step < LIMIT,
                "the gang does not arrive: {}",
                self.state()
            );
            self.act();
        }
        // Late messages must not hurt guests that run.
        while !self.wire.is_empty() {
            self.deliver_one();
        }
        for source in &self.sources {
            source.assert_consistent();
        }
        for target in &self.targets {
            target.store.assert_consistent();
            let counts = target.store.counts();
            self.tally.side_cache_served += counts.served_from_side_cache;
        }
    }

    fn act(&mut self) {
        match self.rng.below(100) {
            0..40 => self.deliver_one(),
            40..70 => self.vm_step(),
            70..80 => self.lose_patience(),
            80..97 => self.guests_write(),
            _ if self.storm() => self.mishap(),
            _ => {}
        }
        self.wake_parked();
    }

    /// Rare events.
    fn mishap(&mut self) {
        let vms = self.vms.len();
        match self.rng.below(40) {
            0 => {
                let shard = self.rng.below(self.shards.len());
                self.tally.shards_died += u64::from(self.dead.insert(shard));
            }
            1 => {
                let vm = self.rng.below(vms);
                self.fail_vm(vm);
            }
            2 => {
                let holder = HolderId(self.rng.below(self.targets.len()) as u16);
                let shard = self.rng.below(self.shards.len());
                self.shards[shard].forget_holder(holder);
            }
            3 => {
                let target = self.rng.below(self.targets.len());
                self.targets[target].mute ^= true;
            }
            _ => {}
        }
    }

    /// What a schedule that does not end looks like.
    fn state(&self) -> String {
        let vms: Vec<String> = self.vms.iter().map(|vm| format!("{vm:?}")).collect();
        format!(
            "{} messages, fetches {}, VMs {vms:#?}",
            self.wire.len(),
            self.fetches.len()
        )
    }

    /// Pages that crossed the core in full.
    pub(super) fn sent_in_full(&self) -> usize {
        self.tally.full as usize
    }

    /// Distinct contents of all VMs at the start, zero pages not counted.
    pub(super) fn distinct_at_start(&self) -> usize {
        let contents: BTreeSet<(usize, Content)> = self
            .vms
            .iter()
            .flat_map(|vm| vm.ram.iter().map(|content| (vm.domain, *content)))
            .filter(|(_, content)| *content != 0)
            .collect();
        contents.len()
    }
}
