//! `drover vm …` and `drover status`.

use super::render;
use super::{CliError, ExitCode};
use crate::api::ApiClient;
use crate::api::types::{AdoptVm, RunVm};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// `drover vm run`
pub(super) async fn run(socket: &Path, name: String) -> Result<ExitCode, CliError> {
    let vm = ApiClient::new(socket).run_vm(&RunVm { name }).await?;
    println!(
        "{} runs (pid {}, driven by {})",
        vm.name,
        vm.pid,
        vm.qmp.display()
    );
    Ok(ExitCode::Ok)
}

/// `drover vm adopt`
pub(super) async fn adopt(socket: &Path, name: String, qmp: PathBuf) -> Result<ExitCode, CliError> {
    let qmp = std::path::absolute(&qmp).unwrap_or(qmp);
    let request = AdoptVm { name, qmp };
    let vm = ApiClient::new(socket).adopt_vm(&request).await?;
    println!(
        "{} adopted (pid {}, {})",
        vm.name,
        vm.pid,
        render::bytes(vm.ram_bytes)
    );
    Ok(ExitCode::Ok)
}

/// `drover vm list`
pub(super) async fn list(socket: &Path, as_json: bool) -> Result<ExitCode, CliError> {
    let vms = ApiClient::new(socket).vms().await?;
    if as_json {
        return print_json(&vms);
    }
    println!("{}", render::vm_table(&vms));
    Ok(ExitCode::Ok)
}

/// `drover vm stop`
pub(super) async fn stop(socket: &Path, name: &str) -> Result<ExitCode, CliError> {
    ApiClient::new(socket).stop_vm(name).await?;
    println!("{name} stopped");
    Ok(ExitCode::Ok)
}

/// `drover status`
pub(super) async fn status(socket: &Path, as_json: bool) -> Result<ExitCode, CliError> {
    let status = ApiClient::new(socket).status().await?;
    if as_json {
        return print_json(&status);
    }
    print!("{}", render::status(&status));
    Ok(ExitCode::Ok)
}

/// Prints one JSON value and a line feed.
pub(super) fn print_json<T: Serialize>(value: &T) -> Result<ExitCode, CliError> {
    let text = serde_json::to_string(value)
        .map_err(|e| CliError::failed(format!("cannot write JSON: {e}"), ""))?;
    println!("{text}");
    Ok(ExitCode::Ok)
}
