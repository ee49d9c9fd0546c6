//! The plan of a migration: which VM goes from where to where.
//!
//! ```toml
//! gang = "web"
//!
//! [[vm]]
//! name = "web1"
//! from = "a1"
//! to = "b1"
//! ```

use crate::config::document::{Document, Section, closest};
use crate::config::{NAME_RULE, Problems, is_name};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Most VMs in a plan: [`crate::types::VmIndex`] counts them in 16 bits, and
/// a plan comes from outside.
pub const MAX_VMS: usize = 4096;

/// A checked plan: at least one VM, no VM twice, none that stays in place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The gang's name.
    pub gang: String,
    /// The VMs, in the file's order; a VM's place is its
    /// [`crate::types::VmIndex`].
    pub vms: Vec<PlannedVm>,
}

/// One VM of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedVm {
    /// The VM.
    pub name: String,
    /// The agent of its source host.
    pub from: String,
    /// The agent of its target host.
    pub to: String,
}

impl Plan {
    /// Reads a plan. `hosts`, if given, are all agents of the cluster: a plan
    /// that names others is wrong. `file` is for messages only.
    pub fn parse(file: &Path, text: &str, hosts: Option<&[&str]>) -> Result<Self, Problems> {
        let document = Document::parse(file, text);
        let root = document.root();
        let gang: Option<String> = root.required("gang", "add gang = \"…\": a name for this gang");
        if let Some(gang) = &gang
            && !is_name(gang)
        {
            root.complain("gang", format!("`{gang}` is not a name"), NAME_RULE);
        }
        let sections = root.sections("vm");
        if sections.is_empty() {
            root.complain("vm", "the plan moves no VM", "add [[vm]] tables");
        }
        if sections.len() > MAX_VMS {
            let message = format!("the plan moves more than {MAX_VMS} VMs");
            root.complain("vm", message, "split it into several plans");
        }
        let mut vms: Vec<PlannedVm> = Vec::new();
        for section in sections {
            if let Some(vm) = read_vm(&section, hosts) {
                if vms.iter().any(|other| other.name == vm.name) {
                    let message = format!("VM {} is in the plan twice", vm.name);
                    section.complain("name", message, "remove one of the entries");
                }
                vms.push(vm);
            }
            section.finish();
        }
        root.finish();
        document.finish(gang.map(|gang| Plan { gang, vms }))
    }

    /// The agents this plan involves, sorted, each once.
    pub fn hosts(&self) -> Vec<&str> {
        let both = self.vms.iter().flat_map(|vm| [&*vm.from, &*vm.to]);
        let mut hosts: Vec<&str> = both.collect();
        hosts.sort_unstable();
        hosts.dedup();
        hosts
    }
}

fn read_vm(section: &Section<'_, '_>, hosts: Option<&[&str]>) -> Option<PlannedVm> {
    let name: Option<String> = section.required("name", "add the VM's name");
    let from: Option<String> = section.required("from", "add the agent the VM runs on");
    let to: Option<String> = section.required("to", "add the agent the VM shall go to");
    for (key, value) in [("name", &name), ("from", &from), ("to", &to)] {
        let Some(value) = value else { continue };
        if !is_name(value) {
            section.complain(key, format!("`{value}` is not a name"), NAME_RULE);
        } else if key != "name"
            && let Some(hosts) = hosts
            && !hosts.contains(&value.as_str())
        {
            let remedy = match closest(value, hosts) {
                Some(near) => format!("did you mean `{near}`?"),
                None => "add it as a [[peer]] of the agent, or correct the plan".to_owned(),
            };
            section.complain(key, format!("there is no agent `{value}`"), remedy);
        }
    }
    if let (Some(from), Some(to)) = (&from, &to)
        && from == to
    {
        section.complain(
            "to",
            format!("{from} is the source already"),
            "choose another target, or leave the VM out",
        );
    }
    Some(PlannedVm {
        name: name?,
        from: from?,
        to: to?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "gang = \"web\"\n[[vm]]\nname = \"w1\"\nfrom = \"a1\"\nto = \"b1\"\n\
                        [[vm]]\nname = \"w2\"\nfrom = \"a2\"\nto = \"b1\"\n";
    const HOSTS: &[&str] = &["a1", "a2", "b1", "b2"];

    fn parse(text: &str) -> Result<Plan, Problems> {
        Plan::parse(Path::new("plan.toml"), text, Some(HOSTS))
    }

    #[test]
    fn a_good_plan_is_read() {
        let plan = parse(GOOD).unwrap();
        assert_eq!(plan.gang, "web");
        assert_eq!(plan.vms[1].from, "a2");
        assert_eq!(plan.hosts(), ["a1", "a2", "b1"]);
    }

    #[test]
    fn mistakes_name_line_and_remedy() {
        #[rustfmt::skip]
        let table = [
            ("gang = \"web\"", "gang = \"a b\"", "plan.toml:1:8: gang: `a b` is not a name"),
            ("gang = \"web\"\n", "", "plan.toml:1:1: gang: this key is missing"),
            ("\"w2\"", "\"w1\"", "plan.toml:7:8: vm[2].name: VM w1 is in the plan twice"),
            ("to = \"b1\"", "to = \"a1\"", "plan.toml:5:6: vm[1].to: a1 is the source already"),
            ("to = \"b1\"", "to = \"b11\"", "plan.toml:5:6: vm[1].to: there is no agent `b11`\n    did you mean `b1`?"),
            ("to = \"b1\"\n", "", "plan.toml:2:1: vm[1].to: this key is missing"),
            ("from =", "form =", "plan.toml:4:1: vm[1].form: unknown key\n    did you mean `from`?"),
        ];
        for (from, to, expected) in table {
            let error = parse(&GOOD.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(expected), "wanted {expected}, got:\n{error}");
        }
        let empty = parse("gang = \"web\"").unwrap_err().to_string();
        assert!(empty.contains("moves no VM"), "{empty}");
    }

    #[test]
    fn the_examples_in_configs_are_right() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/plans");
        let mut seen = 0;
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            Plan::parse(&path, &text, None).unwrap();
            seen += 1;
        }
        assert!(seen > 0);
    }

    proptest::proptest! {
        #[test]
        fn a_damaged_plan_never_panics(at in 0..GOOD.len(), byte in 0u8..128) {
            let mut bytes = GOOD.as_bytes().to_vec();
            bytes[at] = byte;
            let _ = parse(std::str::from_utf8(&bytes).unwrap());
        }
    }
}
