//! The `drover` command.

fn main() -> std::process::ExitCode {
    drover::cli::main().into()
}
