//! A VM that its manager moves, on the host it is moved to.

use super::cloud_hypervisor as chv;
use super::error::ManagedError;
use super::{Dialect, ManagedFacts, look};
use crate::vmm::cloud_hypervisor::wire::Response;
use crate::vmm::launch::blocking;
use crate::vmm::process::VmProcess;
use crate::vmm::qemu_stream::Parse;
use crate::vmm::qemu_stream::reply::{Reply, ReplyParser};
use crate::vmm::relay::relay_after;
use crate::vmm::stream::ProcessRam;
use std::io;
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::watch;

/// How long the VMM may take to listen: its manager has it do so before the
/// source begins.
const LISTEN_LIMIT: Duration = Duration::from_secs(5);
/// How long a Cloud Hypervisor may take to make the VM that waits.
const CONFIGURE_LIMIT: Duration = Duration::from_secs(20);
const LISTEN_LOOK: Duration = Duration::from_millis(50);

/// Dropped, the connection to the VMM is closed, and nothing else is done to it:
/// a QEMU that has not got all of its stream ends by itself.
#[derive(Debug)]
pub struct TargetVm {
    facts: ManagedFacts,
    process: Arc<VmProcess>,
    ram: Arc<ProcessRam>,
    link: Arc<Link>,
}

impl TargetVm {
    /// Connects to the VMM that waits on `path`, finds its process and opens its
    /// RAM for placing pages. `binaries` are what a VMM may be.
    pub async fn prepare(
        path: &Path,
        facts: &ManagedFacts,
        binaries: &[PathBuf],
    ) -> Result<TargetVm, ManagedError> {
        let vm = || facts.name.clone();
        let until = Instant::now() + LISTEN_LIMIT;
        let socket = loop {
            match UnixStream::connect(path).await {
                Ok(socket) => break socket,
                Err(_) if Instant::now() < until => tokio::time::sleep(LISTEN_LOOK).await,
                Err(source) => {
                    return Err(ManagedError::NobodyListens {
                        vm: vm(),
                        path: path.to_owned(),
                        source,
                    });
                }
            }
        };
        let failed = |source| ManagedError::Socket {
            vm: vm(),
            doing: "sharing it",
            source,
        };
        let socket = socket.into_std().map_err(failed)?;
        let socket = match &facts.dialect {
            Dialect::Qemu { .. } => socket,
            Dialect::CloudHypervisor { config } => {
                let (vm, config) = (vm(), config.clone());
                let configuring = move || chv::configure(&vm, socket, &config, CONFIGURE_LIMIT);
                blocking(configuring).await?
            }
        };
        let of = socket.try_clone().map_err(failed)?;
        let (process, ram, _) = look(facts, of, binaries.to_vec(), true).await?;
        let closer = socket.try_clone().map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let socket = UnixStream::from_std(socket).map_err(failed)?;
        Ok(TargetVm {
            facts: facts.clone(),
            process,
            ram,
            link: Arc::new(Link {
                vm: vm(),
                qemu: matches!(facts.dialect, Dialect::Qemu { .. }),
                closer,
                socket: Mutex::new(Some(socket)),
                shut: watch::channel(None).0,
            }),
        })
    }

    /// The VMM.
    pub fn process(&self) -> &Arc<VmProcess> {
        &self.process
    }

    /// What is known of the VM.
    pub fn facts(&self) -> &ManagedFacts {
        &self.facts
    }

    /// Guest RAM, for placing pages. They are where the guest will find them.
    pub fn ram(&self) -> &Arc<ProcessRam> {
        &self.ram
    }

    /// The connection to the VMM.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Closes the connection to the VMM: one that has not got all of its stream
    /// ends by itself.
    pub fn close(&self) {
        // It may have closed it already.
        let _ = self.link.closer.shutdown(Shutdown::Both);
    }

    /// Waits until the VMM has said that it has everything.
    pub async fn wait_arrived(&self, limit: Duration) -> Result<(), ManagedError> {
        let mut shut = self.link.shut.subscribe();
        let said = tokio::time::timeout(limit, shut.wait_for(Option::is_some)).await;
        match said.map(|said| said.map(|said| *said)) {
            Ok(Ok(Some(0))) => Ok(()),
            _ => Err(ManagedError::NotLoaded {
                vm: self.facts.name.clone(),
            }),
        }
    }
}

impl Drop for TargetVm {
    fn drop(&mut self) {
        self.close();
    }
}

/// The connection to the VMM that waits.
#[derive(Debug)]
pub struct Link {
    vm: String,
    /// Whether it speaks QEMU's dialect.
    qemu: bool,
    /// The same socket, for closing it while it is in use.
    closer: std::os::unix::net::UnixStream,
    socket: Mutex<Option<UnixStream>>,
    /// What SHUT said; not 0 if the connection ended without it.
    shut: watch::Sender<Option<u32>>,
}

