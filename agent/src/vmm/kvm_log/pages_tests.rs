//! What becomes of a log that has lost writes, by a VMM that does as it is told.

use super::*;
use drover_vmm::Connection;
use drover_vmm::wire::{Answer, LogKind, Phase, Refusal, RegionInfo, Request, Status};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

const PAGE: usize = 4096;
const PAGES: u64 = 64;

/// What it does about one request; `None` ends the connection instead.
type Play = fn(&Request<'_>, asked: usize) -> Option<Vec<Answer<'static>>>;

/// A VMM with RAM in a file.
struct Scripted {
    dir: tempfile::TempDir,
    ram: File,
    served: JoinHandle<Vec<String>>,
}

impl Scripted {
    /// Serves so many connections; each `Welcome` has that connection's `pages`.
    fn start(play: Play, pages: &'static [u64]) -> Scripted {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let ram = tempfile::tempfile_in("/dev/shm").unwrap();
        ram.set_len(PAGES * PAGE as u64).unwrap();
        let listener = UnixListener::bind(dir.path().join("link")).unwrap();
        let theirs = ram.try_clone().unwrap();
        let served = std::thread::spawn(move || {
            let mut asked = Vec::new();
            for pages in pages {
                let (stream, _) = listener.accept().unwrap();
                let agent = Connection::new(stream).unwrap();
                serve(agent, &theirs, *pages, play, &mut asked);
            }
            asked
        });
        Scripted { dir, ram, served }
    }

    fn source(&self) -> KvmLogSource {
        let link = LinkClient::connect("vm", &self.dir.path().join("link")).unwrap();
        KvmLogSource::start(Arc::new(link)).unwrap()
    }

    fn write(&self, page: u64) {
        self.ram.write_all_at(b"x", page * PAGE as u64).unwrap();
    }
}

fn serve(mut agent: Connection, ram: &File, pages: u64, play: Play, asked: &mut Vec<String>) {
    while let Ok((kind, body)) = agent.receive() {
        let request = Request::decode(kind, body).unwrap();
        if request == Request::Hello {
            let welcome = Answer::Welcome {
                log: LogKind::Ring,
                status: Status {
                    phase: Phase::Live,
                    running: true,
                    logging: false,
                },
                fds: 1,
                regions: vec![RegionInfo {
                    gpa: 0,
                    len: pages * PAGE as u64,
                    offset: 0,
                    fd: 0,
                }],
            };
            let sent = agent.send_with(&[ram.as_fd()], |out| welcome.encode(out));
            sent.unwrap();
            continue;
        }
        asked.push(format!("{request:?}"));
        let Some(answers) = play(&request, asked.len()) else {
            return;
        };
        for answer in answers {
            agent.send(|out| answer.encode(out)).unwrap();
        }
    }
}

fn round(of: &mut KvmLogSource, first: bool) -> Result<Vec<Range<u32>>, KvmLogSourceError> {
    let mut runs = Vec::new();
    let mut note = |run: Range<Gfn>| runs.push(run.start.0..run.end.0);
    match first {
        true => of.first_round(&mut note)?,
        false => of.next_round(&mut note)?,
    };
    Ok(runs)
}

fn refused() -> Vec<Answer<'static>> {
    vec![Answer::Refused {
        why: Refusal::Log,
        text: "a dirty ring has overflowed".to_owned(),
    }]
}

/// The first round asked for is refused, those after it are empty.
fn overflows_once(request: &Request<'_>, asked: usize) -> Option<Vec<Answer<'static>>> {
    Some(match request {
        Request::Round if asked == 2 => refused(),
        Request::Round => vec![Answer::RoundEnd(0)],
        _ => vec![Answer::Done],
    })
}

#[test]
fn after_lost_writes_the_log_begins_anew_with_all_of_ram() {
    let vmm = Scripted::start(overflows_once, &[PAGES]);
    for page in [3, 10, 11] {
        vmm.write(page);
    }
    let mut source = vmm.source();
    assert_eq!(round(&mut source, true).unwrap(), [3..4, 10..12]);
    vmm.write(20);
    // Nobody has said that it was page 20, and a page is left out only as a hole.
    assert_eq!(round(&mut source, false).unwrap(), [3..4, 10..12, 20..21]);
    assert_eq!(round(&mut source, false).unwrap(), []);
    assert!(source.recheck().unwrap().is_empty());
    drop(source);
    let asked = vmm.served.join().unwrap();
    // It is on before RAM is looked at.
    assert_eq!(asked, ["StartLog", "Round", "StartLog", "Round", "StopLog"]);
}

/// The connection ends instead of an answer to a round, and takes the log along.
fn breaks_once(request: &Request<'_>, asked: usize) -> Option<Vec<Answer<'static>>> {
    match request {
        Request::Round if asked == 2 => None,
        Request::Round if asked == 3 => Some(refused()),
        _ => Some(vec![Answer::Done]),
    }
}

#[test]
fn after_a_connection_that_broke_the_log_is_not_taken_for_on() {
    let vmm = Scripted::start(breaks_once, &[PAGES, PAGES]);
    let mut source = vmm.source();
    let broke = round(&mut source, false).unwrap_err();
    assert!(
        matches!(
            broke,
            KvmLogSourceError::Link(LinkClientError::Connection { .. })
        ),
        "{broke}"
    );
    vmm.write(5);
    assert_eq!(
        round(&mut source, false).unwrap(),
        std::slice::from_ref(&(5..6))
    );
    drop(source);
    vmm.served.join().unwrap();
}

#[test]
fn another_vmm_at_the_same_socket_is_not_the_vm() {
    let vmm = Scripted::start(breaks_once, &[PAGES, PAGES / 2, PAGES / 2]);
    let mut source = vmm.source();
    round(&mut source, false).unwrap_err();
    let error = round(&mut source, false).unwrap_err();
    assert!(
        matches!(
            error,
            KvmLogSourceError::Link(LinkClientError::Replaced { .. })
        ),
        "{error}"
    );
    drop(source);
    vmm.served.join().unwrap();
}
