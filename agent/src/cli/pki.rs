//! `drover pki`: the cluster's certificates.

use super::error::with_causes;
use super::{CliError, ExitCode, render};
use crate::config::{ClusterSecret, NAME_RULE, is_name};
use crate::pki::{self, CertificateFile, PkiError};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

fn failed(error: PkiError) -> CliError {
    CliError::failed(with_causes(&error), "")
}

/// `drover pki init`
pub(super) fn init(dir: &Path, cluster: &str) -> Result<ExitCode, CliError> {
    check_names([cluster])?;
    pki::init(dir, cluster).map_err(failed)?;
    let secret = dir.join(pki::SECRET_FILE);
    // A cluster that had a secret before it had certificates keeps it.
    if !secret.exists() {
        ClusterSecret::create(&secret).map_err(|e| CliError::failed(with_causes(&e), ""))?;
    }
    println!(
        "{0}: authority and secret of cluster {cluster} made\n\
         next: drover pki issue {0} NAME…   with the names of all agents",
        dir.display()
    );
    Ok(ExitCode::Ok)
}

/// `drover pki issue`
pub(super) fn issue(dir: &Path, names: &[String], days: u32) -> Result<ExitCode, CliError> {
    check_names(names.iter().map(String::as_str))?;
    for name in names {
        let bundle = pki::issue(dir, name, days).map_err(failed)?;
        tell(name, &bundle)?;
    }
    println!(
        "next: copy each bundle to its host, for instance\n\
         \x20 rsync -rp {}/{}/NAME/ NAME:/etc/drover/",
        dir.display(),
        pki::AGENTS_DIR
    );
    Ok(ExitCode::Ok)
}

/// `drover pki renew`
pub(super) fn renew(dir: &Path, names: Vec<String>, days: u32) -> Result<ExitCode, CliError> {
    check_names(names.iter().map(String::as_str))?;
    let names = match names.is_empty() {
        true => pki::issued(dir).map_err(failed)?,
        false => names,
    };
    if names.is_empty() {
        return Err(CliError::failed(
            format!("{} has no agents' bundles to renew", dir.display()),
            "name the directory of `drover pki init`, after `drover pki issue`",
        ));
    }
    for name in &names {
        let bundle = pki::renew(dir, name, days).map_err(failed)?;
        tell(name, &bundle)?;
    }
    println!("next: copy them to their hosts; running agents take them over within seconds");
    Ok(ExitCode::Ok)
}

fn check_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<(), CliError> {
    match names.into_iter().find(|name| !is_name(name)) {
        None => Ok(()),
        Some(name) => Err(CliError::usage(
            format!("`{name}` is not a name"),
            NAME_RULE,
        )),
    }
}

fn tell(name: &str, bundle: &Path) -> Result<(), CliError> {
    let file = CertificateFile::read(&bundle.join(pki::CERT_FILE)).map_err(failed)?;
    println!(
        "{name}: {}, valid until {}",
        bundle.display(),
        pki::date(file.first().not_after)
    );
    Ok(())
}

/// A certificate as shown.
#[derive(Debug, Serialize)]
struct Shown {
    file: PathBuf,
    /// The agent it is of; none if it is an authority's.
    agent: Option<String>,
    subject: String,
    fingerprint: String,
    not_before_s: u64,
    not_after_s: u64,
    valid: bool,
}

/// `drover pki show`
pub(super) fn show(path: &Path, json: bool) -> Result<ExitCode, CliError> {
    let files = match path.is_dir() {
        false => vec![path.to_owned()],
        true => {
            let here = [pki::CA_FILE, pki::CERT_FILE].map(|file| path.join(file));
            let mut files: Vec<PathBuf> = here.into_iter().filter(|f| f.exists()).collect();
            for name in pki::issued(path).map_err(failed)? {
                files.push(path.join(pki::AGENTS_DIR).join(name).join(pki::CERT_FILE));
            }
            files
        }
    };
    if files.is_empty() {
        return Err(CliError::failed(
            format!("{} has no certificates", path.display()),
            "`drover pki init` and `drover pki issue` make them",
        ));
    }
    let now = SystemTime::now();
    let mut shown = Vec::new();
    for file in files {
        for certificate in CertificateFile::read(&file).map_err(failed)?.parsed {
            let seconds = |at: SystemTime| {
                at.duration_since(UNIX_EPOCH)
                    .map_or(0, |since| since.as_secs())
            };
            shown.push(Shown {
                file: file.clone(),
                agent: certificate.agent().ok().map(str::to_owned),
                fingerprint: certificate.fingerprint_hex(),
                not_before_s: seconds(certificate.not_before),
                not_after_s: seconds(certificate.not_after),
                valid: (certificate.not_before..=certificate.not_after).contains(&now),
                subject: certificate.subject,
            });
        }
    }
    if json {
        let text = serde_json::to_string_pretty(&shown);
        println!("{}", text.map_err(|e| CliError::failed(e.to_string(), ""))?);
        return Ok(ExitCode::Ok);
    }
    for one in &shown {
        println!("{}", describe(one));
    }
    Ok(ExitCode::Ok)
}

/// A certificate for people.
fn describe(shown: &Shown) -> String {
    let time = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
    let (from, until) = (time(shown.not_before_s), time(shown.not_after_s));
    let state = match shown.valid {
        true => "",
        false if SystemTime::now() > until => ": EXPIRED",
        false => ": NOT VALID YET",
    };
    let agent = shown.agent.as_deref().unwrap_or("- (an authority's)");
    format!(
        "{}\n  agent    {agent}\n  subject  {}\n  valid    {} to {}{state}\n  sha-256  {}",
        shown.file.display(),
        render::fit(&shown.subject, 64),
        pki::date(from),
        pki::date(until),
        shown.fingerprint
    )
}
