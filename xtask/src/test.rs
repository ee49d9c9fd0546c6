//! `cargo xtask test`: lints, tests that need nothing, then those that need
//! root, one program at a time, each with a time limit.
use crate::{build, setup, shell};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Only the tests that need no root
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,
    /// Only the tests that need root
    #[arg(long)]
    e2e: bool,
    /// Leave out rustfmt and clippy
    #[arg(long)]
    no_lint: bool,
    /// Longest that one test program may run
    #[arg(long, default_value_t = 15)]
    program_limit_min: u64,
    /// Longest that all of them may run; what has not begun by then fails
    #[arg(long, default_value_t = 58)]
    limit_min: u64,
}

/// How long a test program that is ended may take to take its labs down.
const TAKE_DOWN: Duration = Duration::from_secs(20);

/// The one test in `tests/*.rs` that needs no root.
const ROOTLESS: &str = "fuzz_corpus";

/// Packages whose (other) `tests/*.rs` need root.
const ROOT_PACKAGES: &[(&str, &str)] = &[
    ("drover", "agent"),
    ("drover-vmm", "vmm-link"),
    ("tests", "tests"),
];

#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
    filtered: u64,
    /// Test programs that failed, or never gave a result.
    broken: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let begun = Instant::now();
    let deadline = begun + Duration::from_secs(args.limit_min * 60);
    if !args.unit && !shell::is_root() {
        bail!(
            "tests that make network namespaces, attach eBPF and start VMMs need root: run this as root, \
             or run `cargo xtask test --unit`"
        );
    }
    if !args.unit {
        setup::everything()?;
    }
    if !args.unit {
        build::planted()?;
        build::run()?;
    }
    if !args.no_lint && !args.e2e && args.filter.is_none() {
        shell::run(shell::cargo().args(["fmt", "--all", "--check"]))?;
        shell::run(
            shell::cargo()
                .args([
                    "clippy",
                    "--release",
                    "--workspace",
                    "--all-targets",
                    "--quiet",
                ])
                .args(["--", "-D", "warnings"]),
        )?;
    }

    let mut tally = Tally::default();
    if !args.e2e {
        let programs = programs(&["--workspace", "--lib", "--bins", "--test", ROOTLESS])?;
        for program in &programs {
            tally.run(program, args, deadline, &[])?;
        }
    }
    if !args.unit {
        for (package, folder) in ROOT_PACKAGES {
            if !has_tests(&shell::root().join(folder).join("tests")) {
                continue;
            }
            let programs = programs(&["--package", package, "--test", "*"])?;
            for program in programs.iter().filter(|p| p.name != ROOTLESS) {
                // They share the machine's two or more cores with VMMs and
                // measure time: one test at a time.
                tally.run(program, args, deadline, &["--test-threads=1"])?;
            }
        }
    }

    let Tally {
        passed,
        failed,
        ignored,
        filtered,
        broken,
    } = tally;
    let verdict = if broken.is_empty() && failed == 0 {
        "ok"
    } else {
        "FAILED"
    };
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; \
         {filtered} filtered out; finished in {:.2}s",
        begun.elapsed().as_secs_f64()
    );
    if !broken.is_empty() {
        bail!("failed: {}", broken.join(", "));
    }
    if passed == 0 {
        bail!(
            "no test ran: does any name contain {:?}?",
            args.filter.as_deref().unwrap_or("")
        );
    }
    Ok(())
}

fn has_tests(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| entry.path().extension().is_some_and(|end| end == "rs"))
    })
}

/// One built test program.
struct Program {
    name: String,
    file: PathBuf,
    /// Its package's folder, where cargo would start it.
    folder: PathBuf,
}

