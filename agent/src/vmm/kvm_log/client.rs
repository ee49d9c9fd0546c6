//! Asks a linked VMM. All calls block; one request is under way at a time,
//! whoever asks.

use super::error::LinkClientError;
use super::rounds::RoundReader;
use crate::types::{Gfn, PAGE_SIZE};
use crate::vmm::dirty::ScanStats;
use crate::vmm::qmp::RunState;
use crate::vmm::ram::GuestRam;
use drover_vmm::wire::{Answer, LogKind, MAX_CHUNK, Phase, RegionInfo, Request, Status};
use drover_vmm::{Connection, ConnectionError};
use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a VMM may take for one message: pausing drains its devices.
const LIMIT: Duration = Duration::from_secs(30);

/// A connection to a VMM that embeds `drover-vmm`. When it is dropped the VMM
/// switches the log off; a guest that runs runs on, one that stands stays so.
#[derive(Debug)]
pub struct LinkClient {
    vm: String,
    socket: PathBuf,
    log: LogKind,
    regions: Vec<RegionInfo>,
    file: File,
    path: PathBuf,
    len: u64,
    pid: i32,
    connection: Mutex<Connection>,
}

type Asked<T> = Result<T, LinkClientError>;

impl LinkClient {
    /// Connects to the VMM of `vm` at its socket, and gets its RAM.
    ///
    /// # Errors
    /// Nobody answers there, or its RAM is not one file without gaps.
    pub fn connect(vm: &str, socket: &Path) -> Asked<LinkClient> {
        let stream = UnixStream::connect(socket).map_err(|source| LinkClientError::Connect {
            vm: vm.to_owned(),
            socket: socket.to_owned(),
            source,
        })?;
        let doing = "greeting";
        let broke = |source| LinkClientError::Connection {
            vm: vm.to_owned(),
            doing,
            source,
        };
        let mut connection = Connection::new(stream).map_err(broke)?;
        let greeting = (|| {
            let pid = connection.peer_pid()?;
            connection.set_limit(LIMIT)?;
            connection.send(|out| Request::Hello.encode(out))?;
            Ok::<_, std::io::Error>(pid)
        })();
        let pid = greeting.map_err(|e| broke(e.into()))?;
        let (kind, body, mut fds) = connection.receive_with_fds().map_err(broke)?;
        let answer = Answer::decode(kind, body).map_err(|e| broke(e.into()))?;
        let Answer::Welcome {
            log,
            regions,
            fds: announced,
            ..
        } = answer
        else {
            return Err(wrong(vm, doing, &answer));
        };
        let layout = |what: String| LinkClientError::Layout {
            vm: vm.to_owned(),
            what,
        };
        if announced != 1 || fds.len() != 1 {
            return Err(layout(format!("{announced} files ({} came)", fds.len())));
        }
        let file = File::from(fds.remove(0));
        let len = covered(&regions).map_err(layout)?;
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = std::fs::read_link(&link).unwrap_or_else(|_| link.into());
        Ok(LinkClient {
            vm: vm.to_owned(),
            socket: socket.to_owned(),
            log,
            regions,
            file,
            path,
            len,
            pid,
            connection: Mutex::new(connection),
        })
    }

    /// The VM's name.
    pub fn vm(&self) -> &str {
        &self.vm
    }

    /// The VMM's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The VMM's process, as it was when it began to listen.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// How the VMM logs writes.
    pub fn log_kind(&self) -> LogKind {
        self.log
    }

    /// Guest RAM, for reading (and, on a target, placing) pages.
    ///
    /// # Errors
    /// The file is no RAM file: it has another length, for one.
    pub fn ram(&self, writable: bool) -> Asked<Arc<GuestRam>> {
        let ram = |source| LinkClientError::Ram {
            vm: self.vm.clone(),
            source,
        };
        let file = self.file.try_clone().map_err(|source| {
            ram(crate::vmm::ram::RamError::File {
                what: "keeping RAM file",
                path: self.path.clone(),
                source,
            })
        })?;
        let opened = GuestRam::from_file(file, &self.path, self.len, writable);
        opened.map(Arc::new).map_err(ram)
    }

