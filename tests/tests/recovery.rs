//! An agent that dies at any moment of a handover, and is started again: each
//! VM ends up running in exactly one place with its RAM right, and nothing of
//! the handover is left anywhere.
//!
//! Agents are killed while they are held at a moment ([`drover::gang::moments`]),
//! so that each case happens where its name says.

use anyhow::{Context, Result, ensure};
use drover::api::types::{GangReport, HandoverInfo, VmOutcome};
use drover::gang::moments::Moment;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use tests::check;
use tests::drover::Ended;
use tests::play::{BESIDE, ENDS, Play, VM, equal};
use tests::qmp::Qmp;
use tests::registry;
use tests::save;
use tests::stage::Stage;

/// One case: the agent `victim` is killed at `moment` of a migration, then
/// started again. Returns what its status says of the handover once all is
/// settled, and how the migration ended.
fn killed_at(play: &mut Play, victim: &str, moment: Moment) -> Result<(HandoverInfo, Ended)> {
    let held = play.held_at(moment, BESIDE)?;
    play.kill(victim);
    held.release()?;
    let begun = Instant::now();
    play.start_again(victim)?;
    play.settled()?;
    let took = begun.elapsed();
    let ended = held.end()?;
    println!(
        "{victim} killed at {}: settled in {} ms; {:?}",
        moment.name(),
        took.as_millis(),
        outcome(&ended)
    );
    let told = play.handovers(victim)?.into_iter().find(|h| h.vm == VM);
    let told = told.with_context(|| format!("the status of {victim} tells of no handover"))?;
    ensure!(told.settled && !told.why.is_empty(), "{told:?}");
    Ok((told, ended))
}

/// As [`killed_at`], and demands that the VM runs on `host` then, and that the
/// restarted agent says so: `state` is what it has decided.
fn killed_at_leaves(
    play: &mut Play,
    victim: &str,
    moment: Moment,
    host: &str,
    state: &str,
) -> Result<Ended> {
    let case = || format!("{victim} killed at {}", moment.name());
    let (told, ended) = killed_at(play, victim, moment).with_context(case)?;
    ensure!(told.state == state, "{}: {told:?}", case());
    play.runs_on(host).with_context(case)?;
    Ok(ended)
}

fn outcome(ended: &Ended) -> Option<VmOutcome> {
    let report: Option<&GangReport> = ended.report.as_ref();
    report.map(|report| report.vms[0].outcome)
}

#[test]
fn source_agent_killed_before_the_commitment_keeps_its_vm() -> Result<()> {
    use Moment::*;
    let mut play = Play::new()?;
    let before = [
        JournalMoving,
        Precopy,
        Ready,
        Switch,
        Paused,
        LastPages,
        Sealed,
        DeviceSent,
        Committing,
    ];
    for moment in before {
        let source = play.host().to_owned();
        let ended = killed_at_leaves(&mut play, &source, moment, &source, "stayed here")?;
        let why = ended
            .report
            .and_then(|mut report| report.vms.remove(0).error);
        ensure!(
            why.as_ref().is_some_and(|why| why.contains(&source)),
            "the report does not name the agent that was lost: {why:?}"
        );
    }
    // People are told as well.
    let said = play.agent(ENDS[0]).run(&["status"])?;
    let said = String::from_utf8_lossy(&said.stdout);
    for part in [
        "stayed here",
        "found by a restarted agent: its journal says moving",
    ] {
        ensure!(said.contains(part), "no {part:?} in {said}");
    }
    play.stage.finish()
}

#[test]
fn source_agent_killed_after_the_commitment_gives_its_vm_away() -> Result<()> {
    use Moment::*;
    let mut play = Play::new()?;
    for moment in [Committed, ResumeSent, Resumed, EndingSource, SourceEnded] {
        let (source, target) = (play.host().to_owned(), play.other());
        killed_at_leaves(&mut play, &source, moment, target, "went to the target")?;
    }
    // Its copy has ended, what that leaves has not been removed yet.
    let (source, target) = (play.host().to_owned(), play.other());
    let held = play.held_at(EndingSource, BESIDE)?;
    play.kill(&source);
    let copy = play.agent(&source).files.places(VM);
    // It ends instead of answering.
    let _gone = Qmp::connect(Path::new(&copy.qmp))?.execute("quit", serde_json::json!({}));
    held.release()?;
    play.start_again(&source)?;
    play.runs_on(target)?;
    ensure!(!Path::new(&copy.ram).exists(), "{} was left", copy.ram);
    held.end()?;
    play.stage.finish()
}

