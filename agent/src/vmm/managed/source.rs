//! A VM that its manager moves, on the host it is moved from.

use super::cloud_hypervisor::{self as chv, Begun};
use super::error::ManagedError;
use super::head::{self, Head, QemuHead};
use super::{Dialect, Duplex, ManagedFacts, look};
use crate::types::PAGE_SIZE;
use crate::vmm::launch::blocking;
use crate::vmm::process::VmProcess;
use crate::vmm::qemu_stream::Parse;
use crate::vmm::qemu_stream::reply::{Reply, ReplyParser};
use crate::vmm::ram::GuestRam;
use crate::vmm::source::PageRead;
use crate::vmm::stream::{Feed, Outgoing, Reading, Stand, StreamPages, hand_back, loses_pages};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, Interest};
use tokio::task::AbortHandle;

/// How long QEMU may take to begin its stream.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// How often it is looked whether QEMU has closed the connection.
const LOOK: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub struct SourceVm {
    facts: ManagedFacts,
    process: Arc<VmProcess>,
    kvm: bool,
    ram: Arc<dyn PageRead>,
    /// Its VMM has no dirty log for us.
    unlogged: bool,
    feed: Arc<Feed>,
    stream: Mutex<Stream>,
    /// The target has everything: what its VMM said, until that is handed on.
    loaded: Mutex<Option<Loaded>>,
    watch: AbortHandle,
}

/// How far the stream is.
#[derive(Debug)]
enum Stream {
    /// So much of it was read, and QEMU waits.
    Waits(Box<(UnixStream, Opening)>),
    /// It is being read.
    Read(Reading),
    /// Nothing will come of it any more, or nothing more is to come.
    Over,
}

/// What was read of it so far.
#[derive(Debug)]
enum Opening {
    Qemu(QemuHead),
    CloudHypervisor(Begun),
}

/// What is left to be done when the target has everything.
#[derive(Debug)]
enum Loaded {
    /// QEMU's SHUT is to be handed on.
    Shut(Vec<u8>),
    /// Cloud Hypervisors have *Complete* to exchange.
    CloudHypervisor(chv::Loaded),
}

impl SourceVm {
    /// Looks at what has connected to the VM's socket: reads the beginning of
    /// its stream, finds the VMM and opens guest RAM for reading. The VMM is not
    /// touched. Dropping it closes the connection: QEMU then lets the guest run
    /// on, unless it is through.
    ///
    /// `binaries` are what a VMM may be.
    pub async fn open(
        name: &str,
        domain: &str,
        socket: tokio::net::UnixStream,
        binaries: &[PathBuf],
    ) -> Result<SourceVm, ManagedError> {
        let head = head::read(name, &socket, HEAD_LIMIT).await?;
        let failed = |doing| {
            move |source| ManagedError::Socket {
                vm: name.to_owned(),
                doing,
                source,
            }
        };
        let socket = socket.into_std().map_err(failed("taking it over"))?;
        let mut local = None;
        let (opening, ram_bytes, dialect) = match head {
            Head::Qemu(head) => {
                let block = head.main.name.clone();
                let bytes = head.main.bytes;
                (Opening::Qemu(head), bytes, Dialect::Qemu { block })
            }
            Head::CloudHypervisor(first) => {
                let (vm, of) = (name.to_owned(), socket.try_clone());
                let of = of.map_err(failed("sharing it"))?;
                let beginning = move || chv::begin(&vm, &of, &first, HEAD_LIMIT);
                let mut begun = blocking(beginning).await?;
                local = begun.local.take();
                let config = begun.config.clone();
                let bytes = begun.ram_bytes;
                let dialect = Dialect::CloudHypervisor { config };
                (Opening::CloudHypervisor(begun), bytes, dialect)
            }
        };
        let facts = ManagedFacts {
            name: name.to_owned(),
            ram_bytes,
            dialect,
            domain: domain.to_owned(),
        };
        let of = socket.try_clone().map_err(failed("sharing it"))?;
        let (process, ram, kvm) = look(&facts, of, binaries.to_vec(), false).await?;
        let unlogged = local.is_some();
        let ram: Arc<dyn PageRead> = match local {
            None => ram,
            Some(fd) => {
                // Where others of this host find it, as long as it is open here.
                let path = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
                let path = Path::new(&path);
                let ram = GuestRam::from_file(fd.into(), path, facts.ram_bytes, false);
                let ram = ram.map_err(|source| ManagedError::Ram {
                    vm: name.to_owned(),
                    source,
                })?;
                Arc::new(ram)
            }
        };
        let pages = (facts.ram_bytes / PAGE_SIZE as u64) as u32;
        let feed = Arc::new(Feed::paced(name, pages));
        let watched = socket.try_clone().map_err(failed("sharing it"))?;
        let watch = tokio::spawn(watch(watched, feed.clone())).abort_handle();
        Ok(SourceVm {
            facts,
            process,
            kvm,
            ram,
            unlogged,
            feed,
            stream: Mutex::new(Stream::Waits(Box::new((socket, opening)))),
            loaded: Mutex::default(),
            watch,
        })
    }

