//! `cargo xtask audit`: unsafe code and dependencies, as far as the data for it
//! can be had here; what could not be checked is said, and is not a success.

use crate::shell::{self, which};
use crate::unsafety;
use anyhow::{Result, bail};
use std::process::Command;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Succeed although the advisory database cannot be had
    #[arg(long)]
    offline: bool,
}

/// Checks of cargo-deny that need nothing but this repository and the crates
/// that were downloaded to build it.
const LOCAL: &[&str] = &["licenses", "bans", "sources"];

pub(crate) fn run(args: &Args) -> Result<()> {
    let uses = unsafety::check(shell::root())?;
    println!(
        "unsafe code: {uses} uses in {} files, all known",
        unsafety::ALLOWED.len()
    );
    if which("cargo-deny").is_none() {
        bail!(
            "NOT CHECKED: licences, bans, sources and advisories of dependencies. They need \
             cargo-deny: cargo install cargo-deny --locked"
        );
    }
    shell::run(deny(&["--offline", "check"]).args(LOCAL))?;
    let advisories = shell::run(deny(&["check"]).arg("advisories"));
    match advisories {
        Ok(()) => println!("audit: nothing found"),
        Err(error) if args.offline => {
            println!("NOT CHECKED: advisories (see above): {error:#}");
        }
        Err(error) => bail!(
            "advisories: found, or NOT CHECKED because their database cannot be had (see above; \
             --offline goes on without it): {error:#}"
        ),
    }
    Ok(())
}

fn deny(args: &[&str]) -> Command {
    let mut deny = shell::cargo();
    deny.arg("deny").args(["--workspace"]).args(args);
    deny
}
