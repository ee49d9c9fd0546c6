//! A source and a target, played.

use super::*;
use crate::vmm::cloud_hypervisor::wire::MemoryRange;
use crate::vmm::source::PageRead;
use crate::vmm::stream::{Reading, StreamPages};
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use tokio::sync::mpsc::unbounded_channel;

const LIMIT: Duration = Duration::from_secs(10);
const PAGES: u32 = 16;

fn config(mappings: &[(u64, u64)]) -> Vec<u8> {
    let mappings: Vec<_> = (0..)
        .zip(mappings)
        .map(|(slot, (gpa, size))| {
            serde_json::json!({ "slot": slot, "gpa": gpa, "size": size, "zone_id": "mem0" })
        })
        .collect();
    let json = serde_json::json!({ "memory_manager_data": { "guest_ram_mappings": mappings } });
    json.to_string().into_bytes()
}

fn command(command: Command, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Request::new(command, payload.len() as u64)
        .encode()
        .to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

fn memory(ranges: &[(u32, u32)]) -> Vec<u8> {
    let page = PAGE_SIZE as u64;
    let table: Vec<u8> = ranges
        .iter()
        .flat_map(|(first, count)| {
            let gpa = u64::from(*first) * page;
            let bytes = u64::from(*count) * page;
            MemoryRange { gpa, bytes }.encode()
        })
        .collect();
    let mut bytes = command(Command::Memory, &table);
    let pages: u32 = ranges.iter().map(|(_, count)| count).sum();
    bytes.resize(bytes.len() + pages as usize * PAGE_SIZE, 0x5a);
    bytes
}

/// Sends commands, each when the one before was answered with Ok; how many were.
fn play(mut to: UnixStream, commands: Vec<Vec<u8>>) -> thread::JoinHandle<usize> {
    to.set_read_timeout(Some(LIMIT)).unwrap();
    thread::spawn(move || {
        let answered = commands.iter().take_while(|bytes| {
            let mut answer = [0; HEAD_BYTES];
            let asked = to.write_all(bytes);
            asked.and_then(|()| to.read_exact(&mut answer)).is_ok()
                && Response::parse(&answer).is_ok_and(|answer| answer == Response::Ok)
        });
        answered.count()
    })
}

fn one() -> Vec<u8> {
    config(&[(0, u64::from(PAGES) * PAGE_SIZE as u64)])
}

#[test]
fn what_cannot_be_carried_is_refused_with_what_to_leave_out() {
    let start = Request::start().encode().to_vec();
    let later = {
        let mut bytes = start.clone();
        bytes[2] = 7;
        bytes
    };
    for (commands, why) in [
        (
            vec![start.clone(), command(Command::MemoryFd, &[0; 4])],
            "descriptor",
        ),
        (
            vec![
                start.clone(),
                command(
                    Command::Config,
                    &config(&[(0, 3 << 30), (4 << 30, 1 << 30)]),
                ),
            ],
            "2 mappings",
        ),
        (vec![later], "version"),
        (
            vec![start.clone(), command(Command::Abandon, &[])],
            "given up",
        ),
        (vec![start], "closed"),
    ] {
        let (source, agent) = UnixStream::pair().unwrap();
        let playing = play(source, commands);
        let error = begin("c1", &agent, &[], LIMIT).unwrap_err();
        let told = crate::types::chain(&error);
        assert!(told.contains(why) && told.contains("c1"), "{told}");
        drop(agent);
        playing.join().unwrap();
    }
}

struct NoRam;

impl PageRead for NoRam {
    fn pages(&self) -> u32 {
        PAGES
    }
    fn read_run(&self, _: Gfn, _: &mut [u8]) -> io::Result<()> {
        Ok(())
    }
    fn data_runs(&self) -> io::Result<Vec<Range<Gfn>>> {
        Ok(Vec::new())
    }
    fn place(&self) -> String {
        "nowhere".to_owned()
    }
}

/// Tables say which pages to send, their contents are not looked at; the state
/// goes to the target byte for byte, with what follows it, and only it says
/// that the guest stands still.
#[test]
fn rounds_become_reports_and_the_state_is_left_as_it_is() {
    let (source, agent) = UnixStream::pair().unwrap();
    let state = command(Command::State, br#"{"vcpus":[]}"#);
    let playing = play(
        source,
        vec![
            Request::start().encode().to_vec(),
            command(Command::Config, &one()),
            memory(&[(0, PAGES)]),
            memory(&[(3, 2), (9, 1)]),
            state.clone(),
        ],
    );
    let begun = begin("c1", &agent, &[], LIMIT).unwrap();
    assert_eq!(begun.ram_bytes, u64::from(PAGES) * PAGE_SIZE as u64);
    assert_eq!(begun.config, one());
    let feed = Arc::new(Feed::new("c1", PAGES));
    let mut pages = StreamPages::new(feed.clone(), Arc::new(NoRam), false);
    let (to, mut chunks) = unbounded_channel();
    let held = Arc::default();
    let residue = Residue { to, held };
    let (reading, of) = (agent.try_clone().unwrap(), feed.clone());
    let reader = thread::spawn(move || read(&reading, begun, &of, &residue));
    let taken = loop {
        let taken = pages.take(LIMIT, 4096).unwrap();
        pages.staged();
        if taken.progress.complete {
            break taken;
        }
    };
    assert!(taken.progress.still && taken.progress.passes == 1);
    assert_eq!(
        chunks.blocking_recv(),
        Some(Chunk::Bytes(state)),
        "the state is to go on as it came"
    );
    // Nobody answers the state: it is the target's to do so.
    agent.shutdown(std::net::Shutdown::Both).unwrap();
    feed.fail("the test is over");
    assert_eq!(playing.join().unwrap(), 4);
    let _broken_off = reader.join().unwrap();
}

#[test]
fn a_source_that_ends_in_between_has_given_up() {
    let (mut source, agent) = UnixStream::pair().unwrap();
    source.write_all(&Request::start().encode()).unwrap();
    source.write_all(&command(Command::Config, &one())).unwrap();
    let begun = begin("c1", &agent, &[], LIMIT).unwrap();
    let whole = memory(&[(0, 4)]);
    source.write_all(&whole[..whole.len() / 2]).unwrap();
    source.shutdown(std::net::Shutdown::Write).unwrap();
    let (to, mut chunks) = unbounded_channel();
    let held = Arc::default();
    let why = read(
        &agent,
        begun,
        &Feed::new("c1", PAGES),
        &Residue { to, held },
    );
    assert!(why.unwrap_err().contains("closed"));
    assert_eq!(chunks.blocking_recv(), None);
}

/// Plays the last exchange with a target that answers so, or goes away instead:
/// how it ends, and what the source has heard then.
async fn last_exchange(answer: Option<Response>) -> (Result<(), ManagedError>, Vec<u8>) {
    let (mut source, agent) = UnixStream::pair().unwrap();
    let residue = agent.try_clone().unwrap();
    let feed = Arc::new(Feed::new("c1", PAGES));
    let mut reading = Reading::by("c1", residue, feed, |_, residue| {
        let complete = Request::new(Command::Complete, 0).encode();
        residue.send(complete.to_vec(), "it").unwrap();
        Ok(())
    })
    .unwrap();
    let (mut target, agents) = tokio::io::duplex(4096);
    let loaded = Loaded {
        residue: reading.take_residue().unwrap(),
        target: Box::new(agents),
    };
    let there = tokio::spawn(async move {
        let mut asked = [0; HEAD_BYTES];
        target.read_exact(&mut asked).await.unwrap();
        assert_eq!(Request::parse(&asked).unwrap().command, Command::Complete);
        if let Some(answer) = answer {
            target.write_all(&answer.encode()).await.unwrap();
        }
    });
    let ended = loaded.complete("c1", &agent).await;
    there.await.unwrap();
    source.set_nonblocking(true).unwrap();
    let mut heard = vec![0; 64];
    let n = source.read(&mut heard).unwrap();
    heard.truncate(n);
    (ended, heard)
}

/// The source is told that its VM is gone only by the target; of one that
/// does not say nothing may be told.
#[tokio::test]
async fn a_target_that_does_not_confirm_leaves_the_source_waiting() {
    let [ok, no] = [Response::Ok, Response::Error].map(Response::encode);
    let (ended, heard) = last_exchange(Some(Response::Ok)).await;
    assert!(ended.is_ok() && heard == [ok, ok].concat());
    let (ended, heard) = last_exchange(Some(Response::Error)).await;
    assert!(matches!(ended, Err(ManagedError::NotLoaded { .. })));
    assert_eq!(heard, [ok, no].concat());
    let (ended, heard) = last_exchange(None).await;
    assert!(matches!(ended, Err(ManagedError::Unconfirmed { .. })));
    assert_eq!(heard, ok);
}

#[test]
fn answers_are_heard_one_by_one_and_nothing_else_is_taken_for_one() {
    let mut answers = Answers::default();
    let ok = Response::Ok.encode();
    assert_eq!(answers.hear(&ok[..5]).unwrap(), None);
    assert_eq!(answers.hear(&ok[5..]).unwrap(), Some(Response::Ok));
    let no = Response::Error.encode();
    assert_eq!(answers.hear(&no).unwrap(), Some(Response::Error));
    assert!(answers.hear(&[7; HEAD_BYTES]).is_err());
}
