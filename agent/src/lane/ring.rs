//! One io_uring over one connection: the only module that talks to the ring.
//!
//! It keeps the kernel's and Rust's ideas of memory in step: a buffer that a
//! send may still read is held behind an `Arc` until the kernel's last
//! completion for it, received bytes are lent to a callback before their
//! buffer goes back to the kernel, and a ring that cannot be brought to rest
//! leaks its memory rather than free it under the kernel.
#![allow(unsafe_code)]

use super::pool::{BUF_LEN, BufferPool, PoolBuf};
use super::provided::{GROUP, Provided, map};
use super::setup::{BUFS_PER_REGISTRATION, RingError, build, register};
use super::tcp;
use super::waker::Waker;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use memmap2::MmapRaw;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// `IORING_SEND_ZC_REPORT_USAGE`: tell in the notification whether data was
/// copied after all (linux/io_uring.h).
const SEND_ZC_REPORT_USAGE: u16 = 8;
/// `IORING_NOTIF_USAGE_ZC_COPIED`, in the result of a notification.
const NOTIF_USAGE_ZC_COPIED: u32 = 1 << 31;
/// Completions that end a gathering wait early.
const GATHER_UP_TO: usize = 8;

const TAG_SEND: u64 = 1 << 32;
const TAG_RECV: u64 = 2 << 32;
const TAG_WAKE: u64 = 3 << 32;

/// Bytes a send reads from.
#[derive(Debug)]
pub(super) enum SendMem {
    /// A pool buffer; goes by registered memory if its pool is registered.
    Pool(PoolBuf),
    /// Small control frames.
    Small(Vec<u8>),
}

impl SendMem {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            SendMem::Pool(buf) => buf.bytes(),
            SendMem::Small(bytes) => bytes,
        }
    }
}

/// What has happened on a ring.
#[derive(Debug)]
pub(super) enum Completion<'a> {
    /// The send pushed last took this many bytes.
    Sent(io::Result<usize>),
    /// The kernel has let go of a zero-copy send's memory.
    Released { copied: bool },
    /// Bytes from the peer, to be overwritten at will.
    Data(&'a mut [u8]),
    /// The peer ended the connection.
    Eof,
    /// Receiving failed.
    RecvFailed(io::Error),
    /// Another thread called [`Waker::wake`].
    Woken,
}

/// Where received bytes land.
enum RecvMem {
    Multishot(Provided),
    Single(MmapRaw),
}

/// A ring on a connection. Use from one thread only.
pub(super) struct Ring {
    // First: dropped before the memory the kernel may touch.
    uring: IoUring,
    stream: TcpStream,
    waker: Waker,
    /// Pools whose memory is registered, with the index of each one's first
    /// entry.
    pools: Vec<(BufferPool, u16)>,
    /// Memory of sends, until their last completion.
    sends: Vec<Option<Arc<SendMem>>>,
    recv: RecvMem,
    recv_armed: bool,
    wake_armed: bool,
    peer: String,
    done: Vec<(u64, i32, u32)>,
    enters: u64,
    /// The kernel can gather completions for a while.
    gathers: bool,
}

/// How a ring is to be made.
pub(super) struct RingConfig<'a> {
    /// Pools to register for zero-copy sends.
    pub(super) pools: &'a [&'a BufferPool],
    /// Number (a power of two) and length of receive buffers.
    pub(super) recv_buffers: (u16, u32),
    /// Run completions only when this thread asks for them. Off where sends
    /// should go on while the thread compresses.
    pub(super) deferred: bool,
}

impl Ring {
    /// Sets up a ring for `stream`, whose other end is called `peer` in logs.
    pub(super) fn new(
        stream: TcpStream,
        peer: &str,
        waker: Waker,
        config: &RingConfig<'_>,
    ) -> Result<Ring, RingError> {
        let uring = build(config.deferred).map_err(RingError::Setup)?;
        let pools = register(&uring, config.pools)?;
        let gathers = uring.params().is_feature_min_timeout();
        let (count, len) = config.recv_buffers;
        let recv = match Provided::new(&uring, count, len) {
            Ok(provided) => RecvMem::Multishot(provided),
            Err(error) => {
                tracing::warn!(peer, %error, "no provided buffers: lane receives one at a time");
                RecvMem::Single(map(len as usize * 4).map_err(RingError::Resources)?)
            }
        };
        Ok(Ring {
            uring,
            stream,
            waker,
            pools,
            sends: Vec::new(),
            recv,
            recv_armed: false,
            wake_armed: false,
            peer: peer.to_owned(),
            done: Vec::with_capacity(64),
            enters: 0,
            gathers,
        })
    }

    /// The connection.
    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// System calls made (`io_uring_enter`).
    pub(super) fn enters(&self) -> u64 {
        self.enters
    }

    /// Whether receiving is multishot.
    pub(super) fn multishot(&self) -> bool {
        matches!(self.recv, RecvMem::Multishot(_))
    }

    /// Memory for receiving, in bytes.
    pub(super) fn recv_bytes(&self) -> usize {
        match &self.recv {
            RecvMem::Multishot(provided) => provided.bytes(),
            RecvMem::Single(memory) => memory.len(),
        }
    }