    /// How the VM is.
    ///
    /// # Errors
    /// The VMM does not answer.
    pub fn status(&self) -> Asked<Status> {
        self.ask("being looked at", &Request::Status, |answer| match answer {
            Answer::Status(status) => Some(*status),
            _ => None,
        })
    }

    /// Every write from here on is in a round.
    ///
    /// # Errors
    /// As all of these; the guest goes on in any case.
    pub fn start_log(&self) -> Asked<()> {
        self.done("starting the dirty log", &Request::StartLog)
    }

    /// Switches the log off.
    ///
    /// # Errors
    /// As [`LinkClient::start_log`].
    pub fn stop_log(&self) -> Asked<()> {
        self.done("ending the dirty log", &Request::StopLog)
    }

    /// Reports each run of pages written since the log was started or last
    /// asked, by rising page of the RAM file within each region.
    ///
    /// # Errors
    /// What was reported until then is not all: the log is not to be trusted
    /// any more.
    pub fn round(&self, f: &mut dyn FnMut(Range<Gfn>)) -> Asked<ScanStats> {
        let doing = "reading the dirty log";
        let begun = Instant::now();
        let mut reader = RoundReader::new(&self.regions);
        let mut connection = self.lock();
        self.send(&mut connection, doing, &Request::Round)?;
        loop {
            let said = |what| LinkClientError::Answer {
                vm: self.vm.clone(),
                doing,
                what,
            };
            let over = self.hear(&mut connection, doing, |answer| match answer {
                Answer::Bits(bits) => reader.take(bits, f).map(|()| None).map_err(said),
                Answer::RoundEnd(pages) => Ok(Some(*pages)),
                other => Err(wrong(&self.vm, doing, other)),
            })?;
            let Some(pages) = over else {
                continue;
            };
            reader.flush(f);
            if reader.pages != pages {
                let sum = reader.pages;
                return Err(said(format!("{sum} pages, and says it were {pages}")));
            }
            return Ok(ScanStats {
                pages,
                runs: reader.runs,
                calls: 1,
                took: begun.elapsed(),
            });
        }
    }