    /// What the target has to know.
    pub fn facts(&self) -> &ManagedFacts {
        &self.facts
    }

    /// The VMM.
    pub fn process(&self) -> &Arc<VmProcess> {
        &self.process
    }

    /// Guest RAM as it is now.
    pub fn ram(&self) -> &Arc<dyn PageRead> {
        &self.ram
    }

    /// Whether something can still come of its stream; if not, why.
    pub fn check(&self) -> Result<(), ManagedError> {
        match self.feed.failure() {
            None => Ok(()),
            Some(why) => Err(self.broken(why)),
        }
    }

    /// For the scan thread.
    pub fn pages(&self) -> StreamPages {
        StreamPages::new(self.feed.clone(), self.ram.clone(), self.distrust())
    }

    /// Whether all RAM is to be compared once the guest stands still: where
    /// nothing is logged, and because QEMU 7.2 under TCG loses dirty pages of some
    /// sizes, and libvirt makes every size one of them.
    fn distrust(&self) -> bool {
        match self.facts.dialect {
            Dialect::Qemu { .. } => loses_pages(self.kvm, self.facts.ram_bytes),
            Dialect::CloudHypervisor { .. } => self.unlogged,
        }
    }

    /// Begins to read the stream. From here on QEMU stops the guest when it
    /// thinks that little is left.
    pub fn begin(&self) -> Result<(), ManagedError> {
        let mut stream = self.stream();
        match std::mem::replace(&mut *stream, Stream::Over) {
            Stream::Waits(waits) => {
                let (socket, opening) = *waits;
                let (name, feed) = (&self.facts.name, self.feed.clone());
                let reading = match opening {
                    Opening::Qemu(head) => {
                        Reading::start(name, socket, head.bytes, feed, head.main)
                    }
                    Opening::CloudHypervisor(begun) => {
                        let to = feed.clone();
                        Reading::by(name, socket, feed, move |socket, residue| {
                            chv::read(socket, begun, &to, &residue)
                        })
                    }
                };
                *stream = Stream::Read(reading.map_err(|source| ManagedError::Thread {
                    vm: name.clone(),
                    source,
                })?);
                Ok(())
            }
            other => {
                *stream = other;
                Err(self.not_begun())
            }
        }
    }

    /// Waits until QEMU has stopped the guest: it had when its last section of
    /// RAM began.
    pub async fn stopped(&self) -> Result<(), ManagedError> {
        let mut stand = self.feed.stand();
        let still = stand.wait_for(|stand| *stand != Stand::Runs).await;
        match still.map(|found| found.clone()) {
            Ok(Stand::Still(_)) => Ok(()),
            Ok(Stand::Over(why)) => Err(self.broken(why)),
            Ok(Stand::Runs) | Err(_) => Err(self.not_begun()),
        }
    }

