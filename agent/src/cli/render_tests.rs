use super::*;

fn vm(name: &str, phase: VmPhase) -> VmProgress {
    VmProgress {
        name: name.to_owned(),
        from: "a1".to_owned(),
        to: "b1".to_owned(),
        phase,
        round: 3,
        dirty_pages_per_s: 976,
        left_bytes: 88 << 20,
        total_bytes: 256 << 20,
        sent_bytes: 40 << 20,
        eta_ms: Some(4_200),
        downtime_ms: None,
        error: None,
    }
}

fn core(source: LoadSource) -> CoreLoad {
    CoreLoad {
        tenant_mbit: 210.4,
        migration_mbit: 148.0,
        capacity_mbit: Some(400.0),
        source,
    }
}

fn progress() -> GangProgress {
    GangProgress {
        gang: "web".to_owned(),
        id: "00000000000000ab".to_owned(),
        phase: GangPhase::Moving,
        elapsed_ms: 12_345,
        vms: vec![vm("web1", VmPhase::Precopy), vm("web2", VmPhase::Waiting)],
        core: core(LoadSource::Meter),
        lost: Vec::new(),
    }
}

fn fits(text: &str) {
    for line in text.lines() {
        assert!(line.chars().count() <= WIDTH, "{line}");
        assert_eq!(line.trim_end(), line, "trailing spaces");
    }
}

#[test]
fn progress_lines() {
    let mut arrived = vm("web2", VmPhase::Arrived);
    arrived.downtime_ms = Some(87.4);
    let mut failed = vm("a-rather-long-vm-name", VmPhase::Failed);
    failed.error = Some("b1 has too little memory:\nneeded 2.0 GiB, free 1.2 GiB".to_owned());
    let lines = [
        progress_head(),
        vm_line(&vm("web1", VmPhase::Precopy)),
        vm_line(&arrived),
        vm_line(&failed),
        vm_line(&vm("web3", VmPhase::Preparing)),
        core_line(&core(LoadSource::Meter)),
        core_line(&core(LoadSource::Lanes)),
        gang_line(&progress()),
    ];
    #[rustfmt::skip]
    let expected = [
        "VM             phase     rnd               done      left     dirty/s      ETA",
        "web1           precopy     3 [#######....]  66%  88.0 MiB     3.8 MiB    4.2 s",
        "web2           arrived   on b1 after 3 rounds, stopped 87 ms",
        "a-rather-long… failed    runs on at a1: b1 has too little memory: needed 2.0 Gi…",
        "web3           preparing a1 → b1",
        "core link      tenant 210, migration 148 Mbit/s, capacity 400 Mbit/s",
        "core link      tenant not metered, migration 148 Mbit/s, capacity 400 Mbit/s",
        "12.3 s web: 1 precopy, 1 waiting; left 176.0 MiB; core 358 Mbit/s",
    ];
    assert_eq!(lines, expected);
    lines.iter().for_each(|line| fits(line));
}

#[test]
fn extremes_fit() {
    let mut vm = vm(&"x".repeat(63), VmPhase::Precopy);
    vm.dirty_pages_per_s = u64::MAX / 4096;
    vm.left_bytes = 0;
    vm.total_bytes = 0;
    vm.round = 999;
    vm.eta_ms = Some(359_999_000);
    fits(&vm_line(&vm));
    vm.left_bytes = u64::MAX;
    vm.eta_ms = None;
    fits(&vm_line(&vm));
}

