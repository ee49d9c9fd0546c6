//! Files and values that operators write.

use drover::config::{AgentConfig, ByteSize, Checks, IpPrefix, Problems, TlsConfig, is_name};
use drover::gang::plan::{MAX_VMS, Plan};
use drover::pace::meter::Prefix;
use drover::pace::policy::{self, ProfileName};
use drover::pki::TlsFiles;
use drover::types::PAGE_SIZE;
use drover::vmm::definition::{Definition, Role, VmPaths, check_name, parse_size};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// `agent.toml` and `policy.toml`. Each reads the same text.
pub fn config_files(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    let config = AgentConfig::parse(Path::new("/etc/drover/agent.toml"), text, Checks::File);
    match &config {
        Ok(config) => check_config(config),
        Err(problems) => check_problems(problems, text),
    }
    let policy = policy::parse(text);
    match &policy {
        Ok(policy) => {
            assert!((1e5..=1.25e12).contains(&policy.capacity));
            for name in ProfileName::ALL {
                let profile = policy.profile(name);
                assert!((0.0..=1.0).contains(&profile.share) && profile.share > 0.0);
                assert!(profile.floor > 0.0 && profile.floor <= profile.share);
                assert!((0.0..=0.9).contains(&profile.headroom));
                assert!(profile.stop_copy > 0.0 && profile.stop_copy <= 1.0);
            }
            assert!(policy.limits.lanes_per_pair >= 1 && policy.rounds.max_rounds >= 1);
        }
        Err(problem) => {
            assert!((1..=text.lines().count() + 1).contains(&problem.line));
            assert!(!problem.remedy.is_empty() && !problem.to_string().is_empty());
        }
    }
    config.is_ok() || policy.is_ok()
}

fn check_config(config: &AgentConfig) {
    assert!(is_name(&config.name) && is_name(&config.rack));
    assert_ne!(config.listen.port(), 0);
    assert!(((32 << 20)..=(64 << 30)).contains(&config.data_memory));
    let tls = match &config.tls {
        TlsConfig::Files(TlsFiles { ca, cert, key }) => vec![ca, cert, key],
        TlsConfig::Plaintext => Vec::new(),
    };
    for path in [
        &config.api_socket,
        &config.state_dir,
        &config.run_dir,
        &config.ram_dir,
        &config.secret_file,
        &config.policy,
        &config.vm_definitions,
    ]
    .into_iter()
    .chain(tls)
    .chain(&config.qemu_binaries)
    .chain(&config.vmm_binaries)
    .chain(&config.hold_at_switch)
    .chain(&config.moments)
    {
        assert!(path.is_absolute(), "{path:?}");
    }
    let names: BTreeSet<&str> = config.peers.iter().map(|peer| &*peer.name).collect();
    assert_eq!(names.len(), config.peers.len(), "no peer twice");
    assert!(!names.contains(&*config.name), "nobody is its own peer");
    assert!(
        config
            .peers
            .iter()
            .all(|p| is_name(&p.name) && is_name(&p.rack))
    );
    assert!(config.rack_peers().count() <= config.peers.len());
}

fn check_problems(problems: &Problems, text: &str) {
    assert!(!problems.problems.is_empty());
    assert!(problems.problems.is_sorted_by_key(|problem| problem.line));
    for problem in &problems.problems {
        assert!((1..=text.lines().count() + 1).contains(&problem.line));
        assert!(problem.column >= 1 && !problem.message.is_empty());
    }
    assert!(!problems.to_string().is_empty());
}

