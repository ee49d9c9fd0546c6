//! Peers played after the description of the protocol, not after this code:
//! what they send is put together by `samples`, what they take they read
//! themselves.

use super::error::Fault;
use super::fuzz::{Mark, fuzz_requests, read};
use super::layout::Layout;
use super::receive::{ReceiveError, Received, Receiver, receive};
use super::samples::{self, PAGE, RAM, command, page};
use super::send::{SendError, Sender};
use super::wire::{Command, MemoryRange};
use crate::types::Gfn;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use proptest::prelude::*;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

/// Longest wait of a test for a byte.
const LIMIT: Duration = Duration::from_secs(20);
/// Pages of a sample's VM.
const PAGES: usize = 24;

/// A VM as the target holds it.
#[derive(Debug, Default)]
struct Vm {
    ram: Vec<u8>,
    config: Vec<u8>,
    state: Vec<u8>,
    fds: Vec<(u32, OwnedFd)>,
    paused: Option<bool>,
}

/// A receiver that keeps what comes, and can be told to fail.
#[derive(Debug, Default)]
struct Keep {
    vm: Vm,
    fails_at_round: Option<u32>,
    rounds: u32,
}

impl Receiver for Keep {
    type Error = io::Error;

    fn memory_fd(&mut self, slot: u32, fd: OwnedFd) -> io::Result<()> {
        self.vm.fds.push((slot, fd));
        Ok(())
    }
    fn config(&mut self, json: &[u8], layout: &Layout) -> io::Result<()> {
        self.vm.config = json.to_vec();
        self.vm.ram = vec![0; layout.pages() as usize * PAGE];
        Ok(())
    }
    fn pages(&mut self, start: Gfn, data: &[u8]) -> io::Result<()> {
        self.vm.ram[start.offset()..][..data.len()].copy_from_slice(data);
        Ok(())
    }
    fn round_end(&mut self) -> io::Result<()> {
        self.rounds += 1;
        match self.fails_at_round == Some(self.rounds) {
            true => Err(io::Error::other("no memory left on that host")),
            false => Ok(()),
        }
    }
    fn state(&mut self, piece: &[u8]) -> io::Result<()> {
        self.vm.state.extend_from_slice(piece);
        Ok(())
    }
    fn state_end(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn complete(&mut self, paused: bool) -> io::Result<()> {
        self.vm.paused = Some(paused);
        Ok(())
    }
}

/// What a source does with its VM in the end.
#[derive(Debug, PartialEq, Eq)]
enum Source {
    Ended,
    RunsOn,
}

/// A source: sends its commands one after the other, each when the one before
/// was answered with Ok, as the description says.
fn play_source(mut stream: &UnixStream, commands: &[Vec<u8>]) -> Source {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    for bytes in commands {
        let mut answer = [0; 16];
        let asked = stream.write_all(bytes);
        let answered = asked.and_then(|()| stream.read_exact(&mut answer));
        if answered.is_err() || answer[..2] != [1, 0] {
            return Source::RunsOn;
        }
        assert_eq!(answer[2..], [0; 14]);
    }
    Source::Ended
}

/// A destination that takes commands of the sample's VM and answers with Ok,
/// but for the `refuses`th, and after the last of `until` commands hangs up.
fn play_target(mut stream: UnixStream, refuses: Option<usize>, until: usize) -> Vm {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut vm = Vm {
        ram: vec![0; PAGES * PAGE],
        ..Vm::default()
    };
    for n in 0..until {
        let mut head = [0; 16];
        if stream.read_exact(&mut head).is_err() {
            return vm;
        }
        let length = u64::from_le_bytes(head[8..].try_into().unwrap()) as usize;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).unwrap();
        match head[0] {
            1 => assert_eq!(head[2..4], [0, 0], "version"),
            2 => vm.config = payload,
            3 => vm.state = payload,
            4 => {
                for range in payload.chunks(16) {
                    let word = |at: usize| {
                        u64::from_le_bytes(range[at..at + 8].try_into().unwrap()) as usize
                    };
                    let (_, gpa, _) = RAM[usize::from(word(0) >= 1 << 32)];
                    let first = if gpa == 0 { 0 } else { 16 * PAGE };
                    let at = first + word(0) - gpa as usize;
                    stream.read_exact(&mut vm.ram[at..at + word(8)]).unwrap();
                }
            }
            5 => vm.paused = Some(false),
            8 => vm.paused = Some(true),
            other => panic!("command {other}"),
        }
        let status = if refuses == Some(n) { 2 } else { 1 };
        let mut answer = [0; 16];
        answer[0] = status;
        stream.write_all(&answer).unwrap();
    }
    vm
}

