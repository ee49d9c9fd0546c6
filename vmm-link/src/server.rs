//! The VMM's side: listens for the agent and does what it asks.

use crate::connection::{Connection, ConnectionError};
use crate::kvm::Vm;
use crate::log::Log;
use crate::marks::Marks;
use crate::memory::{self, MemoryError, Region};
use crate::ring::DirtyRings;
use crate::state::{StateReader, StateWriter};
use crate::vmm::{CallError, Vmm};
use crate::wire::{Answer, LogKind, Phase, Refusal, RegionInfo, Request, Status};
use std::fs::Permissions;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use thiserror::Error;

/// How long an agent may stand still inside a message.
const LIMIT: Duration = Duration::from_secs(10);

/// A link cannot be made.
#[derive(Debug, Error)]
pub enum LinkError {
    /// Guest RAM is not as it has to be.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM does not want it.
    #[error("KVM cannot log the VM's writes")]
    Kvm(#[source] io::Error),
    /// These rings feed another link.
    #[error("the dirty rings belong to another link: enable new ones for each VM")]
    Rings,
    /// The socket cannot be listened on.
    #[error("cannot listen on {path}; if another VMM of this VM runs, end it first")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// What a VMM is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Its VM lives here.
    Run,
    /// To wait for a VM: nothing runs until the agent says so.
    Incoming,
}

/// A VM that can be handed to an agent.
#[derive(Debug)]
pub struct Link {
    log: Log,
    marks: Marks,
}

impl Link {
    /// For the VM `vm` (a `kvm_ioctls::VmFd`, or whatever holds its descriptor)
    /// with this RAM. With `rings`, writes are logged in those, else in KVM's
    /// bitmaps. While an agent logs, nobody else may use the VM's dirty log.
    ///
    /// # Errors
    /// The regions are not possible, or KVM refuses.
    pub fn new(
        vm: &impl AsRawFd,
        regions: Vec<Region>,
        rings: Option<DirtyRings>,
    ) -> Result<Link, LinkError> {
        memory::check(&regions)?;
        if rings.as_ref().is_some_and(DirtyRings::is_linked) {
            return Err(LinkError::Rings);
        }
        let marks = Marks::new(&regions);
        let vm = Vm::copy_of(vm).map_err(LinkError::Kvm)?;
        let log = Log::new(vm, regions, marks.clone(), rings).map_err(LinkError::Kvm)?;
        Ok(Link { log, marks })
    }

    /// Where the VMM's devices note what they write.
    pub fn marks(&self) -> Marks {
        self.marks.clone()
    }

    /// How writes are logged.
    pub fn log_kind(&self) -> LogKind {
        self.log.kind()
    }

    /// Serves agents on the socket `path`, one at a time, from a thread of its
    /// own. An agent that goes away takes the log with it, and nothing else: a
    /// running guest runs on, a paused one stays paused, for it may run
    /// elsewhere by then.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn serve(
        self,
        path: &Path,
        role: Role,
        vmm: impl Vmm + 'static,
    ) -> Result<Server, LinkError> {
        let fail = |source| LinkError::Listen {
            path: path.to_owned(),
            source,
        };
        let listener = listen(path).map_err(fail)?;
        let stop = Arc::new(Stop {
            listener: listener.try_clone().map_err(fail)?,
            stopped: AtomicBool::new(false),
            current: Mutex::new(None),
        });
        let mut service = Service {
            log: self.log,
            vmm,
            phase: match role {
                Role::Run => Phase::Live,
                Role::Incoming => Phase::Waiting,
            },
            spoilt: None,
        };
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("drover-link".into())
            .spawn(move || service.serve(&listener, &stopped))
            .map_err(fail)?;
        Ok(Server {
            path: path.to_owned(),
            stop,
            thread: Some(thread),
        })
    }
}

/// Listens on a socket file for root and our own user. What a VMM that ended
/// has left there is replaced, a socket that somebody listens on is not.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == ErrorKind::AddrInUse && UnixStream::connect(path).is_err() => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    }?;
    // Who connects before that is looked at all the same.
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[derive(Debug)]
struct Stop {
    listener: UnixListener,
    stopped: AtomicBool,
    current: Mutex<Option<UnixStream>>,
}

impl Stop {
    fn set_current(&self, stream: Option<UnixStream>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }

    fn is_set(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }
}

