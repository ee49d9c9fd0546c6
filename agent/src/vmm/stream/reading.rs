//! A stream of QEMU's that is being read: by a thread, into the feed and the
//! residue; and the residue on its way to the target.

use super::feed::Feed;
use super::filter::{Chunk, Filter, MainBlock, Residue};
use crate::vmm::qemu_stream::channel::{FIRST, Kind, kind};
use crate::vmm::qemu_stream::main_channel::StreamParser;
use crate::vmm::qemu_stream::{CarryError, carry};
use nix::sys::socket::{MsgFlags, send};
use std::error::Error;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Nothing is read for so long after QEMU has connected: it takes its first
/// measure of the bandwidth after 100 ms, and a first pass that was through
/// before would end its pre-copy whatever the guest has written meanwhile.
const FIRST_MEASURE: Duration = Duration::from_millis(120);

/// Dropped, the socket is shut down: QEMU's migration fails and its guest runs
/// on, unless it is through.
#[derive(Debug)]
pub(in crate::vmm) struct Reading {
    socket: Arc<UnixStream>,
    /// `None` once it is being sent.
    residue: Option<Outgoing>,
}

/// What is left of the stream, as it comes.
#[derive(Debug)]
pub(in crate::vmm) struct Outgoing {
    chunks: UnboundedReceiver<Chunk>,
    held: Arc<AtomicUsize>,
}

impl Reading {
    /// Begins to read a stream of QEMU's. `first` was read before.
    pub(in crate::vmm) fn start(
        vm: &str,
        socket: UnixStream,
        first: Vec<u8>,
        feed: Arc<Feed>,
        block: MainBlock,
    ) -> io::Result<Reading> {
        let to = feed.clone();
        Reading::by(vm, socket, feed, move |socket, residue| {
            read(socket, first, Filter::new(to, block, residue))
        })
    }

    /// Begins to read by `reader`, in a thread of its own. It has not failed once
    /// all of the stream has gone to the feed and the residue; else it says why
    /// it broke off.
    pub(in crate::vmm) fn by(
        vm: &str,
        socket: UnixStream,
        feed: Arc<Feed>,
        reader: impl FnOnce(&UnixStream, Residue) -> Result<(), String> + Send + 'static,
    ) -> io::Result<Reading> {
        socket.set_nonblocking(false)?;
        let socket = Arc::new(socket);
        let (to, chunks) = unbounded_channel();
        let held = Arc::<AtomicUsize>::default();
        let residue = Residue {
            to,
            held: held.clone(),
        };
        let reading = socket.clone();
        std::thread::Builder::new()
            .name(format!("stream-{vm}"))
            .spawn(move || {
                if let Err(why) = reader(&reading, residue) {
                    feed.fail(&why);
                    // The VMM's migration fails, and its guest runs on.
                    let _gone = reading.shutdown(Shutdown::Both);
                }
            })?;
        Ok(Reading {
            socket,
            residue: Some(Outgoing { chunks, held }),
        })
    }

    /// The connection to QEMU, for the target's answers.
    pub(in crate::vmm) fn socket(&self) -> Arc<UnixStream> {
        self.socket.clone()
    }

    /// The residue, once.
    pub(in crate::vmm) fn take_residue(&mut self) -> Option<Outgoing> {
        self.residue.take()
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        // QEMU may have closed it already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Outgoing {
    /// The next piece, which is not held any more; `None` if the stream broke off.
    pub(in crate::vmm) async fn next(&mut self) -> Option<Chunk> {
        let next = self.chunks.recv().await;
        if let Some(Chunk::Bytes(bytes)) = &next {
            self.held.fetch_sub(bytes.len(), Relaxed);
        }
        next
    }

    /// Sends all of it. Says whether the stream was whole.
    pub(in crate::vmm) async fn send(
        mut self,
        mut to: impl AsyncWrite + Unpin,
    ) -> io::Result<bool> {
        loop {
            match self.next().await {
                Some(Chunk::Bytes(bytes)) => {
                    to.write_all(&bytes).await?;
                    to.flush().await?;
                }
                Some(Chunk::End) => {
                    // Only of this direction: the target still answers.
                    to.shutdown().await?;
                    return Ok(true);
                }
                None => return Ok(false),
            }
        }
    }
}

/// Hands QEMU some bytes of its return path, for which its buffer has room
/// unless it hangs.
pub(in crate::vmm) fn hand_back(to: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let how = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let sent = send(to.as_raw_fd(), bytes, how)?;
        bytes = &bytes[sent..];
    }
    Ok(())
}

/// Reads the stream to its end; why it broke off.
fn read(mut socket: &UnixStream, mut first: Vec<u8>, filter: Filter) -> Result<(), String> {
    std::thread::sleep(FIRST_MEASURE);
    if first.len() < FIRST {
        let begun = first.len();
        first.resize(FIRST, 0);
        let rest = socket.read_exact(&mut first[begun..]);
        rest.map_err(|e| format!("QEMU sent nothing: {e}"))?;
    }
    let mut four = [0; FIRST];
    four.copy_from_slice(&first[..FIRST]);
    match kind(four) {
        Ok(Kind::Main) => {}
        Ok(Kind::Multifd) => return Err("it is one of multifd, which was switched off".to_owned()),
        Err(fault) => return Err(fault.to_string()),
    }
    let mut parser = StreamParser::default();
    carry(socket, &first, &mut parser, filter, |_| ()).map_err(|error| {
        let unread = parser.raw().map(|from| format!(" ({from})"));
        let cause = match &error {
            CarryError::Stream(error) => error.source(),
            CarryError::Read(source) => Some(source as &dyn Error),
            CarryError::Sink(_) => None,
        };
        let cause = cause.map(|cause| format!(": {cause}"));
        format!(
            "{error}{}{}",
            cause.unwrap_or_default(),
            unread.unwrap_or_default()
        )
    })
}
