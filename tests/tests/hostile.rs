//! Agents with a real certificate and the real secret lie to a gang, from
//! inside and from outside: the honest VMs arrive with the memory they had,
//! the honest agents' memory stays within what docs/security.md says, and who
//! has lied is named.

use anyhow::{Context, Result, ensure};
use drover::api::types::VmOutcome;
use drover::dedup::fingerprint::FingerprintKey;
use drover::gang::message::{
    Compress, GangHost, GangRequest, GangResponse, GangSpec, GangVm, Verify,
};
use drover::gang::moments::Moment;
use drover::net::rack::RackLimits;
use drover::types::{Fingerprint, GangId, Gfn, PAGE_SIZE, Page, VmIndex};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use tests::agentcfg::AgentOptions;
use tests::chaos::marks::Marks;
use tests::check::{self, HoldWatcher};
use tests::guest::kvm::KvmWork;
use tests::hostile::acts::{Target, fetch_flood, page_frame};
use tests::hostile::identity::Identity;
use tests::hostile::member::Member;
use tests::hostile::memory::Memory;
use tests::hostile::outsider;
use tests::hostile::source::{Source, ask, borrowed_facts, made_up};
use tests::save;
use tests::stage::Stage;
use tests::topology::Shape;

/// What one hostile peer can cost by docs/security.md, MiB, while it sends no
/// compressed pages: control, rack, lanes, device state, unfinished calls,
/// claims.
const PEER_MIB: u64 = 192 + 68 + 128 + 4 + 2 + 384;
/// What an agent takes for a gang of small VMs by itself.
const OWN_MIB: u64 = 256;

/// Fingerprints of all pages of a RAM file that hold something.
fn fingerprints(ram: &Path, key: &FingerprintKey) -> Result<Vec<Fingerprint>> {
    let mut file = fs::File::open(ram).with_context(|| ram.display().to_string())?;
    let mut page: Box<Page> = Box::new([0; PAGE_SIZE]);
    let mut all = Vec::new();
    while file.read_exact(&mut page[..]).is_ok() {
        let fp = key.fingerprint(&page);
        if fp != Fingerprint::ZERO {
            all.push(fp);
        }
    }
    Ok(all)
}

/// A gang that the liar itself brings about, of one VM there is not: what it
/// sends there is accepted, and kept to be sent again.
async fn earlier_gang(who: &Identity, like: &(String, String)) -> Result<Vec<u8>> {
    let (from, to, vm) = ("r1h2", "r2h1", VmIndex(0));
    let host = |name: &str, rack: &str| GangHost {
        name: name.into(),
        rack: rack.into(),
    };
    let spec = GangSpec {
        id: GangId(0x0001_eade),
        name: "earlier".into(),
        coordinator: from.into(),
        hosts: vec![host(from, "rack1"), host(to, "rack2")],
        vms: vec![GangVm {
            name: "vm3".into(),
            from: from.into(),
            to: to.into(),
        }],
        profile: "normal".into(),
        compress: Compress::Never,
        verify: Verify::Digest,
        downtime_limit_ms: u64::MAX,
        align: false,
    };
    let gang = spec.id;
    let facts = borrowed_facts(who, like, "vm3").await?;
    let requests = [
        GangRequest::Open(spec),
        GangRequest::PrepareTarget { gang, vm, facts },
    ];
    for request in requests {
        let answer = ask(who, to, &request).await?;
        ensure!(answer == GangResponse::Done, "{request:?}: {answer:?}");
    }
    let target = Target {
        identity: who,
        name: to,
        gang,
        vm,
    };
    let frame = page_frame(gang, vm, Gfn(1024));
    let mut lane = target.lane().await?;
    lane.send(&frame).await?;
    lane.acknowledged().await?;
    drop(lane);
    let answer = ask(who, to, &GangRequest::Close { gang }).await?;
    ensure!(answer == GangResponse::Done, "closing: {answer:?}");
    Ok(frame)
}

/// Runs a hostile program on a thread of its own, to its end.
fn program<T: Send + 'static>(
    who: &Identity,
    work: impl AsyncFnOnce(&Identity) -> Result<T> + Send + 'static,
) -> std::thread::JoinHandle<Result<T>> {
    let who = who.clone();
    std::thread::spawn(move || who.run(work(&who)))
}

fn joined<T>(what: &str, thread: std::thread::JoinHandle<Result<T>>) -> Result<T> {
    let done = thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    done.with_context(|| what.to_owned())
}

/// Lines of an agent's log that hold all of these.
fn logged(log: &Path, words: &[&str]) -> Result<usize> {
    let text = fs::read_to_string(log)?;
    let holds = |line: &&str| words.iter().all(|word| line.contains(word));
    let count = text.lines().filter(holds).count();
    ensure!(count > 0, "no line with {words:?} in {}", log.display());
    Ok(count)
}

