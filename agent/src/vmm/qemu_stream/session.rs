//! The threads of one migration, and what they share.
//!
//! Each connection has a thread that reads it, parses it and writes it to the
//! target's QEMU; the main connection has a second for the return path. A
//! further one for writing would cost more in turns than it gains.
//! They block in the kernel without limits of their own: whoever fails first
//! says why and shuts all sockets down, which wakes the others. So both QEMUs see
//! their migration end, and neither can take what it has for the whole.

use super::carry::{CarryError, READ_BYTES, carry};
use super::channel::{FIRST, Kind, kind};
use super::cut::Parse;
use super::error::{Fault, StreamError};
use super::main_channel::StreamParser;
use super::multifd::PacketParser;
use super::relay::{ChannelReport, Limits, RelayError, StreamReport};
use super::reply::ReplyParser;
use super::sink::{SinkError, Verbatim};
use std::fmt;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Most multifd connections of a VM: they are to take 64 MiB together at most.
pub const MAX_MULTIFD: usize = 32;

/// A connection, in messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// Has not said yet what it is.
    New(usize),
    /// The main connection, towards the target.
    Main,
    /// The main connection, towards the source.
    Return,
    /// A multifd connection, by the order in which they came.
    Multifd(usize),
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Channel::New(number) => write!(f, "connection {number}"),
            Channel::Main => f.write_str("main connection"),
            Channel::Return => f.write_str("return path"),
            Channel::Multifd(number) => write!(f, "multifd connection {number}"),
        }
    }
}

/// The main connection as others see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Main {
    Missing,
    /// It is here, and about to reach the target.
    Here,
    /// The target has it: others may follow.
    Open,
    Ended,
}

#[derive(Debug)]
struct State {
    sockets: Vec<Arc<UnixStream>>,
    closed: bool,
    failure: Option<RelayError>,
    main: Main,
    report: StreamReport,
}

/// What the threads of one migration share.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) vm: Arc<str>,
    pub(super) target: PathBuf,
    pub(super) limits: Limits,
    /// Bytes read and bytes written, of all connections.
    moved: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

