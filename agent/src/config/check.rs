//! The checks behind `agent.toml`: first what the file alone can tell, then
//! what this host must have.

use super::agent::{Draft, FencingConfig, LogConfig, LogFormat, PeerConfig, TlsConfig};
use super::document::{Section, closest};
use super::{ByteSize, ClusterSecret, HostGroup, NAME_RULE, is_name};
use crate::pki::{Credentials, PkiError, TlsFiles};
use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Least and most `data_memory`, bytes.
const DATA_MEMORY: std::ops::RangeInclusive<u64> = (32 << 20)..=(64 << 30);

/// The longest path a Unix socket can have.
const SOCKET_PATH_MAX: usize = 107;

/// What can be judged without looking at the host.
pub(super) fn file(root: &Section<'_, '_>, draft: &Draft) {
    for (key, name) in [("name", &draft.name), ("rack", &draft.rack)] {
        if let Some(name) = name
            && !is_name(name)
        {
            root.complain(key, format!("`{name}` is not a name"), NAME_RULE);
        }
    }
    if let Some(listen) = draft.listen
        && listen.port() == 0
    {
        root.complain("listen", "port 0 is no fixed port", "use port 7400");
    }
    if let Some(socket) = &draft.api_socket
        && socket.as_os_str().len() > SOCKET_PATH_MAX
    {
        root.complain(
            "api_socket",
            format!("is longer than {SOCKET_PATH_MAX} bytes, more than a Unix socket can have"),
            "choose a shorter path",
        );
    }
    if let Some(ByteSize(bytes)) = draft.data_memory
        && !DATA_MEMORY.contains(&bytes)
    {
        root.complain(
            "data_memory",
            "must be between 32 MiB and 64 GiB",
            "\"256 MiB\" is enough for a 10 Gbit/s core link",
        );
    }
    api_groups(root, draft);
    directories_differ(root, draft);
    uplinks(root, draft);
    own_entry(root, draft);
    racks_and_prefixes(root, draft);
    for (key, i, binary) in binaries(draft) {
        if !binary.is_absolute() {
            root.complain_item(
                key,
                i,
                format!("{} is not an absolute path", binary.display()),
                "write the whole path, like \"/usr/bin/qemu-system-x86_64\"",
            );
        }
    }
}

/// What definitions from peers may start: key, place in it, program.
fn binaries(draft: &Draft) -> impl Iterator<Item = (&'static str, usize, &PathBuf)> {
    let keys = [
        ("qemu_binaries", &draft.qemu_binaries),
        ("vmm_binaries", &draft.vmm_binaries),
    ];
    keys.into_iter().flat_map(|(key, list)| {
        let list = list.iter().flatten().enumerate();
        list.map(move |(i, binary)| (key, i, binary))
    })
}

/// The keys of agent.toml that name groups, and what they name.
fn named_groups(draft: &Draft) -> impl Iterator<Item = (&'static str, &str)> {
    let keys = [
        ("api_group", draft.api_group.as_deref()),
        ("api_readonly_group", draft.api_readonly_group.as_deref()),
        ("transport_group", draft.transport_group.as_deref()),
    ];
    keys.into_iter()
        .filter_map(|(key, name)| Some((key, name?)))
}

fn api_groups(root: &Section<'_, '_>, draft: &Draft) {
    for (key, name) in named_groups(draft) {
        if name.is_empty() || name.contains(|c: char| c == ':' || c.is_whitespace()) {
            root.complain(
                key,
                format!("`{name}` cannot name a group"),
                "see `getent group`; leave the key out to admit root only",
            );
        }
    }
    if draft.api_group.is_some() && draft.api_group == draft.api_readonly_group {
        root.complain(
            "api_readonly_group",
            "is the same group as api_group",
            "leave it out: members of api_group may look, too",
        );
    }
}

fn directories_differ(root: &Section<'_, '_>, draft: &Draft) {
    let mut seen: Vec<(&str, &PathBuf)> = Vec::new();
    let dirs = [
        ("state_dir", &draft.state_dir),
        ("run_dir", &draft.run_dir),
        ("ram_dir", &draft.ram_dir),
        ("transport_dir", &draft.transport_dir),
    ];
    for (key, dir) in dirs {
        let Some(dir) = dir else { continue };
        if let Some((other, _)) = seen.iter().find(|(_, d)| *d == dir) {
            root.complain(
                key,
                format!("is the same directory as {other}"),
                "give each its own: they are cleaned up in different ways",
            );
        }
        seen.push((key, dir));
    }
}