/// The commands of a live migration, one by one, and the RAM it ends with.
fn live() -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut ram = vec![0; PAGES * PAGE];
    for (gfn, fill) in [(0, 9), (1, 2), (16, 3), (23, 7)] {
        ram[gfn * PAGE..][..PAGE].fill(fill);
    }
    let first = samples::memory(
        &[(0, 2 * PAGE as u64), (1 << 32, PAGE as u64)],
        &[page(1), page(2), page(3)].concat(),
    );
    let last = samples::memory(
        &[
            (0, PAGE as u64),
            ((1 << 32) + 7 * PAGE as u64, PAGE as u64),
            (0, PAGE as u64),
        ],
        &[page(8), page(7), page(9)].concat(),
    );
    let commands = vec![
        samples::start(),
        samples::configured(),
        first,
        samples::memory(&[], &[]),
        last,
        samples::state(),
        samples::complete(),
    ];
    (commands, ram)
}

/// Plays `commands` to [`receive`].
fn received(
    commands: &[Vec<u8>],
    keep: &mut Keep,
) -> (Source, Result<Received, ReceiveError<io::Error>>) {
    let (near, far) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let source = scope.spawn(move || play_source(&far, commands));
        let received = receive("web1", &near, LIMIT, keep);
        drop(near);
        (source.join().unwrap(), received)
    })
}

#[test]
fn a_live_vm_arrives_whole_and_only_then_its_source_ends() {
    let (commands, ram) = live();
    let mut keep = Keep::default();
    let (source, received) = received(&commands, &mut keep);
    let received = received.unwrap();
    assert_eq!(source, Source::Ended);
    assert!(keep.vm.ram == ram, "RAM differs");
    assert_eq!(keep.vm.config, samples::config());
    assert_eq!(keep.vm.state, samples::STATE);
    assert_eq!(keep.vm.paused, Some(false));
    let wanted = Received {
        pages: 6,
        rounds: 3,
        state_bytes: samples::STATE.len() as u64,
        paused: false,
    };
    assert_eq!(received, wanted);
}

#[test]
fn a_paused_vm_stays_paused() {
    let commands = [
        samples::start(),
        samples::configured(),
        samples::state(),
        samples::complete_paused(),
    ];
    let mut keep = Keep::default();
    let (source, received) = received(&commands, &mut keep);
    assert!(received.unwrap().paused && source == Source::Ended);
    assert_eq!(keep.vm.paused, Some(true));
}

#[test]
fn a_receiver_that_fails_lets_the_source_run_on() {
    let (commands, _) = live();
    let mut keep = Keep {
        fails_at_round: Some(2),
        ..Keep::default()
    };
    let (source, received) = received(&commands, &mut keep);
    assert_eq!(source, Source::RunsOn);
    let error = received.unwrap_err();
    assert!(matches!(error, ReceiveError::Refused { .. }), "{error:?}");
    assert_eq!(keep.vm.paused, None);
}

#[test]
fn a_source_that_gives_up_or_goes_away_leaves_nothing_running_here() {
    let (mut commands, _) = live();
    commands.truncate(4);
    let mut keep = Keep::default();
    let (_, gone) = received(&commands, &mut keep);
    assert!(matches!(gone, Err(ReceiveError::Closed { .. })), "{gone:?}");
    commands.push(samples::abandon());
    let (_, given_up) = received(&commands, &mut keep);
    assert!(
        matches!(given_up, Err(ReceiveError::Abandoned { .. })),
        "{given_up:?}"
    );
    assert_eq!(keep.vm.paused, None);
}

#[test]
fn a_source_that_says_nothing_is_given_up_in_time() {
    let (near, mut far) = UnixStream::pair().unwrap();
    far.write_all(&samples::start()[..7]).unwrap();
    let idle = Duration::from_millis(50);
    let error = receive("web1", &near, idle, &mut Keep::default()).unwrap_err();
    assert!(
        matches!(&error, ReceiveError::Socket { source, .. } if source.kind() == io::ErrorKind::WouldBlock),
        "{error:?}"
    );
}

/// An anonymous file that holds `text`.
fn file(text: &[u8]) -> File {
    let fd = nix::sys::memfd::memfd_create(c"ram", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let mut file = File::from(fd.unwrap());
    file.write_all(text).unwrap();
    file
}

fn same_file(a: impl AsFd, b: impl AsFd) -> bool {
    let inode = |fd: std::os::fd::BorrowedFd<'_>| nix::sys::stat::fstat(fd).unwrap().st_ino;
    inode(a.as_fd()) == inode(b.as_fd())
}

#[test]
fn the_descriptors_of_a_local_vm_come_through_both_ends() {
    let rams = [file(b"slot 0"), file(b"slot 5")];
    let (near, far) = UnixStream::pair().unwrap();
    let mut keep = Keep::default();
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut sender = Sender::start("web1", far, LIMIT).unwrap();
            for ((slot, ..), ram) in RAM.iter().zip(&rams) {
                sender.memory_fd(*slot, ram.as_fd()).unwrap();
            }
            sender.config(&samples::config()).unwrap();
            sender.state(samples::STATE).unwrap();
            sender.complete(false).unwrap();
        });
        receive("web1", &near, LIMIT, &mut keep).unwrap();
        sending.join().unwrap();
    });
    assert_eq!(keep.vm.fds.len(), 2);
    for ((slot, fd), (ram, (wanted, ..))) in keep.vm.fds.iter().zip(rams.iter().zip(RAM)) {
        assert_eq!(*slot, wanted);
        assert!(same_file(fd, ram));
    }
}

