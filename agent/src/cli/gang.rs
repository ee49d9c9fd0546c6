//! `drover gang open`: VMs whose manager (libvirt) drives their migration.

use super::args::GangOpen;
use super::migrate::{interrupts, move_gang};
use super::vms::print_json;
use super::{CliError, ExitCode};
use crate::api::ApiClient;
use crate::api::types::{MigrationRequest, OfferInfo, OfferRequest, OfferState};
use crate::gang::plan::Plan;
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::signal::unix::Signal;

/// How often the agent is asked who has come.
const POLL: Duration = Duration::from_millis(250);

#[derive(Serialize)]
struct Offered<'a> {
    offers: &'a [OfferInfo],
}

/// `drover gang open`
pub(super) async fn open(socket: &Path, args: GangOpen) -> Result<ExitCode, CliError> {
    let wanted = args.wait_for.map_or(args.vms.len(), usize::from);
    if wanted > args.vms.len() {
        return Err(CliError::usage(
            format!(
                "--wait-for {wanted}, but only {} VMs are named",
                args.vms.len()
            ),
            "name each VM by --vm, or wait for fewer",
        ));
    }
    let others = match &args.with {
        Some(file) => others(file)?,
        None => String::new(),
    };
    let client = ApiClient::new(socket);
    let mut interrupts = interrupts()?;
    let from = client.status().await?.agent;
    let request = OfferRequest {
        gang: args.gang.clone(),
        domain: args.domain.clone(),
        vms: args.vms.clone(),
    };
    let offers = client.offer(&request).await?;
    let moved = async {
        tell(&offers, args.how.json)?;
        let here = wait(&client, &mut interrupts, &args, wanted).await?;
        let late = args.vms.iter().filter(|vm| !here.contains(*vm)).cloned();
        let late: Vec<_> = late.collect();
        if !late.is_empty() {
            eprintln!("not waited for: {}", late.join(", "));
            client.withdraw(&args.gang, late).await?;
        }
        let request = MigrationRequest {
            plan_file: format!("gang {}", args.gang),
            plan: plan(&args.gang, &here, &from, &args.to) + &others,
            options: args.how.options(false),
        };
        move_gang(&client, &mut interrupts, &request, args.how.json).await
    };
    let moved = moved.await;
    // What moves goes on; what does not runs on where it is.
    let withdrawn = client.withdraw(&args.gang, Vec::new()).await;
    let code = moved?;
    withdrawn?;
    Ok(code)
}

fn tell(offers: &[OfferInfo], json: bool) -> Result<(), CliError> {
    if json {
        return print_json(&Offered { offers }).map(drop);
    }
    for offer in offers {
        println!("{}  {}", offer.vm, offer.uri);
    }
    Ok(())
}

/// Waits for `wanted` of the VMs; who is there then.
async fn wait(
    client: &ApiClient,
    interrupts: &mut Signal,
    args: &GangOpen,
    wanted: usize,
) -> Result<Vec<String>, CliError> {
    let until = Instant::now() + args.wait;
    let mut told: Vec<OfferInfo> = Vec::new();
    loop {
        let offers = client.offers(&args.gang).await?;
        for news in offers.iter().filter(|offer| !told.contains(offer)) {
            match (news.state, &news.error) {
                (OfferState::Refused, Some(why)) => eprintln!("{why}"),
                (OfferState::Offered, _) => {}
                (state, _) => eprintln!("{} {}", news.vm, state.as_str()),
            }
        }
        let names = |state| {
            let of_state = offers.iter().filter(move |offer| offer.state == state);
            of_state.map(|offer| offer.vm.clone()).collect::<Vec<_>>()
        };
        let here = names(OfferState::Connected);
        if here.len() >= wanted {
            return Ok(here);
        }
        let refused = names(OfferState::Refused);
        let missing = names(OfferState::Offered);
        let can_come = here.len() + missing.len() >= wanted;
        if !can_come || Instant::now() > until {
            let why = match can_come {
                true => format!("did not come within {} s", args.wait.as_secs()),
                false => "cannot come any more".to_owned(),
            };
            let absent = [refused, missing].concat().join(", ");
            return Err(CliError::failed(
                format!("gang {} is not whole: {absent} {why}", args.gang),
                "those that came run on where they are; start `virsh migrate` for each VM with its \
                 --migrateuri while this command waits",
            ));
        }
        told = offers;
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            _ = interrupts.recv() => {
                return Err(CliError {
                    error: format!("gang {} was given up while it waited", args.gang),
                    remedy: "its VMs run on where they are".to_owned(),
                    code: ExitCode::Interrupted,
                });
            }
        }
    }
}

/// The gang's plan. What is no name in it the agent refuses.
fn plan(gang: &str, vms: &[String], from: &str, to: &str) -> String {
    let mut plan = format!("gang = {gang:?}\n");
    for vm in vms {
        add(&mut plan, vm, from, to);
    }
    plan
}

fn add(plan: &mut String, vm: &str, from: &str, to: &str) {
    // Writing to a string does not fail.
    let _ = write!(
        plan,
        "\n[[vm]]\nname = {vm:?}\nfrom = {from:?}\nto = {to:?}\n"
    );
}

/// The VMs of a plan that go along.
fn others(file: &Path) -> Result<String, CliError> {
    let text = std::fs::read_to_string(file).map_err(|e| {
        CliError::usage(
            format!("cannot read {}: {e}", file.display()),
            "name an existing plan; configs/plans has an example",
        )
    })?;
    let mut others = String::new();
    for vm in Plan::parse(file, &text, None)?.vms {
        add(&mut others, &vm.name, &vm.from, &vm.to);
    }
    Ok(others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_offered_makes_a_plan_that_the_agent_takes() {
        let vms = ["g1".to_owned(), "g2".to_owned()];
        let mut text = plan("evac", &vms, "a1", "b1");
        add(&mut text, "web1", "a2", "b2");
        let plan = Plan::parse(Path::new("gang evac"), &text, None).unwrap();
        assert_eq!(plan.gang, "evac");
        let moves: Vec<_> = plan
            .vms
            .iter()
            .map(|vm| (&*vm.name, &*vm.from, &*vm.to))
            .collect();
        assert_eq!(
            moves,
            [("g1", "a1", "b1"), ("g2", "a1", "b1"), ("web1", "a2", "b2")]
        );
    }
}