#[test]
fn liars_cost_bounded_memory_harm_no_honest_vm_and_are_named() -> Result<()> {
    // 14 MiB at 60 Mbit/s: on the way while it is all done to them.
    let saves = [1, 2].map(|seed| {
        save::kvm_with(KvmWork {
            seed,
            common_mib: 6,
            own_mib: 6,
            ws_mib: 1,
            rate_kb: 100,
        })
    });
    let shape = Shape {
        hosts: 3,
        rate_mbit: 60,
        ..Shape::default()
    };
    let mut stage = Stage::shaped(shape, AgentOptions::default())?;
    let liars = ["r1h2", "r1h3", "r2h2", "r2h3"];
    for liar in liars {
        stage.cluster.agent_mut(liar).kill();
    }
    let [source, claimer, holder, fetcher] =
        [(1, 2), (1, 3), (2, 2), (2, 3)].map(|(r, h)| Identity::of(stage.lab.host(r, h)));
    let (source, claimer, holder, fetcher) = (source?, claimer?, holder?, fetcher?);
    let mut gang = stage.gang();
    for (i, saved) in saves.into_iter().enumerate() {
        gang.adopt(&format!("vm{}", i + 1), &saved?, "r1h1")?;
    }
    let known = fingerprints(Path::new(&gang.vms[0].at.ram), &source.key("lab"))?;
    let honest = ["r1h1", "r2h1"];
    let memory = honest
        .map(|name| Memory::of(name, stage.cluster.agent(name).pid()))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;

    let like = ("r1h1".to_owned(), "vm1".to_owned());
    let asked = like.clone();
    let earlier = program(&source, async move |who| earlier_gang(who, &asked).await);
    let earlier = joined("a gang of its own", earlier)?;

    let lying_holder = Member::start(holder.clone(), None)?;
    let lying_source = Member::start(
        source,
        Some(Source {
            like,
            known: known.clone(),
            earlier,
        }),
    )?;
    // Agents that found a peer dead call it again at the latest by then.
    std::thread::sleep(RackLimits::default().backoff_max);
    // All of it is done to a gang that is on its way.
    let marks = Marks::new(stage.moments_dir());
    marks.hold(Moment::Switch, "vm1")?;
    let watcher = HoldWatcher::start(&stage.hold_dir())?;
    let moves = [
        ("vm1", "r1h1", "r2h1"),
        ("vm2", "r1h1", "r2h2"),
        ("vm3", "r1h2", "r2h1"),
    ];
    let moves = moves.map(|(vm, from, to)| (vm.into(), from.into(), to.into()));
    let mut migration =
        stage
            .cluster
            .start_migration(&stage.lab, "gang", &moves, &["--compress", "never"])?;
    let spec = lying_source.await_gang()?;
    marks.wait(Moment::Prepared, "vm1", &mut migration)?;

    let (a, b, c, d) = (spec.clone(), spec.clone(), spec.clone(), spec.id);
    let meddling = program(&claimer, async move |who| {
        outsider::claim(who, "r1h1", &a, &known).await?;
        outsider::meddle(who, "r2h1", &a).await
    });
    let fetching = program(&fetcher, async move |who| {
        outsider::fetch(who, "r2h1", &b).await?;
        outsider::meddle(who, "r2h1", &c).await?;
        outsider::dawdle(who, "r2h1").await
    });
    let flooding = program(&holder, async move |who| {
        let fps: Vec<Fingerprint> = (0..1024).map(made_up).collect();
        fetch_flood(who, "r2h1", d, &fps).await
    });

    joined("an outsider that claims", meddling)?;
    joined("an outsider that fetches and dawdles", fetching)?;
    let answered = joined("a million fetches", flooding)?;
    let acts = lying_source.finished()?;
    for (act, outcome) in &acts {
        eprintln!("{act}: {outcome:?}");
    }
    marks.release(Moment::Switch, "vm1")?;
    let migrated = migration.wait()?;
    let found = watcher.finish()?;
    let (told, served) = (&lying_source.seen, &lying_holder.seen);
    let counts = [&told.claims, &served.rubbish, &served.batches].map(|n| n.load(Relaxed));
    eprintln!(
        "lied to {} claims, served rubbish {} times, threw {} batches away, \
         got {answered} bytes of answers to a million fetches",
        counts[0], counts[1], counts[2]
    );
    for (act, outcome) in acts {
        outcome.with_context(|| act.to_owned())?;
    }
    ensure!(counts.iter().all(|&n| n > 0), "a liar was not believed");

    // The honest VM is where it should be; the others run where they were.
    let outcomes: Vec<VmOutcome> = migrated.report.vms.iter().map(|v| v.outcome).collect();
    ensure!(
        outcomes == [VmOutcome::Arrived, VmOutcome::Failed, VmOutcome::Failed],
        "{:#?}\n{}",
        migrated.report,
        migrated.stderr
    );
    ensure!(
        found.get("vm1").is_some_and(Vec::is_empty),
        "RAM of vm1 at its switch: {found:?}"
    );
    gang.settle(&migrated, &[(0, "r2h1"), (1, "r2h2")])?;
    gang.check()?;
    ensure!(
        check::vmms_of(&stage.lab, "vm3")?.is_empty(),
        "a VM that never was runs"
    );

    for memory in &memory {
        memory.within(OWN_MIB + liars.len() as u64 * PEER_MIB)?;
    }

    // Who did what.
    let log = |name: &str| stage.cluster.agent(name).files.log.clone();
    let wrong = "served content that does not match its fingerprint";
    logged(&log("r2h1"), &[wrong, "r2h2"])?;
    logged(
        &log("r2h1"),
        &["did not serve what it was said to hold", "r2h2"],
    )?;
    let to_come = "contents that were to come to this host did not";
    logged(&log("r2h1"), &[to_come])?;
    let unsettled = "claimed contents and did not say of them that they arrived";
    logged(&log("r1h1"), &[unsettled, "r1h2"])?;
    ensure!(logged(&log("r2h1"), &["lane from r1h2"])? >= 6);
    logged(
        &log("r2h1"),
        &["broke the rules", "r1h2", "asks without end"],
    )?;
    logged(&log("r2h1"), &["broke the rules", "r2h3", "fetch pages"])?;
    logged(&log("r2h1"), &["broke the rules", "r2h3", "too slowly"])?;
    logged(&log("r1h1"), &["broke the rules", "r1h3", "claim contents"])?;
    let warnings = stage.cluster.agent("r2h1").status()?.warnings.concat();
    for liar in ["r1h2", "r2h3"] {
        ensure!(warnings.contains(liar), "{liar} is not in: {warnings}");
    }

    // And all is well without them.
    lying_source.finish()?;
    lying_holder.finish()?;
    stage.migrate(&mut gang, &[(0, "r1h1")], &[])?;
    drop(gang);
    stage.finish()
}

