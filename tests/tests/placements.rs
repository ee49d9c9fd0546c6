//! Small gangs in every arrangement of hosts.

use anyhow::{Result, ensure};
use drover::api::types::VmInfo;
use tests::save;
use tests::stage::Stage;

#[test]
fn one_vm() -> Result<()> {
    let saves = save::kvm(1)?;
    let stage = Stage::new(400)?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &saves[0], "r1h1")?;
    stage.migrate(&mut gang, &[(0, "r2h1")], &[])?;
    let list = stage.cluster.agent("r2h1").run(&["vm", "list", "--json"])?;
    let vms: Vec<VmInfo> = serde_json::from_slice(&list.stdout)?;
    ensure!(
        vms.len() == 1 && vms[0].name == "vm1" && vms[0].status == "running",
        "{vms:?}"
    );
    let list = stage.cluster.agent("r1h1").run(&["vm", "list", "--json"])?;
    ensure!(
        serde_json::from_slice::<Vec<VmInfo>>(&list.stdout)?.is_empty(),
        "the source lists it still"
    );
    drop(gang);
    stage.finish()
}

#[test]
fn two_vms_of_one_host_to_two_hosts() -> Result<()> {
    let saves = save::kvm(2)?;
    let stage = Stage::new(400)?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &saves[0], "r1h1")?;
    gang.adopt("vm2", &saves[1], "r1h1")?;
    stage.migrate(&mut gang, &[(0, "r2h1"), (1, "r2h2")], &[])?;
    drop(gang);
    stage.finish()
}

#[test]
fn two_vms_to_one_host() -> Result<()> {
    let saves = save::kvm(2)?;
    let stage = Stage::new(400)?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &saves[0], "r1h1")?;
    gang.adopt("vm2", &saves[1], "r1h2")?;
    stage.migrate(&mut gang, &[(0, "r2h1"), (1, "r2h1")], &["--align"])?;
    drop(gang);
    stage.finish()
}

#[test]
fn there_and_back_three_times() -> Result<()> {
    let saves = save::kvm(2)?;
    let stage = Stage::new(400)?;
    let mut gang = stage.gang();
    gang.adopt("vm1", &saves[0], "r1h1")?;
    gang.adopt("vm2", &saves[1], "r1h2")?;
    for _ in 0..3 {
        stage.migrate(&mut gang, &[(0, "r2h1"), (1, "r2h2")], &[])?;
        stage.migrate(&mut gang, &[(0, "r1h1"), (1, "r1h2")], &[])?;
    }
    drop(gang);
    stage.finish()
}