#[test]
fn a_report() {
    let vm = |name: &str, outcome, error: Option<&str>| VmReport {
        name: name.to_owned(),
        from: "a1".to_owned(),
        to: "b1".to_owned(),
        kind: "qemu-direct".to_owned(),
        not: Vec::new(),
        outcome,
        downtime_ms: 87.4,
        journal_ms: 0.0,
        stop: (outcome == VmOutcome::Arrived).then_some(StopTimes {
            pause_ms: 1.24,
            last_pages_ms: 30.0,
            seal_ms: 2.5,
            device_ms: 50.0,
            commit_ms: 0.66,
            resume_ms: 3.0,
        }),
        rounds: 4,
        pages: PageCounts {
            sent: 10,
            reference: 5,
            zero: 3,
            unchanged: 1,
            ..PageCounts::default()
        },
        verified: error.is_none(),
        error: error.map(str::to_owned),
    };
    let gang = GangReport {
        gang: "web".to_owned(),
        id: "00".to_owned(),
        outcome: Outcome::Partial,
        total_ms: 4_321,
        core_bytes: 170_000_000,
        vms: vec![
            vm("web1", VmOutcome::Arrived, None),
            vm("web2", VmOutcome::Failed, Some("lost agent b2")),
        ],
        error: None,
        warnings: vec!["connections are NOT encrypted".to_owned()],
        lost: vec![LostAgent {
            agent: "b2".to_owned(),
            at_ms: 2_100,
            silent_ms: 1_800,
            why: "it said nothing".to_owned(),
            found_again: false,
        }],
    };
    let text = report(&gang);
    fits(&text);
    assert_eq!(
        text,
        "VM    from → to  outcome  stopped  rounds  verified\n\
         web1  a1 → b1    arrived    87 ms       4  yes\n\
         web2  a1 → b1    failed     87 ms       4  no\n\
         \n\
         web: 1 of 2 VMs arrived in 4.3 s; 162.1 MiB crossed the core link\n\
         pages: 20 sent, 10 by reference, 6 zero, 2 unchanged\n\
         stop, ms  pause  last pages  digests  device state  commit  resume\n\
         web1        1.2        30.0      2.5          50.0     0.7     3.0\n\
         agent b2 is lost: noticed at 2.1 s after 1.8 s of silence (it said nothing)\n\
         web2: lost agent b2\n\
         WARNING        connections are NOT encrypted\n"
    );
}

#[test]
fn tables_of_vms() {
    assert!(vm_table(&[]).contains("drover vm run"));
    let kind = |kind: &str, why_not: Option<&str>| KindInfo {
        kind: kind.to_owned(),
        why_not: why_not.map(str::to_owned),
    };
    let vm = VmInfo {
        name: "web1".to_owned(),
        kind: "qemu-direct".to_owned(),
        kinds: vec![kind("qemu-direct", None), kind("qemu-stream", None)],
        status: "running".to_owned(),
        ram_bytes: 2 << 30,
        pages_scanned: 524_288,
        dirty_bytes_per_s: Some(4_000_000),
        pid: 1234,
        qmp: "/run/drover/vms/web1/qmp.sock".into(),
        domain: "tenant-a".to_owned(),
    };
    let fresh = VmInfo {
        name: "web2".to_owned(),
        kind: "qemu-stream".to_owned(),
        kinds: vec![
            kind("qemu-stream", None),
            kind("qemu-direct", Some("guest RAM is private")),
        ],
        dirty_bytes_per_s: None,
        pages_scanned: 0,
        ..vm.clone()
    };
    let refused = VmInfo {
        name: "g1".to_owned(),
        kind: "none".to_owned(),
        kinds: vec![kind("qemu-managed", Some("leave out --parallel"))],
        status: "refused".to_owned(),
        ..fresh.clone()
    };
    let text = vm_table(&[vm, fresh, refused]);
    fits(&text);
    assert_eq!(
        text,
        "VM    kind         status       RAM  scanned  dirty/s   pid\n\
         web1  qemu-direct  running  2.0 GiB  2.0 GiB  3.8 MiB  1234\n\
         web2  qemu-stream  running  2.0 GiB      0 B        -  1234\n\
         g1    none         refused  2.0 GiB      0 B        -  1234\n\
         web1: moved as qemu-direct; qemu-stream is possible too\n\
         web2: moved as qemu-stream; not qemu-direct: guest RAM is private\n\
         g1: cannot be moved; not qemu-managed: leave out --parallel"
    );
}

