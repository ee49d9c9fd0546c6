//! Cloud Hypervisor's dialect: `send-migration` into the VM's socket here, and
//! `receive-migration` on it there. [`crate::vmm::cloud_hypervisor`] has the
//! protocol.
//!
//! ```text
//! source                     source agent                target agent        target
//!  Start ───────────────────▶ Ok
//!  Config ──────────────────▶ (kept) ── facts ─────────────▶ Start, Config ──▶ Ok
//!        its turn:            Ok
//!  Memory, contents ────────▶ which, not what; Ok          pages into its memory
//!  State ───────────────────▶ residue, once sealed ────────────────────────▶ loads
//!                             (Ok is kept) ◀──────────────────────────────── Ok
//!        complete:            Ok
//!  Complete ────────────────▶ ─────────────────────────────────────────────▶ runs
//!  ends  ◀─────────────────── ◀───────────────────────────────────────────── Ok
//! ```
//!
//! A round's table is the dirty log. Cloud Hypervisor takes it *before* it reads
//! the contents, so whoever reads a page after its table sees what was written
//! before, and what is written later is in a later table, at the latest in the one
//! that it sends of the guest it has stopped.
//!
//! With `local=on` it sends the descriptor of its RAM before *Config*, no tables,
//! and stops the guest when *Config* is answered. All RAM has been sent by then;
//! what has changed since is found by comparing all of it, while the guest stands
//! still.

use super::Duplex;
use super::error::ManagedError;
use crate::types::{Gfn, PAGE_SIZE};
use crate::vmm::cloud_hypervisor::layout::Layout;
use crate::vmm::cloud_hypervisor::requests::{Event, RequestParser};
use crate::vmm::cloud_hypervisor::wire::{Command, HEAD_BYTES, Request, Response};
use crate::vmm::cloud_hypervisor::{Fault, Input, Sender};
use crate::vmm::stream::{Chunk, Feed, Outgoing, Residue, hand_back};
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes that are read at once.
const READ_BYTES: usize = 256 << 10;
/// How long the source may take for *Complete*, and the target to let its guest
/// run.
const COMPLETE_LIMIT: Duration = Duration::from_secs(20);
/// Pages that are reported at once.
const BATCH: usize = 64;

/// How a source's connection begins, that no QEMU's does.
pub(super) const FIRST: [u8; 4] = [Command::Start as u8, 0, 0, 0];

/// A migration that has begun: its source waits for the answer to *Config*.
#[derive(Debug)]
pub(super) struct Begun {
    parser: RequestParser,
    /// JSON, for the target.
    pub(super) config: Vec<u8>,
    /// Bytes of guest RAM.
    pub(super) ram_bytes: u64,
    /// The descriptor of its RAM, of a source with `local=on`: that keeps no
    /// dirty log, and stops the guest when *Config* is answered.
    pub(super) local: Option<OwnedFd>,
}

/// What one step of the beginning has told.
enum Said {
    More,
    Nothing,
    Started,
    Descriptor,
    Configured(Vec<u8>),
    GivenUp,
}

/// Takes the beginning of `vm`'s migration, of which `first` was read before, up to the
/// configuration. Blocks; no read takes longer than `limit`.
pub(super) fn begin(
    vm: &str,
    mut from: &UnixStream,
    first: &[u8],
    limit: Duration,
) -> Result<Begun, ManagedError> {
    let socket = |source| ManagedError::Socket {
        vm: vm.to_owned(),
        doing: "reading the beginning of the migration",
        source,
    };
    let unfit = |why: String| ManagedError::Unfit {
        vm: vm.to_owned(),
        why,
    };
    from.set_nonblocking(false).map_err(socket)?;
    from.set_read_timeout(Some(limit)).map_err(socket)?;
    let mut parser = RequestParser::default();
    let mut input = Input::begun(first);
    let mut local = None;
    loop {
        let step = parser
            .step(input.rest())
            .map_err(|fault| unfit(told(&fault)))?;
        let used = step.used;
        let said = match step.event {
            None if step.used == 0 => Said::More,
            Some(Event::Start) => Said::Started,
            Some(Event::MemoryFd { .. }) => Said::Descriptor,
            Some(Event::Config(json)) => Said::Configured(json.to_vec()),
            Some(Event::Abandon) => Said::GivenUp,
            None | Some(_) => Said::Nothing,
        };
        input.done(used);
        match said {
            Said::More => {
                if input.fill(from).map_err(socket)? == 0 {
                    return Err(ManagedError::Silent {
                        vm: vm.to_owned(),
                        what: "Cloud Hypervisor closed its migration's socket: its log says why"
                            .to_owned(),
                    });
                }
            }
            Said::Nothing => {}
            Said::Started => from.write_all(&Response::Ok.encode()).map_err(socket)?,
            Said::Descriptor => {
                let fd = input.take_fd();
                let fd = fd.ok_or_else(|| unfit("a descriptor of its RAM is missing".into()))?;
                // Of several, the layout tells, and is refused.
                local = Some(fd);
                from.write_all(&Response::Ok.encode()).map_err(socket)?;
            }
            Said::Configured(config) => {
                let ram_bytes = one_mapping(parser.layout()).map_err(unfit)?;
                if !input.rest().is_empty() || input.take_fd().is_some() {
                    return Err(unfit("it does not wait for answers".to_owned()));
                }
                from.set_read_timeout(None).map_err(socket)?;
                return Ok(Begun {
                    parser,
                    config,
                    ram_bytes,
                    local,
                });
            }
            Said::GivenUp => return Err(unfit("it was given up".to_owned())),
        }
    }
}

