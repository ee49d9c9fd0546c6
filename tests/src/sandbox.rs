//! An agent as the systemd unit would run it: the unit's capabilities, its
//! system call filter, its limits, without systemd.
#![allow(unsafe_code)]

use crate::cache;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter, compile_from_json,
};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

/// Capabilities by their number, as linux/capability.h has them.
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Flags of clone and unshare that make namespaces.
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;

/// What of the unit is put on an agent of the lab.
#[derive(Clone)]
pub struct Sandbox {
    /// The capabilities it may have, sorted.
    pub capabilities: BTreeSet<String>,
    nofile: u64,
    filters: Arc<Vec<BpfProgram>>,
    /// What of the unit is not.
    pub not_applied: Vec<String>,
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sandbox({:?})", self.capabilities)
    }
}

/// `key=value` lines of a unit's [Service] section, in order.
struct Unit(Vec<(String, String)>);

impl Unit {
    fn parse(text: &str) -> Unit {
        let (_, service) = text.split_once("[Service]").unwrap_or(("", text));
        let service = service.split("\n[").next().unwrap_or_default();
        let lines = service.lines().map(str::trim);
        let pairs = lines
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split_once('='));
        Unit(pairs.map(|(k, v)| (k.into(), v.into())).collect())
    }

    fn words(&self, key: &str) -> Vec<&str> {
        let values = self.0.iter().filter(|(k, _)| k == key);
        values.flat_map(|(_, v)| v.split_whitespace()).collect()
    }

    fn one(&self, key: &str) -> Result<&str> {
        match self.words(key)[..] {
            [value] => Ok(value),
            _ => bail!("the unit has no (single) {key}="),
        }
    }
}

impl Sandbox {
    /// As `configs/drover-agent.service` says.
    ///
    /// # Errors
    /// When it says something that this cannot do and does not know it cannot.
    pub fn of_the_unit() -> Result<Sandbox> {
        let path = cache::workspace().join("configs/drover-agent.service");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Sandbox::parse(&text)
    }

    fn parse(text: &str) -> Result<Sandbox> {
        let unit = Unit::parse(text);
        ensure!(unit.one("NoNewPrivileges")? == "yes", "not hardened");
        ensure!(unit.one("LimitMEMLOCK")? == "infinity", "a limit on memory");
        ensure!(
            unit.words("AmbientCapabilities").is_empty(),
            "ambient capabilities"
        );
        let words = unit.words("CapabilityBoundingSet");
        for word in &words {
            ensure!(CAPABILITIES.contains(word), "unknown capability {word}");
        }
        let mut not_applied = Vec::new();
        let mut filters = Vec::new();
        let calls = unit.words("SystemCallFilter");
        match groups(&calls) {
            Ok(names) if names.is_empty() => {}
            Ok(names) => filters.extend(filter(&names, &unit)?),
            Err(error) => not_applied.push(format!("SystemCallFilter=: {error:#}")),
        }
        let done = [
            "NoNewPrivileges",
            "CapabilityBoundingSet",
            "AmbientCapabilities",
            "SystemCallFilter",
            "SystemCallErrorNumber",
            "SystemCallArchitectures",
            "RestrictAddressFamilies",
            "RestrictNamespaces",
            "LimitMEMLOCK",
            "LimitNOFILE",
        ];
        let hardening = ["Protect", "Private", "Restrict", "Lock", "Keyring", "UMask"];
        for (key, value) in &unit.0 {
            let hardens = hardening.iter().any(|start| key.starts_with(start));
            if hardens && !done.contains(&key.as_str()) {
                not_applied.push(format!("{key}={value}"));
            }
        }
        let mut capabilities: BTreeSet<String> = words.into_iter().map(str::to_owned).collect();
        if !may_lock_all()? {
            not_applied.push(
                "LimitMEMLOCK=infinity: tests may not raise it here; CAP_IPC_LOCK stands in"
                    .to_owned(),
            );
            capabilities.insert("CAP_IPC_LOCK".to_owned());
        }
        Ok(Sandbox {
            capabilities,
            nofile: unit.one("LimitNOFILE")?.parse()?,
            filters: Arc::new(filters),
            not_applied,
        })
    }

