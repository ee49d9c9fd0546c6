//! One cell: a gang starts, is held at a moment, something happens, and once
//! all has come to rest everything is looked at.

use super::cell::{Cell, Random};
use super::census::Watch;
use super::inject::{self, Active, Roles};
use super::invariants::{self, Allowed, Now, Where};
use super::marks::Switches;
use super::operator::{Decision, Operator};
use super::stand::{Stand, ms_since};
use crate::drover::{Ended, Migration};
use anyhow::{Context, Result, bail, ensure};
use drover::gang::moments::Moment;
use std::time::{Duration, Instant};

/// How long a gang may take after a fault, and how long it may be until all is
/// as it should be.
const GANG: Duration = Duration::from_secs(120);
const REST: Duration = Duration::from_secs(75);
const LOOK: Duration = Duration::from_millis(50);

/// When the fault comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// While the gang is held at the cell's moment.
    Moment,
    /// So long after the gang's start, whatever it does then.
    After(Duration),
}

/// What a cell came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survived {
    /// From the end of the fault (its beginning, if it lasts as long as the
    /// gang) until everything was as it should be.
    pub recovery_ms: u64,
    /// How the operator was told that it ended.
    pub outcome: String,
    /// What the operator had to decide.
    pub decided: Vec<Decision>,
}

/// Runs one cell on a stand whose VMs are together.
///
/// # Errors
/// With the invariants that do not hold. The stand is then not to be used any
/// more.
pub fn run(stand: &mut Stand, cell: &Cell, seed: u64, when: When) -> Result<Survived> {
    let mut random = Random::new(seed);
    let from = stand.side()?;
    let focus = random.below(stand.vms.len() as u64) as usize;
    let roles = Roles::new(stand, focus, from);
    stand.marks.clear()?;
    let switches = Switches::watch(&stand.hold_dir())?;
    let doubles = Watch::start(stand.census.clone());

    if when == When::Moment {
        stand.marks.hold(cell.moment, &roles.focus)?;
    }
    let (mut migration, gang) = come_to(stand, cell, &roles, when)?;
    let active = inject::inject(stand, &roles, cell.victim, cell.fault, &mut random)
        .with_context(|| format!("injecting {cell}"));
    if when == When::Moment {
        stand.marks.release(cell.moment, &roles.focus)?;
    }
    let active = active?;
    ensure!(
        active.is_some() || when != When::Moment,
        "there was no {} to hit",
        cell.victim
    );
    let hit_at = Instant::now();
    let (ended, over_at) = to_the_end(stand, active, &mut migration, hit_at)
        .and_then(|over_at| Ok((migration.end()?, over_at)))
        .with_context(|| format!("{gang} after the fault"))?;

    let mut operator = Operator::default();
    let now = rest(stand, cell, when, &roles, over_at, &mut operator)?;
    let decided = operator.decided;
    let recovery_ms = ms_since(over_at);
    // Everything that does not hold is told: the first of it may be the least.
    let mut wrong = Wrong(now.trouble.into_iter().collect());
    let doubled = doubles.finish()?;
    wrong.0.extend(doubled);
    let at_switch = switches.finish()?;
    wrong.note(invariants::ram_was_equal(&at_switch));
    if let Some(places) = &now.places {
        note_places(stand, places);
        for verified in stand.verify_all() {
            wrong.note(verified);
        }
        wrong.note(invariants::told_truly(
            &ended, &stand.vms, places, cell, when, &roles,
        ));
        wrong.note(invariants::doubt_was_told(ended.report.as_ref(), &decided));
    }
    wrong.note(invariants::held_at_switch(
        &at_switch,
        ended.report.as_ref(),
    ));
    wrong.note(invariants::nothing_else(stand));
    ensure!(wrong.0.is_empty(), "{}", wrong.0.join("; "));
    Ok(Survived {
        recovery_ms,
        outcome: in_short(&ended, &roles),
        decided,
    })
}

/// What does not hold.
struct Wrong(Vec<String>);

impl Wrong {
    fn note(&mut self, checked: Result<()>) {
        self.0
            .extend(checked.err().map(|error| format!("{error:#}")));
    }
}

/// Starts the gang and brings it to where the fault comes.
fn come_to(
    stand: &mut Stand,
    cell: &Cell,
    roles: &Roles,
    when: When,
) -> Result<(Migration, String)> {
    let rolled_back = when == When::Moment && cell.moment == Moment::RolledBack;
    if rolled_back {
        stand.marks.hold(Moment::Paused, &roles.focus)?;
    }
    let (mut migration, gang) = stand.start_gang(roles.from)?;
    if let When::After(delay) = when {
        std::thread::sleep(delay);
        return Ok((migration, gang));
    }
    if rolled_back {
        // Something has to fail before anything is rolled back.
        stand
            .marks
            .wait(Moment::Paused, &roles.focus, &mut migration)?;
        let cancel = ["cancel", &gang, "--vm", &roles.focus];
        stand.coordinator(roles.from).run(&cancel)?;
        stand.marks.release(Moment::Paused, &roles.focus)?;
    }
    stand
        .marks
        .wait(cell.moment, &roles.focus, &mut migration)?;
    Ok((migration, gang))
}

/// Waits for the end of the fault and of the gang, whichever is later. Returns
/// from when on recovery counts.
fn to_the_end(
    stand: &mut Stand,
    mut active: Option<Active>,
    migration: &mut Migration,
    hit_at: Instant,
) -> Result<Instant> {
    let until = active.as_ref().and_then(|active| active.until);
    let mut over_at = active.as_ref().map_or(hit_at, |active| active.since);
    let limit = hit_at + GANG;
    loop {
        let running = migration.running()?;
        let due = until.is_some_and(|until| Instant::now() >= until);
        let with_gang = until.is_none() && !running;
        if (due || with_gang)
            && let Some(active) = active.take()
        {
            if due {
                over_at = Instant::now();
            }
            active.end(stand)?;
        }
        if !running && active.is_none() {
            return Ok(over_at);
        }
        if Instant::now() > limit {
            bail!("the gang is not over {GANG:?} after the fault");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until everything is as it should be, or for as long as that may take.
/// VMs that stay in doubt are decided on.
fn rest(
    stand: &Stand,
    cell: &Cell,
    when: When,
    roles: &Roles,
    over_at: Instant,
    operator: &mut Operator,
) -> Result<Now> {
    let until = over_at.max(Instant::now()) + REST;
    loop {
        let mut now = invariants::now(stand, |vm| Allowed::of(cell, when, roles, vm))?;
        let Some(trouble) = &mut now.trouble else {
            return Ok(now);
        };
        if Instant::now() > until {
            *trouble = format!("no rest within {REST:?}: {trouble}");
            return Ok(now);
        }
        operator.look(stand)?;
        std::thread::sleep(LOOK);
    }
}

fn note_places(stand: &mut Stand, found: &[Where]) {
    for (vm, place) in stand.vms.iter_mut().zip(found) {
        vm.rack = match place {
            Where::Runs(rack) => Some(*rack),
            Where::Nowhere => None,
        };
    }
}

/// `arrived, failed` and so on; the focus first.
fn in_short(ended: &Ended, roles: &Roles) -> String {
    let Some(report) = &ended.report else {
        return "no report".to_owned();
    };
    let mut vms: Vec<_> = report.vms.iter().collect();
    vms.sort_by_key(|vm| vm.name != roles.focus);
    let outcome = |vm: &&drover::api::types::VmReport| format!("{:?}", vm.outcome).to_lowercase();
    vms.iter().map(outcome).collect::<Vec<_>>().join(", ")
}
