//! The operator: where the two sides of a handover cannot agree, somebody has
//! to look at both hosts and decide (`docs/handover.md`). This one looks at
//! the hosts' processes, and gives the command that `drover status` shows for
//! what was found.

use super::census::VmmProcess;
use super::stand::Stand;
use anyhow::{Context, Result, bail};
use drover::api::types::HandoverInfo;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a VM is left in doubt, once the fault and the gang are over: what
/// the agents can settle between themselves they settle before.
const PATIENCE: Duration = Duration::from_secs(5);

/// A decision that was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The VM.
    pub vm: String,
    /// Where it is to run.
    pub runs_on: String,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Operator {
    /// Since when which agent is in doubt of which VM.
    doubts: BTreeMap<(String, String), Instant>,
    /// What was decided.
    pub decided: Vec<Decision>,
}

impl Operator {
    /// Decides what has been in doubt for long enough.
    ///
    /// # Errors
    /// When the agents offer no command for what is the case, or do not obey.
    pub fn look(&mut self, stand: &Stand) -> Result<()> {
        // An agent that does not answer yet may settle it.
        let Ok(statuses) = stand.statuses() else {
            return Ok(());
        };
        let doubts: Vec<(String, HandoverInfo)> = statuses
            .into_iter()
            .flat_map(|status| {
                let agent = status.agent;
                let open = status.handovers.into_iter();
                open.filter(|handover| !handover.settled && handover.in_doubt.is_some())
                    .map(move |handover| (agent.clone(), handover))
            })
            .collect();
        self.doubts.retain(|(agent, vm), _| {
            let same = |(at, handover): &(String, HandoverInfo)| at == agent && handover.vm == *vm;
            doubts.iter().any(same)
        });
        for (agent, handover) in doubts {
            let key = (agent.clone(), handover.vm.clone());
            let since = *self.doubts.entry(key).or_insert_with(Instant::now);
            if since.elapsed() < PATIENCE {
                continue;
            }
            if let Some(runs_on) = truth(stand, &agent, &handover)? {
                decide(stand, &agent, &handover, &runs_on)?;
                // The other side hears of it, or is in doubt for as long again.
                self.doubts.clear();
                self.decided.push(Decision {
                    vm: handover.vm,
                    runs_on,
                });
                break;
            }
        }
        Ok(())
    }
}

/// The host on which a VM in doubt has to run by what its hosts have; `None`
/// while both of them have it and neither runs it: agents that live on both
/// must come to an end without anybody's help.
fn truth(stand: &Stand, agent: &str, handover: &HandoverInfo) -> Result<Option<String>> {
    let vmms = stand.census.vmms()?;
    let of_vm = |vmm: &&VmmProcess| vmm.vm == handover.vm;
    let found: Vec<&VmmProcess> = vmms.iter().filter(of_vm).collect();
    let runs = |vmm: &&&VmmProcess| vmm.status().is_some_and(|status| status == "running");
    if let Some(running) = found.iter().find(runs) {
        return Ok(Some(running.host.clone()));
    }
    Ok(match found[..] {
        // It died with its process: whoever asks is told that nobody else has it.
        [] => Some(agent.to_owned()),
        [only] => Some(only.host.clone()),
        _ => None,
    })
}

/// Gives the command that the agent offers for this case.
fn decide(stand: &Stand, agent: &str, handover: &HandoverInfo, runs_on: &str) -> Result<()> {
    let command = format!(
        "drover gang resolve --vm {} --runs-on {runs_on}",
        handover.vm
    );
    let offered = handover.remedies.iter().any(|text| {
        // The whole of the host's name, not its beginning.
        text.split_once(&command)
            .is_some_and(|(_, rest)| !rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
    });
    if !offered {
        bail!(
            "{} is in doubt at {agent}, which offers no `{command}`: {handover:?}",
            handover.vm
        );
    }
    let args: Vec<&str> = command.split(' ').skip(1).collect();
    let done = stand.cluster.agent(agent).run(&args);
    done.map(drop).with_context(|| format!("`{command}`"))
}