fn uplinks(root: &Section<'_, '_>, draft: &Draft) {
    let uplinks = draft.uplinks.as_deref().unwrap_or_default();
    let mut seen = HashSet::new();
    for (i, name) in uplinks.iter().enumerate() {
        let fits = (1..16).contains(&name.len())
            && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace())
            && name != "."
            && name != "..";
        if !fits {
            let message = format!("`{name}` cannot name an interface");
            root.complain_item("uplinks", i, message, "see `ip -brief link`");
        } else if !seen.insert(name) {
            let message = format!("{name} is listed twice");
            root.complain_item("uplinks", i, message, "remove one of them");
        }
    }
    let prefixes = draft.rack_prefixes.as_deref().unwrap_or_default();
    if !uplinks.is_empty() && prefixes.is_empty() && draft.rack_prefixes.is_some() {
        root.complain(
            "rack_prefixes",
            "is empty although uplinks are metered",
            "list the networks of this rack, or all its traffic counts as core traffic",
        );
    }
    for (i, prefix) in prefixes.iter().enumerate() {
        if prefixes[..i].contains(prefix) {
            let message = format!("{prefix} is listed twice");
            root.complain_item("rack_prefixes", i, message, "remove one of them");
        }
    }
}

/// One list of peers can be given to every host, so this agent may be in it,
/// but then the entry has to be true.
fn own_entry(root: &Section<'_, '_>, draft: &Draft) {
    let (Some(name), Some(rack)) = (&draft.name, &draft.rack) else {
        return;
    };
    let (peers, listen) = (root.sections("peer"), draft.listen);
    for (section, peer) in peers.iter().zip(&draft.peers) {
        if peer.name != *name {
            continue;
        }
        if peer.rack != *rack {
            section.complain(
                "rack",
                format!("is `{}`, but this agent ({name}) is in `{rack}`", peer.rack),
                "make both the same",
            );
        }
        if listen.is_some_and(|l| l.port() != peer.address.port()) {
            section.complain(
                "address",
                format!("has another port than `listen` of this agent ({name})"),
                "make both the same",
            );
        }
    }
}

/// The meter tells core from rack traffic by address: a peer on the wrong
/// side of the prefixes would be counted wrong.
fn racks_and_prefixes(root: &Section<'_, '_>, draft: &Draft) {
    let (Some(rack), Some(prefixes)) = (&draft.rack, &draft.rack_prefixes) else {
        return;
    };
    if prefixes.is_empty() {
        return;
    }
    for (section, peer) in root.sections("peer").iter().zip(&draft.peers) {
        let inside = prefixes.iter().any(|p| p.contains(peer.address.ip()));
        let message = match (inside, peer.rack == *rack) {
            (true, false) => format!(
                "{} is inside rack_prefixes, but peer {} is in rack {}",
                peer.address, peer.name, peer.rack
            ),
            (false, true) => format!(
                "{} is outside rack_prefixes, but peer {} is in this rack",
                peer.address, peer.name
            ),
            _ => continue,
        };
        section.complain(
            "address",
            message,
            "correct the address, the rack or rack_prefixes",
        );
    }
}

/// Reads `[log]`.
pub(super) fn log(root: &Section<'_, '_>) -> LogConfig {
    let mut log = LogConfig {
        level: "info".to_owned(),
        format: LogFormat::Text,
    };
    let Some(section) = root.section("log") else {
        return log;
    };
    log.level = section.or("level", log.level);
    if let Err(error) = log.level.parse::<tracing_subscriber::EnvFilter>() {
        section.complain(
            "level",
            format!("`{}` is no log filter: {error}", log.level),
            "write error, warn, info, debug or trace",
        );
    }
    let format: String = section.or("format", "text".to_owned());
    match format.as_str() {
        "text" => {}
        "json" => log.format = LogFormat::Json,
        other => {
            let near = closest(other, &["text", "json"]).unwrap_or("text");
            section.complain(
                "format",
                format!("`{other}` is no log format"),
                format!("write \"text\" or \"json\"; did you mean `{near}`?"),
            );
        }
    }
    section.finish();
    log
}