/// Builds test programs and tells where they are. They are then started
/// directly, so that one that hangs can be ended by its own process id.
fn programs(which: &[&str]) -> Result<Vec<Program>> {
    let mut cargo = shell::cargo();
    cargo
        .args(["test", "--release", "--no-run", "--quiet"])
        .arg("--message-format=json-render-diagnostics")
        .args(which);
    eprintln!("$ cargo test --release --no-run {}", which.join(" "));
    let out = cargo
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !out.status.success() {
        bail!("tests do not build");
    }
    let mut programs: Vec<Program> = String::from_utf8_lossy(&out.stdout)
        .lines()
        .filter(|line| is_test_program(line))
        .filter_map(|line| {
            let file = PathBuf::from(field(line, "executable")?);
            let stem = file.file_name()?.to_str()?;
            let name = stem
                .rsplit_once('-')
                .map_or(stem, |(name, _)| name)
                .to_owned();
            let folder = PathBuf::from(field(line, "manifest_path")?)
                .parent()?
                .into();
            Some(Program { name, file, folder })
        })
        .collect();
    programs.sort_by(|a, b| (&a.folder, &a.name).cmp(&(&b.folder, &b.name)));
    Ok(programs)
}

/// Whether one of cargo's JSON lines is about a program built for testing; the
/// binaries that integration tests start are built in passing.
fn is_test_program(line: &str) -> bool {
    let profile = line
        .split_once("\"profile\":{")
        .and_then(|(_, rest)| rest.split_once('}'));
    profile.is_some_and(|(profile, _)| profile.contains("\"test\":true"))
}

/// A string in one of cargo's JSON lines; paths with quotes or backslashes
/// are not looked for.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(&format!("\"{name}\":\""))?;
    Some(rest.split_once('"')?.0)
}

impl Tally {
    /// Runs one test program and adds up what it reports.
    fn run(
        &mut self,
        program: &Program,
        args: &Args,
        deadline: Instant,
        more: &[&str],
    ) -> Result<()> {
        let name = program.name.clone();
        let begun = Instant::now();
        let limit = deadline.min(begun + Duration::from_secs(args.program_limit_min * 60));
        if limit <= begun {
            eprintln!("{name}: not begun, the time for all tests is over");
            self.broken.push(format!("{name} (no time left)"));
            return Ok(());
        }
        println!("\n     Running {name}");
        let mut child = Command::new(&program.file)
            .current_dir(&program.folder)
            .args(&args.filter)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.file.display()))?;
        let stdout = child.stdout.take().context("the test's output is a pipe")?;
        let reader = std::thread::spawn(move || {
            let mut result = None;
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                println!("{line}");
                if line.starts_with("test result:") {
                    result = Some(line);
                }
            }
            result
        });
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if Instant::now() >= limit {
                end(&mut child)?;
                break None;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        let Some(status) = status else {
            eprintln!(
                "{name}: ended after {:.0?}, its time limit",
                begun.elapsed()
            );
            self.broken.push(format!("{name} (time limit)"));
            // What it started may still hold the pipe: do not wait for the reader.
            return Ok(());
        };
        match reader.join().ok().flatten() {
            Some(line) => {
                self.passed += count(&line, "passed");
                self.failed += count(&line, "failed");
                self.ignored += count(&line, "ignored");
                self.filtered += count(&line, "filtered out");
            }
            None => eprintln!("{name}: gave no result ({status})"),
        }
        if !status.success() {
            self.broken.push(name);
        }
        Ok(())
    }
}

/// Ends a test program that takes too long: in order first, so that it takes its
/// labs down, and by force if it does not.
fn end(child: &mut Child) -> Result<()> {
    let _ = Command::new("kill").arg(child.id().to_string()).status();
    let until = Instant::now() + TAKE_DOWN;
    while Instant::now() < until {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// The number before `what` in "test result: ok. 5 passed; 0 failed; ...".
fn count(line: &str, what: &str) -> u64 {
    line.split([';', '.'])
        .filter_map(|part| part.trim().strip_suffix(what))
        .find_map(|number| number.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{count, field};

    #[test]
    fn reads_cargos_lines() {
        let line =
            r#"{"manifest_path":"/a/b/Cargo.toml","profile":{"test":true},"executable":"/t/x-1"}"#;
        assert_eq!(field(line, "manifest_path"), Some("/a/b/Cargo.toml"));
        assert_eq!(field(line, "executable"), Some("/t/x-1"));
        assert_eq!(field(r#"{"executable":null}"#, "executable"), None);
    }

    #[test]
    fn reads_the_result_line_of_a_test_program() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.02s";
        assert_eq!(count(line, "passed"), 12);
        assert_eq!(count(line, "failed"), 3);
        assert_eq!(count(line, "ignored"), 1);
        assert_eq!(count(line, "filtered out"), 7);
    }
}
