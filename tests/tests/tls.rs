//! Agents trust nobody without a certificate, and nobody on the way sees a page.

use anyhow::{Context, Result, ensure};
use drover::pki::{self, TlsFiles};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};
use tests::agentcfg::{self, AgentOptions};
use tests::capture::{self, Capture, Seen};
use tests::drover::Ended;
use tests::guest::kvm::KvmWork;
use tests::qemu::Guest;
use tests::save;
use tests::stage::Stage;
use tests::topology::Host;

/// Long enough for an agent to notice that its files changed.
const NOTICE: Duration = Duration::from_secs(10);

/// Moves a VM with its pages as they are, and looks for them on the network.
fn move_and_look(plaintext: bool) -> Result<Seen> {
    let saves = save::kvm(1)?;
    let stage = Stage::with(
        400,
        AgentOptions {
            plaintext,
            ..AgentOptions::default()
        },
    )?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &saves[0], "r1h1")?;
    let needles = capture::needles(Path::new(&gang.vms[0].at.ram))?;
    let capture = Capture::start(stage.lab.host(2, 1), &needles)?;
    let migrated = stage.migrate(&mut gang, &[(0, "r2h1")], &["--compress", "never"])?;
    let seen = capture.finish()?;
    let warned = |texts: &[String]| texts.iter().any(|text| text.contains("NOT encrypted"));
    let status = stage.cluster.agent("r2h1").status()?;
    for warnings in [&migrated.report.warnings, &status.warnings] {
        ensure!(warned(warnings) == plaintext, "{warnings:?}");
    }
    ensure!(status.tls.encrypted != plaintext, "{:?}", status.tls);
    drop(gang);
    stage.finish()?;
    Ok(seen)
}

#[test]
fn no_guest_page_crosses_the_network_in_the_clear() -> Result<()> {
    // That pages can be found at all is shown by agents told to do without TLS.
    let clear = move_and_look(true)?;
    ensure!(clear.found >= 16, "the search finds nothing: {clear:?}");
    let sealed = move_and_look(false)?;
    ensure!(sealed.found == 0, "pages in the clear: {sealed:?}");
    ensure!(
        sealed.bytes > clear.bytes / 2,
        "hardly anything was looked at: {sealed:?}, {clear:?}"
    );
    Ok(())
}

