//! `drover gang open`, running: for VMs whose manager drives their migration.

use crate::check::HoldWatcher;
use crate::drover::Agent;
use crate::limit;
use crate::play::until;
use anyhow::{Context, Result, ensure};
use drover::api::types::{GangReport, Outcome, VmInfo};
use std::process::{Child, Stdio};

/// The command. Dropping it ends it, and the sockets go.
#[derive(Debug)]
pub struct Opened(Option<Child>);

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code.
    pub code: Option<i32>,
    /// What became of the VMs, if it came to that.
    pub report: Option<GangReport>,
    /// All it has said.
    pub said: String,
}

impl Opened {
    /// Opens gang `evac` to agent `to` for these VMs, and waits until their
    /// sockets are there.
    ///
    /// # Errors
    /// When they do not come.
    pub fn start(agent: &Agent, to: &str, vms: &[&str], more: &[&str]) -> Result<Opened> {
        let mut command = agent.command(&["gang", "open", "evac", "--domain", "lab", "--json"])?;
        command.args(["--to", to, "--wait", "60s"]).args(more);
        for vm in vms {
            command.args(["--vm", vm]);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let opened = Opened(Some(command.spawn()?));
        until("the sockets", || {
            let mut paths = vms
                .iter()
                .map(|vm| agent.files.transport.join(format!("{vm}.sock")));
            Ok(paths.all(|path| path.exists()).then_some(()))
        })?;
        Ok(opened)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end, or says something else than it should.
    pub fn end(mut self) -> Result<Ended> {
        let child = self.0.take().context("waited for already")?;
        let output = limit::output(child, limit::COMMAND).context("drover gang open")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // The offers, and then the report.
        let report = text.lines().nth(1).map(serde_json::from_str).transpose()?;
        Ok(Ended {
            code: output.status.code(),
            report,
            said: format!("{text}{}", String::from_utf8_lossy(&output.stderr)),
        })
    }
}

impl Ended {
    /// What became of the VMs, if all have arrived, each held at its switch, its
    /// RAM then equal on both sides byte for byte.
    ///
    /// # Errors
    /// With the first of these that does not hold.
    pub fn all_arrived(self, watcher: HoldWatcher) -> Result<GangReport> {
        let report = self.report.with_context(|| self.said.clone())?;
        ensure!(
            self.code == Some(0) && report.outcome == Outcome::Arrived,
            "{report:#?}\n{}",
            self.said
        );
        let differing = watcher.finish()?;
        for vm in &report.vms {
            let pages = differing.get(&vm.name).context("not held at its switch")?;
            ensure!(pages.is_empty() && vm.verified, "{}: {pages:?}", vm.name);
        }
        Ok(report)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _gone = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until the VMM of `vm` has connected to its socket and waits for the gang.
///
/// # Errors
/// When it does not.
pub fn connected(agent: &Agent, vm: &str) -> Result<VmInfo> {
    until(&format!("{vm} to come"), || {
        let list = agent.run(&["vm", "list", "--json"])?;
        let vms: Vec<VmInfo> = serde_json::from_slice(&list.stdout)?;
        let mut come = vms
            .into_iter()
            .filter(|of| of.name == vm && of.status == "connected");
        Ok(come.next())
    })
}
