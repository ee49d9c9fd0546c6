//! What goes over a host's network, looked through for known bytes.

use crate::topology::Host;
use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Length of a needle.
const LEN: usize = 48;
/// Needles taken from a guest's RAM.
const COUNT: usize = 64;
/// Room in the kernel for packets not yet looked at.
const ROOM: usize = 64 << 20;

/// Pieces of different pages of guest RAM, each of them nowhere else by chance.
///
/// # Errors
/// When the file cannot be read or has too few pages of varied content.
pub fn needles(ram: &Path) -> Result<Vec<[u8; LEN]>> {
    let ram = fs::read(ram).with_context(|| ram.display().to_string())?;
    let (pages, _) = ram.as_chunks::<4096>();
    let pieces = pages.iter().filter_map(|page| {
        let piece: [u8; LEN] = page[1024..1024 + LEN].try_into().ok()?;
        let varied = piece.iter().collect::<HashSet<_>>().len() > LEN / 2;
        varied.then_some(piece)
    });
    let all: Vec<_> = pieces.collect::<HashSet<_>>().into_iter().collect();
    ensure!(
        all.len() >= COUNT,
        "only {} pages of varied content",
        all.len()
    );
    Ok(all.into_iter().take(COUNT).collect())
}

/// A look at everything a host sends and receives. Dropping it ends it.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Seen>>>,
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Bytes looked through, headers included.
    pub bytes: u64,
    /// Needles found, each once.
    pub found: usize,
}

impl Capture {
    /// Starts to look for `needles` at `host`.
    ///
    /// # Errors
    /// When there is no packet socket to be had.
    pub fn start(host: &Host, needles: &[[u8; LEN]]) -> Result<Capture> {
        let packets = host.ns.inside(|| {
            let fd = socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::EthAll,
            )?;
            setsockopt(&fd, sockopt::RcvBufForce, &ROOM)?;
            setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50))?;
            Ok(fd)
        })?;
        // By their first eight bytes.
        let mut starts: HashMap<[u8; 8], Vec<[u8; LEN]>> = HashMap::new();
        for needle in needles {
            let start = needle.first_chunk().context("needles are longer")?;
            starts.entry(*start).or_default().push(*needle);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut packet = vec![0; 1 << 17];
            let mut found: HashSet<[u8; LEN]> = HashSet::new();
            let mut seen = Seen::default();
            // Hosts are never silent for long, since agents of a rack tell each
            // other of the core link: what waits when the end is wished is
            // looked at, and no more than fits the room.
            let mut left = usize::MAX;
            while left > 0 {
                let flags = if ended.load(Ordering::Relaxed) {
                    left = left.min(ROOM);
                    MsgFlags::MSG_DONTWAIT
                } else {
                    MsgFlags::empty()
                };
                match recv(packets.as_raw_fd(), &mut packet, flags) {
                    Ok(len) => {
                        seen.bytes += len as u64;
                        left = left.saturating_sub(len.max(1));
                        for at in packet[..len].windows(LEN) {
                            let here = at.first_chunk().and_then(|start| starts.get(start));
                            let same = |needle: &&[u8; LEN]| needle[..] == *at;
                            found.extend(here.into_iter().flatten().filter(same));
                        }
                    }
                    Err(nix::Error::EAGAIN) if ended.load(Ordering::Relaxed) => break,
                    Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            seen.found = found.len();
            Ok(seen)
        });
        Ok(Capture {
            stop,
            thread: Some(thread),
        })
    }

    /// Looks at what is still waiting, and ends.
    ///
    /// # Errors
    /// When looking failed.
    pub fn finish(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("ended already")?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