#[test]
fn the_status() {
    let peer = |name: &str, state: &str| PeerStatus {
        name: name.to_owned(),
        rack: "B".to_owned(),
        address: "10.2.0.11:7400".to_owned(),
        state: state.to_owned(),
    };
    let text = status(&StatusInfo {
        agent: "a1".to_owned(),
        rack: "A".to_owned(),
        version: "0.1.0".to_owned(),
        uptime_s: 3_725,
        vms: 2,
        peers: vec![
            peer("b1", "connected"),
            peer("b2", "connection refused; is the agent running there?"),
        ],
        metered_uplinks: vec!["eth0".to_owned()],
        tls: TlsStatus {
            encrypted: true,
            fingerprint: Some("5a".repeat(32)),
            expires_s: Some(1_800_000_000),
        },
        warnings: vec!["cert.pem expires soon".to_owned()],
        core: core(LoadSource::Meter),
        lanes: LaneCounters {
            sent_bytes: 5 << 30,
            zero_copied: 1000,
            copied: 24,
            reopened: 1,
        },
        migrations: vec![progress()],
        handovers: vec![HandoverInfo {
            vm: "web3".to_owned(),
            gang: "00000000000000ab".to_owned(),
            side: "source".to_owned(),
            peer: "b1".to_owned(),
            state: "committed".to_owned(),
            why: "found by a restarted agent".to_owned(),
            settled: false,
            in_doubt: Some("b1 cannot be asked".to_owned()),
            remedies: vec!["if it runs on b1: drover gang resolve …".to_owned()],
            age_ms: 5,
        }],
    });
    fits(&text);
    assert_eq!(
        text,
        "agent a1 in rack A, drover 0.1.0, up 1 h 2 min, 2 VMs\n\
         WARNING        cert.pem expires soon\n\
         core link      tenant 210, migration 148 Mbit/s, capacity 400 Mbit/s\n\
         uplinks        metered: eth0\n\
         connections    TLS 1.3, certificate 5a5a5a5a5a5a5a5a until 2027-01-15 08:00 UTC\n\
         lanes          5.0 GiB sent, 1000 sends zero-copied, 24 copied, 1 reopened\n\
         \n\
         peer  rack  address         state\n\
         b1    B     10.2.0.11:7400  connected\n\
         b2    B     10.2.0.11:7400  connection refused; is the …\n\
         \n\
         handover of web3 to b1 (gang 00000000000000ab): committed\n    \
         found by a restarted agent\n    \
         IN DOUBT: b1 cannot be asked\n    \
         if it runs on b1: drover gang resolve …\n\
         \n\
         12.3 s web: 1 precopy, 1 waiting; left 176.0 MiB; core 358 Mbit/s\n\
         run 00000000000000ab\n\
         VM             phase     rnd               done      left     dirty/s      ETA\n\
         web1           precopy     3 [#######....]  66%  88.0 MiB     3.8 MiB    4.2 s\n\
         web2           waiting   a1 → b1\n"
    );
}

#[test]
fn a_dry_run() {
    let check = |vm: Option<&str>, ok| Check {
        vm: vm.map(str::to_owned),
        what: "memory on b1".to_owned(),
        ok,
        detail: "2.0 GiB needed, 1.2 GiB free; free some in ram_dir".to_owned(),
    };
    let started = MigrationStarted {
        gang: "web".to_owned(),
        id: None,
        checks: vec![check(None, true), check(Some("web1"), false)],
    };
    assert_eq!(
        checks(&started),
        "ok    web: memory on b1: 2.0 GiB needed, 1.2 GiB free; free some in ram_dir\n\
         FAIL  web1: memory on b1: 2.0 GiB needed, 1.2 GiB free; free some in ram_dir\n\
         web: 1 check failed\n"
    );
}

#[test]
fn units() {
    let sizes = [0, 1023, 1024, 1_023_900, 1_048_000, 1 << 40, u64::MAX];
    let shown = sizes.map(bytes);
    assert_eq!(
        shown,
        [
            "0 B",
            "1023 B",
            "1.0 KiB",
            "999.9 KiB",
            "1.0 MiB",
            "1.0 TiB",
            "16384.0 PiB"
        ]
    );
    let times = [0, 999, 12_345, 245_000, 7_380_000].map(duration);
    assert_eq!(
        times,
        ["0 ms", "999 ms", "12.3 s", "4 min 5 s", "2 h 3 min"]
    );
    assert_eq!(fit("ab\ncd", 4), "ab …");
}