impl Session {
    pub(super) fn new(vm: Arc<str>, target: PathBuf, limits: Limits) -> Session {
        Session {
            vm,
            target,
            limits,
            moved: AtomicU64::new(0),
            state: Mutex::new(State {
                sockets: Vec::new(),
                closed: false,
                failure: None,
                main: Main::Missing,
                report: StreamReport::default(),
            }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock; the state is whole in any case.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn moved(&self) -> u64 {
        self.moved.load(Relaxed)
    }

    /// Whether further connections may come.
    pub(super) fn is_open(&self) -> bool {
        let state = self.state();
        !state.closed && state.main != Main::Ended
    }

    /// Shuts all sockets down: all threads end.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        for socket in &state.sockets {
            // The peer may have gone already.
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
    }

    /// Says why, if nobody has yet, and closes.
    pub(super) fn fail(&self, error: RelayError) {
        self.state().failure.get_or_insert(error);
        self.close();
    }

    /// How it ended, once all threads have.
    pub(super) fn outcome(&self) -> Result<StreamReport, RelayError> {
        let mut state = self.state();
        match state.failure.take() {
            Some(failure) => Err(failure),
            None if state.main != Main::Ended => Err(RelayError::Closed {
                vm: self.vm.clone(),
            }),
            None => Ok(std::mem::take(&mut state.report)),
        }
    }

    /// Carries connection `number` of the source until it has ended.
    pub(super) fn connection(&self, source: UnixStream, number: usize) {
        self.run(|| {
            let source = self.hold(source)?;
            let mut first = [0; FIRST];
            let channel = Channel::New(number);
            (&*source)
                .read_exact(&mut first)
                .map_err(|source| self.read_error(channel, source))?;
            self.count(FIRST);
            match kind(first).map_err(|fault| self.fault(channel, fault))? {
                Kind::Main => self.main(&source, first),
                Kind::Multifd => self.multifd(&source, first, Channel::Multifd(number)),
            }
        });
    }

    fn main(&self, source: &UnixStream, first: [u8; FIRST]) -> Result<(), RelayError> {
        self.pass(|main| match main {
            Main::Missing => Ok(Main::Here),
            _ => Err(RelayError::SecondMain {
                vm: self.vm.clone(),
            }),
        })?;
        let target = self.reach_target()?;
        self.pass(|_| Ok(Main::Open))?;
        let mut parser = StreamParser::default();
        let mut replies = ReplyParser::default();
        let whole = thread::scope(|scope| {
            let back = scope.spawn(|| self.run(|| self.back(&target, source, &mut replies)));
            let there = self.run(|| {
                let carried = self.carry(source, &first, &mut parser, &target);
                carried.map_err(|error| self.error(Channel::Main, error))
            });
            joined(back) && there
        });
        let mut state = self.state();
        state.report.main = ChannelReport {
            bytes: parser.offset(),
            tally: parser.tally(),
        };
        state.report.raw = parser.raw().cloned();
        state.report.back = replies.offset();
        if whole {
            state.main = Main::Ended;
        }
        Ok(())
    }

    fn multifd(
        &self,
        source: &UnixStream,
        first: [u8; FIRST],
        channel: Channel,
    ) -> Result<(), RelayError> {
        self.wait_for_main()?;
        let target = self.reach_target()?;
        let mut parser = PacketParser::default();
        let carried = self.carry(source, &first, &mut parser, &target);
        let outcome = carried.map_err(|error| self.error(channel, error));
        self.state().report.multifd.push(ChannelReport {
            bytes: parser.offset(),
            tally: parser.tally(),
        });
        outcome
    }

    /// One direction of one connection, as it is.
    fn carry<P: Parse>(
        &self,
        from: &UnixStream,
        first: &[u8],
        parser: &mut P,
        to: &UnixStream,
    ) -> Result<(), CarryError> {
        let sink = Verbatim::new(to, |n| self.count(n));
        carry(from, first, parser, sink, |n| self.count(n))
    }

    /// The return path, up to SHUT. Nothing is ever added to it, above all not
    /// SHUT, by which the source knows that the target has it all.
    fn back(
        &self,
        target: &UnixStream,
        source: &UnixStream,
        replies: &mut ReplyParser,
    ) -> Result<(), RelayError> {
        let carried = self.carry(target, &[], replies, source);
        carried.map_err(|error| match error {
            CarryError::Stream(StreamError {
                fault: Fault::Ended { .. },
                ..
            }) => RelayError::Unconfirmed {
                vm: self.vm.clone(),
            },
            other => self.error(Channel::Return, other),
        })?;
        match replies.shut() {
            Some(value @ 1..) => Err(RelayError::TargetFailed {
                vm: self.vm.clone(),
                value,
            }),
            _ => Ok(()),
        }
    }

    /// Connects to the target's QEMU.
    fn reach_target(&self) -> Result<Arc<UnixStream>, RelayError> {
        let connected = || -> io::Result<UnixStream> {
            let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
            // How long connecting waits when the backlog is full.
            socket.set_write_timeout(Some(self.limits.connect))?;
            socket.connect(&socket2::SockAddr::unix(&self.target)?)?;
            socket.set_write_timeout(None)?;
            // Twice the usual: fewer turns of both QEMUs and the relay for the same bytes.
            socket.set_send_buffer_size(READ_BYTES)?;
            Ok(UnixStream::from(std::os::fd::OwnedFd::from(socket)))
        };
        self.hold(connected().map_err(|source| RelayError::Target {
            vm: self.vm.clone(),
            path: self.target.clone(),
            source,
        })?)
    }

    /// Keeps a socket where [`Session::close`] finds it.
    fn hold(&self, socket: UnixStream) -> Result<Arc<UnixStream>, RelayError> {
        let socket = Arc::new(socket);
        let mut state = self.state();
        if state.closed {
            return Err(RelayError::Closed {
                vm: self.vm.clone(),
            });
        }
        state.sockets.push(socket.clone());
        Ok(socket)
    }

    fn pass(&self, to: impl FnOnce(Main) -> Result<Main, RelayError>) -> Result<(), RelayError> {
        let mut state = self.state();
        state.main = to(state.main)?;
        self.changed.notify_all();
        Ok(())
    }

    /// A target of 7.2 takes its first connection for the main one.
    fn wait_for_main(&self) -> Result<(), RelayError> {
        let waiting =
            |state: &mut State| !state.closed && matches!(state.main, Main::Missing | Main::Here);
        let state = self.changed.wait_while(self.state(), waiting);
        if state.unwrap_or_else(PoisonError::into_inner).closed {
            return Err(RelayError::Closed {
                vm: self.vm.clone(),
            });
        }
        Ok(())
    }

    /// Runs a part; whether it did well. If not, all ends.
    fn run(&self, part: impl FnOnce() -> Result<(), RelayError>) -> bool {
        part().map_err(|error| self.fail(error)).is_ok()
    }

    fn count(&self, bytes: usize) {
        self.moved.fetch_add(bytes as u64, Relaxed);
    }

    fn error(&self, channel: Channel, error: CarryError) -> RelayError {
        match error {
            CarryError::Read(source) => self.read_error(channel, source),
            CarryError::Stream(source) => self.stream_error(channel, source),
            CarryError::Sink(source) => self.sink_error(channel, source),
        }
    }

    fn read_error(&self, channel: Channel, source: io::Error) -> RelayError {
        RelayError::Read {
            vm: self.vm.clone(),
            channel,
            source,
        }
    }

    fn write_error(&self, channel: Channel, source: io::Error) -> RelayError {
        RelayError::Write {
            vm: self.vm.clone(),
            channel,
            source,
        }
    }

    fn stream_error(&self, channel: Channel, source: StreamError) -> RelayError {
        RelayError::Stream {
            vm: self.vm.clone(),
            channel,
            source,
        }
    }

    fn fault(&self, channel: Channel, fault: Fault) -> RelayError {
        self.stream_error(channel, StreamError { offset: 0, fault })
    }

    fn sink_error(&self, channel: Channel, error: SinkError) -> RelayError {
        match error {
            SinkError::Gone => RelayError::Closed {
                vm: self.vm.clone(),
            },
            SinkError::Write(source) => self.write_error(channel, source),
            SinkError::Items(fault) => self.fault(channel, fault),
            SinkError::Refused(why) => self.write_error(channel, io::Error::other(why)),
        }
    }
}

fn joined(thread: thread::ScopedJoinHandle<'_, bool>) -> bool {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
