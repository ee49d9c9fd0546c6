//! An agent that dies at any moment of a handover, and is started again: each
//! VM ends up running in exactly one place with its RAM right, and nothing of
//! the handover is left anywhere.
//!
//! Agents are killed while they are held at a moment ([`drover::gang::moments`]),
//! so that each case happens where its name says.

use anyhow::{Context, Result, bail, ensure};
use drover::api::types::{GangReport, HandoverInfo, VmOutcome};
use drover::gang::moments::Moment;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tests::agentcfg::AgentFiles;
use tests::check::{self, HoldWatcher};
use tests::drover::{Ended, Migration};
use tests::gang::{Gang, RunningVm};
use tests::qemu::Guest;
use tests::qmp::Qmp;
use tests::registry;
use tests::save;
use tests::stage::Stage;

const VM: &str = "vm1";
/// The hosts that the VM is moved between, and one beside them.
const ENDS: [&str; 2] = ["r1h1", "r2h1"];
const BESIDE: &str = "r1h2";
/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

/// The folder by which agents are held.
struct Moments(PathBuf);

impl Moments {
    fn of(stage: &Stage) -> Moments {
        Moments(stage.moments_dir())
    }

    fn file(&self, moment: Moment, what: &str) -> PathBuf {
        use drover::gang::moments::Party;
        match moment.party() {
            Party::Gang => self.0.join(format!("{}.{what}", moment.name())),
            _ => self.0.join(format!("{}.{VM}.{what}", moment.name())),
        }
    }

    fn hold(&self, moment: Moment) -> Result<()> {
        fs::create_dir_all(&self.0)?;
        let _earlier = fs::remove_file(self.file(moment, "reached"));
        Ok(fs::write(self.file(moment, "hold"), b"")?)
    }

    fn wait(&self, moment: Moment) -> Result<()> {
        until(&format!("{VM} at {}", moment.name()), || {
            Ok(self.file(moment, "reached").exists().then_some(()))
        })
    }

    fn release(&self, moment: Moment) -> Result<()> {
        Ok(fs::remove_file(self.file(moment, "hold"))?)
    }
}

/// Asks again and again.
fn until<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + LIMIT;
    loop {
        match ask() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) if Instant::now() < end => std::thread::sleep(POLL),
            Ok(None) => bail!("{what}: not within {LIMIT:?}"),
            Err(error) if Instant::now() < end => {
                drop(error);
                std::thread::sleep(POLL);
            }
            Err(error) => return Err(error.context(what.to_owned())),
        }
    }
}

/// A stage with one VM; agents come and go, so the VM is kept apart from them.
struct Play {
    stage: Stage,
    vm: Option<RunningVm>,
}

impl Play {
    fn new() -> Result<Play> {
        let stage = Stage::new(400)?;
        let mut gang = stage.gang();
        gang.run(VM, &Guest::small_kvm(1)?, ENDS[0])?;
        let vm = gang.vms.pop();
        drop(gang);
        Ok(Play { stage, vm })
    }

    /// Does something with the VM as a gang.
    fn gang<T>(&mut self, f: impl FnOnce(&mut Gang) -> Result<T>) -> Result<T> {
        let mut gang = self.stage.gang();
        gang.vms.extend(self.vm.take());
        let done = f(&mut gang);
        self.vm = gang.vms.pop();
        done
    }

    fn host(&self) -> &str {
        self.vm.as_ref().map_or("nowhere", |vm| &vm.host)
    }