#[test]
fn a_descriptor_that_belongs_to_nothing_is_refused() {
    let ram = file(b"?");
    let fd = ram.as_raw_fd();
    for (before, command, bytes, fds, wanted) in [
        (None, Command::Start, samples::start(), vec![fd], 0),
        (
            Some(samples::start()),
            Command::MemoryFd,
            samples::slot(0),
            vec![fd; 2],
            1,
        ),
        (
            Some(samples::start()),
            Command::MemoryFd,
            samples::slot(0),
            vec![],
            1,
        ),
    ] {
        let (near, far) = UnixStream::pair().unwrap();
        let found = fds.len();
        let source = thread::spawn(move || {
            let played = before.map(|bytes| play_source(&far, &[bytes]));
            let rights = [ControlMessage::ScmRights(&fds)];
            let rights = if fds.is_empty() { &[][..] } else { &rights };
            let io = [io::IoSlice::new(&bytes)];
            sendmsg::<()>(far.as_raw_fd(), &io, rights, MsgFlags::empty(), None).unwrap();
            (played, far)
        });
        let error = receive("web1", &near, LIMIT, &mut Keep::default()).unwrap_err();
        let fault = Fault::Descriptors {
            command,
            found,
            wanted,
        };
        assert!(
            matches!(&error, ReceiveError::Protocol { source, .. } if *source == fault),
            "{error:?}"
        );
        let (played, _far) = source.join().unwrap();
        assert_ne!(played, Some(Source::RunsOn));
    }
}

/// Sends the sample's VM.
fn send(stream: UnixStream, ram: &[u8]) -> Result<(), SendError> {
    let mut sender = Sender::start("web1", stream, LIMIT)?;
    sender.config(&samples::config())?;
    let (low, high) = ram.split_at(16 * PAGE);
    let ranges = RAM.map(|(_, gpa, bytes)| MemoryRange { gpa, bytes });
    sender.memory(&ranges, &mut low.chain(high))?;
    sender.state(samples::STATE)?;
    sender.complete(false)
}

#[test]
fn a_vm_is_given_to_its_target_whole() {
    let (_, ram) = live();
    let (near, far) = UnixStream::pair().unwrap();
    let target = thread::spawn(move || play_target(far, None, 5));
    send(near, &ram).unwrap();
    let vm = target.join().unwrap();
    assert!(vm.ram == ram, "RAM differs");
    assert_eq!(vm.config, samples::config());
    assert_eq!(vm.state, samples::STATE);
    assert_eq!(vm.paused, Some(false));
}

#[test]
fn a_target_that_refuses_or_dies_is_named_with_what_it_was_asked() {
    for n in 0..5 {
        let commands = [
            Command::Start,
            Command::Config,
            Command::Memory,
            Command::State,
            Command::Complete,
        ];
        let (near, far) = UnixStream::pair().unwrap();
        let target = thread::spawn(move || play_target(far, Some(n), n + 1));
        let error = send(near, &vec![0; PAGES * PAGE]).unwrap_err();
        assert!(
            matches!(error, SendError::Refused { command, .. } if command == commands[n]),
            "{error:?}"
        );
        target.join().unwrap();

        let (near, far) = UnixStream::pair().unwrap();
        let target = thread::spawn(move || play_target(far, None, n));
        let error = send(near, &vec![0; PAGES * PAGE]).unwrap_err();
        assert!(
            matches!(error, SendError::Socket { command, .. } if command == commands[n]),
            "{error:?}"
        );
        target.join().unwrap();
    }
}

#[test]
fn whole_migrations_are_read_to_their_ends() {
    for (name, bytes) in samples::migrations() {
        assert!(fuzz_requests(&bytes, 61), "{name}");
        // Whatever is missing at the end is noticed.
        for cut in 1..bytes.len() {
            assert!(
                !fuzz_requests(&bytes[..cut], bytes.len()),
                "{name} at {cut}"
            );
        }
    }
    let (_, live) = &samples::migrations()[0];
    let marks = read(live, live.len()).marks;
    assert_eq!(marks[0], Mark::Start);
    assert_eq!(marks[2], Mark::Table(3));
    assert_eq!(marks[5], Mark::Page(16, page(3)));
    assert_eq!(*marks.last().unwrap(), Mark::Complete(false));
}