    /// Since when the guest has stood still, if it does.
    pub fn stopped_at(&self) -> Option<Instant> {
        match *self.feed.stand().borrow() {
            Stand::Still(since) => Some(since),
            _ => None,
        }
    }

    /// Sends what is left of the stream to `target` and hands its answers back,
    /// but for the one by which the target's VMM says that it has everything
    /// (QEMU's SHUT, Cloud Hypervisor's answer to the state), until that has come.
    /// All pages must be in place.
    pub async fn state_out(
        &self,
        target: impl Duplex + 'static,
        limit: Duration,
    ) -> Result<(), ManagedError> {
        let (socket, residue) = {
            let mut stream = self.stream();
            let Stream::Read(reading) = &mut *stream else {
                return Err(self.not_begun());
            };
            let residue = reading.take_residue().ok_or_else(|| self.not_begun())?;
            (reading.socket(), residue)
        };
        let both = async {
            match self.facts.dialect {
                Dialect::Qemu { .. } => self.until_shut(target, residue, &socket).await,
                Dialect::CloudHypervisor { .. } => {
                    let loading = chv::load(&self.facts.name, Box::new(target), residue);
                    let loaded = loading.await?;
                    *self.loaded() = Some(Loaded::CloudHypervisor(loaded));
                    Ok(())
                }
            }
        };
        match tokio::time::timeout(limit, both).await {
            Ok(done) => done,
            Err(_) => Err(self.not_forwarded(io::ErrorKind::TimedOut.into())),
        }
    }

    async fn until_shut(
        &self,
        target: impl Duplex,
        residue: Outgoing,
        socket: &UnixStream,
    ) -> Result<(), ManagedError> {
        let (from_target, to_target) = tokio::io::split(target);
        // QEMU waits for SHUT and does not close before: if its stream ends, its
        // migration has failed or was cancelled.
        let forwarding = async {
            match residue.send(to_target).await {
                Ok(true) => self.broken("QEMU gave it up before the target had all of it".into()),
                Ok(false) => self.broken(self.feed.failure().unwrap_or_default()),
                Err(source) => self.not_forwarded(source),
            }
        };
        let answering = async {
            let shut = answers(from_target, socket).await;
            match shut.map_err(|source| self.not_forwarded(source))? {
                (0, bytes) => {
                    *self.loaded() = Some(Loaded::Shut(bytes));
                    Ok(())
                }
                _ => Err(self.not_loaded()),
            }
        };
        tokio::select! {
            error = forwarding => Err(error),
            answered = answering => answered,
        }
    }

    /// The point of no return: hands on what was held back, after which the
    /// migration is complete. From here on its manager decides where the guest
    /// runs; of Cloud Hypervisors, the target lets it run now and the source ends.
    pub async fn complete(&self) -> Result<(), ManagedError> {
        let loaded = self.loaded().take().ok_or_else(|| self.not_begun())?;
        let socket = match &*self.stream() {
            Stream::Read(reading) => reading.socket(),
            _ => return Err(self.not_begun()),
        };
        let vm = &self.facts.name;
        match loaded {
            Loaded::Shut(bytes) => {
                let handed = hand_back(&socket, &bytes);
                handed.map_err(|source| self.not_forwarded(source))
            }
            Loaded::CloudHypervisor(loaded) => match loaded.complete(vm, &socket).await {
                Err(error @ ManagedError::Unconfirmed { .. }) => {
                    self.keep_still();
                    Err(error)
                }
                done => done,
            },
        }
    }

    /// Never closes the connection, as long as this agent lives: the VMM waits at
    /// its other end, and would let the guest run, which may run elsewhere.
    fn keep_still(&self) {
        let stream = std::mem::replace(&mut *self.stream(), Stream::Over);
        // Dropped, it would be shut down.
        std::mem::forget(stream);
    }

    /// Closes the connection: QEMU gives its migration up and its guest runs on,
    /// unless it is complete.
    pub fn break_off(&self) {
        self.feed.fail("the move was given up");
        *self.stream() = Stream::Over;
    }

