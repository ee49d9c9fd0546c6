//! The link of a real VM under KVM. Needs `/dev/kvm` and so, usually, root.
#![allow(unsafe_code)]

mod common;

use common::{PAGES, RAM, Vm, state};
use drover_vmm::Role;
use drover_vmm::wire::{Answer, LogKind, Phase, Request};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

/// For each kind of log; the ring is too small for what the guest writes.
fn for_each_log(test: impl Fn(&Vm)) {
    for ring in [None, Some(256)] {
        let vm = Vm::new(ring, Role::Run);
        test(&vm);
        assert!(
            vm.agent().log
                == if ring.is_some() {
                    LogKind::Ring
                } else {
                    LogKind::ManualBitmap
                }
        );
    }
}

#[test]
fn rounds_report_each_write_of_guest_and_devices_once() {
    for_each_log(|vm| {
        let mut agent = vm.agent();
        vm.write([7]);
        vm.marks.wrote(9 << 12, 1);
        agent.done(&Request::StartLog);
        assert_eq!(agent.round(), set([]), "what was before the log");
        vm.write([200, 63, 64, 200]);
        vm.marks.wrote((100 << 12) + 4095, 2);
        assert_eq!(agent.round(), set([63, 64, 100, 101, 200]));
        assert_eq!(agent.round(), set([]));
        // More than the ring holds, and the same again.
        for _ in 0..2 {
            vm.write(1..PAGES - 2);
            assert_eq!(agent.round(), set(1..PAGES - 2));
        }
        vm.write([5]);
        agent.done(&Request::StartLog);
        assert_eq!(
            agent.round(),
            set([]),
            "a log that is started anew begins anew"
        );
        agent.done(&Request::StopLog);
        assert!(agent.refused(&Request::Round).contains("start it"));
    });
}

#[test]
fn the_agent_reads_the_memory_that_the_guest_writes() {
    let vm = Vm::new(None, Role::Run);
    let mut agent = vm.agent();
    assert_eq!(agent.regions.len(), 1);
    assert_eq!(agent.regions[0].len, RAM as u64);
    let ram = File::from(agent.fds.pop().unwrap());
    vm.write([80, 80, 80]);
    let mut byte = [0];
    ram.read_exact_at(&mut byte, 80 << 12).unwrap();
    assert_eq!(byte, [3]);
}

#[test]
fn an_agent_that_goes_away_takes_the_log_with_it_and_nothing_else() {
    for_each_log(|vm| {
        let mut agent = vm.agent();
        agent.done(&Request::StartLog);
        vm.write([3]);
        drop(agent);
        let mut next = vm.agent();
        assert!(next.status.running && !next.status.logging);
        vm.write(1..PAGES - 2);
        next.ask(&Request::Pause, |a| assert_eq!(a, Answer::Paused(true)));
        drop(next);
        assert!(!vm.agent().status.running, "a paused VM may run elsewhere");
    });
}

#[test]
fn what_is_no_request_ends_the_connection_only() {
    use std::io::{Read, Write};
    let vm = Vm::new(None, Role::Run);
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 64],
        &[0, 0, 0, 0, 2, 0, 0, 0], // a request before Hello
    ] {
        let mut stranger = UnixStream::connect(&vm.socket).unwrap();
        stranger.write_all(bytes).unwrap();
        let mut said = Vec::new();
        // Closed, or reset because we said more than was read.
        let _reset = stranger.read_to_end(&mut said);
        assert!(said.is_empty());
    }
    let mut agent = vm.agent();
    agent
        .connection
        .send(|out| Request::Chunk(b"out of order").encode(out))
        .unwrap();
    assert!(agent.connection.receive().is_err());
    assert!(vm.agent().status.running);
}

