//! The agent as the destination of `send-migration`: takes a VM from Cloud
//! Hypervisor, and answers each command when what it asked for is done.

#![allow(unsafe_code)]

use super::error::Fault;
use super::layout::Layout;
use super::requests::{Event, RequestParser};
use super::wire::{Command, Response};
use crate::types::Gfn;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use std::collections::VecDeque;
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use thiserror::Error;

/// Bytes read at once.
const READ_BYTES: usize = 256 << 10;
/// Descriptors taken with one read; a command has one at most.
const READ_FDS: usize = 4;

/// Where a VM goes that a source sends. An error is told to the source, whose
/// VM runs on.
pub trait Receiver {
    /// Why it cannot be taken.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The descriptor of a slot's RAM, of a source started with `local=on`: it
    /// may be mapped and read instead of what [`Self::pages`] would bring.
    fn memory_fd(&mut self, slot: u32, fd: OwnedFd) -> Result<(), Self::Error>;
    /// The VM's configuration, to be given to its target unchanged.
    fn config(&mut self, json: &[u8], layout: &Layout) -> Result<(), Self::Error>;
    /// Contents of pages that follow each other. Later ones replace earlier.
    fn pages(&mut self, start: Gfn, data: &[u8]) -> Result<(), Self::Error>;
    /// A round has ended: the source looks at its dirty log again, or has
    /// stopped the guest.
    fn round_end(&mut self) -> Result<(), Self::Error>;
    /// A piece of the VM's state; the guest stands still.
    fn state(&mut self, piece: &[u8]) -> Result<(), Self::Error>;
    /// The state is complete.
    fn state_end(&mut self) -> Result<(), Self::Error>;
    /// The source gives the VM away. When this returns `Ok` the source is told
    /// so and ends: from then on the VM is here or nowhere.
    fn complete(&mut self, paused: bool) -> Result<(), Self::Error>;
}

/// Why a VM was not received. The source's VM runs on.
#[derive(Debug, Error)]
pub enum ReceiveError<E: std::error::Error + 'static> {
    /// The socket failed, or nothing came in time.
    #[error("VM {vm}: cannot {doing} its Cloud Hypervisor")]
    Socket {
        /// The VM.
        vm: String,
        /// What was tried.
        doing: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The source closed the connection half-way.
    #[error(
        "VM {vm}: its Cloud Hypervisor closed the migration before it was over: its log says why"
    )]
    Closed {
        /// The VM.
        vm: String,
    },
    /// The source gave up in order.
    #[error("VM {vm}: its Cloud Hypervisor gave the migration up: its log says why")]
    Abandoned {
        /// The VM.
        vm: String,
    },
    /// What came is not of the protocol, or not of what is taken.
    #[error("VM {vm}: its Cloud Hypervisor sent something that cannot be taken")]
    Protocol {
        /// The VM.
        vm: String,
        /// What.
        #[source]
        source: Fault,
    },
    /// The receiver does not want it.
    #[error("VM {vm} cannot be taken from its Cloud Hypervisor")]
    Refused {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: E,
    },
}

/// What a migration brought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Received {
    /// Pages, those that came twice counted twice.
    pub pages: u64,
    /// Rounds, the last with the guest stopped among them.
    pub rounds: u32,
    /// Bytes of state.
    pub state_bytes: u64,
    /// Whether the VM was paused before and is to stay so.
    pub paused: bool,
}

/// Takes VM `vm` from the Cloud Hypervisor at the other end of `stream`. No
/// read or write may take longer than `idle`. Blocks.
///
/// # Errors
/// See [`ReceiveError`]. The source was told, if it could be.
pub fn receive<R: Receiver>(
    vm: &str,
    stream: &UnixStream,
    idle: Duration,
    receiver: &mut R,
) -> Result<Received, ReceiveError<R::Error>> {
    let socket = |doing| {
        move |source| ReceiveError::Socket {
            vm: vm.to_owned(),
            doing,
            source,
        }
    };
    let limits = || {
        stream.set_read_timeout(Some(idle))?;
        stream.set_write_timeout(Some(idle))
    };
    limits().map_err(socket("set limits for"))?;
    let mut session = Session {
        input: Input::default(),
        parser: RequestParser::default(),
        received: Received::default(),
    };
    loop {
        let answer = match session.read(receiver) {
            Ok(Asked::More) => match session.input.fill(stream) {
                Ok(0) => return Err(ReceiveError::Closed { vm: vm.to_owned() }),
                Ok(_) => continue,
                Err(source) => return Err(socket("read from")(source)),
            },
            answer => answer,
        };
        let response = match &answer {
            Ok(_) => Response::Ok,
            Err(_) => Response::Error,
        };
        let told = (&mut &*stream).write_all(&response.encode());
        match answer {
            // An error is worth more than that it could not be told.
            Err(Why::Protocol(source)) => {
                let vm = vm.to_owned();
                return Err(ReceiveError::Protocol { vm, source });
            }
            Err(Why::Refused(source)) => {
                let vm = vm.to_owned();
                return Err(ReceiveError::Refused { vm, source });
            }
            Ok(Asked::Abandoned) => return Err(ReceiveError::Abandoned { vm: vm.to_owned() }),
            Ok(Asked::Over) => {
                told.map_err(socket("answer"))?;
                return Ok(session.received);
            }
            Ok(Asked::Answer | Asked::More) => told.map_err(socket("answer"))?,
        }
    }
}

