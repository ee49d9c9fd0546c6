//! `cargo xtask fuzz`: libFuzzer on the parsers of bytes from outside.
mod result;
mod toolchain;

use crate::shell::{self, which};
use anyhow::{Context, Result, bail};
use result::Outcome;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Instant;
use toolchain::Toolchain;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this target; without, all
    target: Option<String>,
    /// How long each target runs
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// How many targets run at the same time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    jobs: u64,
}

/// Most memory a target may take: parsers are to be modest.
const MEMORY_MIB: u32 = 1024;

pub(crate) fn run(args: &Args) -> Result<()> {
    let fuzz = shell::root().join("fuzz");
    let mut names = targets(&fuzz)?;
    if let Some(wanted) = &args.target {
        if !names.contains(wanted) {
            bail!("no target {wanted}; there are: {}", names.join(", "));
        }
        names = vec![wanted.clone()];
    }
    let toolchain = Toolchain::find();
    eprintln!("fuzz: {toolchain}");
    if which("cargo-fuzz").is_none() {
        shell::run(shell::cargo().args(["install", "cargo-fuzz", "--locked"]))?;
    }
    // Built once, then run as they are: whoever works on the sources meanwhile
    // does not change what is fuzzed, and nobody waits for cargo's lock.
    let target_dir = fuzz.join("target");
    let mut build = toolchain.cargo();
    build
        .args(["fuzz", "build", "--target", toolchain::TRIPLE])
        .arg("--target-dir")
        .arg(&target_dir)
        .args(&args.target);
    shell::run(&mut build)?;
    let programs = target_dir.join(toolchain::TRIPLE).join("release");

    let (waiting, ended) = (Mutex::new(names.iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..args.jobs {
            scope.spawn(|| {
                let next = || waiting.lock().expect("no holder panics").next();
                while let Some(name) = next() {
                    let outcome = one(&fuzz, &programs, name, args.seconds);
                    match &outcome {
                        Ok(outcome) => eprintln!("{}", outcome.row()),
                        Err(error) => eprintln!("error: {name}: {error:#}"),
                    }
                    ended.lock().expect("no holder panics").push(outcome);
                }
            });
        }
    });
    let mut outcomes = ended
        .into_inner()
        .expect("no holder panics")
        .into_iter()
        .collect::<Result<Vec<Outcome>>>()?;
    outcomes.sort_by(|a, b| a.target.cmp(&b.target));
    println!("{}", result::table(&outcomes));
    let bad: Vec<String> = outcomes.iter().filter_map(Outcome::problem).collect();
    if !bad.is_empty() {
        bail!("{}", bad.join("\n"));
    }
    Ok(())
}

/// Runs one target, its output in a log of its own.
fn one(fuzz: &Path, programs: &Path, target: &str, seconds: u64) -> Result<Outcome> {
    // What libFuzzer finds new goes to the first directory, which is not kept;
    // the corpus of the repository is only read.
    let found = fuzz.join("corpus-work").join(target);
    let artifacts = fuzz.join("artifacts").join(target);
    let logs = fuzz.join("logs");
    for dir in [&found, &artifacts, &logs] {
        fs::create_dir_all(dir)?;
    }
    let log: PathBuf = logs.join(format!("{target}.log"));
    let file = File::create(&log).with_context(|| log.display().to_string())?;
    let begun = Instant::now();
    let status = Command::new(programs.join(target))
        .arg(&found)
        .arg(fuzz.join("corpus").join(target))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-timeout=10", "-print_final_stats=1"])
        // Several crates bring the same C symbols.
        .env("ASAN_OPTIONS", "detect_odr_violation=0")
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("cannot start the fuzz target {target}"))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    Ok(Outcome::read(
        target,
        &text,
        status.success(),
        begun.elapsed(),
        log,
    ))
}

/// The programs of `fuzz/fuzz_targets`, sorted.
fn targets(fuzz: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(fuzz.join("fuzz_targets"))? {
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