#[test]
fn state_travels_whole_and_phases_are_kept() {
    let source = Vm::new(None, Role::Run);
    let mut agent = source.agent();
    assert!(
        agent
            .refused(&Request::SaveState)
            .contains("pause it first")
    );
    agent.ask(&Request::Pause, |a| assert_eq!(a, Answer::Paused(true)));
    // Twice: a move that fails is tried again.
    for _ in 0..2 {
        let mut got = Vec::new();
        agent
            .connection
            .send(|out| Request::SaveState.encode(out))
            .unwrap();
        while agent.hear(|answer| match answer {
            Answer::Chunk(bytes) => {
                got.extend_from_slice(bytes);
                true
            }
            end => {
                assert_eq!(end, Answer::ChunksEnd(state().len() as u64));
                false
            }
        }) {}
        assert_eq!(got, state());
    }
    let target = Vm::new(None, Role::Incoming);
    let mut there = target.agent();
    assert_eq!(there.status.phase, Phase::Waiting);
    for request in [
        Request::Resume,
        Request::Pause,
        Request::StartLog,
        Request::SaveState,
    ] {
        there.refused(&request);
    }
    load(&mut there, &state());
    there.hear(|answer| assert_eq!(answer, Answer::Done));
    assert_eq!(target.told.lock().unwrap().loaded, state());
    assert!(
        !target.told.lock().unwrap().running,
        "not before it is told"
    );
    there.done(&Request::Resume);
    there.ask(&Request::Status, |answer| match answer {
        Answer::Status(s) => assert!(s.running && s.phase == Phase::Live),
        other => panic!("{other:?}"),
    });
    agent.done(&Request::End);
    source.server.unwrap().wait();
    assert!(source.told.lock().unwrap().ended);
}

fn load(agent: &mut common::Agent, state: &[u8]) {
    agent
        .connection
        .send(|out| {
            Request::LoadState.encode(out);
            for chunk in state.chunks(drover_vmm::wire::MAX_CHUNK) {
                Request::Chunk(chunk).encode(out);
            }
            Request::ChunksEnd(state.len() as u64).encode(out);
        })
        .unwrap();
}

#[test]
fn a_vm_whose_state_did_not_load_never_runs() {
    let vm = Vm::new(None, Role::Incoming);
    vm.told.lock().unwrap().fail_load = true;
    let mut agent = vm.agent();
    load(&mut agent, &state());
    agent.hear(|answer| match answer {
        Answer::Refused { text, .. } => assert!(text.contains("cheese"), "{text}"),
        other => panic!("{other:?}"),
    });
    vm.told.lock().unwrap().fail_load = false;
    load(&mut agent, &state());
    agent.hear(|answer| assert!(matches!(answer, Answer::Refused { .. })));
    assert!(agent.refused(&Request::Resume).contains("half-way"));
    agent.done(&Request::End);
}

#[test]
fn a_vm_that_arrived_and_stays_paused_can_leave_again() {
    let vm = Vm::new(None, Role::Incoming);
    let mut agent = vm.agent();
    load(&mut agent, &state());
    agent.hear(|answer| assert_eq!(answer, Answer::Done));
    agent.done(&Request::StartLog);
    agent.ask(&Request::Pause, |a| assert_eq!(a, Answer::Paused(false)));
    let saved = agent.ask(&Request::SaveState, |answer| {
        matches!(answer, Answer::Chunk(_))
    });
    assert!(saved);
    drop(agent);
    // Whoever comes next finds it as it was.
    let status = vm.agent().status;
    assert!(status.phase == Phase::Arrived && !status.running);
}

#[test]
fn a_vm_whose_agent_died_while_its_state_was_loaded_never_runs() {
    let vm = Vm::new(None, Role::Incoming);
    let mut agent = vm.agent();
    let begun = agent.connection.send(|out| {
        Request::LoadState.encode(out);
        Request::Chunk(&state()[..100]).encode(out);
    });
    begun.unwrap();
    drop(agent);
    let mut next = vm.agent();
    assert!(next.refused(&Request::Resume).contains("half-way"));
    load(&mut next, &state());
    next.hear(|answer| assert!(matches!(answer, Answer::Refused { .. })));
    next.done(&Request::End);
}

#[test]
fn a_server_that_is_dropped_ends_whatever_it_waits_for() {
    let mut idle = Vm::new(None, Role::Run);
    drop(idle.server.take());
    assert!(!idle.socket.exists());
    let mut busy = Vm::new(None, Role::Run);
    let mut agent = busy.agent();
    agent.done(&Request::StartLog);
    drop(busy.server.take());
    assert!(agent.connection.receive().is_err());
}
