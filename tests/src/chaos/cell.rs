//! What the fault matrix is made of: who is hit, by what, and when.

use drover::gang::moments::{Moment, Party};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Who or what is hit. Roles are those of one VM of the gang, the *focus*.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Victim {
    /// The agent that the focus leaves.
    SourceAgent,
    /// The agent that the focus comes to.
    TargetAgent,
    /// The agent that drives the gang; no VM of the gang is on its host.
    Coordinator,
    /// The other source agent of the rack: it holds half of the claim table.
    ClaimShard,
    /// The other target agent of the rack: contents that it has are referred to.
    HolderHost,
    /// The process the focus runs in.
    SourceVmm,
    /// The process that waits for the focus.
    TargetVmm,
    /// The link between the racks.
    CoreLink,
    /// The uplink of the focus's source host.
    SourceLink,
    /// The uplink of the focus's target host.
    TargetLink,
    /// The uplink of the coordinator's host.
    CoordinatorLink,
}

/// What happens to a victim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// SIGKILL. An agent is started again after [`DOWN_FOR`]: later than its
    /// peers must have noticed. A VMM stays dead.
    Kill,
    /// SIGSTOP for five seconds.
    Stop,
    /// An agent: SIGKILL, and started again at once, as a service manager does.
    /// A VMM: SIGTERM, and once the gang is over its VM is started anew.
    Restart,
    /// The link is down for eight seconds: longer than agents wait for a sign
    /// of life, shorter than a handover is repeated.
    Cut,
    /// The link is down for forty seconds: longer than a handover is repeated.
    LongCut,
    /// The link is down for three seconds.
    Down3s,
    /// What the victim's side sends is lost for eight seconds.
    OneWayOut,
    /// What is sent to the victim's side is lost for eight seconds.
    OneWayIn,
    /// Every tenth frame is lost, both ways, until the gang is over.
    Loss,
    /// One byte of every hundredth frame is changed, both ways, below TCP.
    Corrupt,
    /// Every TCP connection of the host is aborted, once.
    Reset,
    /// The state directory has no byte left, until the gang is over.
    DiskFull,
    /// The RAM directory has no page left, until the gang is over.
    NoMemory,
    /// The wall clock jumps an hour ahead.
    ClockForward,
    /// The wall clock jumps an hour back.
    ClockBack,
}

/// Seconds that a killed agent is away.
pub const DOWN_FOR: u64 = 4;

use Fault as F;
use Victim as V;

const PROCESS: &[Fault] = &[F::Kill, F::Stop, F::Restart];

/// Every fault of every victim.
const PAIRS: &[(Victim, &[Fault])] = &[
    (V::SourceAgent, PROCESS),
    (V::TargetAgent, PROCESS),
    (V::Coordinator, PROCESS),
    (V::ClaimShard, PROCESS),
    (V::HolderHost, PROCESS),
    (V::SourceVmm, PROCESS),
    (V::TargetVmm, PROCESS),
    (
        V::CoreLink,
        &[
            F::Cut,
            F::LongCut,
            F::Down3s,
            F::OneWayOut,
            F::OneWayIn,
            F::Loss,
            F::Corrupt,
        ],
    ),
    (V::SourceLink, &[F::Cut, F::OneWayOut, F::OneWayIn]),
    (V::TargetLink, &[F::Cut, F::OneWayOut, F::OneWayIn]),
    (V::CoordinatorLink, &[F::Cut]),
    (
        V::SourceAgent,
        &[F::Reset, F::DiskFull, F::ClockForward, F::ClockBack],
    ),
    (
        V::TargetAgent,
        &[
            F::Reset,
            F::DiskFull,
            F::NoMemory,
            F::ClockForward,
            F::ClockBack,
        ],
    ),
    (V::Coordinator, &[F::Reset, F::DiskFull]),
];

/// Every victim with every fault that it can have.
pub fn pairs() -> Vec<(Victim, Fault)> {
    let each = |(victim, faults): &(Victim, &'static [Fault])| {
        let victim = *victim;
        faults.iter().map(move |fault| (victim, *fault))
    };
    PAIRS.iter().flat_map(each).collect()
}

/// One cell of the matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cell {
    /// Who is hit.
    pub victim: Victim,
    /// By what.
    pub fault: Fault,
    /// When.
    pub moment: Moment,
}

impl Cell {
    /// Whether there is such a victim at that moment.
    fn exists(&self) -> bool {
        use Moment as M;
        let before_target = [M::Checked, M::Opened, M::JournalMoving, M::Preparing];
        let after_source = [M::SourceEnded, M::Closing];
        match self.victim {
            // The target is made before the source's journal is written, but
            // the coordinator's own steps come earlier.
            V::TargetVmm => {
                !before_target[..2].contains(&self.moment)
                    && self.moment != M::Preparing
                    && self.moment != M::RolledBack
            }
            V::SourceVmm => !after_source.contains(&self.moment),
            _ => self.fault != F::LongCut || in_doubt_begins(self.moment),
        }
    }

    /// A number of its own for this cell in a run with this seed.
    pub fn seed(&self, run: u64) -> u64 {
        let name = self.to_string();
        name.bytes()
            .fold(mix(run), |seed, byte| mix(seed ^ u64::from(byte)))
    }
}

/// Moments from which on a long silence leaves a VM's owner unknown.
fn in_doubt_begins(moment: Moment) -> bool {
    use Moment as M;
    matches!(
        moment,
        M::Sealed
            | M::DeviceArrived
            | M::Committing
            | M::Committed
            | M::ResumeSent
            | M::ResumeReceived
            | M::TargetCommitted
            | M::TargetRunning
    )
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cell {
            victim,
            fault,
            moment,
        } = self;
        write!(f, "{victim}/{fault}/{}", moment.name())
    }
}

