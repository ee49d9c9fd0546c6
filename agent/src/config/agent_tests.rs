use super::*;

/// A file with nothing wrong in it.
const GOOD: &str = r#"
name = "a1"
rack = "A"
listen = "10.1.0.11:7400"
state_dir = "state"
run_dir = "/run/x/vms"
ram_dir = "/dev/shm/x"
secret_file = "secret"
uplinks = ["eth0"]
rack_prefixes = ["10.1.0.0/16"]
policy = "policy.toml"
vm_definitions = "vms"
qemu_binaries = ["/usr/bin/qemu-system-x86_64"]
data_memory = "64 MiB"

[log]
level = "info,drover::net=debug"
format = "json"

[[peer]]
name = "a1"
rack = "A"
address = "10.1.0.11:7400"

[[peer]]
name = "b1"
rack = "B"
address = "10.2.0.11:7400"
source_addresses = ["10.2.0.12"]

[placeholders]
images = "/srv/images"

[tls]
ca = "ca.pem"
cert = "/etc/tls/cert.pem"
key = "key.pem"
"#;

fn parse(text: &str) -> Result<AgentConfig, Problems> {
    AgentConfig::parse(Path::new("/etc/drover/agent.toml"), text, Checks::File)
}

#[test]
fn a_good_file_is_read_whole() {
    let config = parse(GOOD).unwrap();
    assert_eq!(config.state_dir, Path::new("/etc/drover/state"));
    assert_eq!(config.api_socket, Path::new("/run/drover/agent.sock"));
    assert_eq!(config.api_group, None);
    assert_eq!(config.data_memory, 64 << 20);
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.placeholders["images"], "/srv/images");
    assert_eq!(config.peers.len(), 1, "its own entry is left out");
    assert_eq!(config.peers[0].name, "b1");
    assert_eq!(config.rack_peers().count(), 0);
    let files = TlsFiles {
        ca: "/etc/drover/ca.pem".into(),
        cert: "/etc/tls/cert.pem".into(),
        key: "/etc/drover/key.pem".into(),
    };
    assert_eq!(config.tls, TlsConfig::Files(files));
}

#[test]
fn the_example_in_configs_is_right() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/agent.toml");
    AgentConfig::load(&file, Checks::File).unwrap();
}

