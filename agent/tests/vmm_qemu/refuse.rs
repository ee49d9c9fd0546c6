//! What direct mode cannot move is refused before it is touched, in words that
//! say what to change; what failed leaves nothing behind.

use crate::harness::*;
use drover::vmm::definition::Definition;
use drover::vmm::direct::{DirectError, SourceVm, TargetVm};
use drover::vmm::launch::{LaunchError, Launched, Role};
use drover::vmm::preflight::{PreflightError, QemuFacts};
use drover::vmm::ram::RamError;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

async fn refusal(definition: &Definition, words: &[&str]) -> PreflightError {
    let host = Host::new();
    // Not `host.start`: without a shared file the test cannot see it tick.
    let launched = host.launch(definition, Role::Run).await.unwrap();
    let error = SourceVm::open(launched.vmm().clone()).await.unwrap_err();
    let text = full(&error);
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
    assert!(text.contains("VM vm"), "{text}");
    let DirectError::Preflight(error) = error else {
        panic!("{text}")
    };
    error
}

#[test]
fn ram_that_is_no_shared_named_file() {
    run(async {
        let with = |backend| define("vm", "64M", Accel::Tcg, backend, &["-name", "{ram}"]);
        let off = "memory-backend-file,id=ram,size={ram_size},mem-path={ram},share=off";
        let error = refusal(&with(off), &["share=off", "add share=on"]).await;
        assert!(matches!(error, PreflightError::NotShared { .. }));
        let memfd = "memory-backend-memfd,id=ram,size={ram_size},share=on";
        let error = refusal(
            &with(memfd),
            &["memory-backend-memfd", "memory-backend-file"],
        )
        .await;
        assert!(matches!(error, PreflightError::BackendType { .. }));
        let private = "memory-backend-ram,id=ram,size={ram_size}";
        let error = refusal(&with(private), &["memory-backend-ram", "share=on"]).await;
        assert!(matches!(error, PreflightError::BackendType { .. }));
        let dir = "memory-backend-file,id=ram,size={ram_size},mem-path=/dev/shm,share=on";
        let error = refusal(&with(dir), &["/dev/shm", "a file in it"]).await;
        assert!(matches!(error, PreflightError::Unnamed { .. }));
    });
}

#[test]
fn more_than_one_backend() {
    run(async {
        let numa = define(
            "vm",
            "64M",
            Accel::Tcg,
            RAM,
            &["-object", "memory-backend-ram,id=more,size=1M"],
        );
        let error = refusal(&numa, &["2 memory backends", "ram", "more"]).await;
        assert!(matches!(error, PreflightError::Backends { count: 2, .. }));
    });
}

/// As much of a vhost-user back end as QEMU needs to start.
fn vhost_user_back_end(socket: &Path) -> std::thread::JoinHandle<()> {
    let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _): (UnixStream, _) = listener.accept().unwrap();
        let mut head = [0; 12];
        const GET_FEATURES: u32 = 1;
        while stream.read_exact(&mut head).is_ok() {
            let word = |i: usize| u32::from_le_bytes(head[i * 4..][..4].try_into().unwrap());
            let mut body = vec![0; word(2) as usize];
            stream.read_exact(&mut body).unwrap();
            if word(0) == GET_FEATURES {
                let mut reply = [GET_FEATURES, 0x5, 8].map(u32::to_le_bytes).concat();
                reply.extend(0u64.to_le_bytes());
                stream.write_all(&reply).unwrap();
            }
        }
    })
}

#[test]
fn a_device_in_another_process() {
    run(async {
        let host = Host::new();
        let socket = host.dir.join("vhost.sock");
        let back_end = vhost_user_back_end(&socket);
        let chardev = format!("socket,id=c,path={}", socket.display());
        let more = [
            "-chardev",
            &chardev,
            "-netdev",
            "vhost-user,id=n,chardev=c",
            "-device",
            "virtio-net-pci,netdev=n",
        ];
        let error = refusal(
            &define("vm", "64M", Accel::Tcg, RAM, &more),
            &["vhost-user", "past the dirty log"],
        )
        .await;
        assert!(matches!(error, PreflightError::Device { .. }));
        back_end.join().unwrap();
    });
}

#[test]
fn ram_that_another_process_can_write() {
    run(async {
        let host = Host::new();
        let vm = host.start(&tcg("vm")).await;
        // A second VMM on the first one's RAM: what an operator's mistake looks like.
        let other = format!(
            "memory-backend-file,id=ram,size={{ram_size}},mem-path={},share=on",
            vm.paths.ram.display()
        );
        let more = ["-name", "{ram}", "-S"];
        let text = define("other", "64M", Accel::Tcg, &other, &more[..2]).text;
        let other = Definition::parse("other", &text).unwrap();
        let second = Launched::start(
            &other,
            &host.paths("other"),
            &host.placeholders(),
            Role::Incoming,
        )
        .await
        .unwrap();
        let error = SourceVm::open(vm.launched.vmm().clone()).await.unwrap_err();
        let pid = second.vmm().process.pid();
        assert!(
            matches!(error, DirectError::Preflight(PreflightError::SharedWith { pid: p, .. }) if p == pid),
            "{}",
            full(&error)
        );
        drop(second);
        SourceVm::open(vm.launched.vmm().clone()).await.unwrap();
    });
}