#[test]
fn target_agent_killed_at_any_moment_leaves_one_vm() -> Result<()> {
    use Moment::*;
    let mut play = Play::new()?;
    for moment in [Preparing, Prepared, Sealing, DeviceExpected, DeviceArrived] {
        let (source, target) = (play.host().to_owned(), play.other());
        killed_at_leaves(&mut play, target, moment, &source, "was given up")?;
    }
    for moment in [ResumeReceived, TargetCommitted, TargetRunning] {
        let target = play.other();
        killed_at_leaves(&mut play, target, moment, target, "runs here")?;
    }
    play.stage.finish()
}

#[test]
fn both_agents_killed_around_the_commitment_agree() -> Result<()> {
    let mut play = Play::new()?;
    for (moment, arrives) in [
        (Moment::DeviceSent, false),
        (Moment::Committing, false),
        (Moment::Committed, true),
        (Moment::Resumed, true),
    ] {
        let (source, target) = (play.host().to_owned(), play.other());
        let held = play.held_at(moment, BESIDE)?;
        play.kill(&source);
        play.kill(target);
        held.release()?;
        // The target is alone for a while: it may not decide.
        play.start_again(target)?;
        std::thread::sleep(Duration::from_millis(500));
        play.start_again(&source)?;
        let expected = if arrives { target.to_owned() } else { source };
        play.runs_on(&expected)
            .with_context(|| format!("both killed at {}", moment.name()))?;
        held.end()?;
    }
    play.stage.finish()
}

#[test]
fn adopted_vm_of_a_killed_source_runs_on_and_is_found_again() -> Result<()> {
    let saves = save::kvm(1)?;
    let stage = Stage::new(400)?;
    let mut gang = stage.gang();
    gang.adopt(VM, &saves[0], ENDS[0])?;
    let vm = gang.vms.pop();
    drop(gang);
    let mut play = Play { stage, vm };
    let (_, ended) = killed_at(&mut play, ENDS[0], Moment::Paused)?;
    ensure!(outcome(&ended) == Some(VmOutcome::Failed), "{ended:?}");
    play.gang(|gang| {
        gang.check()?;
        // It was protected when its agent died: the kernel has forgotten that.
        let pid = check::exactly_one_vmm(gang.lab, VM)?;
        let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let protected = maps
            .lines()
            .filter_map(|line| line.strip_prefix("VmFlags:"))
            .any(|flags| flags.split_whitespace().any(|flag| flag == "uw"));
        ensure!(!protected, "RAM of {VM} is still write-protected");
        Ok(())
    })?;
    let again = play.stage.cluster.agent(ENDS[0]).status()?;
    ensure!(
        again.vms == 1,
        "the restarted agent has no VM in its charge"
    );
    // And it can be moved after all.
    let mut gang = play.stage.gang();
    gang.vms.extend(play.vm.take());
    play.stage.migrate(&mut gang, &[(0, ENDS[1])], &[])?;
    drop(gang);
    play.stage.finish()
}

#[test]
fn fenced_target_gives_the_vm_back_to_its_source() -> Result<()> {
    let mut play = Play::new()?;
    // The fence is believed, so it has to be right: it succeeds once the test
    // has seen that nothing runs on the target.
    let proof = play.stage.lab.run_dir().join("fenced");
    let script = format!(
        "test \"$DROVER_FENCE_HOST\" = {} && test -e {}",
        ENDS[1],
        proof.display()
    );
    let config = play.agent(ENDS[0]).files.config.clone();
    let text = fs::read_to_string(&config)?;
    let fencing =
        format!("\n[fencing]\ncommand = [\"/bin/sh\", \"-c\", {script:?}]\nlimit_s = 5\n");
    fs::write(&config, text + &fencing)?;
    play.kill(ENDS[0]);
    play.start_again(ENDS[0])?;
    let held = play.held_at(Moment::Committed, ENDS[0])?;
    play.kill(ENDS[1]);
    for pid in check::vmms_of(&play.stage.lab, VM)? {
        let target = &play.stage.lab.host(2, 1).ns;
        if registry::processes(target)?.contains(&pid) {
            registry::kill(&registry::pidfd(pid)?);
        }
    }
    fs::write(&proof, b"")?;
    held.release()?;
    let ended = held.end()?;
    ensure!(outcome(&ended) != Some(VmOutcome::Arrived), "{ended:?}");
    play.handover(ENDS[0], "the VM to run at its source again", |handover| {
        handover.state.contains("runs here")
    })?;
    play.start_again(ENDS[1])?;
    play.runs_on(ENDS[0])?;
    play.stage.finish()
}