/// One edit of [`GOOD`] a row: what to replace by what, then the line, key,
/// part of the message and part of the remedy that must come out.
#[test]
fn every_mistake_names_its_line_key_and_remedy() {
    #[rustfmt::skip]
    let table = [
        ("name = \"a1\"\nrack = \"A\"\nlisten", "rack = \"A\"\nlisten", 1, "name", "missing", "what plans call"),
        ("name = \"a1\"\nrack = \"A\"\nlisten", "name = \"a/1\"\nrack = \"A\"\nlisten", 2, "name", "`a/1` is not a name", "letters"),
        ("listen = \"10.1.0.11:7400\"", "listen = \"10.1.0.11\"", 4, "listen", "not an IP address with a port", "10.1.0.11:7400"),
        ("listen = \"10.1.0.11:7400\"", "listen = \"10.1.0.11:0\"", 4, "listen", "port 0", "7400"),
        ("listen = \"10.1.0.11:7400\"", "listen = 7400", 4, "listen", "is a whole number", "quotes"),
        ("listen = ", "lisen = ", 4, "lisen", "unknown key", "did you mean `listen`?"),
        ("ram_dir = \"/dev/shm/x\"", "ram_dir = \"state\"", 7, "ram_dir", "same directory as state_dir", "own"),
        ("uplinks = [\"eth0\"]", "uplinks = [\"eth0\", \"eth0\"]", 9, "uplinks[2]", "twice", "remove"),
        ("uplinks = [\"eth0\"]", "uplinks = [\"a/b\"]", 9, "uplinks[1]", "cannot name an interface", "ip -brief"),
        ("uplinks = [\"eth0\"]", "uplinks = [3]", 9, "uplinks[1]", "is a whole number", "quotes"),
        ("[\"10.1.0.0/16\"]", "[]", 10, "rack_prefixes", "is empty", "networks of this rack"),
        ("10.1.0.0/16", "10.1.0.0/40", 10, "rack_prefixes[1]", "at most 32 bits", "10.1.0.0/16"),
        ("10.1.0.0/16", "10.1.0.7/16", 10, "rack_prefixes[1]", "the network is 10.1.0.0/16", "network"),
        ("[\"10.1.0.0/16\"]", "[\"10.1.0.0/16\", \"10.1.0.0/16\"]", 10, "rack_prefixes[2]", "twice", "remove"),
        ("data_memory", "vmm_binaries = [\"kvmm\"]\ndata_memory", 14, "vmm_binaries[1]", "not an absolute path", "/usr/bin"),
        ("\"/usr/bin/qemu", "\"bin/qemu", 13, "qemu_binaries[1]", "not an absolute path", "/usr/bin"),
        ("64 MiB", "64 KiB", 14, "data_memory", "between", "256 MiB"),
        ("64 MiB", "much", 14, "data_memory", "not a size", "256 MiB"),
        ("info,drover", "lots,,=", 17, "log.level", "no log filter", "error, warn"),
        ("\"json\"", "\"jsn\"", 18, "log.format", "no log format", "did you mean `json`?"),
        ("[log]", "[log]\ncolour = true", 17, "log.colour", "unknown key", "known keys here: format, level"),
        ("rack = \"A\"\naddress", "rack = \"B\"\naddress", 22, "peer[1].rack", "this agent (a1) is in `A`", "same"),
        ("address = \"10.1.0.11:7400\"", "address = \"10.1.0.11:7401\"", 23, "peer[1].address", "another port", "same"),
        ("name = \"b1\"", "name = \"a1\"", 26, "peer[2].name", "twice", "remove"),
        ("name = \"b1\"\n", "", 25, "peer[2].name", "missing", "peer agent's name"),
        ("10.2.0.11:7400", "10.1.0.12:7400", 28, "peer[2].address", "inside rack_prefixes", "correct"),
        ("10.2.0.11:7400", "10.1.0.11:7400", 28, "peer[2].address", "address of a1 already", "own"),
        ("10.2.0.11:7400", "0.0.0.0:7400", 28, "peer[2].address", "cannot be connected to", "own IP"),
        ("[\"10.2.0.12\"]", "[\"b1\"]", 29, "peer[2].source_addresses[1]", "not an IP address", "10.1.0.11"),
        ("images = ", "Images = ", 32, "placeholders.Images", "cannot be a placeholder", "lower-case"),
        ("images = \"/srv/images\"", "images = 3", 32, "placeholders.images", "is a whole number", "quotes"),
        ("[tls]", "[tls_]", 1, "tls", "is missing", "drover pki init"),
        ("[tls]", "[tls]\nplaintext = true", 36, "tls.ca", "so is plaintext", "remove plaintext"),
        ("key = \"key.pem\"", "", 34, "tls.key", "missing", "drover pki issue"),
        ("key = \"key.pem\"", "keys = \"key.pem\"", 37, "tls.keys", "unknown key", "did you mean `key`?"),
        ("key = \"key.pem\"", "plaintext = \"no\"", 37, "tls.plaintext", "is a string", "write true"),
        ("[placeholders]", "[placeholders", 31, "", "not valid TOML", "toml.io"),
    ];
    for (from, to, line, key, message, remedy) in table {
        assert!(GOOD.contains(from), "{from}");
        let error = parse(&GOOD.replacen(from, to, 1)).expect_err(to);
        let found = error.problems.iter().any(|p| {
            (p.line, p.key.as_str()) == (line, key)
                && p.message.contains(message)
                && p.remedy.contains(remedy)
        });
        assert!(found, "{from} -> {to}: wanted {line} {key}, got:\n{error}");
    }
}

#[test]
fn nobody_is_without_tls_by_leaving_something_out() {
    let (with, _) = GOOD.split_once("[tls]").unwrap();
    assert!(parse(with).is_err());
    assert!(parse(&format!("{with}[tls]\n")).is_err());
    assert!(parse(&format!("{with}[tls]\nplaintext = false\n")).is_err());
    let config = parse(&format!("{with}[tls]\nplaintext = true\n")).unwrap();
    assert_eq!(config.tls, TlsConfig::Plaintext);
}