#[test]
fn a_capability_that_does_not_go_together() {
    run(async {
        let host = Host::new();
        let vm = host.start(&tcg("vm")).await;
        let qmp = vm.launched.vmm().qmp().unwrap();
        qmp.set_migration_capabilities(&[("postcopy-ram", true)])
            .await
            .unwrap();
        let error = full(&SourceVm::open(vm.launched.vmm().clone()).await.unwrap_err());
        assert!(error.contains("postcopy-ram"), "{error}");
    });
}

async fn target(host: &Host, definition: &Definition, facts: &QemuFacts) -> DirectError {
    TargetVm::prepare(definition, &host.paths("vm"), &host.placeholders(), facts)
        .await
        .unwrap_err()
}

/// QEMU takes a target without `share=on` and then has no RAM: we look.
#[test]
fn targets_that_do_not_fit_are_refused_and_gone() {
    run(async {
        let a = Host::new();
        let b = Host::new();
        let vm = a.start(&tcg("vm")).await;
        let source = SourceVm::open(vm.launched.vmm().clone()).await.unwrap();
        let facts = source.facts();
        let off = "memory-backend-file,id=ram,size={ram_size},mem-path={ram},share=off";
        let error = target(&b, &define("vm", "64M", Accel::Tcg, off, &[]), facts).await;
        assert!(
            matches!(
                error,
                DirectError::Preflight(PreflightError::NotShared { .. })
            ),
            "{}",
            full(&error)
        );
        b.assert_empty();

        let error = target(&b, &define("vm", "32M", Accel::Tcg, RAM, &[]), facts).await;
        assert!(full(&error).contains("RAM size"), "{}", full(&error));

        let pc = define(
            "vm",
            "64M",
            Accel::Tcg,
            RAM,
            &["-machine", "pc-i440fx-7.2,memory-backend=ram"],
        );
        let error = full(&target(&b, &pc, facts).await);
        assert!(
            error.contains("pc-q35-7.2") && error.contains("pc-i440fx-7.2"),
            "{error}"
        );
        b.assert_empty();

        let newer = QemuFacts {
            version: drover::vmm::qmp::Version {
                major: 99,
                ..facts.version
            },
            ..facts.clone()
        };
        let error = full(&target(&b, &tcg("vm"), &newer).await);
        assert!(
            error.contains("QEMU version") && error.contains("99"),
            "{error}"
        );
        b.assert_empty();
        vm.guest.wait_ticking();
    });
}

/// QEMU's own words come with the error, and nothing stays.
#[test]
fn a_vmm_that_does_not_start() {
    run(async {
        let host = Host::new();
        let bad = define("vm", "64M", Accel::Tcg, RAM, &["-device", "no-such-device"]);
        let error = host.launch(&bad, Role::Run).await.unwrap_err();
        assert!(matches!(error, LaunchError::NotStarted { .. }));
        assert!(
            full(&error).contains("'no-such-device' is not a valid device"),
            "{}",
            full(&error)
        );
        host.assert_empty();
        let unknown = define("vm", "64M", Accel::Tcg, RAM, &["-drive", "file={disks}/a"]);
        let error = host.launch(&unknown, Role::Run).await.unwrap_err();
        assert!(full(&error).contains("{disks}"));
        host.assert_empty();
        let caged = define("vm", "64M", Accel::Tcg, RAM, &["-sandbox", "on,spawn=deny"]);
        let error = host.launch(&caged, Role::Run).await.unwrap_err();
        assert!(
            full(&error).contains("leave out spawn=deny"),
            "{}",
            full(&error)
        );
        host.assert_empty();
        // A start that is given up halfway leaves nothing either.
        for ms in [0, 5, 20, 60] {
            let placeholders = host.placeholders();
            let definition = tcg("vm");
            let paths = host.paths("vm");
            let start = Launched::start(&definition, &paths, &placeholders, Role::Run);
            let _ = tokio::time::timeout(std::time::Duration::from_millis(ms), start).await;
            wait("something stays", || {
                !paths.ram.exists() && !paths.dir.exists()
            });
        }
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        host.assert_empty();
        // The same name twice: the first goes on.
        let vm = host.start(&tcg("vm")).await;
        let again = host.launch(&tcg("vm"), Role::Run).await;
        assert!(matches!(again.unwrap_err(), LaunchError::Exists { .. }));
        vm.guest.wait_ticking();
    });
}

#[test]
fn a_target_without_room() {
    run(async {
        let host = Host::new();
        let _small = Mounted::new("tmpfs", "size=16m", &host.ram_dir);
        let error = host.launch(&tcg("vm"), Role::Incoming).await.unwrap_err();
        let text = full(&error);
        assert!(
            matches!(
                error,
                LaunchError::Ram {
                    source: RamError::NoSpace { .. },
                    ..
                }
            ),
            "{text}"
        );
        assert!(
            text.contains("16 MiB free") && text.contains("needs 64 MiB"),
            "{text}"
        );
        host.assert_empty();
    });
}