fn told(fault: &Fault) -> String {
    crate::types::chain(fault)
}

/// Bytes of guest RAM.
fn one_mapping(layout: &Layout) -> Result<u64, String> {
    match layout.mappings() {
        [one] => Ok(one.bytes),
        several => Err(format!(
            "its RAM is in {} mappings, one is taken: up to 3 GiB, in one zone, none hotplugged",
            several.len()
        )),
    }
}

/// Lets the source go on and reads what it sends to its end; why it broke off.
pub(super) fn read(
    mut from: &UnixStream,
    mut begun: Begun,
    feed: &Feed,
    residue: &Residue,
) -> Result<(), String> {
    let answer = |mut to: &UnixStream| {
        let answered = to.write_all(&Response::Ok.encode());
        answered.map_err(|error| format!("it cannot be answered: {error}"))
    };
    answer(from)?;
    let mut buffer = vec![0; READ_BYTES];
    let (mut start, mut end) = (0, 0);
    loop {
        let input = &buffer[start..end];
        if begun.parser.is_between() && is_state(input) {
            // It had stopped the guest when it asked for its last table.
            feed.stands_still(Instant::now());
            feed.complete();
            return rest(from, input, residue);
        }
        let step = begun.parser.step(input).map_err(|fault| told(&fault))?;
        if step.needs_more() {
            buffer.copy_within(start..end, 0);
            end -= start;
            start = 0;
            match from.read(&mut buffer[end..]) {
                Ok(0) => return Err("Cloud Hypervisor closed it: its log says why".to_owned()),
                Ok(n) => end += n,
                Err(error) => return Err(format!("it cannot be read: {error}")),
            }
            continue;
        }
        start += step.used;
        match step.event {
            Some(Event::Pages { start, data }) => report(feed, start, data.len())?,
            Some(Event::TableEnd) => answer(from)?,
            Some(Event::Abandon) => return Err("Cloud Hypervisor gave it up".to_owned()),
            _ => {}
        }
    }
}

/// Whether a state begins here. Its head may not be whole yet.
fn is_state(input: &[u8]) -> bool {
    let head = input.first_chunk::<HEAD_BYTES>();
    let request = head.and_then(|head| Request::parse(head).ok());
    request.is_some_and(|request| request.command == Command::State)
}

fn report(feed: &Feed, start: Gfn, bytes: usize) -> Result<(), String> {
    let pages = start.0..start.0 + (bytes / PAGE_SIZE) as u32;
    let pages: Vec<Gfn> = pages.map(Gfn).collect();
    for batch in pages.chunks(BATCH) {
        let reported = feed.report(batch, batch.len() * PAGE_SIZE);
        reported.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// The state and what follows it, unread.
fn rest(mut from: &UnixStream, begun: &[u8], residue: &Residue) -> Result<(), String> {
    let send = |bytes: &[u8]| {
        let sent = residue.send(bytes.to_vec(), "state");
        sent.map_err(|error| error.to_string())
    };
    send(begun)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return residue.end().map_err(|error| error.to_string()),
            Ok(n) => send(&buffer[..n])?,
            Err(error) => return Err(format!("it cannot be read: {error}")),
        }
    }
}