/// Plans and VM definitions. Each reads the same text.
pub fn vm_files(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    let plan = Plan::parse(Path::new("plan.toml"), text, None);
    match &plan {
        Ok(plan) => check_plan(plan, text),
        Err(problems) => check_problems(problems, text),
    }
    let definition = Definition::parse("vm.toml", text);
    match &definition {
        Ok(vm) => check_definition(vm),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    plan.is_ok() || definition.is_ok()
}

fn check_plan(plan: &Plan, text: &str) {
    assert!(is_name(&plan.gang) && (1..=MAX_VMS).contains(&plan.vms.len()));
    let names: BTreeSet<&str> = plan.vms.iter().map(|vm| &*vm.name).collect();
    assert_eq!(names.len(), plan.vms.len(), "no VM twice");
    let mut again = format!("gang = \"{}\"\n", plan.gang);
    for vm in &plan.vms {
        assert!(
            [&vm.name, &vm.from, &vm.to]
                .into_iter()
                .all(|name| is_name(name))
        );
        assert_ne!(vm.from, vm.to);
        let (name, from, to) = (&vm.name, &vm.from, &vm.to);
        again += &format!("[[vm]]\nname = \"{name}\"\nfrom = \"{from}\"\nto = \"{to}\"\n");
    }
    let parse =
        |text: &str, hosts: Option<&[&str]>| Plan::parse(Path::new("plan.toml"), text, hosts);
    assert_eq!(parse(&again, None).as_ref(), Ok(plan));
    assert_eq!(parse(text, Some(&plan.hosts())).as_ref(), Ok(plan));
    assert!(parse(text, Some(&[])).is_err(), "hosts nobody knows");
}

fn check_definition(vm: &Definition) {
    assert_eq!(
        &Definition::parse("again", &vm.text).expect("its own text"),
        vm
    );
    assert!(is_name(&vm.name), "a plan can name every VM: {:?}", vm.name);
    assert!(vm.binary.is_absolute());
    assert!(vm.ram_bytes > 0 && vm.ram_bytes.is_multiple_of(PAGE_SIZE as u64));
    let (run, ram) = (Path::new("/run/vms"), Path::new("/dev/shm/drover"));
    let paths = VmPaths::new(run, ram, &vm.name);
    assert_eq!(paths.dir.parent(), Some(run), "a name is no path");
    assert_eq!(paths.ram.parent(), Some(ram), "a name is no path");
    let known: BTreeMap<String, String> = vm
        .host_placeholders()
        .into_iter()
        .map(|name| (name.to_owned(), "{ram}".to_owned()))
        .collect();
    let args = vm
        .expand(&paths, &known, Role::Incoming)
        .expect("all placeholders are known");
    assert_eq!(args.len(), vm.args.len() + vm.incoming_args.len());
    let own_alone = vm.expand(&paths, &BTreeMap::new(), Role::Incoming);
    assert_eq!(own_alone.is_ok(), known.is_empty());
}

/// Values inside files and on command lines: sizes, prefixes, names.
pub fn values(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    let mut accepted = false;
    if let Ok(size) = parse_size(text) {
        assert!(size.is_multiple_of(1024));
        assert_eq!(parse_size(&format!("{}K", size / 1024)), Ok(size));
        let unit = text.strip_suffix("iB").unwrap_or(text);
        let number = unit.strip_suffix(['K', 'M', 'G', 'T']);
        assert!(
            number.is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit())),
            "{text:?} is a size only to a parser that is too kind"
        );
        accepted = true;
    }
    if let Ok(size) = text.parse::<ByteSize>() {
        assert_eq!(size.0.to_string().parse(), Ok(size));
        accepted = true;
    }
    if let Ok(prefix) = text.parse::<IpPrefix>() {
        assert!(prefix.contains(prefix.address()));
        assert_eq!(prefix.to_string().parse(), Ok(prefix));
        // The meter's own prefix type reads what the configuration accepts.
        assert!(prefix.to_string().parse::<Prefix>().is_ok());
        accepted = true;
    }
    if let Ok(prefix) = text.parse::<Prefix>() {
        assert!(prefix.contains(prefix.address()));
        assert_eq!(prefix.to_string().parse(), Ok(prefix));
        accepted = true;
    }
    if check_name(text).is_ok() {
        assert!(is_name(text), "a plan can name every VM: {text:?}");
    }
    if is_name(text) {
        let file = PathBuf::from("/d").join(format!("{text}.toml"));
        assert_eq!(file.parent(), Some(Path::new("/d")), "a name is no path");
        accepted = true;
    }
    if let Ok(profile) = text.parse::<ProfileName>() {
        assert_eq!(profile.as_str(), text);
        accepted = true;
    }
    accepted
}
