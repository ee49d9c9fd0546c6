use super::*;
use proptest::prelude::*;

const GOOD: &str = r#"
name = "web-1"
domain = "tenant-a"
ram = "262136K"

[qemu]
binary = "/usr/bin/qemu-system-x86_64"
args = [
  "-object", "memory-backend-file,id=ram,size={ram_size},mem-path={ram},share=on",
  "-blockdev", '{"driver":"file","filename":"{disks}/a.img"}',
  "-serial", "file:{serial}",
]
"#;

fn error(text: &str) -> (usize, String) {
    match Definition::parse("web-1.toml", text).unwrap_err() {
        e @ DefinitionError::Invalid { line, .. } => (line, e.to_string()),
        other => panic!("{other}"),
    }
}

#[test]
fn a_definition_is_read_and_expanded_for_a_host() {
    let vm = Definition::parse("web-1.toml", GOOD).unwrap();
    assert_eq!((vm.ram_bytes, vm.kind), (262136 << 10, Kind::Auto));
    assert_eq!(
        vm.host_placeholders().into_iter().collect::<Vec<_>>(),
        ["disks"]
    );
    let paths = VmPaths::new(Path::new("/run/drover"), Path::new("/dev/shm"), &vm.name);
    let mut host = BTreeMap::from([("disks".to_owned(), "/srv/d".to_owned())]);
    host.insert("ram".to_owned(), "/evil".to_owned());
    let args = vm.expand(&paths, &host, Role::Run).unwrap();
    let ram = "memory-backend-file,id=ram,size=262136K,mem-path=/dev/shm/web-1.ram,share=on";
    assert_eq!(args[1], ram);
    assert_eq!(args[3], r#"{"driver":"file","filename":"/srv/d/a.img"}"#);
    assert_eq!(args[5], "file:/run/drover/web-1/serial.log");
    let e = vm.expand(&paths, &BTreeMap::new(), Role::Run);
    let e = e.unwrap_err().to_string();
    assert!(
        e.contains("{disks}") && e.contains("[placeholders]") && e.contains("web-1"),
        "{e}"
    );
}

#[test]
fn a_vm_with_ram_of_its_own_needs_no_file() {
    let file =
        "\"-object\", \"memory-backend-file,id=ram,size={ram_size},mem-path={ram},share=on\",";
    let private = GOOD.replace(file, "\"-m\", \"{ram_size}\",");
    for kind in ["auto", "qemu-stream"] {
        let text = private.replace("ram =", &format!("kind = {kind:?}\nram ="));
        let vm = Definition::parse("web-1.toml", &text).unwrap();
        assert!(!vm.has_ram_file());
        assert_eq!(vm.kind.to_string(), kind);
    }
    assert!(
        Definition::parse("web-1.toml", GOOD)
            .unwrap()
            .has_ram_file()
    );
}

const LINKED: &str = r#"
name = "k1"
domain = "tenant-a"
ram = "64M"

[vmm]
binary = "/usr/bin/my-vmm"
args = ["--agent", "{link}", "--ram", "{ram}", "--disk", "{disks}/k1.img"]
incoming_args = ["--wait", "--log={dir}/{logs}"]
"#;

#[test]
fn another_vmm_waits_with_arguments_of_its_own() {
    let vm = Definition::parse("k1.toml", LINKED).unwrap();
    assert_eq!((vm.family, vm.kind), (Family::Linked, Kind::Auto));
    assert!(vm.has_ram_file());
    let needed: Vec<_> = vm.host_placeholders().into_iter().collect();
    assert_eq!(needed, ["disks", "logs"]);
    let paths = VmPaths::new(Path::new("/run/drover"), Path::new("/dev/shm"), &vm.name);
    let host = BTreeMap::from(["disks", "logs"].map(|name| (name.to_owned(), name.to_owned())));
    let run = vm.expand(&paths, &host, Role::Run).unwrap();
    assert_eq!(run[1], "/run/drover/k1/link.sock");
    assert_eq!(run.last().unwrap(), "disks/k1.img");
    let incoming = vm.expand(&paths, &host, Role::Incoming).unwrap();
    assert_eq!(incoming[..run.len()], run);
    assert_eq!(
        incoming[run.len()..],
        ["--wait", "--log=/run/drover/k1/logs"]
    );
}

#[test]
fn mistakes_in_the_table_of_another_vmm_are_named() {
    for (from, to, line, words) in [
        ("/usr/bin/m", "m", 7, "absolute"),
        ("{link}", "/run/k1.sock", 7, "{link}"),
        ("--wait", "a\\u0000", 9, "zero byte"),
        ("ram = ", "kind = \"qemu-direct\"\nram = ", 8, "[qemu]"),
        ("[vmm]", "[vm]", 6, "vm"),
        (
            "[vmm]",
            "[qemu]\nbinary = \"/q\"\nargs = []\n[vmm]",
            10,
            "leave out one",
        ),
    ] {
        let text = LINKED.replacen(from, to, 1);
        let e = Definition::parse("k1.toml", &text).unwrap_err().to_string();
        let at = format!("k1.toml:{line}:");
        assert!(e.starts_with(&at) && e.contains(words), "{e}");
    }
    let bare = LINKED.split("[vmm]").next().unwrap();
    assert!(error(bare).1.contains("neither [qemu] nor [vmm]"));
    let qemu = GOOD.replace("ram =", "kind = \"kvm-log\"\nram =");
    assert!(error(&qemu).1.contains("[vmm]"));
}

#[test]
fn mistakes_are_named_with_their_line_and_a_remedy() {
    for (from, to, line, words) in [
        ("domain =", "domian =", 3, "domian"),
        ("web-1", "Web 1", 2, "a-z"),
        ("web-1", "../x", 2, "a-z"),
        ("web-1", ".x", 2, "must not start"),
        ("262136K", "262136", 4, "262136K"),
        ("262136K", "262137K", 4, "multiple of 4096"),
        ("262136K", "0M", 4, "more than 0"),
        ("/usr/bin/q", "q", 7, "absolute"),
        ("{ram}", "/x", 7, "{ram}"),
        (
            "ram = \"262136K\"\n\n[qemu]\nbinary = \"/usr/bin/qemu-system-x86_64\"\nargs = [\n  \"-object\", \"memory-backend-file,id=ram,size={ram_size},mem-path={ram},share=on\",",
            "kind = \"qemu-direct\"\nram = \"262136K\"\n\n[qemu]\nbinary = \"/usr/bin/qemu-system-x86_64\"\nargs = [",
            8,
            "{ram}",
        ),
        ("\"-serial\"", "\"-incoming\"", 11, "the agent decides"),
        ("\"-serial\"", "\"--S\"", 11, "the agent decides"),
        ("ram = ", "kind = \"vhs\"\nram = ", 4, "qemu-direct"),
    ] {
        let text = GOOD.replacen(from, to, 1);
        let (at, message) = error(&text);
        assert_eq!(at, line, "{message}");
        assert!(
            message.starts_with("web-1.toml:") && message.contains(words),
            "{message}"
        );
    }
    assert!(error(&" ".repeat(MAX_TEXT + 1)).1.contains("longer"));
}

#[test]
fn sizes() {
    assert_eq!(parse_size("4G"), Ok(4 << 30));
    assert_eq!(parse_size("4GiB"), Ok(4 << 30));
    for bad in [
        "",
        "K",
        "1",
        "-1K",
        "1.5G",
        "1k",
        "99999999999T",
        "+1K",
        "1 K",
        "4GiBiB",
    ] {
        assert!(parse_size(bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn never_panics(text in "\\PC{0,200}") {
        let _ = Definition::parse("x", &text);
        let _ = parse_size(&text);
        let _ = placeholders(&text).count();
        let _ = program::check_arg(&text);
    }

    #[test]
    fn sizes_roundtrip(n in 0u64..1 << 24, unit in 0usize..4) {
        let text = format!("{n}{}", ["K", "M", "G", "T"][unit]);
        prop_assert_eq!(parse_size(&text), Ok(n << (10 * (unit as u32 + 1))));
    }

    /// Whatever an argument holds, only valid placeholders in it change.
    #[test]
    fn text_around_placeholders_stays(a in "[^{}]{0,10}", b in "[^{}]{0,10}") {
        let vm = Definition { args: vec![format!("{a}{{name}}{b}")], ..Definition::parse("x", GOOD).unwrap() };
        let paths = VmPaths::new(Path::new("/r"), Path::new("/m"), "n");
        prop_assert_eq!(&vm.expand(&paths, &BTreeMap::new(), Role::Run).unwrap()[0], &format!("{a}web-1{b}"));
    }
}