/// Reads `[tls]`. It has to say one thing or the other: nobody is without TLS
/// by leaving something out.
pub(super) fn tls(root: &Section<'_, '_>, here: &Path) -> Option<TlsConfig> {
    const REMEDY: &str = "name the files of this agent's bundle, ca.pem, cert.pem and key.pem, as \
         ca, cert and key; `drover pki init` and `drover pki issue` make them";
    let Some(section) = root.section("tls") else {
        root.complain("tls", "is missing", REMEDY);
        return None;
    };
    let plaintext = section.or("plaintext", false);
    let tls = if plaintext {
        for key in ["ca", "cert", "key"] {
            if section.has(key) {
                section.complain(
                    key,
                    "is set, but so is plaintext = true",
                    "remove plaintext to use TLS",
                );
            }
        }
        Some(TlsConfig::Plaintext)
    } else {
        let path = |key| {
            section
                .required::<PathBuf>(key, REMEDY)
                .map(|p| here.join(p))
        };
        match (path("ca"), path("cert"), path("key")) {
            (Some(ca), Some(cert), Some(key)) => Some(TlsConfig::Files(TlsFiles { ca, cert, key })),
            _ => None,
        }
    };
    section.finish();
    tls
}

/// Reads `[[peer]]`. An entry that is not whole is left out.
pub(super) fn peers(root: &Section<'_, '_>) -> Vec<PeerConfig> {
    let mut peers: Vec<PeerConfig> = Vec::new();
    for section in root.sections("peer") {
        let name: Option<String> = section.required("name", "add the peer agent's name");
        let rack: Option<String> = section.required("rack", "add the rack the peer is in");
        let address: Option<SocketAddr> =
            section.required("address", "add address = \"IP:7400\" of the peer");
        let source_addresses: Vec<IpAddr> = section.or("source_addresses", Vec::new());
        for (key, value) in [("name", &name), ("rack", &rack)] {
            if let Some(value) = value
                && !is_name(value)
            {
                section.complain(key, format!("`{value}` is not a name"), NAME_RULE);
            }
        }
        if let Some(address) = address
            && (address.port() == 0 || address.ip().is_unspecified())
        {
            section.complain(
                "address",
                format!("{address} cannot be connected to"),
                "write the peer's own IP address and port",
            );
        }
        if let (Some(name), Some(rack), Some(address)) = (name, rack, address) {
            if peers.iter().any(|p| p.name == name) {
                section.complain(
                    "name",
                    format!("{name} is listed twice"),
                    "remove one of the entries",
                );
            } else if let Some(other) = peers.iter().find(|p| p.address == address) {
                section.complain(
                    "address",
                    format!("{address} is the address of {} already", other.name),
                    "give each peer its own address",
                );
            }
            peers.push(PeerConfig {
                name,
                rack,
                address,
                source_addresses,
            });
        }
        section.finish();
    }
    peers
}

/// Reads `[placeholders]`.
pub(super) fn placeholders(root: &Section<'_, '_>) -> BTreeMap<String, String> {
    let mut placeholders = BTreeMap::new();
    let Some(section) = root.section("placeholders") else {
        return placeholders;
    };
    for (key, value) in section.strings() {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if key.is_empty() || !key.chars().all(fits) {
            section.complain(
                &key,
                "cannot be a placeholder",
                "use lower-case letters, digits and `_`",
            );
        }
        placeholders.insert(key, value);
    }
    placeholders
}

/// `[fencing]`: the command that proves a host down.
pub(super) fn fencing(root: &Section<'_, '_>) -> Option<FencingConfig> {
    let section = root.section("fencing")?;
    let command: Option<Vec<String>> = section.required(
        "command",
        "add command = [\"/usr/local/sbin/fence\"]: a program, and its arguments, that succeeds \
         only if the host it is given is down",
    );
    let limit_s: u64 = section.or("limit_s", 60);
    if limit_s == 0 || limit_s > 600 {
        section.complain(
            "limit_s",
            format!("{limit_s} s is no limit"),
            "use 1 to 600 seconds",
        );
    }
    let command = command?;
    if command
        .first()
        .is_none_or(|program| !Path::new(program).is_absolute())
    {
        section.complain(
            "command",
            "does not begin with an absolute path",
            "name the program by its full path",
        );
    }
    section.finish();
    Some(FencingConfig {
        command,
        limit: Duration::from_secs(limit_s),
    })
}

