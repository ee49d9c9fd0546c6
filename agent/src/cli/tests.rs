use super::args::Cli;
use crate::config::{Checks, Problems};
use clap::{CommandFactory, Parser};
use std::path::Path;

/// The long help of every command, with its name.
fn helps(command: &mut clap::Command, name: &str, all: &mut Vec<(String, String)>) {
    let name = format!("{name} {}", command.get_name());
    all.push((name.clone(), command.render_long_help().to_string()));
    all.push((name.clone(), command.render_help().to_string()));
    for sub in command.get_subcommands_mut() {
        helps(sub, &name, all);
    }
}

#[test]
fn every_help_fits_eighty_columns_and_explains_every_option() {
    let mut command = Cli::command();
    command.build();
    let mut all = Vec::new();
    helps(&mut command, "", &mut all);
    assert!(all.len() > 30);
    for (name, help) in all {
        for line in help.lines() {
            assert!(line.chars().count() <= 80, "{name}: {line}");
        }
    }
    fn explained(command: &clap::Command) {
        let about = command.get_about();
        assert!(about.is_some(), "{}", command.get_name());
        for arg in command.get_arguments() {
            assert!(
                arg.get_help().is_some(),
                "{} {}",
                command.get_name(),
                arg.get_id()
            );
        }
        command.get_subcommands().for_each(explained);
    }
    explained(&command);
}

#[test]
fn the_command_lines_of_the_documents_are_understood() {
    let good = [
        "drover agent --config agent.toml",
        "drover vm run web1",
        "drover vm adopt web1 --qmp /run/q.sock",
        "drover vm adopt k1 --link /run/k.sock",
        "drover vm list --json",
        "drover vm stop web1 --socket /tmp/s",
        "drover --socket /tmp/s status --json",
        "drover migrate plan.toml --profile urgent --json --dry-run --align",
        "drover migrate plan.toml --downtime-limit 100 --verify full --compress never",
        "drover cancel web --vm web1",
        "drover gang open evac --to b1 --domain tenant-a --vm g1 --vm g2 --wait 10m",
        "drover gang open evac --to b1 --domain t --vm g1 --wait-for 1 --with p.toml --json",
        "drover config check agent.toml --file-only",
        "drover policy check policy.toml",
        "drover secret init secret",
        "drover bench fingerprint --json f.json",
        "drover bench claims",
        "drover bench lane",
    ];
    for line in good {
        Cli::try_parse_from(line.split(' ')).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
    for line in [
        "drover",
        "drover migrate",
        "drover migrate p --downtime-limit 0",
        "drover vm adopt x",
        "drover gang open evac --to b1 --domain t",
        "drover gang open evac --to b1 --domain t --vm g1 --wait 10",
        "drover gang open evac --to b1 --domain t --vm g1 --wait 0s",
    ] {
        let error = Cli::try_parse_from(line.split(' ')).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn problems_are_all_shown_and_exit_as_usage_errors() {
    let parsed = crate::config::AgentConfig::parse(Path::new("f.toml"), "a = 1\n", Checks::File);
    let problems: Problems = parsed.unwrap_err();
    let error = super::CliError::from(problems);
    assert_eq!(error.code, super::ExitCode::Usage);
    let text = error.render();
    assert!(text.contains("f.toml:1:1: a: unknown key"), "{text}");
    assert!(text.contains("problems found"), "{text}");
}

#[test]
fn the_vm_definitions_in_configs_are_right() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/vms");
    let mut seen = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        crate::vmm::definition::Definition::load(&path).unwrap();
        seen += 1;
    }
    assert!(seen > 0);
}