#[test]
fn vm_in_doubt_waits_for_the_operator_and_obeys() -> Result<()> {
    let mut play = Play::new()?;
    let held = play.held_at(Moment::Committed, ENDS[0])?;
    play.kill(ENDS[1]);
    held.release()?;
    let doubt = play.handover(ENDS[0], "the source to be in doubt", |handover| {
        handover.in_doubt.is_some()
    })?;
    let ended = held.end()?;
    ensure!(outcome(&ended) == Some(VmOutcome::InDoubt), "{ended:?}");
    let command = format!("drover gang resolve --vm {VM} --runs-on {}", ENDS[0]);
    ensure!(
        doubt.remedies.iter().any(|r| r.contains(&command)),
        "no command in {doubt:?}"
    );
    // Nobody runs it, and nobody guesses.
    ensure!(
        check::vmms_of(&play.stage.lab, VM)?.len() == 2,
        "a copy is gone"
    );
    let agent = play.agent(ENDS[0]);
    agent.run(&["gang", "resolve", "--vm", VM, "--runs-on", ENDS[0]])?;
    play.handover(ENDS[0], "the VM to run at its source", |handover| {
        handover.state.contains("runs here")
    })?;
    // The target hears of it when it is back.
    play.start_again(ENDS[1])?;
    play.runs_on(ENDS[0])?;
    play.stage.finish()
}

#[test]
fn gang_without_its_coordinator_is_taken_over() -> Result<()> {
    let mut play = Play::new()?;
    let held = play.held_at(Moment::SwitchGranted, BESIDE)?;
    let early = play.agent(ENDS[1]).try_run(&["gang", "resume", "gang"])?;
    ensure!(!early.status.success(), "its coordinator lives: {early:?}");
    play.kill(BESIDE);
    held.release()?;
    let watcher = held.abandon();
    std::thread::sleep(Duration::from_millis(2500));
    let resumed = play
        .agent(ENDS[1])
        .run(&["gang", "resume", "gang", "--json"])?;
    let report: GangReport = serde_json::from_slice(&resumed.stdout)?;
    ensure!(report.vms[0].outcome == VmOutcome::Arrived, "{report:?}");
    let journal_ms = report.vms[0].journal_ms;
    ensure!(journal_ms > 0.0, "no time for two journals? {report:?}");
    println!("journals took {journal_ms:.1} ms of the stop");
    ensure!(equal(watcher)?, "no switch");
    play.start_again(BESIDE)?;
    play.runs_on(ENDS[1])?;
    play.stage.finish()
}

#[test]
fn gang_without_anybody_ends_with_its_vm_at_the_source() -> Result<()> {
    let mut play = Play::new()?;
    let held = play.held_at(Moment::SwitchGranted, BESIDE)?;
    play.kill(BESIDE);
    held.release()?;
    let _nothing_to_compare = held.abandon();
    let begun = Instant::now();
    play.settled()?;
    let took = begun.elapsed();
    println!("settled {} s after the coordinator died", took.as_secs());
    play.start_again(BESIDE)?;
    play.runs_on(ENDS[0])?;
    play.stage.finish()
}

#[test]
fn full_or_read_only_state_directory_refuses_the_gang_before_it_begins() -> Result<()> {
    use nix::mount::{MsFlags, mount, umount};
    let mut play = Play::new()?;
    let refused = |play: &Play, why: &str| {
        let ended = play.migrate_at(ENDS[0])?.end()?;
        ensure!(
            !ended.success && ended.said.contains(why) && ended.said.contains("writable"),
            "neither {why:?} nor a remedy in {}",
            ended.said
        );
        Ok(())
    };
    for host in ENDS {
        let on = play.stage.lab.hosts.iter().find(|h| h.name == host);
        let state = on.context("host")?.run_dir.join("state/handover");
        // Unmounted with the lab, whatever happens.
        let tmpfs =
            |flags, options| mount(Some("tmpfs"), &state, Some("tmpfs"), flags, Some(options));
        tmpfs(MsFlags::empty(), "size=4k,nr_inodes=2")?;
        let filler = state.join("filler");
        fs::write(&filler, vec![0; 4096])?;
        refused(&play, "space")?;
        let left: Vec<_> = fs::read_dir(&state)?.flatten().map(|e| e.path()).collect();
        ensure!(left == [filler], "the attempt left {left:?}");
        umount(&state)?;
        tmpfs(MsFlags::MS_RDONLY, "size=4k")?;
        refused(&play, "Read-only")?;
        umount(&state)?;
    }
    play.runs_on(ENDS[0])?;
    ensure!(
        registry::processes(&play.stage.lab.host(2, 1).ns)?.len() == 1,
        "something besides the agent was started at the target"
    );
    play.stage.finish()
}