/// `[debug]`, for tests: `hold_at_switch` and `moments`.
pub(super) fn debug(root: &Section<'_, '_>) -> [Option<PathBuf>; 2] {
    let Some(section) = root.section("debug") else {
        return [None, None];
    };
    let dirs = ["hold_at_switch", "moments"].map(|key| section.optional(key));
    section.finish();
    dirs
}

/// What this host must have for the agent to start.
pub(super) fn host(root: &Section<'_, '_>, draft: &Draft) {
    let makes = [
        ("state_dir", &draft.state_dir),
        ("run_dir", &draft.run_dir),
        ("ram_dir", &draft.ram_dir),
    ];
    for (key, dir) in makes {
        if let Some(dir) = dir {
            writable_directory(root, key, dir);
        }
    }
    if let Some(parent) = draft.api_socket.as_deref().and_then(Path::parent) {
        writable_directory(root, "api_socket", parent);
    }
    for (key, name) in named_groups(draft) {
        if let Err(error) = HostGroup::find(name) {
            root.complain(key, "names no group", error.to_string());
        }
    }
    if let Some(policy) = &draft.policy
        && !policy.is_file()
    {
        root.complain(
            "policy",
            format!("{} is not a file", policy.display()),
            "configs/policy.toml is a commented example to copy there",
        );
    }
    if let Some(dir) = &draft.vm_definitions
        && !dir.is_dir()
    {
        root.complain(
            "vm_definitions",
            format!("{} is not a directory", dir.display()),
            format!("create it: mkdir -p {}", dir.display()),
        );
    }
    if let Some(secret) = &draft.secret_file
        && let Err(error) = ClusterSecret::load(secret)
    {
        root.complain("secret_file", "cannot be used", error.to_string());
    }
    if let (Some(TlsConfig::Files(files)), Some(name)) = (&draft.tls, &draft.name)
        && let Err(error) = Credentials::load(files, name)
        && let Some(section) = root.section("tls")
    {
        let key = match &error {
            PkiError::OtherAuthority { .. } => "ca",
            PkiError::OtherAgent { .. } | PkiError::Nameless { .. } => "cert",
            PkiError::Private(_) | PkiError::NotAKey { .. } | PkiError::Mismatch { .. } => "key",
            PkiError::Read { path, .. } | PkiError::NotACertificate { path, .. }
                if *path == files.ca =>
            {
                "ca"
            }
            _ => "cert",
        };
        section.complain(key, "cannot be used", error.to_string());
    }
    for (i, uplink) in draft.uplinks.iter().flatten().enumerate() {
        if !Path::new("/sys/class/net").join(uplink).exists() {
            root.complain_item(
                "uplinks",
                i,
                format!("this host has no interface {uplink}"),
                "see `ip -brief link` for the interfaces there are",
            );
        }
    }
    for (key, i, binary) in binaries(draft) {
        let executable = nix::unistd::access(binary, nix::unistd::AccessFlags::X_OK).is_ok();
        if !executable || !binary.is_file() {
            root.complain_item(
                key,
                i,
                format!("{} cannot be run", binary.display()),
                "install it (QEMU: qemu-system-x86), or correct the path",
            );
        }
    }
}

/// The agent makes missing directories itself; what must exist and be
/// writable is the nearest one above that does.
fn writable_directory(root: &Section<'_, '_>, key: &str, dir: &Path) {
    let Some(existing) = dir.ancestors().find(|d| d.exists()) else {
        return;
    };
    if !existing.is_dir() {
        root.complain(
            key,
            format!("{} is not a directory", existing.display()),
            "choose another path, or move that file away",
        );
    } else if nix::unistd::access(existing, nix::unistd::AccessFlags::W_OK).is_err() {
        root.complain(
            key,
            format!("{} is not writable", existing.display()),
            "run the agent as root, or make the directory writable for its user",
        );
    }
}