    /// Without one of its capabilities.
    ///
    /// # Errors
    /// When it has none of that name.
    pub fn without(mut self, capability: &str) -> Result<Sandbox> {
        ensure!(
            self.capabilities.remove(capability),
            "the unit does not grant {capability}"
        );
        Ok(self)
    }

    /// Puts it on a command that is to be started. What else is done before the
    /// program begins must have been asked for before.
    pub fn apply(&self, command: &mut Command) {
        let (keep, nofile) = (self.mask(), self.nofile);
        let filters = Arc::clone(&self.filters);
        // SAFETY: between fork and exec only system calls are made; the vectors
        // were made before and are only read.
        unsafe {
            command.pre_exec(move || {
                raise(Resource::RLIMIT_MEMLOCK, u64::MAX)?;
                raise(Resource::RLIMIT_NOFILE, nofile)?;
                limit_capabilities(keep)?;
                for filter in filters.iter() {
                    // It sets no_new_privs first.
                    apply_filter(filter).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
                }
                match libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
    }

    /// Its capabilities as the kernel shows them in `/proc/PID/status`.
    pub fn mask(&self) -> u64 {
        let bit = |name: &String| CAPABILITIES.iter().position(|c| c == name);
        self.capabilities
            .iter()
            .filter_map(bit)
            .fold(0, |mask, bit| mask | 1 << bit)
    }
}

/// Whether this process can lift the limit on locked memory for its children.
fn may_lock_all() -> io::Result<bool> {
    let (_, most) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let effective = line.and_then(|l| u64::from_str_radix(l.trim(), 16).ok());
    let raises = CAPABILITIES.iter().position(|c| *c == "CAP_SYS_RESOURCE");
    let raises = raises.is_some_and(|bit| effective.unwrap_or(0) >> bit & 1 == 1);
    Ok(most == u64::MAX || raises)
}

/// Sets a limit. Tests may be forbidden to go beyond the one they have: then
/// the agent has less than the unit gives it.
fn raise(resource: Resource, to: u64) -> io::Result<()> {
    let (_, most) = getrlimit(resource)?;
    match setrlimit(resource, to, to) {
        Err(nix::Error::EPERM) => Ok(setrlimit(resource, to.min(most), to.min(most))?),
        set => Ok(set?),
    }
}

/// Bounding set and all others, for good. Root gets what is left at exec.
fn limit_capabilities(keep: u64) -> io::Result<()> {
    for bit in (0..CAPABILITIES.len()).filter(|bit| keep >> bit & 1 == 0) {
        // SAFETY: plain numbers go in.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, bit, 0, 0, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let half = |shift: u32| (keep >> shift) as u32;
    // Version 3, this thread; effective, permitted, inheritable, twice 32 bits.
    let header = [0x2008_0522u32, 0];
    let data = [half(0), half(0), 0, half(32), half(32), 0];
    // SAFETY: the kernel reads a header of two and data of six numbers.
    match unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The system calls of a filter, its groups taken from this machine's systemd.
fn groups(words: &[&str]) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    let mut open: Vec<String> = words.iter().map(|w| w.to_string()).collect();
    let mut seen = BTreeSet::new();
    while let Some(word) = open.pop() {
        if !word.starts_with('@') {
            names.insert(word);
            continue;
        }
        if !seen.insert(word.clone()) {
            continue;
        }
        let output = Command::new("systemd-analyze")
            .args(["syscall-filter", &word])
            .output()
            .context("what the groups hold is systemd-analyze's to say, which is not here")?;
        ensure!(output.status.success(), "there is no group {word}");
        let text = String::from_utf8(output.stdout)?;
        let listed = text.lines().skip(1).map(str::trim);
        open.extend(
            listed
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(str::to_owned),
        );
    }
    Ok(names)
}

/// The filter as systemd makes it: what is not listed fails with EPERM.
fn filter(names: &BTreeSet<String>, unit: &Unit) -> Result<[BpfProgram; 2]> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for name in names {
        // Groups list calls of all architectures.
        if let Some(number) = number(name) {
            rules.insert(number, Vec::new());
        }
    }
    ensure!(rules.len() > 200, "hardly any system calls: {names:?}");
    let condition = |arg, length, op, value| SeccompCondition::new(arg, length, op, value);
    let mut families = Vec::new();
    for family in unit.words("RestrictAddressFamilies") {
        let number = match family {
            "AF_UNIX" => libc::AF_UNIX,
            "AF_INET" => libc::AF_INET,
            "AF_INET6" => libc::AF_INET6,
            "AF_NETLINK" => libc::AF_NETLINK,
            other => bail!("address family {other}"),
        };
        let is = condition(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, number as u64)?;
        families.push(SeccompRule::new(vec![is])?);
    }
    rules.insert(libc::SYS_socket, families);
    ensure!(unit.one("RestrictNamespaces")? == "yes", "namespaces");
    for call in [libc::SYS_clone, libc::SYS_unshare] {
        let none = condition(
            0,
            SeccompCmpArgLen::Qword,
            SeccompCmpOp::MaskedEq(NAMESPACES),
            0,
        )?;
        rules.insert(call, vec![SeccompRule::new(vec![none])?]);
    }
    rules.remove(&libc::SYS_setns);
    let refuse = |errno: i32| SeccompAction::Errno(errno as u32);
    ensure!(unit.one("SystemCallErrorNumber")? == "EPERM", "an errno");
    let all = SeccompFilter::new(
        rules,
        refuse(libc::EPERM),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    // Its flags are in memory, where no filter sees them; the C library then
    // uses clone.
    let clone3 = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        refuse(libc::ENOSYS),
        TargetArch::x86_64,
    )?;
    Ok([all.try_into()?, clone3.try_into()?])
}

/// The number of a system call, if this architecture has it.
fn number(name: &str) -> Option<i64> {
    // The names are the library's business: a filter of this one call tells
    // whether it knows it.
    let json = format!(
        r#"{{"one": {{"mismatch_action": "allow", "match_action": "trap",
            "filter": [{{"syscall": "{name}"}}]}}}}"#
    );
    let compiled = compile_from_json(json.as_bytes(), TargetArch::x86_64).ok()?;
    let program = compiled.get("one")?;
    // The one comparison with a system call's number that is not the
    // architecture's: the first jump after the number was loaded.
    let load = program.iter().rposition(|i| i.code == 0x20 && i.k == 0)?;
    Some(i64::from(program.get(load + 1)?.k))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_calls_have_the_numbers_that_libc_knows() {
        for (name, expected) in [
            ("read", libc::SYS_read),
            ("bpf", libc::SYS_bpf),
            ("pidfd_getfd", libc::SYS_pidfd_getfd),
            ("io_uring_enter", libc::SYS_io_uring_enter),
            ("clone3", libc::SYS_clone3),
        ] {
            assert_eq!(number(name), Some(expected), "{name}");
        }
        assert_eq!(number("arm_fadvise64_64"), None);
    }

    #[test]
    fn the_unit_is_read_and_what_cannot_be_applied_is_known() -> Result<()> {
        let sandbox = Sandbox::of_the_unit()?;
        assert!(sandbox.capabilities.contains("CAP_BPF"));
        assert!(!sandbox.capabilities.contains("CAP_SYS_ADMIN"));
        assert_eq!(sandbox.mask() >> 39 & 1, 1);
        let rest = sandbox.not_applied.join("\n");
        assert!(rest.contains("ProtectSystem=strict"), "{rest}");
        assert!(
            sandbox.filters.is_empty(),
            "VMMs under seccomp cannot be moved"
        );
        Ok(())
    }
}