/// A link that is served. Dropping it ends that, and switches the log off.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Waits until the agent has ended the VM (see [`Vmm::end`]).
    pub fn wait(mut self) {
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.stopped.store(true, Ordering::SeqCst);
        // Wakes the thread wherever it waits. Both fail only if it is past that.
        let _over = nix::sys::socket::shutdown(
            self.stop.listener.as_raw_fd(),
            nix::sys::socket::Shutdown::Both,
        );
        let current = &self.stop.current;
        if let Some(stream) = &*current.lock().unwrap_or_else(PoisonError::into_inner) {
            let _gone = stream.shutdown(Shutdown::Both);
        }
        self.join();
        let _gone = std::fs::remove_file(&self.path);
    }
}

/// How an agent's connection ended.
#[derive(Debug, PartialEq, Eq)]
enum Over {
    Gone,
    Ended,
}

struct Service<V> {
    log: Log,
    vmm: V,
    phase: Phase,
    /// Why nothing but `End` is possible any more.
    spoilt: Option<&'static str>,
}

impl<V: Vmm> Service<V> {
    fn serve(&mut self, listener: &UnixListener, stop: &Stop) {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(_) if stop.is_set() => return,
                Err(error) => {
                    self.vmm.note(&error);
                    // No descriptors left, perhaps: not as fast as it goes.
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            stop.set_current(stream.try_clone().ok());
            let over = if stop.is_set() {
                Ok(Over::Gone)
            } else {
                self.attend(stream)
            };
            stop.set_current(None);
            if let Err(error) = self.log.stop() {
                self.vmm.note(&error);
            }
            match over {
                Ok(Over::Ended) => {
                    self.vmm.end();
                    return;
                }
                Ok(Over::Gone) => {}
                Err(error) => self.vmm.note(&error),
            }
            if stop.is_set() {
                return;
            }
        }
    }

    fn attend(&mut self, stream: UnixStream) -> Result<Over, ConnectionError> {
        let mut agent = Connection::new(stream)?;
        agent.set_limit(LIMIT)?;
        let (kind, body) = match agent.receive() {
            Err(ConnectionError::Closed) => return Ok(Over::Gone),
            received => received?,
        };
        match Request::decode(kind, body)? {
            Request::Hello => self.welcome(&mut agent)?,
            _ => return Err(crate::wire::WireError::Kind(kind).into()),
        }
        loop {
            let (kind, body) = match agent.receive_some_day(LIMIT) {
                Err(ConnectionError::Closed) => return Ok(Over::Gone),
                received => received?,
            };
            let request = Request::decode(kind, body)?;
            if request == Request::End {
                agent.send(|out| Answer::Done.encode(out))?;
                return Ok(Over::Ended);
            }
            let answer = match request {
                Request::Status => Ok(Answer::Status(self.status())),
                Request::StartLog => self.start_log(),
                Request::Round => self.round(&mut agent)?,
                Request::StopLog => self.log.stop().map_err(log_failed).map(done),
                Request::Pause => self.pause(),
                Request::Resume => self.resume(),
                Request::SaveState => self.save_state(&mut agent)?,
                Request::LoadState => self.load_state(&mut agent)?,
                Request::Hello | Request::Chunk(_) | Request::ChunksEnd(_) | Request::End => {
                    return Err(crate::wire::WireError::Kind(kind).into());
                }
            };
            let answer = answer.unwrap_or_else(|Refused(why, text)| Answer::Refused { why, text });
            agent.send(|out| answer.encode(out))?;
        }
    }

    fn status(&mut self) -> Status {
        Status {
            phase: self.phase,
            running: self.vmm.is_running(),
            logging: self.log.is_on(),
        }
    }

    fn welcome(&mut self, agent: &mut Connection) -> io::Result<()> {
        let status = self.status();
        let (files, index) = memory::files_of(self.log.regions());
        let regions = self.log.regions().iter().zip(index);
        let answer = Answer::Welcome {
            log: self.log.kind(),
            status,
            fds: files.len() as u16,
            regions: regions
                .map(|(region, fd)| RegionInfo {
                    gpa: region.gpa,
                    len: region.len,
                    offset: region.offset,
                    fd,
                })
                .collect(),
        };
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        agent.send_with(&fds, |out| answer.encode(out))
    }

