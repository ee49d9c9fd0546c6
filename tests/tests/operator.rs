//! What an operator sees and does while a gang is on its way: cancel, Ctrl-C,
//! and an agent that is lost.

use anyhow::{Context, Result, ensure};
use drover::api::types::{GangPhase, VmOutcome};
use drover::gang::moments::Moment;
use tests::drover::Ended;
use tests::play::{BESIDE, ENDS, Held, Play, until};

/// Exit status of a command that was interrupted.
const INTERRUPTED: i32 = 130;
/// Lets the gang go on; it has to end as cancelled, its VM still at its source.
fn stays(play: &mut Play, held: Held, moment: Moment) -> Result<Ended> {
    let case = || format!("cancelled at {}", moment.name());
    let source = play.host().to_owned();
    held.release()?;
    let ended = held.end()?;
    let report = ended.report.as_ref().with_context(|| ended.said.clone())?;
    ensure!(
        report.vms[0].outcome == VmOutcome::Cancelled && ended.code == Some(INTERRUPTED),
        "{}: {ended:?}",
        case()
    );
    play.runs_on(&source).with_context(case)?;
    Ok(ended)
}

#[test]
fn cancel_is_heard_at_every_step_before_the_commitment() -> Result<()> {
    use Moment::*;
    let mut play = Play::new()?;
    for moment in [Prepared, Precopy, Ready, Switch, Paused, Sealed, DeviceSent] {
        let held = play.held_at(moment, BESIDE)?;
        play.agent(BESIDE).run(&["cancel", "gang"])?;
        play.cancelling(BESIDE)?;
        stays(&mut play, held, moment)?;
    }
    play.stage.finish()
}

#[test]
fn ctrl_c_cancels_and_says_so_and_a_second_one_leaves_it_to_the_agent() -> Result<()> {
    let mut play = Play::new()?;
    // While the guest runs, and while it stands still.
    for moment in [Moment::Precopy, Moment::Sealed] {
        let held = play.held_at(moment, BESIDE)?;
        held.migration.interrupt()?;
        play.cancelling(BESIDE)?;
        let ended = stays(&mut play, held, moment)?;
        ensure!(ended.said.contains("cancelling"), "{}", ended.said);
    }
    let source = play.host().to_owned();
    let mut held = play.held_at(Moment::Precopy, BESIDE)?;
    held.migration.interrupt()?;
    play.cancelling(BESIDE)?;
    held.migration.interrupt()?;
    until("the command to leave", || {
        Ok((!held.migration.running()?).then_some(()))
    })?;
    // The agent goes on with it.
    held.release()?;
    let left = held.end()?;
    ensure!(
        left.code == Some(INTERRUPTED) && left.report.is_none(),
        "{left:?}"
    );
    ensure!(
        left.said.contains("left while gang is being cancelled"),
        "{left:?}"
    );
    until("the gang to end", || {
        let progress = play.progress(BESIDE)?.context("no gang")?;
        Ok((progress.phase == GangPhase::Done).then_some(()))
    })?;
    play.runs_on(&source)?;
    play.stage.finish()
}

#[test]
fn a_target_agent_that_hangs_is_named_at_once_and_when_it_is_back() -> Result<()> {
    let mut play = Play::new()?;
    let held = play.held_at(Moment::Precopy, BESIDE)?;
    let frozen = play.agent(ENDS[1]).freeze()?;
    let lost = until("the coordinator to name the lost agent", || {
        let progress = play.progress(BESIDE)?.context("no gang")?;
        Ok(progress.lost.into_iter().next())
    })?;
    ensure!(lost.agent == ENDS[1] && !lost.why.is_empty(), "{lost:?}");
    // Two seconds are promised; a machine that is too busy to look in time
    // does not fail this.
    println!("noticed after {} ms of silence", lost.silent_ms);
    ensure!(lost.silent_ms < 10_000, "{lost:?}");
    drop(frozen);
    until("the agent to be found again", || {
        let progress = play.progress(BESIDE)?.context("no gang")?;
        Ok(progress.lost.is_empty().then_some(()))
    })?;
    held.release()?;
    let ended = held.end()?;
    let report = ended.report.context("no report")?;
    let named = report
        .lost
        .iter()
        .any(|l| l.agent == ENDS[1] && l.found_again);
    ensure!(named, "{report:?}");
    let at = match report.vms[0].outcome {
        VmOutcome::Arrived => ENDS[1],
        _ => ENDS[0],
    };
    play.runs_on(at)?;
    play.stage.finish()
}