    /// Starts sending `mem[from..to]`; one send may be under way at a time.
    /// With `zero_copy` and registered memory it is a `SEND_ZC`, which also
    /// yields a [`Completion::Released`]; returns whether it is one.
    pub(super) fn send(
        &mut self,
        mem: &Arc<SendMem>,
        from: usize,
        to: usize,
        zero_copy: bool,
    ) -> io::Result<bool> {
        let bytes = &mem.bytes()[from..to];
        let fd = Fd(self.stream.as_raw_fd());
        let flags = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        let registered = match &**mem {
            SendMem::Pool(buf) if zero_copy => self.registration(buf),
            _ => None,
        };
        let slot = self.slot();
        let entry = match registered {
            Some(index) => opcode::SendZc::new(fd, bytes.as_ptr(), bytes.len() as u32)
                .buf_index(Some(index))
                .zc_flags(SEND_ZC_REPORT_USAGE)
                .flags(flags)
                .build(),
            None => opcode::Send::new(fd, bytes.as_ptr(), bytes.len() as u32)
                .flags(flags)
                .build(),
        };
        self.sends[slot] = Some(Arc::clone(mem));
        // SAFETY: the bytes are kept by `sends[slot]` until the last
        // completion of this entry, and are not written while an Arc holds
        // them; the fd is open as long as the ring.
        let pushed = unsafe { self.push(&entry.user_data(TAG_SEND | slot as u64)) };
        if let Err(error) = pushed {
            self.sends[slot] = None;
            return Err(error);
        }
        Ok(registered.is_some())
    }

    /// Submits what is new and waits until something completes, at most
    /// `limit` (not at all if zero).
    pub(super) fn wait(&mut self, limit: Duration) -> io::Result<()> {
        self.wait_gathering(limit, Duration::ZERO)
    }