/// Waits until an agent's status is as wanted.
fn await_status(
    stage: &Stage,
    host: &str,
    what: &str,
    wanted: impl Fn(&drover::api::types::StatusInfo) -> bool,
) -> Result<()> {
    let until = Instant::now() + NOTICE;
    loop {
        let status = stage.cluster.agent(host).status()?;
        if wanted(&status) {
            return Ok(());
        }
        ensure!(
            Instant::now() < until,
            "{host} does not show {what}: {status:#?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn certificates_are_renewed_under_a_moving_gang() -> Result<()> {
    // 40 Mbit/s make 16 MB of pages last for seconds.
    let saved = save::kvm_with(KvmWork {
        seed: 1,
        common_mib: 1,
        own_mib: 12,
        ws_mib: 1,
        rate_kb: 100,
    })?;
    let stage = Stage::new(40)?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &saved, "r1h1")?;
    let before: Vec<_> = stage
        .lab
        .hosts
        .iter()
        .map(|host| Ok(stage.cluster.agent(&host.name).status()?.tls.fingerprint))
        .collect::<Result<_>>()?;
    let watcher = tests::check::HoldWatcher::start(&stage.hold_dir())?;
    let moves = [(0, "r2h1")];
    let mut migration = gang.start_migration("gang", &moves, &["--compress", "never"])?;
    let dir = agentcfg::pki_dir(&stage.lab);
    for host in &stage.lab.hosts {
        let bundle = pki::renew(&dir, &host.name, 30)?;
        agentcfg::install(&bundle, host)?;
    }
    for (host, before) in stage.lab.hosts.iter().zip(before) {
        await_status(&stage, &host.name, "the new certificate", |status| {
            status.warnings.is_empty() && status.tls.fingerprint != before
        })?;
    }
    ensure!(
        migration.running()?,
        "the gang had arrived before the certificates were renewed"
    );
    let migrated = migration.wait()?;
    watcher.finish()?;
    ensure!(migrated.success, "{:#?}", migrated.report);
    gang.settle(&migrated, &moves)?;
    gang.check()?;

    // A key that others can read is not taken, and the agent goes on.
    let key = stage.lab.host(1, 1).run_dir.join(pki::KEY_FILE);
    fs::set_permissions(&key, Permissions::from_mode(0o644))?;
    await_status(&stage, "r1h1", "what is wrong", |status| {
        let text = status.warnings.concat();
        text.contains("key.pem has mode 0644") && text.contains("chmod 0600")
    })?;
    stage.migrate(&mut gang, &[(0, "r1h1")], &[])?;
    fs::set_permissions(&key, Permissions::from_mode(0o600))?;
    drop(gang);
    stage.finish()
}

/// Everything a migration that was refused said.
fn said(ended: &Ended) -> String {
    let report = ended.report.iter();
    let errors = report.flat_map(|r| r.vms.iter().filter_map(|v| v.error.clone()));
    format!("{}\n{}", ended.said, errors.collect::<Vec<_>>().join("\n"))
}

/// Gives an agent other files while it runs, and waits until it has them.
fn reequip(stage: &Stage, host: &Host, bundle: &Path) -> Result<()> {
    let file = pki::CertificateFile::read(&bundle.join(pki::CERT_FILE))?;
    let fingerprint = file.first().fingerprint_hex();
    agentcfg::install(bundle, host)?;
    await_status(stage, &host.name, "its new certificate", |status| {
        status.tls.fingerprint.as_ref() == Some(&fingerprint)
    })
}

#[test]
fn wrong_certificates_are_refused_with_host_and_remedy_and_the_vm_runs_on() -> Result<()> {
    let stage = Stage::new(400)?;
    let mut gang = stage.gang();
    gang.run("vm1", &Guest::small_kvm(1)?, "r1h1")?;
    let host = stage.lab.host(2, 1);
    let good = agentcfg::pki_dir(&stage.lab);
    let refused = |gang: &tests::gang::Gang, wanted: &[&str]| {
        let ended = gang.start_migration("gang", &[(0, "r2h1")], &[])?.end()?;
        let text = said(&ended);
        ensure!(!ended.success, "it should have been refused: {text}");
        for wanted in ["r2h1", "drover pki"].iter().chain(wanted) {
            ensure!(text.contains(wanted), "no {wanted:?} in: {text}");
        }
        Ok(())
    };

    // An authority of somebody else.
    let foreign = stage.lab.run_dir().join("foreign");
    pki::init(&foreign, "foreign")?;
    fs::copy(good.join(pki::SECRET_FILE), foreign.join(pki::SECRET_FILE))?;
    reequip(&stage, host, &pki::issue(&foreign, "r2h1", 30)?)?;
    refused(&gang, &["not of this cluster's authority"])?;

    // A certificate whose time is over.
    let text = |file: &str| fs::read_to_string(good.join(file)).context(file.to_owned());
    let (ca, key) = (text(pki::CA_FILE)?, text(pki::CA_KEY_FILE)?);
    let authority = pki::Authority::from_pem(&good.join(pki::CA_FILE), &ca, &key)?;
    let hours = |n: u64| Duration::from_secs(3600 * n);
    let now = SystemTime::now();
    let old = authority.issue_between("r2h1", now - hours(3), now - hours(1))?;
    let expired = stage.lab.run_dir().join("expired");
    fs::create_dir(&expired)?;
    let files = TlsFiles::in_dir(&expired);
    fs::write(&files.ca, ca)?;
    fs::write(&files.cert, &old.cert_pem)?;
    fs::write(&files.key, old.key_pem.as_bytes())?;
    fs::set_permissions(&files.key, Permissions::from_mode(0o600))?;
    reequip(&stage, host, &expired)?;
    refused(&gang, &["its certificate expired on"])?;
    await_status(&stage, "r2h1", "that it expired", |status| {
        status.warnings.concat().contains("cert.pem expired on")
    })?;

    // The right one again.
    reequip(&stage, host, &pki::renew(&good, "r2h1", 30)?)?;
    stage.migrate(&mut gang, &[(0, "r2h1")], &[])?;
    drop(gang);
    stage.finish()
}