impl Link {
    /// Carries what the source agent sends to the VMM, and its answers back,
    /// until both have ended. The first byte may take until `begin`.
    pub async fn play(
        &self,
        source: impl AsyncRead + AsyncWrite,
        begin: Duration,
        idle: Duration,
    ) -> Result<(), ManagedError> {
        let socket = self.socket.lock();
        let socket = socket.unwrap_or_else(PoisonError::into_inner).take();
        let socket = socket.ok_or_else(|| ManagedError::NotBegun {
            vm: self.vm.clone(),
        })?;
        let overheard = Overheard {
            socket,
            answers: match self.qemu {
                true => Answers::Qemu(ReplyParser::default(), Vec::new()),
                false => Answers::CloudHypervisor(chv::Answers::default()),
            },
            shut: &self.shut,
        };
        let played = relay_after(begin, source, overheard, idle).await;
        // Not if it has said something else.
        self.shut.send_if_modified(|shut| {
            let silent = shut.is_none();
            shut.get_or_insert(u32::MAX);
            silent
        });
        match played {
            Ok(_) => Ok(()),
            // The source hangs up once it has heard SHUT.
            Err(_) if *self.shut.borrow() == Some(0) => Ok(()),
            Err(source) => Err(ManagedError::Play {
                vm: self.vm.clone(),
                source,
            }),
        }
    }
}

enum Answers {
    Qemu(ReplyParser, Vec<u8>),
    CloudHypervisor(chv::Answers),
}

/// The VMM's socket; listens in what it says for the word that it has
/// everything, and changes nothing.
struct Overheard<'a> {
    socket: UnixStream,
    answers: Answers,
    shut: &'a watch::Sender<Option<u32>>,
}

impl Overheard<'_> {
    fn hear(&mut self, said: &[u8]) -> io::Result<()> {
        let wrong = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let (parser, rest) = match &mut self.answers {
            Answers::Qemu(parser, rest) => (parser, rest),
            Answers::CloudHypervisor(answers) => {
                // The first is to the state.
                if let Some(answer) = answers.hear(said)? {
                    let failed = u32::from(answer != Response::Ok);
                    self.shut.send_if_modified(|shut| {
                        let first = shut.is_none();
                        shut.get_or_insert(failed);
                        first
                    });
                }
                return Ok(());
            }
        };
        rest.extend_from_slice(said);
        let mut at = 0;
        while let Some((reply, used)) = parser.next(&rest[at..]).map_err(wrong)? {
            at += used;
            if let Reply::Shut(said, _) = reply {
                self.shut.send_replace(Some(said));
            }
        }
        rest.drain(..at);
        Ok(())
    }
}

impl AsyncRead for Overheard<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.socket).poll_read(cx, buf);
        if let Poll::Ready(Ok(())) = read {
            self.hear(&buf.filled()[before..])?;
        }
        read
    }
}

impl AsyncWrite for Overheard<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::qemu_stream::samples::message;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const LIMIT: Duration = Duration::from_secs(10);

    fn link() -> (Arc<Link>, UnixStream) {
        let (agent, vmm) = std::os::unix::net::UnixStream::pair().unwrap();
        for end in [&agent, &vmm] {
            end.set_nonblocking(true).unwrap();
        }
        let link = Link {
            vm: "g1".to_owned(),
            qemu: true,
            closer: agent.try_clone().unwrap(),
            socket: Mutex::new(Some(UnixStream::from_std(agent).unwrap())),
            shut: watch::channel(None).0,
        };
        (Arc::new(link), UnixStream::from_std(vmm).unwrap())
    }

    #[tokio::test]
    async fn shut_is_heard_and_passed_on_and_the_source_may_hang_up_then() {
        let (link, mut vmm) = link();
        let (mut source, played) = tokio::io::duplex(4096);
        let playing = link.clone();
        let playing = tokio::spawn(async move { playing.play(played, LIMIT, LIMIT).await });
        source.write_all(b"device state").await.unwrap();
        let mut got = [0; 12];
        vmm.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"device state");
        let said = [message(2, &[0; 4]), message(1, &[0; 4])].concat();
        vmm.write_all(&said).await.unwrap();
        drop(vmm);
        let mut heard = vec![0; said.len()];
        source.read_exact(&mut heard).await.unwrap();
        assert_eq!(heard, said);
        drop(source);
        playing.await.unwrap().unwrap();
        assert_eq!(*link.shut.borrow(), Some(0));
    }

    #[tokio::test]
    async fn a_vmm_that_ends_without_shut_has_not_got_it_all() {
        let (link, vmm) = link();
        let (source, played) = tokio::io::duplex(4096);
        drop((vmm, source));
        let _ended = link.play(played, LIMIT, LIMIT).await;
        assert_ne!(*link.shut.borrow(), Some(0));
        assert!(link.shut.borrow().is_some());
        // There is one connection, for one stream.
        let (_source, played) = tokio::io::duplex(64);
        assert!(link.play(played, LIMIT, LIMIT).await.is_err());
    }
}