    /// Stops the guest; whether it was running.
    ///
    /// # Errors
    /// It runs on.
    pub fn pause(&self) -> Asked<bool> {
        self.ask("pausing", &Request::Pause, |answer| match answer {
            Answer::Paused(was_running) => Some(*was_running),
            _ => None,
        })
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// It stands.
    pub fn resume(&self) -> Asked<()> {
        self.done("resuming", &Request::Resume)
    }

    /// Writes the state of a paused VM to `out`; how much it was.
    ///
    /// # Errors
    /// `out` does not have all of it.
    pub fn save_state(&self, out: &mut dyn Write) -> Asked<u64> {
        let doing = "saving its state";
        let mut connection = self.lock();
        self.send(&mut connection, doing, &Request::SaveState)?;
        let (mut total, mut failed) = (0, None);
        loop {
            let end = self.hear(&mut connection, doing, |answer| match answer {
                Answer::Chunk(bytes) => {
                    total += bytes.len() as u64;
                    // What comes is read to its end, or the next answer is mistaken.
                    if failed.is_none() {
                        failed = out.write_all(bytes).err();
                    }
                    Ok(None)
                }
                Answer::ChunksEnd(announced) => Ok(Some(*announced)),
                other => Err(wrong(&self.vm, doing, other)),
            })?;
            match (end, failed.take()) {
                (None, error) => failed = error,
                (Some(_), Some(source)) => {
                    let vm = self.vm.clone();
                    return Err(LinkClientError::State { vm, source });
                }
                (Some(announced), None) if announced == total => return Ok(total),
                (Some(announced), None) => {
                    let what = format!("{total} of {announced} bytes");
                    let vm = self.vm.clone();
                    return Err(LinkClientError::Answer { vm, doing, what });
                }
            }
        }
    }

    /// Has a waiting VMM take in the state that `state` has.
    ///
    /// # Errors
    /// The VMM can only be ended then.
    pub fn load_state(&self, state: &mut dyn Read) -> Asked<u64> {
        let doing = "taking in its state";
        let mut connection = self.lock();
        self.send(&mut connection, doing, &Request::LoadState)?;
        let mut chunk = vec![0; MAX_CHUNK];
        let mut total = 0;
        loop {
            let n = state.read(&mut chunk).map_err(|source| {
                // The VMM waits for the rest.
                connection.close();
                let vm = self.vm.clone();
                LinkClientError::State { vm, source }
            })?;
            if n == 0 {
                break;
            }
            total += n as u64;
            self.send(&mut connection, doing, &Request::Chunk(&chunk[..n]))?;
        }
        self.send(&mut connection, doing, &Request::ChunksEnd(total))?;
        self.hear(&mut connection, doing, |answer| match answer {
            Answer::Done => Ok(total),
            other => Err(wrong(&self.vm, doing, other)),
        })
    }

    /// The VM lives elsewhere: has the VMM end itself.
    ///
    /// # Errors
    /// It may still be there.
    pub fn end(&self) -> Asked<()> {
        self.done("ending", &Request::End)
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn done(&self, doing: &'static str, request: &Request<'_>) -> Asked<()> {
        self.ask(doing, request, |answer| {
            matches!(answer, Answer::Done).then_some(())
        })
    }

    fn ask<T>(
        &self,
        doing: &'static str,
        request: &Request<'_>,
        f: impl FnOnce(&Answer<'_>) -> Option<T>,
    ) -> Asked<T> {
        let mut connection = self.lock();
        self.send(&mut connection, doing, request)?;
        self.hear(&mut connection, doing, |answer| {
            f(answer).ok_or_else(|| wrong(&self.vm, doing, answer))
        })
    }

    fn broke(&self, doing: &'static str, source: ConnectionError) -> LinkClientError {
        LinkClientError::Connection {
            vm: self.vm.clone(),
            doing,
            source,
        }
    }

    fn send(
        &self,
        connection: &mut Connection,
        doing: &'static str,
        request: &Request<'_>,
    ) -> Asked<()> {
        let sent = connection.send(|out| request.encode(out));
        sent.map_err(|e| self.broke(doing, e.into()))
    }

    fn hear<T>(
        &self,
        connection: &mut Connection,
        doing: &'static str,
        f: impl FnOnce(&Answer<'_>) -> Asked<T>,
    ) -> Asked<T> {
        let heard = (|| {
            let (kind, body) = connection.receive().map_err(|e| self.broke(doing, e))?;
            let answer = Answer::decode(kind, body).map_err(|e| self.broke(doing, e.into()))?;
            f(&answer)
        })();
        match heard {
            Ok(value) => Ok(value),
            Err(refused @ LinkClientError::Refused { .. }) => Err(refused),
            Err(error) => {
                // What is still to come would be taken for the next answer.
                connection.close();
                Err(error)
            }
        }
    }
}

/// How a VM is, in QEMU's words, which the agent uses for all of them.
pub fn run_state(status: Status) -> RunState {
    match status.phase {
        Phase::Waiting => RunState::Inmigrate,
        Phase::Live | Phase::Arrived if status.running => RunState::Running,
        Phase::Live | Phase::Arrived => RunState::Paused,
    }
}

/// An answer that is none to what was asked.
fn wrong(vm: &str, doing: &'static str, answer: &Answer<'_>) -> LinkClientError {
    let vm = vm.to_owned();
    match answer {
        Answer::Refused { text, .. } => LinkClientError::Refused {
            vm,
            doing,
            text: text.clone(),
        },
        other => {
            let mut what = format!("{other:?}");
            what.truncate(what.floor_char_boundary(80));
            LinkClientError::Answer { vm, doing, what }
        }
    }
}

/// How long a file is that the regions, wherever the guest has them, make up
/// without gap and without overlap.
fn covered(regions: &[RegionInfo]) -> Result<u64, String> {
    let mut parts: Vec<_> = regions.iter().map(|r| r.offset..r.offset + r.len).collect();
    parts.sort_by_key(|part| part.start);
    let end = parts.iter().try_fold(0, |at, part| {
        if part.start == at {
            Ok(part.end)
        } else {
            Err(at)
        }
    });
    match end {
        Ok(len) if len / PAGE_SIZE as u64 <= u64::from(u32::MAX) => Ok(len),
        Ok(len) => Err(format!("{len} bytes")),
        Err(at) => Err(format!("not made of one part at {at:#x} of its file")),
    }
}