    /// Like [`wait`](Self::wait), but for `gather` (below `limit`) only several
    /// completions end the wait, where the kernel can do that (6.12).
    pub(super) fn wait_gathering(&mut self, limit: Duration, gather: Duration) -> io::Result<()> {
        self.arm()?;
        let timespec = Timespec::from(limit);
        let mut args = SubmitArgs::new().timespec(&timespec);
        let mut want = usize::from(self.uring.completion().is_empty());
        if want > 0 && !gather.is_zero() && self.gathers {
            args = args.min_wait_usec(gather.as_micros() as u32);
            want = GATHER_UP_TO;
        }
        self.enters += 1;
        match self.uring.submitter().submit_with_args(want, &args) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Submits what is new without waiting; costs nothing if there is nothing.
    pub(super) fn kick(&mut self) -> io::Result<()> {
        self.arm()?;
        if self.uring.submission().is_empty() {
            return Ok(());
        }
        self.enters += 1;
        match self.uring.submit() {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Hands every completion there is to `handle`, stopping at its first
    /// error (the rest is lost: the caller gives the connection up).
    pub(super) fn reap<E>(
        &mut self,
        mut handle: impl FnMut(Completion<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut done = std::mem::take(&mut self.done);
        done.clear();
        done.extend(
            self.uring
                .completion()
                .map(|c| (c.user_data(), c.result(), c.flags())),
        );
        let mut outcome = Ok(());
        for &(user_data, result, flags) in &done {
            // After an error the bookkeeping goes on, the handler rests.
            let mut tell = |completion: Completion<'_>| {
                if outcome.is_ok() {
                    outcome = handle(completion);
                }
            };
            match user_data & !0xffff_ffff {
                TAG_SEND => {
                    self.send_done((user_data & 0xffff_ffff) as usize, result, flags, &mut tell)
                }
                TAG_RECV => self.recv_done(result, flags, &mut tell),
                _ => {
                    self.wake_armed &= cqueue::more(flags);
                    self.waker.clear();
                    tell(Completion::Woken);
                }
            }
        }
        self.done = done;
        outcome
    }

    fn send_done(
        &mut self,
        slot: usize,
        result: i32,
        flags: u32,
        tell: &mut dyn FnMut(Completion<'_>),
    ) {
        if !cqueue::more(flags) {
            self.sends[slot] = None;
        }
        if cqueue::notif(flags) {
            tell(Completion::Released {
                copied: result as u32 & NOTIF_USAGE_ZC_COPIED != 0,
            });
        } else {
            tell(Completion::Sent(outcome(result)));
        }
    }

    fn recv_done(&mut self, result: i32, flags: u32, tell: &mut dyn FnMut(Completion<'_>)) {
        match &mut self.recv {
            RecvMem::Multishot(provided) => {
                self.recv_armed &= cqueue::more(flags);
                if let Some(id) = cqueue::buffer_select(flags) {
                    let len = result.max(0) as usize;
                    // SAFETY: the kernel gave buffer `id` to this completion
                    // and will not touch it until `provide` below.
                    let bytes = unsafe { provided.filled(id, len) };
                    if !bytes.is_empty() {
                        tell(Completion::Data(bytes));
                    }
                    provided.provide(id);
                    if len > 0 {
                        return;
                    }
                }
            }
            RecvMem::Single(memory) => {
                self.recv_armed = false;
                if result > 0 {
                    let len = (result as usize).min(memory.len());
                    // SAFETY: the one receive into `memory` has completed and
                    // wrote `len` bytes; the next is armed only later.
                    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr(), len) };
                    return tell(Completion::Data(bytes));
                }
            }
        }
        match outcome(result) {
            Ok(0) => tell(Completion::Eof),
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                // Out of buffers: they are provided again by now.
                Some(libc::ENOBUFS | libc::EINTR | libc::EAGAIN) => {}
                Some(libc::EINVAL) if self.multishot() => self.no_multishot(tell),
                _ => tell(Completion::RecvFailed(error)),
            },
        }
    }

    /// The kernel takes provided buffers but not multishot receive.
    fn no_multishot(&mut self, tell: &mut dyn FnMut(Completion<'_>)) {
        tracing::warn!(peer = %self.peer, "no multishot receive: lane receives one at a time");
        let len = self.recv_bytes();
        match map(len) {
            Ok(memory) => {
                let _ = self.uring.submitter().unregister_buf_ring(GROUP);
                self.recv = RecvMem::Single(memory);
            }
            Err(error) => tell(Completion::RecvFailed(error)),
        }
    }

    /// Queues the receive and the wake-up poll if they are not pending.
    fn arm(&mut self) -> io::Result<()> {
        if !self.wake_armed {
            let fd = Fd(self.waker.fd().as_raw_fd());
            let poll = opcode::PollAdd::new(fd, libc::POLLIN as u32)
                .multi(true)
                .build();
            // SAFETY: a poll touches no memory; the event's fd lives in `waker`.
            unsafe { self.push(&poll.user_data(TAG_WAKE))? };
            self.wake_armed = true;
        }
        if !self.recv_armed {
            let fd = Fd(self.stream.as_raw_fd());
            let entry = match &self.recv {
                RecvMem::Multishot(_) => opcode::RecvMulti::new(fd, GROUP).build(),
                RecvMem::Single(memory) => {
                    opcode::Recv::new(fd, memory.as_mut_ptr(), memory.len() as u32).build()
                }
            };
            // SAFETY: the kernel writes only to provided buffers or to
            // `memory`, which live until the ring is at rest (see Drop) and
            // are not read before its completion.
            unsafe { self.push(&entry.user_data(TAG_RECV))? };
            self.recv_armed = true;
        }
        Ok(())
    }

    /// # Safety
    /// What `entry` points to must stay valid until its last completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        for _ in 0..2 {
            // SAFETY: passed on to the caller.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.enters += 1;
            self.uring.submit()?;
        }
        Err(io::Error::other("a lane's submission queue stays full"))
    }

    fn slot(&mut self) -> usize {
        match self.sends.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.sends.push(None);
                self.sends.len() - 1
            }
        }
    }

    /// The registration entry that covers `buf`, if its pool is registered.
    fn registration(&self, buf: &PoolBuf) -> Option<u16> {
        let (pool, first) = self.pools.iter().find(|(pool, _)| buf.belongs_to(pool))?;
        let offset = buf.bytes().as_ptr().addr() - pool.region().0.addr();
        Some(first + (offset / BUF_LEN / BUFS_PER_REGISTRATION) as u16)
    }

    /// Ends the connection and brings the ring to rest, at most `limit`;
    /// returns whether it is.
    fn rest(&mut self, limit: Duration) -> bool {
        if self.sends.iter().any(Option::is_some) {
            // Buffers about to be reused must not be retransmitted from.
            tcp::abort(&self.stream);
        } else {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        let end = Instant::now() + limit;
        while self.recv_armed || self.sends.iter().any(Option::is_some) {
            if Instant::now() >= end {
                return false;
            }
            // Not `wait`: nothing may be armed anew.
            let timespec = Timespec::from(Duration::from_millis(10));
            let args = SubmitArgs::new().timespec(&timespec);
            let _ = self.uring.submitter().submit_with_args(1, &args);
            let done: Vec<_> = self
                .uring
                .completion()
                .map(|c| (c.user_data(), c.flags()))
                .collect();
            for (user_data, flags) in done {
                match user_data & !0xffff_ffff {
                    _ if cqueue::more(flags) => {}
                    TAG_SEND => self.sends[(user_data & 0xffff_ffff) as usize] = None,
                    TAG_RECV => self.recv_armed = false,
                    _ => {}
                }
            }
        }
        true
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.rest(Duration::from_secs(2)) {
            return;
        }
        tracing::error!(
            peer = %self.peer,
            "a lane's ring does not come to rest: leaking its buffers, since the kernel may still use them"
        );
        for mem in self.sends.drain(..).flatten() {
            std::mem::forget(mem);
        }
        for (pool, _) in self.pools.drain(..) {
            std::mem::forget(pool);
        }
        if let Ok(empty) = map(4096) {
            std::mem::forget(std::mem::replace(&mut self.recv, RecvMem::Single(empty)));
        }
    }
}

fn outcome(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}