    fn stream(&self) -> MutexGuard<'_, Stream> {
        // Nothing panics while it holds the lock; the state is whole in any case.
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn not_loaded(&self) -> ManagedError {
        ManagedError::NotLoaded {
            vm: self.facts.name.clone(),
        }
    }

    fn loaded(&self) -> MutexGuard<'_, Option<Loaded>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn broken(&self, why: String) -> ManagedError {
        ManagedError::Broken {
            vm: self.facts.name.clone(),
            why,
        }
    }

    fn not_forwarded(&self, source: io::Error) -> ManagedError {
        ManagedError::Forward {
            vm: self.facts.name.clone(),
            source,
        }
    }

    fn not_begun(&self) -> ManagedError {
        ManagedError::NotBegun {
            vm: self.facts.name.clone(),
        }
    }
}

impl Drop for SourceVm {
    fn drop(&mut self) {
        self.watch.abort();
        self.break_off();
    }
}

/// Hands the target's answers to QEMU until SHUT comes: that, and what it said.
async fn answers(mut from: impl AsyncRead + Unpin, to: &UnixStream) -> io::Result<(u32, Vec<u8>)> {
    let mut parser = ReplyParser::default();
    let (mut buffer, mut begun) = ([0; 4096], 0);
    loop {
        let read = from.read(&mut buffer[begun..]).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let end = begun + read;
        let mut at = 0;
        while let Some((reply, used)) = parser
            .next(&buffer[at..end])
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?
        {
            at += used;
            match reply {
                Reply::Shut(said, bytes) => return Ok((said, bytes.to_vec())),
                reply => hand_back(to, reply.bytes())?,
            }
        }
        // What is left is shorter than a message's head.
        buffer.copy_within(at..end, 0);
        begun = end - at;
    }
}

/// Tells the feed when QEMU has closed its end: its migration was cancelled, or
/// has failed.
async fn watch(socket: UnixStream, feed: Arc<Feed>) {
    let Ok(socket) = tokio::net::UnixStream::from_std(socket) else {
        return;
    };
    loop {
        match socket.ready(Interest::READABLE).await {
            Ok(ready) if ready.is_read_closed() => {
                return feed.fail("QEMU closed it: its migration was cancelled, or has failed");
            }
            Ok(_) => tokio::time::sleep(LOOK).await,
            Err(error) => return feed.fail(&error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::qemu_stream::samples::message;
    use std::io::Read;
    use tokio::io::AsyncWriteExt;

    /// Until SHUT is handed on, QEMU can be told by closing the socket that
    /// nothing came of it.
    #[tokio::test]
    async fn answers_go_back_as_they_come_and_shut_is_kept() {
        let (agent, mut qemu) = UnixStream::pair().unwrap();
        let (mut target, from_target) = tokio::io::duplex(64);
        let pong = message(2, &[0, 0, 0, 3]);
        let shut = message(1, &[0; 4]);
        let said = [pong.clone(), shut.clone()].concat();
        let saying = tokio::spawn(async move {
            for byte in said {
                target.write_all(&[byte]).await.unwrap();
            }
            target
        });
        let (value, kept) = answers(from_target, &agent).await.unwrap();
        assert_eq!((value, kept), (0, shut));
        drop(saying.await.unwrap());
        drop(agent);
        let mut heard = Vec::new();
        qemu.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, pong);
    }

    #[tokio::test]
    async fn a_target_that_ends_or_talks_nonsense_has_not_got_it_all() {
        let (agent, _qemu) = UnixStream::pair().unwrap();
        for said in [message(2, &[0; 4]), message(1, &[0; 9]), Vec::new()] {
            let (mut target, from_target) = tokio::io::duplex(64);
            target.write_all(&said).await.unwrap();
            drop(target);
            assert!(answers(from_target, &agent).await.is_err(), "{said:?}");
        }
    }
}