/// After the beginning and the configuration.
fn then(bytes: Vec<u8>) -> Vec<u8> {
    [samples::start(), samples::configured(), bytes].concat()
}

fn fault_of(bytes: &[u8]) -> Fault {
    let fault = read(bytes, bytes.len().max(1)).failure;
    fault.unwrap_or_else(|| panic!("{} bytes were taken", bytes.len()))
}

#[test]
fn what_a_hostile_source_says_is_refused_for_what_it_is() {
    let near_all = u64::MAX - 15;
    let order = |bytes: &[u8]| matches!(fault_of(bytes), Fault::Order { .. });
    assert_eq!(
        fault_of(&command(1, 1, 0, &[])),
        Fault::Version { found: 1 }
    );
    assert_eq!(
        fault_of(&command(77, 0, 0, &[])),
        Fault::Command { number: 77 }
    );
    assert_eq!(fault_of(&command(9, 0, 16, &[0; 16])), Fault::Postcopy);
    for number in [2, 3, 4] {
        let bytes = match number {
            2 => [samples::start(), command(2, 0, near_all, &[])].concat(),
            _ => then(command(number, 0, near_all, &[])),
        };
        assert!(matches!(fault_of(&bytes), Fault::TooLong { .. }));
    }
    for bytes in [
        then(command(4, 0, 24, &[0; 24])),
        [samples::start(), command(7, 0, 8, &[0; 8])].concat(),
        [command(1, 0, 4, &[0; 4])].concat(),
        then([samples::state(), command(5, 0, 1, &[0])].concat()),
    ] {
        assert!(matches!(fault_of(&bytes), Fault::Length { .. }));
    }
    let page = PAGE as u64;
    for range in [
        (0, 0),
        (1, page),
        (0, page + 1),
        (15 * page, 2 * page),
        (16 * page, page),
        ((1 << 32) + 8 * page, page),
        (u64::MAX - page + 1, page),
        (u64::MAX - page + 1, 2 * page),
        (0, u64::MAX - page + 1),
    ] {
        let fault = fault_of(&then(samples::memory(&[range], &[])));
        assert!(matches!(fault, Fault::Range { .. }), "{range:?}: {fault}");
    }
    let slot = [samples::start(), samples::slot(3), samples::slot(3)].concat();
    assert_eq!(fault_of(&slot), Fault::SlotTwice { slot: 3 });
    for bytes in [
        samples::configured(),
        [samples::start(), samples::start()].concat(),
        [samples::start(), samples::memory(&[], &[])].concat(),
        then(samples::configured()),
        then(samples::slot(0)),
        then(samples::complete()),
        then([samples::state(), samples::state()].concat()),
        then([samples::state(), samples::memory(&[], &[])].concat()),
        then([samples::state(), samples::complete(), samples::complete()].concat()),
    ] {
        assert!(order(&bytes));
    }
}

#[test]
fn ram_that_no_vm_has_is_refused() {
    let with = |mappings: &str| {
        let json = format!(r#"{{"memory_manager_data":{{"guest_ram_mappings":[{mappings}]}}}}"#);
        Layout::of_config(json.as_bytes())
    };
    let one =
        |slot: u32, gpa: u64, size: u64| format!(r#"{{"slot":{slot},"gpa":{gpa},"size":{size}}}"#);
    for (mappings, wanted) in [
        (String::new(), "0 mappings"),
        (one(0, 0, 4095), "whole pages"),
        (one(0, 12, 4096), "whole pages"),
        (one(0, 0, 0), "whole pages"),
        (one(0, u64::MAX - 4095, 8192), "beyond all addresses"),
        (one(0, 0, 1 << 45), "16 TiB"),
        (
            [one(0, 0, 8192), one(1, 4096, 4096)].join(","),
            "lies over other RAM",
        ),
        (
            [one(0, 0, 4096), one(0, 4096, 4096)].join(","),
            "the slot of other RAM",
        ),
        (vec![one(0, 0, 4096); 1025].join(","), "1025 mappings"),
    ] {
        let error = with(&mappings).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    assert!(matches!(
        Layout::of_config(&b"[".repeat(100_000)),
        Err(Fault::Config { .. })
    ));
}

proptest! {
    #[test]
    fn any_bytes_are_read_alike_however_they_are_cut(
        which in 0..4_usize,
        at in any::<prop::sample::Index>(),
        flip in any::<u8>(),
        step in 1..5000_usize,
    ) {
        let (_, mut bytes) = samples::migrations().swap_remove(which);
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        fuzz_requests(&bytes, step);
    }
}