/// What follows from what has come.
enum Asked {
    /// More has to come.
    More,
    /// The source waits for an answer.
    Answer,
    /// It waits for the last one.
    Over,
    /// It has given up.
    Abandoned,
}

enum Why<E> {
    Protocol(Fault),
    Refused(E),
}

impl<E> From<Fault> for Why<E> {
    fn from(fault: Fault) -> Self {
        Why::Protocol(fault)
    }
}

struct Session {
    input: Input,
    parser: RequestParser,
    received: Received,
}

impl Session {
    /// Hands on what has come, up to the next command that wants an answer.
    fn read<R: Receiver>(&mut self, receiver: &mut R) -> Result<Asked, Why<R::Error>> {
        loop {
            let step = self.parser.step(&self.input.bytes[self.input.used..])?;
            if step.needs_more() {
                return Ok(Asked::More);
            }
            self.input.used += step.used;
            let Some(event) = step.event else { continue };
            if event.is_answered() {
                let wanted = matches!(event, Event::MemoryFd { .. });
                self.input.check_fds(&event, usize::from(wanted))?;
            }
            let answered = event.is_answered();
            let received = &mut self.received;
            match event {
                Event::Start => Ok(()),
                Event::MemoryFd { slot } => match self.input.fds.pop_front() {
                    Some(fd) => receiver.memory_fd(slot, fd),
                    None => Ok(()),
                },
                Event::Config(json) => {
                    let layout = self.parser.layout();
                    receiver.config(json, layout)
                }
                Event::Table { pages } => {
                    received.pages = received.pages.saturating_add(pages);
                    Ok(())
                }
                Event::Pages { start, data } => receiver.pages(start, data),
                Event::TableEnd => {
                    received.rounds += 1;
                    receiver.round_end()
                }
                Event::State(piece) => {
                    received.state_bytes += piece.len() as u64;
                    receiver.state(piece)
                }
                Event::StateEnd => receiver.state_end(),
                Event::Complete { paused } => {
                    receiver.complete(paused).map_err(Why::Refused)?;
                    received.paused = paused;
                    return Ok(Asked::Over);
                }
                Event::Abandon => return Ok(Asked::Abandoned),
            }
            .map_err(Why::Refused)?;
            if answered {
                return Ok(Asked::Answer);
            }
        }
    }
}

/// What has come and is not done with.
#[derive(Debug, Default)]
pub(in crate::vmm) struct Input {
    bytes: Vec<u8>,
    /// Of them, done with.
    used: usize,
    fds: VecDeque<OwnedFd>,
}

impl Input {
    /// What was read before by somebody else.
    pub(in crate::vmm) fn begun(bytes: &[u8]) -> Input {
        Input {
            bytes: bytes.to_vec(),
            ..Input::default()
        }
    }

    /// What is not done with.
    pub(in crate::vmm) fn rest(&self) -> &[u8] {
        &self.bytes[self.used..]
    }

    /// So much more is done with.
    pub(in crate::vmm) fn done(&mut self, bytes: usize) {
        self.used += bytes;
    }

    /// The descriptor that came with a command.
    pub(in crate::vmm) fn take_fd(&mut self) -> Option<OwnedFd> {
        self.fds.pop_front()
    }

    /// Reads on; 0 at the end.
    pub(in crate::vmm) fn fill(&mut self, stream: &UnixStream) -> io::Result<usize> {
        self.bytes.drain(..self.used);
        self.used = 0;
        let had = self.bytes.len();
        self.bytes.resize(had + READ_BYTES, 0);
        let got = self.recv(stream, had);
        self.bytes.truncate(had + *got.as_ref().unwrap_or(&0));
        got
    }

    fn recv(&mut self, stream: &UnixStream, at: usize) -> io::Result<usize> {
        let mut space = nix::cmsg_space!([RawFd; READ_FDS]);
        let mut buffers = [IoSliceMut::new(&mut self.bytes[at..])];
        let message = loop {
            match recvmsg::<()>(
                stream.as_raw_fd(),
                &mut buffers,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Err(nix::errno::Errno::EINTR) => {}
                message => break message?,
            }
        };
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel has just made these for us.
                let owned = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
                self.fds.extend(fds.into_iter().map(owned));
            }
        }
        match message.flags.contains(MsgFlags::MSG_CTRUNC) {
            true => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it sent more descriptors than any command has",
            )),
            false => Ok(message.bytes),
        }
    }

    /// The source waits for an answer now, so whatever descriptors are here
    /// came with this command.
    fn check_fds(&self, event: &Event<'_>, wanted: usize) -> Result<(), Fault> {
        let found = self.fds.len();
        if found == wanted {
            return Ok(());
        }
        let command = match event {
            Event::Start => Command::Start,
            Event::MemoryFd { .. } => Command::MemoryFd,
            Event::Config(_) => Command::Config,
            Event::Table { .. } | Event::Pages { .. } | Event::TableEnd => Command::Memory,
            Event::State(_) | Event::StateEnd => Command::State,
            Event::Complete { paused: false } => Command::Complete,
            Event::Complete { paused: true } => Command::CompletePaused,
            Event::Abandon => Command::Abandon,
        };
        Err(Fault::Descriptors {
            command,
            found,
            wanted,
        })
    }
}
