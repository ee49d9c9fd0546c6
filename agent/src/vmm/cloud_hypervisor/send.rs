//! The agent as the source of `receive-migration`: gives a VM to Cloud
//! Hypervisor, and goes on with each command when the one before was answered.

use super::error::Fault;
use super::wire::{Command, HEAD_BYTES, MemoryRange, RANGE_BYTES, Request, Response};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use thiserror::Error;

/// Why a VM cannot be given to its target's Cloud Hypervisor. Until
/// [`Sender::complete`] has been answered the VM does not run there.
#[derive(Debug, Error)]
pub enum SendError {
    /// The socket failed, or nothing came in time.
    #[error("VM {vm}: its target's Cloud Hypervisor does not take {command:?}")]
    Socket {
        /// The VM.
        vm: String,
        /// Which command.
        command: Command,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// It said that it cannot do what was asked.
    #[error("VM {vm}: its target's Cloud Hypervisor refused {command:?}: its log says why")]
    Refused {
        /// The VM.
        vm: String,
        /// Which command.
        command: Command,
    },
    /// It answered something else.
    #[error("VM {vm}: its target's Cloud Hypervisor answered {command:?} with something else")]
    Protocol {
        /// The VM.
        vm: String,
        /// Which command.
        command: Command,
        /// What.
        #[source]
        source: Fault,
    },
    /// The contents of pages could not be had.
    #[error("VM {vm}: its pages cannot be read for its target")]
    Contents {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One VM on its way into a Cloud Hypervisor. All calls block until they are
/// answered; dropping it before the end makes the receiver give the VM up.
#[derive(Debug)]
pub struct Sender {
    vm: String,
    stream: UnixStream,
}

impl Sender {
    /// Begins a migration over a connection to the socket of
    /// `receive-migration`. No read or write may take longer than `idle`.
    ///
    /// # Errors
    /// When the receiver does not take this version of the protocol.
    pub fn start(vm: &str, stream: UnixStream, idle: Duration) -> Result<Sender, SendError> {
        let mut sender = Sender {
            vm: vm.to_owned(),
            stream,
        };
        let limits = || {
            sender.stream.set_read_timeout(Some(idle))?;
            sender.stream.set_write_timeout(Some(idle))
        };
        let limited = limits();
        limited.map_err(|source| sender.socket(Command::Start, source))?;
        sender.put(Command::Start, &Request::start().encode())?;
        sender.answer(Command::Start)?;
        Ok(sender)
    }

    /// Gives the descriptor of a slot's RAM, which the receiver maps as the
    /// VM's; before the configuration, and only of a VM with shared memory.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn memory_fd(&mut self, slot: u32, fd: BorrowedFd<'_>) -> Result<(), SendError> {
        let command = Command::MemoryFd;
        let payload = slot.to_le_bytes();
        self.head(command, payload.len() as u64)?;
        let fds = [fd.as_raw_fd()];
        let sent = sendmsg::<()>(
            self.stream.as_raw_fd(),
            &[IoSlice::new(&payload)],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        let sent = sent.map_err(|errno| self.socket(command, errno.into()))?;
        // What a descriptor travels with goes in one piece, but for a signal.
        self.put(command, &payload[sent..])?;
        self.answer(command)
    }

    /// Gives the configuration, JSON as the source sent it.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn config(&mut self, json: &[u8]) -> Result<(), SendError> {
        self.whole(Command::Config, json)
    }

    /// Gives contents: `read` fills buffers with those of `ranges`, in their
    /// order, as much at once as it likes to give.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn memory(
        &mut self,
        ranges: &[MemoryRange],
        contents: &mut dyn Read,
    ) -> Result<(), SendError> {
        let command = Command::Memory;
        self.head(command, (ranges.len() * RANGE_BYTES) as u64)?;
        let table: Vec<u8> = ranges.iter().flat_map(MemoryRange::encode).collect();
        self.put(command, &table)?;
        let mut left: u64 = ranges.iter().map(|range| range.bytes).sum();
        let mut buffer = vec![0; 64 << 10];
        while left > 0 {
            let n = (buffer.len() as u64).min(left) as usize;
            let read = contents.read_exact(&mut buffer[..n]);
            read.map_err(|source| SendError::Contents {
                vm: self.vm.clone(),
                source,
            })?;
            self.put(command, &buffer[..n])?;
            left -= n as u64;
        }
        self.answer(command)
    }

    /// Gives the state, JSON as the source sent it.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn state(&mut self, json: &[u8]) -> Result<(), SendError> {
        self.whole(Command::State, json)
    }

    /// Lets the VM run there, or stand if it was `paused`.
    ///
    /// # Errors
    /// See [`SendError`]. After one that is no [`SendError::Refused`] the VM may run
    /// there, or not: nobody here can know.
    pub fn complete(mut self, paused: bool) -> Result<(), SendError> {
        let command = match paused {
            true => Command::CompletePaused,
            false => Command::Complete,
        };
        self.head(command, 0)?;
        self.answer(command)
    }

    /// Leaves the rest to somebody else: the connection, between two commands.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Gives up in order.
    ///
    /// # Errors
    /// See [`SendError`]; the receiver then finds the connection closed, which
    /// means the same to it.
    pub fn abandon(mut self) -> Result<(), SendError> {
        self.head(Command::Abandon, 0)
    }

    fn whole(&mut self, command: Command, payload: &[u8]) -> Result<(), SendError> {
        self.head(command, payload.len() as u64)?;
        self.put(command, payload)?;
        self.answer(command)
    }

    fn head(&mut self, command: Command, length: u64) -> Result<(), SendError> {
        self.put(command, &Request::new(command, length).encode())
    }

    fn put(&mut self, command: Command, bytes: &[u8]) -> Result<(), SendError> {
        let put = self.stream.write_all(bytes);
        put.map_err(|source| self.socket(command, source))
    }

    fn answer(&mut self, command: Command) -> Result<(), SendError> {
        let mut bytes = [0; HEAD_BYTES];
        let read = self.stream.read_exact(&mut bytes);
        read.map_err(|source| self.socket(command, source))?;
        let vm = || self.vm.clone();
        match Response::parse(&bytes) {
            Ok(Response::Ok) => Ok(()),
            Ok(Response::Error) => Err(SendError::Refused { vm: vm(), command }),
            Err(source) => Err(SendError::Protocol {
                vm: vm(),
                command,
                source,
            }),
        }
    }

    fn socket(&self, command: Command, source: io::Error) -> SendError {
        SendError::Socket {
            vm: self.vm.clone(),
            command,
            source,
        }
    }
}