    fn other(&self) -> &'static str {
        if self.host() == ENDS[0] {
            ENDS[1]
        } else {
            ENDS[0]
        }
    }

    fn migrate_at(&self, coordinator: &str) -> Result<Migration> {
        let moves = [(VM.into(), self.host().into(), self.other().into())];
        let lab = &self.stage.lab;
        let cluster = &self.stage.cluster;
        cluster.start_migration_at(coordinator, lab, "gang", &moves, &[])
    }

    fn kill(&mut self, agent: &str) {
        self.stage.cluster.agent_mut(agent).kill();
    }

    fn start_again(&mut self, agent: &str) -> Result<()> {
        let (rack, host) = (agent.as_bytes()[1] - b'0', agent.as_bytes()[3] - b'0');
        let on = self.stage.lab.host(rack, host).clone();
        self.stage.cluster.agent_mut(agent).start_again(&on)
    }

    fn handovers(&self, agent: &str) -> Result<Vec<HandoverInfo>> {
        Ok(self.stage.cluster.agent(agent).status()?.handovers)
    }

    /// Waits until nothing is unsettled on any agent.
    fn settled(&self) -> Result<()> {
        for agent in ENDS {
            until(&format!("{agent} to be done with every handover"), || {
                let open = self.handovers(agent)?.into_iter().find(|h| !h.settled);
                match open {
                    None => Ok(Some(())),
                    Some(open) => bail!("{open:?}"),
                }
            })?;
        }
        Ok(())
    }

    /// Demands that the VM runs on `host`, and nowhere else, with its data
    /// right, and that nothing of a handover is left.
    fn runs_on(&mut self, host: &str) -> Result<()> {
        self.settled()?;
        let at = self.stage.cluster.agent(host).files.places(VM);
        if let Some(vm) = &mut self.vm {
            (vm.host, vm.at) = (host.to_owned(), at);
        }
        self.gang(|gang| gang.check())?;
        let places = &self.vm.as_ref().context("the VM")?.at;
        let mut qmp = Qmp::connect(Path::new(&places.qmp))?;
        let state = qmp.execute("query-status", serde_json::json!({}))?;
        ensure!(state["status"] == "running", "{VM} on {host} is {state}");
        for host in &self.stage.lab.hosts {
            let journal = host.run_dir.join("state/handover");
            let left: Vec<_> = fs::read_dir(journal)?.flatten().map(|e| e.path()).collect();
            ensure!(left.is_empty(), "{} left {left:?}", host.name);
            let files = AgentFiles::of(host);
            let left = check::files_of(&[&files.run_dir], &format!("{VM}.out"))?;
            ensure!(left.is_empty(), "{} left {left:?}", host.name);
        }
        Ok(())
    }

    /// One case: the agent `victim` is killed at `moment` of a migration, then
    /// started again. Returns how long it took from then until all is settled.
    fn killed_at(&mut self, victim: &str, moment: Moment) -> Result<Duration> {
        let moments = Moments::of(&self.stage);
        let watcher = HoldWatcher::start(&self.stage.hold_dir())?;
        moments.hold(moment)?;
        let migration = self.migrate_at(BESIDE)?;
        moments.wait(moment)?;
        self.kill(victim);
        moments.release(moment)?;
        let begun = Instant::now();
        self.start_again(victim)?;
        self.settled()?;
        let took = begun.elapsed();
        let ended = migration.end()?;
        let differing = watcher.finish()?.remove(VM).unwrap_or_default();
        ensure!(
            differing.is_empty(),
            "RAM differs at the switch: {differing:?}"
        );
        println!(
            "{victim} killed at {}: settled in {} ms; {:?}",
            moment.name(),
            took.as_millis(),
            ended.report.map(|r| r.vms[0].outcome)
        );
        Ok(took)
    }
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
        play.killed_at(&source, moment)
            .and_then(|_| play.runs_on(&source))
            .with_context(|| format!("killed at {}", moment.name()))?;
    }
    play.stage.finish()
}

#[test]
fn source_agent_killed_after_the_commitment_gives_its_vm_away() -> Result<()> {
    use Moment::*;
    let mut play = Play::new()?;
    for moment in [Committed, ResumeSent, Resumed, EndingSource, SourceEnded] {
        let (source, target) = (play.host().to_owned(), play.other());
        play.killed_at(&source, moment)
            .and_then(|_| play.runs_on(target))
            .with_context(|| format!("killed at {}", moment.name()))?;
    }
    play.stage.finish()
}