/// Begins the migration at the target, which then has the VM's RAM. Blocks.
pub(super) fn configure(
    vm: &str,
    socket: UnixStream,
    config: &[u8],
    limit: Duration,
) -> Result<UnixStream, ManagedError> {
    let unblocked = socket.set_nonblocking(false);
    unblocked.map_err(|source| ManagedError::Socket {
        vm: vm.to_owned(),
        doing: "setting it up",
        source,
    })?;
    let configured = || {
        let mut sender = Sender::start(vm, socket, limit)?;
        sender.config(config)?;
        Ok(sender.into_stream())
    };
    configured().map_err(|source| ManagedError::Target { source })
}

/// The target's VMM has all of the VM, and the source's waits to hear so.
pub(super) struct Loaded {
    /// *Complete* is to come.
    residue: Outgoing,
    target: Box<dyn Duplex>,
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Loaded")
    }
}

/// Sends the state to the target, until its VMM has said that it has loaded it.
pub(super) async fn load(
    vm: &str,
    mut target: Box<dyn Duplex>,
    mut residue: Outgoing,
) -> Result<Loaded, ManagedError> {
    let failed = |source| ManagedError::Forward {
        vm: vm.to_owned(),
        source,
    };
    let mut answer = [0; HEAD_BYTES];
    let mut heard = 0;
    while heard < answer.len() {
        tokio::select! {
            chunk = residue.next() => {
                let bytes = piece(vm, chunk)?;
                write(&mut target, &bytes).await.map_err(failed)?;
            }
            read = target.read(&mut answer[heard..]) => match read.map_err(failed)? {
                0 => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                n => heard += n,
            }
        }
    }
    match Response::parse(&answer) {
        Ok(Response::Ok) => Ok(Loaded { residue, target }),
        _ => Err(ManagedError::NotLoaded { vm: vm.to_owned() }),
    }
}

impl Loaded {
    /// Lets the source's VMM at the other end of `source` give the VM away, and the
    /// target's run it.
    ///
    /// # Errors
    /// After [`ManagedError::Unconfirmed`] the guest may run at the target: the
    /// source's must not be told anything then. After any other it does not.
    pub(super) async fn complete(self, vm: &str, source: &UnixStream) -> Result<(), ManagedError> {
        let Loaded {
            mut residue,
            mut target,
        } = self;
        let hand = |bytes: &[u8]| {
            hand_back(source, bytes).map_err(|source| ManagedError::Forward {
                vm: vm.to_owned(),
                source,
            })
        };
        hand(&Response::Ok.encode())?;
        let command = tokio::time::timeout(COMPLETE_LIMIT, residue.next()).await;
        let command = piece(vm, command.unwrap_or_default())?;
        let completing = async {
            write(&mut target, &command).await?;
            let mut answer = [0; HEAD_BYTES];
            target.read_exact(&mut answer).await?;
            Ok(answer)
        };
        let completed = match tokio::time::timeout(COMPLETE_LIMIT, completing).await {
            Ok(completed) => completed,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        let answer = completed.map_err(|source| ManagedError::Unconfirmed {
            vm: vm.to_owned(),
            source,
        })?;
        // It runs there, or not, whether the source is still here to hear so or not.
        let _may_be_gone = hand(&answer);
        match Response::parse(&answer) {
            Ok(Response::Ok) => Ok(()),
            _ => Err(ManagedError::NotLoaded { vm: vm.to_owned() }),
        }
    }
}

fn piece(vm: &str, chunk: Option<Chunk>) -> Result<Vec<u8>, ManagedError> {
    match chunk {
        Some(Chunk::Bytes(bytes)) => Ok(bytes),
        Some(Chunk::End) | None => Err(ManagedError::Broken {
            vm: vm.to_owned(),
            why: "its VMM gave it up before the target had all of it: its log says why".to_owned(),
        }),
    }
}

async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

/// What a target's answers say: loaded once, and then that it runs.
#[derive(Debug, Default)]
pub(super) struct Answers {
    rest: Vec<u8>,
}

impl Answers {
    /// Takes more bytes; the next whole answer.
    pub(super) fn hear(&mut self, said: &[u8]) -> io::Result<Option<Response>> {
        self.rest.extend_from_slice(said);
        let Some(head) = self.rest.first_chunk::<HEAD_BYTES>() else {
            return Ok(None);
        };
        let response = Response::parse(head);
        let response =
            response.map_err(|fault| io::Error::new(io::ErrorKind::InvalidData, fault))?;
        self.rest.drain(..HEAD_BYTES);
        Ok(Some(response))
    }
}

#[cfg(test)]
#[path = "cloud_hypervisor_tests.rs"]
mod tests;
