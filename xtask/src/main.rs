//! Project chores, one module for each: `cargo xtask <command>`.
//!
//! Root is asked for only where it is needed (installing packages, tests and
//! labs that make network namespaces), and its absence is said plainly.
mod audit;
mod build;
mod build_ebpf;
mod chaos;
mod dist;
mod fuzz;
mod lab;
mod setup;
mod shell;
mod test;
mod unsafety;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Drover's project chores")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install (as root, on Debian) or name what the project needs
    Setup(setup::Args),
    /// Build the eBPF programs
    BuildEbpf,
    /// Build the eBPF programs and the release binary that embeds the meter
    Build(build::Args),
    /// Lints, unit tests, then the tests that need root
    Test(test::Args),
    /// Move a gang between two racks of a lab, and show what happened
    #[command(disable_help_flag = true)]
    Demo(lab::Passed),
    /// Racks in network namespaces with real guests: up, down, run
    #[command(disable_help_flag = true)]
    Lab(lab::Passed),
    /// Measure: gang, fingerprint, claims, lane
    #[command(disable_help_flag = true)]
    Bench(lab::Passed),
    /// Break things at every moment of a handover; --help tells how
    #[command(disable_help_flag = true)]
    Chaos(lab::Passed),
    /// Feed random bytes to the parsers of bytes from outside
    Fuzz(fuzz::Args),
    /// Check unsafe code, licences and advisories of dependencies
    Audit(audit::Args),
    /// Make a tarball to install from
    Dist(dist::Args),
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Setup(args) => setup::run(&args),
        Command::BuildEbpf => build_ebpf::run(),
        Command::Build(args) => build::from_args(&args),
        Command::Test(args) => test::run(&args),
        Command::Demo(passed) => lab::run(Some("demo"), &passed),
        Command::Lab(passed) => lab::run(None, &passed),
        Command::Bench(passed) => lab::bench(&passed),
        Command::Chaos(passed) => chaos::run(&passed),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Audit(args) => audit::run(&args),
        Command::Dist(args) => dist::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // Not by returning it: that would print a backtrace where a sentence
        // says what to do.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
