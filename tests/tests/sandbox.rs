//! The agent does its work with no more of root than its systemd unit leaves
//! it, and each capability that the unit leaves it is needed.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use tests::agentcfg::AgentOptions;
use tests::qemu::Guest;
use tests::sandbox::Sandbox;
use tests::save;
use tests::stage::Stage;

/// Field `key` of a process's status.
fn status_field(pid: i32, key: &str) -> Result<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix(key));
    let value = line.with_context(|| format!("no {key} of process {pid}"))?;
    Ok(value.trim_start_matches(':').trim().to_owned())
}

#[test]
fn agents_move_a_gang_with_the_capabilities_and_calls_of_the_unit_and_need_them_all() -> Result<()>
{
    let sandbox = Sandbox::of_the_unit()?;
    for directive in &sandbox.not_applied {
        eprintln!("NOT APPLIED without systemd: {directive}");
    }
    let saves = save::kvm(1)?;
    let options = AgentOptions {
        sandbox: Some(sandbox.clone()),
        ..AgentOptions::default()
    };
    let mut stage = Stage::with(400, options)?;
    let mask = format!("{:016x}", sandbox.mask());
    for agent in &stage.cluster.agents {
        for key in ["CapPrm", "CapEff", "CapBnd"] {
            ensure!(
                status_field(agent.pid(), key)? == mask,
                "{key} is not {mask}"
            );
        }
        ensure!(status_field(agent.pid(), "CapInh")? == "0000000000000000");
        ensure!(status_field(agent.pid(), "NoNewPrivs")? == "1");
        ensure!(
            status_field(agent.pid(), "Seccomp")? == "0",
            "under seccomp"
        );
    }
    // One VM that an agent started, so with what it has inherited, and one that
    // others did; each becomes one of the former on the way.
    let mut gang = stage.gang();
    gang.run("vm1", &Guest::small_kvm(2)?, "r1h1")?;
    gang.adopt("vm2", &saves[0], "r1h2")?;
    for (a, b) in [("r2h1", "r2h2"), ("r1h1", "r1h2")] {
        let migrated = stage.migrate(&mut gang, &[(0, a), (1, b)], &[])?;
        ensure!(migrated.report.core_bytes > 0, "nothing was metered");
    }
    drop(gang);

    // Without any of them it says what is missing.
    let host = stage.lab.host(1, 2).clone();
    for (capability, wanted) in [
        ("CAP_BPF", "CAP_BPF"),
        ("CAP_NET_ADMIN", "CAP_NET_ADMIN"),
        ("CAP_PERFMON", "CAP_PERFMON"),
    ] {
        let agent = stage.cluster.agent_mut("r1h2");
        agent.stop()?;
        match agent.start_again_in(&host, sandbox.clone().without(capability)?) {
            Ok(()) => bail!("{capability} is not needed"),
            Err(error) => ensure!(
                format!("{error:#}").contains(wanted),
                "no {wanted} in: {error:#}"
            ),
        }
    }
    let agent = stage.cluster.agent_mut("r1h2");
    agent.start_again_in(&host, sandbox.clone().without("CAP_CHECKPOINT_RESTORE")?)?;
    let mut gang = stage.gang();
    gang.adopt("vm3", &saves[0], "r1h2")?;
    // Its RAM can only be reached in the other way, and the list says why.
    let list = stage.cluster.agent("r1h2").run(&["vm", "list", "--json"])?;
    let list = String::from_utf8_lossy(&list.stdout);
    ensure!(
        list.contains("qemu-stream") && list.contains("map_files"),
        "CAP_CHECKPOINT_RESTORE is not needed: {list}"
    );
    drop(gang);
    let agent = stage.cluster.agent_mut("r1h2");
    agent.stop()?;
    agent.start_again_in(&host, sandbox.clone().without("CAP_SYS_PTRACE")?)?;
    let mut gang = stage.gang();
    let refused = gang.adopt("vm4", &saves[0], "r1h2");
    let why = format!(
        "{:#}",
        refused.err().context("CAP_SYS_PTRACE is not needed")?
    );
    ensure!(why.contains("CAP_SYS_PTRACE"), "no remedy in: {why}");
    drop(gang);
    stage.finish()
}
