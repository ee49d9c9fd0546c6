//! `cargo xtask fuzz`: libFuzzer on the parsers of bytes from outside.
use crate::shell::{self, output, which};
use anyhow::{Result, bail};
use std::path::Path;
use std::process::Command;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this target; without, all in turn
    target: Option<String>,
    /// How long each target runs
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
}

/// Most memory a target may take: parsers are to be modest.
const MEMORY_MIB: u32 = 1024;

pub(crate) fn run(args: &Args) -> Result<()> {
    let fuzz = shell::root().join("fuzz");
    let mut targets = targets(&fuzz)?;
    if let Some(wanted) = &args.target {
        if !targets.contains(wanted) {
            bail!("no target {wanted}; there are: {}", targets.join(", "));
        }
        targets = vec![wanted.clone()];
    }
    if output(Command::new("rustup").args(["run", "nightly", "rustc", "--version"])).is_none() {
        bail!(
            "fuzzing needs a nightly toolchain, and rustup has none: run \
             `rustup toolchain install nightly --profile minimal`. The corpus alone is checked \
             without it: `cargo test --release -p drover --test fuzz_corpus`"
        );
    }
    if which("cargo-fuzz").is_none() {
        shell::run(&mut cargo(&["install", "cargo-fuzz", "--locked"]))?;
    }
    for target in &targets {
        // What libFuzzer finds new goes to the first directory, which is not
        // kept; the corpus of the repository is only read.
        let found = fuzz.join("corpus-work").join(target);
        std::fs::create_dir_all(&found)?;
        shell::run(
            cargo(&["+nightly", "fuzz", "run", target])
                .arg(&found)
                .arg(fuzz.join("corpus").join(target))
                .arg("--")
                .arg(format!("-max_total_time={}", args.seconds))
                .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
                .args(["-timeout=10", "-print_final_stats=1"]),
        )?;
    }
    eprintln!(
        "fuzz: {} s each, nothing found: {}",
        args.seconds,
        targets.join(", ")
    );
    Ok(())
}

/// The programs of `fuzz/fuzz_targets`, sorted.
fn targets(fuzz: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(fuzz.join("fuzz_targets"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "rs")
            && let Some(stem) = path.file_stem()
        {
            names.push(stem.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// rustup's cargo, which understands `+nightly`. What cargo and rustup told
/// this program about its own toolchain is not for that one.
fn cargo(args: &[&str]) -> Command {
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(shell::root())
        .args(args)
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .env_remove("RUSTC");
    cargo
}
