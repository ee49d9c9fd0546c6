//! The `drover` command.

pub mod args;
mod bench;
mod check;
mod error;
mod gang;
mod migrate;
mod pki;
pub mod render;
mod vms;

pub use error::{CliError, ExitCode};

use args::{
    BenchCommand, Cli, Command, ConfigCommand, GangCommand, PkiCommand, PolicyCommand,
    SecretCommand, VmCommand,
};
use clap::Parser;

/// Runs the command line; returns the process's exit code.
pub fn main() -> ExitCode {
    // Clap itself ends with 2 on a usage error, and 0 after --help.
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{}", error.render());
            error.code
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode, CliError> {
    let socket = cli.socket;
    match cli.command {
        Command::Agent { config } => check::run_agent(&config),
        Command::Vm { command } => on_runtime(async {
            match command {
                VmCommand::Run { name } => vms::run(&socket, name).await,
                VmCommand::Adopt { name, qmp } => vms::adopt(&socket, name, qmp).await,
                VmCommand::List { json } => vms::list(&socket, json).await,
                VmCommand::Stop { name } => vms::stop(&socket, &name).await,
            }
        }),
        Command::Migrate(migrate) => on_runtime(migrate::run(&socket, migrate)),
        Command::Status { json } => on_runtime(vms::status(&socket, json)),
        Command::Cancel { gang, vm } => on_runtime(migrate::cancel(&socket, &gang, vm.as_deref())),
        Command::Gang { command } => on_runtime(async {
            match command {
                GangCommand::Open(open) => gang::open(&socket, open).await,
                GangCommand::Resume { gang, json } => migrate::resume(&socket, &gang, json).await,
                GangCommand::Resolve { vm, runs_on } => {
                    migrate::resolve(&socket, vm, runs_on).await
                }
            }
        }),
        Command::Config {
            command: ConfigCommand::Check { file, file_only },
        } => check::config(&file, file_only),
        Command::Policy {
            command: PolicyCommand::Check { file },
        } => check::policy(&file),
        Command::Secret {
            command: SecretCommand::Init { file },
        } => check::secret(&file),
        Command::Pki { command } => match command {
            PkiCommand::Init { dir, cluster } => pki::init(&dir, &cluster),
            PkiCommand::Issue { dir, names, days } => pki::issue(&dir, &names, days),
            PkiCommand::Renew { dir, names, days } => pki::renew(&dir, names, days),
            PkiCommand::Show { path, json } => pki::show(&path, json),
        },
        Command::Bench { command } => {
            let (BenchCommand::Fingerprint { json }
            | BenchCommand::Claims { json }
            | BenchCommand::Lane { json }) = &command;
            bench::run(&command, json.as_deref())
        }
    }
}

/// Client commands wait for one agent: one thread is plenty.
fn on_runtime(
    work: impl Future<Output = Result<ExitCode, CliError>>,
) -> Result<ExitCode, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(work),
        Err(error) => Err(CliError::failed(
            format!("cannot start: {error}"),
            "the system is out of file descriptors or memory",
        )),
    }
}

#[cfg(test)]
mod tests;