#[test]
fn all_mistakes_come_at_once() {
    let error = parse("lisen = 3\nuplinks = 4\n[[peer]]\nname = 5\n").unwrap_err();
    let text = error.to_string();
    for key in [
        "name",
        "rack",
        "listen",
        "lisen",
        "state_dir",
        "uplinks",
        "policy",
        "peer[1].name",
        "peer[1].address",
    ] {
        assert!(text.contains(&format!(": {key}: ")), "{key}:\n{text}");
    }
}

#[test]
fn the_host_is_checked_too() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    std::fs::write(dir.path().join("state"), "in the way").unwrap();
    let text = GOOD
        .replace("/run/x/vms", "vms-run")
        .replace("/dev/shm/x", "ram")
        .replace("\"eth0\"", "\"no-such-if0\"")
        .replace("/usr/bin/qemu-system-x86_64", "/no/such/qemu")
        .replace(
            "rack = \"A\"\nlisten",
            "rack = \"A\"\napi_socket = \"s\"\nlisten",
        );
    std::fs::write(&file, &text).unwrap();
    let error = AgentConfig::load(&file, Checks::Host).unwrap_err();
    let keys: Vec<&str> = error.problems.iter().map(|p| p.key.as_str()).collect();
    let expected = [
        "state_dir",
        "secret_file",
        "uplinks[1]",
        "policy",
        "vm_definitions",
        "qemu_binaries[1]",
        "tls.ca",
    ];
    assert_eq!(keys, expected, "{error}");

    std::fs::remove_file(dir.path().join("state")).unwrap();
    std::fs::create_dir(dir.path().join("vms")).unwrap();
    std::fs::write(dir.path().join("policy.toml"), "").unwrap();
    ClusterSecretFile::make(&dir.path().join("secret"));
    let text = text
        .replace("no-such-if0", "lo")
        .replace("/no/such/qemu", "/bin/sh")
        .replace("/etc/tls/", "");
    let pki = dir.path().join("pki");
    crate::pki::init(&pki, "test").unwrap();
    ClusterSecretFile::make(&pki.join("secret"));
    let bundle = |name| crate::pki::issue(&pki, name, 1).unwrap();
    let install = |bundle: &Path| {
        for file in ["ca.pem", "cert.pem", "key.pem"] {
            std::fs::copy(bundle.join(file), dir.path().join(file)).unwrap();
        }
    };
    install(&bundle("b1"));
    let error = AgentConfig::parse(&file, &text, Checks::Host).unwrap_err();
    assert_eq!(error.problems[0].key, "tls.cert");
    assert!(error.to_string().contains("this is agent a1"), "{error}");
    install(&bundle("a1"));
    let exposed = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(dir.path().join("key.pem"), exposed).unwrap();
    let error = AgentConfig::parse(&file, &text, Checks::Host).unwrap_err();
    assert_eq!(error.problems[0].key, "tls.key");
    assert!(error.to_string().contains("chmod 0600"), "{error}");
    install(&bundle("b2"));
    install(&pki.join("agents/a1"));
    AgentConfig::parse(&file, &text, Checks::Host).unwrap();
}

struct ClusterSecretFile;

impl ClusterSecretFile {
    fn make(path: &Path) {
        crate::config::ClusterSecret::create(path).unwrap();
    }
}

proptest::proptest! {
    #[test]
    fn reading_never_panics(text in ".{0,200}") {
        let _ = parse(&text);
    }

    #[test]
    fn a_damaged_file_never_panics(at in 0..GOOD.len(), byte in 0u8..128) {
        let mut bytes = GOOD.as_bytes().to_vec();
        bytes[at] = byte;
        let _ = parse(std::str::from_utf8(&bytes).unwrap());
    }
}

#[test]
fn groups_of_the_api_are_named_and_differ() {
    let with = |lines: &str| parse(&format!("{lines}{GOOD}"));
    let config = with("api_group = \"ops\"\napi_readonly_group = \"look\"\n").unwrap();
    assert_eq!(config.api_group.as_deref(), Some("ops"));
    assert_eq!(config.api_readonly_group.as_deref(), Some("look"));
    let complaint = |lines: &str| with(lines).unwrap_err().to_string();
    let same = complaint("api_group = \"ops\"\napi_readonly_group = \"ops\"\n");
    assert!(same.contains("is the same group as api_group"), "{same}");
    let odd = complaint("api_group = \"a b\"\n");
    assert!(odd.contains("cannot name a group"), "{odd}");
}
