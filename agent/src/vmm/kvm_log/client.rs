//! Asks a linked VMM. All calls block; one request is under way at a time,
//! whoever asks.

use super::error::LinkClientError;
use super::greeting::Greeting;
use super::rounds::RoundReader;
use super::session::{Session, wrong};
use crate::types::Gfn;
use crate::vmm::dirty::ScanStats;
use crate::vmm::qmp::RunState;
use crate::vmm::ram::{GuestRam, RamError};
use drover_vmm::Connection;
use drover_vmm::wire::{Answer, LogKind, MAX_CHUNK, Phase, RegionInfo, Request, Status};
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a VMM may take for one message.
const LIMIT: Duration = Duration::from_secs(10);
/// The same where it may have much to do: pausing drains its devices.
const LONG_LIMIT: Duration = Duration::from_secs(30);

/// A connection to a VMM that embeds `drover-vmm`. When it is dropped the VMM
/// switches the log off; a guest that runs runs on, one that stands stays so.
///
/// One that broke is made anew by the next request, if it is still the same VMM
/// that answers. Its log is off then, which the next round is told.
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
    connection: Mutex<Option<Connection>>,
}

/// What comes of asking.
pub(super) type Asked<T> = Result<T, LinkClientError>;

impl LinkClient {
    /// Connects to the VMM of `vm` at its socket, and gets its RAM.
    ///
    /// # Errors
    /// Nobody answers there, or its RAM is not one file without gaps.
    pub fn connect(vm: &str, socket: &Path) -> Asked<LinkClient> {
        let greeting = Greeting::exchange(vm, socket)?;
        Ok(LinkClient {
            vm: vm.to_owned(),
            socket: socket.to_owned(),
            log: greeting.log,
            regions: greeting.regions,
            path: Greeting::path(&greeting.file),
            file: greeting.file,
            len: greeting.len,
            pid: greeting.pid,
            connection: Mutex::new(Some(greeting.connection)),
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

    /// Guest RAM as KVM has it.
    pub fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    /// Bytes of guest RAM that have memory.
    ///
    /// # Errors
    /// The file cannot be asked.
    pub fn filled_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
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
            ram(RamError::File {
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
        let begun = Instant::now();
        let mut reader = RoundReader::new(&self.regions);
        let mut session = self.session("reading the dirty log", LIMIT)?;
        session.send(&Request::Round)?;
        let pages = loop {
            let said = |what| self.mistaken("reading the dirty log", what);
            let over = session.hear(|answer| match answer {
                Answer::Bits(bits) => reader.take(bits, f).map(|()| None).map_err(said),
                Answer::RoundEnd(pages) => Ok(Some(*pages)),
                other => Err(wrong(&self.vm, "reading the dirty log", other)),
            })?;
            if let Some(pages) = over {
                break pages;
            }
        };
        reader.flush(f);
        if reader.pages != pages {
            session.give_up();
            let what = format!("{} pages, and says it were {pages}", reader.pages);
            return Err(self.mistaken(session.doing, what));
        }
        Ok(ScanStats {
            pages,
            runs: reader.runs,
            calls: 1,
            took: begun.elapsed(),
        })
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
        let mut session = self.session("saving its state", LONG_LIMIT)?;
        session.send(&Request::SaveState)?;
        let (mut total, mut failed) = (0, None);
        let announced = loop {
            let end = session.hear(|answer| match answer {
                Answer::Chunk(bytes) => {
                    total += bytes.len() as u64;
                    // What comes is read to its end, or the next answer is mistaken.
                    if failed.is_none() {
                        failed = out.write_all(bytes).err();
                    }
                    Ok(None)
                }
                Answer::ChunksEnd(announced) => Ok(Some(*announced)),
                other => Err(wrong(&self.vm, "saving its state", other)),
            })?;
            if let Some(announced) = end {
                break announced;
            }
        };
        match failed {
            Some(source) => Err(LinkClientError::State {
                vm: self.vm.clone(),
                source,
            }),
            None if announced == total => Ok(total),
            None => {
                session.give_up();
                let what = format!("{total} of {announced} bytes");
                Err(self.mistaken(session.doing, what))
            }
        }
    }

    /// Has a waiting VMM take in the state that `state` has.
    ///
    /// # Errors
    /// The VMM can only be ended then.
    pub fn load_state(&self, state: &mut dyn Read) -> Asked<u64> {
        let mut session = self.session("taking in its state", LONG_LIMIT)?;
        session.send(&Request::LoadState)?;
        let mut chunk = vec![0; MAX_CHUNK];
        let mut total = 0;
        loop {
            let n = state.read(&mut chunk).map_err(|source| {
                // The VMM waits for the rest.
                session.give_up();
                let vm = self.vm.clone();
                LinkClientError::State { vm, source }
            })?;
            if n == 0 {
                break;
            }
            total += n as u64;
            session.send(&Request::Chunk(&chunk[..n]))?;
        }
        session.send(&Request::ChunksEnd(total))?;
        session.hear(|answer| match answer {
            Answer::Done => Ok(total),
            other => Err(wrong(&self.vm, "taking in its state", other)),
        })
    }

    /// The VM lives elsewhere: has the VMM end itself.
    ///
    /// # Errors
    /// It may still be there.
    pub fn end(&self) -> Asked<()> {
        self.done("ending", &Request::End)
    }

    /// Nobody else asks for as long as this is held.
    fn session(&self, doing: &'static str, limit: Duration) -> Asked<Session<'_>> {
        let connection = self.connection.lock();
        let mut held = connection.unwrap_or_else(PoisonError::into_inner);
        if held.is_none() {
            let greeting = Greeting::exchange(&self.vm, &self.socket)?;
            if !greeting.is_of(self.pid, &self.regions, &self.file) {
                return Err(LinkClientError::Replaced {
                    vm: self.vm.clone(),
                    socket: self.socket.clone(),
                    pid: self.pid,
                });
            }
            *held = Some(greeting.connection);
        }
        let mut session = Session {
            vm: &self.vm,
            doing,
            held,
        };
        session.limit(limit)?;
        Ok(session)
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
        let limit = match request {
            Request::Pause => LONG_LIMIT,
            _ => LIMIT,
        };
        let mut session = self.session(doing, limit)?;
        session.send(request)?;
        session.hear(|answer| f(answer).ok_or_else(|| wrong(&self.vm, doing, answer)))
    }

    fn mistaken(&self, doing: &'static str, what: String) -> LinkClientError {
        let vm = self.vm.clone();
        LinkClientError::Answer { vm, doing, what }
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