impl FromStr for Cell {
    type Err = String;

    fn from_str(text: &str) -> Result<Cell, String> {
        all()
            .into_iter()
            .find(|cell| cell.to_string() == text)
            .ok_or_else(|| format!("there is no cell {text}: see `--list`"))
    }
}

/// The kebab-case name that JSON has.
fn kebab<T: Serialize>(value: T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        other => unreachable!("a unit variant is a string, not {other:?}"),
    }
}

impl fmt::Display for Victim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&kebab(self))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&kebab(self))
    }
}

/// Every cell there is: each pair at each moment at which the victim exists.
pub fn all() -> Vec<Cell> {
    let at = |(victim, fault)| {
        Moment::ALL.iter().map(move |&moment| Cell {
            victim,
            fault,
            moment,
        })
    };
    pairs()
        .into_iter()
        .flat_map(at)
        .filter(Cell::exists)
        .collect()
}

/// `count` cells that have every pair and every moment about equally often,
/// in an order that the seed decides.
pub fn sample(count: usize, seed: u64) -> Vec<Cell> {
    let mut left = all();
    let mut random = Random::new(seed);
    let mut by_pair = std::collections::HashMap::new();
    let mut by_moment = std::collections::HashMap::new();
    let mut taken = Vec::new();
    while taken.len() < count && !left.is_empty() {
        // The rarest pair first, of it the rarest moment, else by chance.
        let rarity = |cell: &Cell| {
            let pair = (cell.victim, cell.fault);
            let pair = by_pair.get(&pair).copied().unwrap_or(0);
            let moment = by_moment.get(&cell.moment).copied().unwrap_or(0);
            (pair, moment)
        };
        let least = left.iter().map(rarity).min().unwrap_or((0, 0));
        let rarest: Vec<usize> = (0..left.len())
            .filter(|i| rarity(&left[*i]) == least)
            .collect();
        let cell = left.swap_remove(rarest[random.below(rarest.len() as u64) as usize]);
        *by_pair.entry((cell.victim, cell.fault)).or_insert(0u32) += 1;
        *by_moment.entry(cell.moment).or_insert(0u32) += 1;
        taken.push(cell);
    }
    taken
}

/// The short form: every fault once and every victim at least once, each at
/// a moment that the seed decides.
pub fn short(seed: u64) -> Vec<Cell> {
    let mut random = Random::new(seed);
    let mut cells = Vec::new();
    let mut pairs = pairs();
    // It costs most of a minute, and the rest of the matrix has it.
    pairs.retain(|(_, fault)| *fault != F::LongCut);
    random.shuffle(&mut pairs);
    let (mut faults, mut victims) = (Vec::new(), Vec::new());
    // First what brings in two at once, then what is still missing.
    for both in [true, false] {
        for (victim, fault) in &pairs {
            let new_fault = !faults.contains(fault);
            let new_victim = !victims.contains(victim);
            let wanted = match both {
                true => new_fault && new_victim,
                false => new_fault || new_victim,
            };
            if !wanted {
                continue;
            }
            faults.push(*fault);
            victims.push(*victim);
            let mut at: Vec<Cell> = all();
            at.retain(|c| c.victim == *victim && c.fault == *fault);
            cells.push(at[random.below(at.len() as u64) as usize]);
        }
    }
    cells
}

/// Which file names a moment has, for the focus.
pub fn moment_stem(moment: Moment, focus: &str) -> String {
    match moment.party() {
        Party::Gang => moment.name().to_owned(),
        _ => format!("{}.{focus}", moment.name()),
    }
}

const fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Numbers that a seed decides (splitmix64): runs have to be repeatable, on
/// any version of any library.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From this seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// Puts `list` in an order by chance.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_matrix_is_large_enough_and_has_no_cell_twice() {
        let all = all();
        let distinct: HashSet<Cell> = all.iter().copied().collect();
        assert_eq!(all.len(), distinct.len());
        assert!(all.len() >= 300, "{} cells", all.len());
        for cell in all {
            assert_eq!(cell.to_string().parse(), Ok(cell));
        }
    }

    #[test]
    fn a_sample_is_the_seeds_and_has_every_pair_and_moment() {
        let sample_of = |seed| sample(300, seed);
        assert_eq!(sample_of(5), sample_of(5));
        assert_ne!(sample_of(5), sample_of(6));
        let cells = sample_of(5);
        let found: HashSet<_> = cells.iter().map(|c| (c.victim, c.fault)).collect();
        assert_eq!(found.len(), pairs().len());
        let moments: HashSet<_> = cells.iter().map(|c| c.moment).collect();
        assert_eq!(moments.len(), Moment::ALL.len());
        assert_eq!(cells.iter().collect::<HashSet<_>>().len(), 300);
    }

    #[test]
    fn the_short_form_has_each_fault_and_each_victim() {
        for seed in 0..20 {
            let cells = short(seed);
            let faults: HashSet<_> = cells.iter().map(|c| c.fault).collect();
            let victims: HashSet<_> = cells.iter().map(|c| c.victim).collect();
            let of_all: HashSet<_> = pairs().iter().map(|(_, f)| *f).collect();
            assert_eq!(faults.len(), of_all.len() - 1, "all but the long cut");
            assert_eq!(victims.len(), 11);
            assert!(cells.len() < 20, "{} cells", cells.len());
        }
    }
}