#[test]
fn target_agent_killed_at_any_moment_leaves_one_vm() -> Result<()> {
    use Moment::*;
    let mut play = Play::new()?;
    for moment in [Preparing, Prepared, Sealing, DeviceExpected, DeviceArrived] {
        let (source, target) = (play.host().to_owned(), play.other());
        play.killed_at(target, moment)
            .and_then(|_| play.runs_on(&source))
            .with_context(|| format!("killed at {}", moment.name()))?;
    }
    for moment in [ResumeReceived, TargetCommitted, TargetRunning] {
        let target = play.other();
        play.killed_at(target, moment)
            .and_then(|_| play.runs_on(target))
            .with_context(|| format!("killed at {}", moment.name()))?;
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
        let moments = Moments::of(&play.stage);
        let watcher = HoldWatcher::start(&play.stage.hold_dir())?;
        moments.hold(moment)?;
        let migration = play.migrate_at(BESIDE)?;
        moments.wait(moment)?;
        play.kill(&source);
        play.kill(target);
        moments.release(moment)?;
        // The target is alone for a while: it may not decide.
        play.start_again(target)?;
        std::thread::sleep(Duration::from_millis(500));
        play.start_again(&source)?;
        let expected = if arrives { target.to_owned() } else { source };
        play.runs_on(&expected)
            .with_context(|| format!("both killed at {}", moment.name()))?;
        migration.end()?;
        watcher.finish()?;
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
    let moments = Moments::of(&play.stage);
    moments.hold(Moment::Paused)?;
    let migration = play.migrate_at(BESIDE)?;
    moments.wait(Moment::Paused)?;
    play.kill(ENDS[0]);
    moments.release(Moment::Paused)?;
    play.start_again(ENDS[0])?;
    play.settled()?;
    let ended = migration.end()?;
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
fn cancel_is_heard_at_every_step_before_the_commitment() -> Result<()> {
    use Moment::*;
    let mut play = Play::new()?;
    for moment in [Prepared, Precopy, Ready, Switch, Paused, Sealed, DeviceSent] {
        let source = play.host().to_owned();
        let moments = Moments::of(&play.stage);
        let watcher = HoldWatcher::start(&play.stage.hold_dir())?;
        moments.hold(moment)?;
        let migration = play.migrate_at(BESIDE)?;
        moments.wait(moment)?;
        play.stage.cluster.agent(BESIDE).run(&["cancel", "gang"])?;
        // The word has to get from the coordinator to the source.
        std::thread::sleep(Duration::from_millis(300));
        moments.release(moment)?;
        let ended = migration.end()?;
        ensure!(
            outcome(&ended) == Some(VmOutcome::Cancelled),
            "cancelled at {}: {ended:?}",
            moment.name()
        );
        watcher.finish()?;
        play.runs_on(&source)
            .with_context(|| format!("cancelled at {}", moment.name()))?;
    }
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
    let config = play.stage.cluster.agent(ENDS[0]).files.config.clone();
    let text = fs::read_to_string(&config)?;
    let fencing =
        format!("\n[fencing]\ncommand = [\"/bin/sh\", \"-c\", {script:?}]\nlimit_s = 5\n");
    fs::write(&config, text + &fencing)?;
    play.kill(ENDS[0]);
    play.start_again(ENDS[0])?;
    let moments = Moments::of(&play.stage);
    let watcher = HoldWatcher::start(&play.stage.hold_dir())?;
    moments.hold(Moment::Committed)?;
    let migration = play.migrate_at(ENDS[0])?;
    moments.wait(Moment::Committed)?;
    play.kill(ENDS[1]);
    for pid in check::vmms_of(&play.stage.lab, VM)? {
        let target = &play.stage.lab.host(2, 1).ns;
        if registry::processes(target)?.contains(&pid) {
            registry::kill(&registry::pidfd(pid)?);
        }
    }
    fs::write(&proof, b"")?;
    moments.release(Moment::Committed)?;
    let ended = migration.end()?;
    ensure!(outcome(&ended) != Some(VmOutcome::Arrived), "{ended:?}");
    until("the VM to run at its source again", || {
        let mut all = play.handovers(ENDS[0])?.into_iter();
        Ok(all.find(|h| h.state.contains("runs here")))
    })?;
    play.start_again(ENDS[1])?;
    play.runs_on(ENDS[0])?;
    watcher.finish()?;
    play.stage.finish()
}

#[test]
fn vm_in_doubt_waits_for_the_operator_and_obeys() -> Result<()> {
    let mut play = Play::new()?;
    let moments = Moments::of(&play.stage);
    let watcher = HoldWatcher::start(&play.stage.hold_dir())?;
    moments.hold(Moment::Committed)?;
    let migration = play.migrate_at(ENDS[0])?;
    moments.wait(Moment::Committed)?;
    play.kill(ENDS[1]);
    moments.release(Moment::Committed)?;
    let doubt = until("the source to be in doubt", || {
        let mut all = play.handovers(ENDS[0])?.into_iter();
        Ok(all.find(|h| h.in_doubt.is_some()))
    })?;
    let ended = migration.end()?;
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
    let agent = play.stage.cluster.agent(ENDS[0]);
    agent.run(&["gang", "resolve", "--vm", VM, "--runs-on", ENDS[0]])?;
    until("the VM to run at its source", || {
        let open = play.handovers(ENDS[0])?.into_iter();
        Ok(open.into_iter().find(|h| h.state.contains("runs here")))
    })?;
    // The target hears of it when it is back.
    play.start_again(ENDS[1])?;
    play.runs_on(ENDS[0])?;
    watcher.finish()?;
    play.stage.finish()
}

#[test]
fn gang_without_its_coordinator_is_taken_over() -> Result<()> {
    let mut play = Play::new()?;
    let moments = Moments::of(&play.stage);
    let watcher = HoldWatcher::start(&play.stage.hold_dir())?;
    moments.hold(Moment::SwitchGranted)?;
    let migration = play.migrate_at(BESIDE)?;
    moments.wait(Moment::SwitchGranted)?;
    let early = play
        .stage
        .cluster
        .agent(ENDS[1])
        .command(&["gang", "resume", "gang"])?
        .output()?;
    ensure!(!early.status.success(), "its coordinator lives: {early:?}");
    play.kill(BESIDE);
    moments.release(Moment::SwitchGranted)?;
    drop(migration);
    std::thread::sleep(Duration::from_millis(2500));
    let resumed = play
        .stage
        .cluster
        .agent(ENDS[1])
        .run(&["gang", "resume", "gang", "--json"])?;
    let report: GangReport = serde_json::from_slice(&resumed.stdout)?;
    ensure!(report.vms[0].outcome == VmOutcome::Arrived, "{report:?}");
    let journal_ms = report.vms[0].journal_ms;
    ensure!(journal_ms > 0.0, "no time for two journals? {report:?}");
    println!("journals took {journal_ms:.1} ms of the stop");
    let differing = watcher.finish()?.remove(VM).context("no switch")?;
    ensure!(differing.is_empty(), "RAM differs: {differing:?}");
    play.start_again(BESIDE)?;
    play.runs_on(ENDS[1])?;
    play.stage.finish()
}

#[test]
fn gang_without_anybody_ends_with_its_vm_at_the_source() -> Result<()> {
    let mut play = Play::new()?;
    let moments = Moments::of(&play.stage);
    moments.hold(Moment::SwitchGranted)?;
    let migration = play.migrate_at(BESIDE)?;
    moments.wait(Moment::SwitchGranted)?;
    play.kill(BESIDE);
    moments.release(Moment::SwitchGranted)?;
    drop(migration);
    let begun = Instant::now();
    play.settled()?;
    let took = begun.elapsed();
    println!("settled {} s after the coordinator died", took.as_secs());
    play.start_again(BESIDE)?;
    play.runs_on(ENDS[0])?;
    play.stage.finish()
}

#[test]
fn full_state_directory_refuses_the_gang_before_it_begins() -> Result<()> {
    use nix::mount::{MsFlags, mount};
    let mut play = Play::new()?;
    for host in ENDS {
        let on = play.stage.lab.hosts.iter().find(|h| h.name == host);
        let state = on.context("host")?.run_dir.join("state/handover");
        // Unmounted with the lab, whatever happens.
        let options = Some("size=4k,nr_inodes=2");
        mount(
            Some("tmpfs"),
            &state,
            Some("tmpfs"),
            MsFlags::empty(),
            options,
        )?;
        fs::write(state.join("filler"), vec![0; 4096])?;
        let ended = play.migrate_at(ENDS[0])?.end()?;
        ensure!(
            !ended.success && ended.said.contains("space"),
            "no reason in {}",
            ended.said
        );
        fs::remove_file(state.join("filler"))?;
        nix::mount::umount(&state)?;
    }
    play.runs_on(ENDS[0])?;
    ensure!(
        registry::processes(&play.stage.lab.host(2, 1).ns)?.len() == 1,
        "something besides the agent was started at the target"
    );
    play.stage.finish()
}