    fn start_log(&mut self) -> Result<Answer<'static>, Refused> {
        self.lives_here()?;
        self.log.start().map_err(log_failed).map(done)
    }

    fn round(
        &mut self,
        agent: &mut Connection,
    ) -> Result<Result<Answer<'static>, Refused>, ConnectionError> {
        if !self.log.is_on() {
            return Ok(Err(refused("the log is off: start it first")));
        }
        let mut broken = None;
        let vmm = &mut self.vmm;
        let done = self.log.round(
            || vmm.kick(),
            |region, first, words| {
                let sent = agent.send(|out| Answer::encode_bits(out, region, first, words));
                sent.map_err(|error| {
                    let kind = error.kind();
                    broken = Some(error);
                    kind.into()
                })
            },
        );
        if let Some(error) = broken {
            return Err(error.into());
        }
        Ok(done.map(Answer::RoundEnd).map_err(log_failed))
    }

    fn pause(&mut self) -> Result<Answer<'static>, Refused> {
        self.lives_here()?;
        let was_running = self.vmm.pause().map_err(vmm_failed)?;
        Ok(Answer::Paused(was_running))
    }

    fn resume(&mut self) -> Result<Answer<'static>, Refused> {
        self.whole()?;
        if self.phase == Phase::Waiting {
            return Err(refused("its state has not arrived"));
        }
        self.vmm.resume().map_err(vmm_failed)?;
        self.phase = Phase::Live;
        Ok(Answer::Done)
    }

    fn save_state(
        &mut self,
        agent: &mut Connection,
    ) -> Result<Result<Answer<'static>, Refused>, ConnectionError> {
        if let Err(refused) = self.lives_here() {
            return Ok(Err(refused));
        }
        if self.vmm.is_running() {
            return Ok(Err(refused("the guest runs: pause it first")));
        }
        let mut out = StateWriter::new(agent);
        let saved = self.vmm.save_state(&mut out);
        let total = out.finish()?;
        Ok(saved.map(|()| Answer::ChunksEnd(total)).map_err(vmm_failed))
    }

    fn load_state(
        &mut self,
        agent: &mut Connection,
    ) -> Result<Result<Answer<'static>, Refused>, ConnectionError> {
        let may = self.waits();
        let mut state = StateReader::new(agent);
        let begun = may.is_ok();
        let loaded = may.and_then(|()| self.vmm.load_state(&mut state).map_err(vmm_failed));
        let finished = state.finish();
        if begun && finished.is_err() {
            // An agent that went away in the middle of it.
            self.spoilt = Some(HALF_LOADED);
        }
        let left = finished?;
        let loaded = match loaded {
            Ok(()) if left > 0 => Err(Refused(
                Refusal::Vmm,
                format!("{left} bytes of state were not used: another release's?"),
            )),
            loaded => loaded,
        };
        match &loaded {
            Ok(()) => self.phase = Phase::Arrived,
            Err(Refused(Refusal::Vmm, _)) => self.spoilt = Some(HALF_LOADED),
            Err(_) => {}
        }
        Ok(loaded.map(done))
    }

    fn whole(&self) -> Result<(), Refused> {
        self.spoilt.map_or(Ok(()), |why| Err(refused(why)))
    }

    /// One that has arrived may stand for good: it was paused where it came from.
    fn lives_here(&self) -> Result<(), Refused> {
        self.whole()?;
        match self.phase {
            Phase::Live | Phase::Arrived => Ok(()),
            Phase::Waiting => Err(refused("it waits for a VM, and has none")),
        }
    }

    fn waits(&self) -> Result<(), Refused> {
        self.whole()?;
        match self.phase {
            Phase::Waiting => Ok(()),
            Phase::Live | Phase::Arrived => Err(refused("a VM lives here already")),
        }
    }
}

/// Some vCPU may have its registers, another not.
const HALF_LOADED: &str = "loading its state failed half-way: end it";

struct Refused(Refusal, String);

fn done((): ()) -> Answer<'static> {
    Answer::Done
}

fn refused(why: &str) -> Refused {
    Refused(Refusal::State, why.to_owned())
}

fn log_failed(error: io::Error) -> Refused {
    Refused(Refusal::Log, format!("KVM's dirty log: {error}"))
}

fn vmm_failed(error: CallError) -> Refused {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    Refused(Refusal::Vmm, text)
}