/// What a tenant and an operator can see of its VM's move beside another one's.
#[derive(Debug)]
struct Visible {
    sent: u64,
    reference: u64,
    /// References of both VMs: which of them comes first is chance.
    shared: u64,
    /// Of both VMs.
    core_bytes: u64,
}

/// Moves a victim and a tenant that has filled its memory with what it takes
/// the victim's to be, each from and to a host of its own.
fn move_beside(
    stage: &Stage,
    round: u32,
    guess: &save::Saved,
    victim: &save::Saved,
    domains: [&str; 2],
) -> Result<Visible> {
    let mut gang = stage.gang();
    let names = ["victim", "tenant"].map(|who| format!("{who}{round}"));
    gang.adopt_in(domains[0], &names[0], victim, "r1h1")?;
    gang.adopt_in(domains[1], &names[1], guess, "r1h2")?;
    let moves = [(0, "r2h1"), (1, "r2h2")];
    let migrated = stage.migrate(&mut gang, &moves, &["--compress", "never"])?;
    for (name, host) in names.iter().zip(["r2h1", "r2h2"]) {
        stage.cluster.agent(host).run(&["vm", "stop", name])?;
    }
    let report = migrated.report;
    let tenant = &report.vms[1].pages;
    Ok(Visible {
        sent: tenant.sent,
        reference: tenant.reference,
        shared: report.vms.iter().map(|vm| vm.pages.reference).sum(),
        core_bytes: report.core_bytes,
    })
}

#[test]
fn a_tenant_cannot_see_whether_it_has_guessed_a_page_of_another_domain() -> Result<()> {
    // 4 MiB that do not change: the victim's, and another content. The guests
    // are alike in all else.
    let work = |seed, common_mib, own_mib| KvmWork {
        seed,
        common_mib,
        own_mib,
        ws_mib: 0,
        rate_kb: 0,
    };
    let victim = save::kvm_with(work(1, 4, 0))?;
    let right = save::kvm_with(work(2, 4, 0))?;
    let wrong = save::kvm_with(work(2, 0, 4))?;
    const GUESSED: u64 = 1024;
    // What differs from run to run: pages a guest happens to write, and the
    // headers of a few packets.
    const NOISE: u64 = 64;
    let stage = Stage::new(400)?;
    let apart = ["victims", "tenants"];
    let [right, wrong, told] = [
        move_beside(&stage, 1, &right, &victim, apart)?,
        move_beside(&stage, 2, &wrong, &victim, apart)?,
        // That there is something to be seen within one domain.
        move_beside(&stage, 3, &right, &victim, ["both", "both"])?,
    ];
    eprintln!("right: {right:?}\nwrong: {wrong:?}\nin one domain: {told:?}");
    let saved = GUESSED / 2 * PAGE_SIZE as u64;
    ensure!(
        told.shared > 4 * NOISE && told.core_bytes + saved < right.core_bytes,
        "nothing is seen in one domain: {told:?}, in two {right:?}"
    );
    ensure!(
        right.sent.abs_diff(wrong.sent) < NOISE
            && right.reference.abs_diff(wrong.reference) < NOISE
            && right.sent > GUESSED,
        "a right guess shows in the pages: {right:?}, a wrong one {wrong:?}"
    );
    let pages = right.core_bytes.abs_diff(wrong.core_bytes) / PAGE_SIZE as u64;
    ensure!(
        pages < 2 * NOISE,
        "a right guess shows on the core link: {right:?}, a wrong one {wrong:?}"
    );
    stage.finish()
}
