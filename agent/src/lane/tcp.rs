//! Socket options and readings that std does not have.
#![allow(unsafe_code)]

use socket2::SockRef;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// What the kernel knows about a lane's connection (`TCP_INFO`): the pacer's
/// second signal, where traffic that no agent meters shows as queueing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct TcpReading {
    /// Smoothed round-trip time, in microseconds.
    pub rtt_us: u32,
    /// The lowest round-trip time of the kernel's window, in microseconds: the
    /// path without its queues. 0 if the kernel does not tell.
    pub min_rtt_us: u32,
    /// Segments retransmitted since the connection began.
    pub retransmits: u32,
    /// Bytes written and not yet sent.
    pub notsent_bytes: u32,
    /// Segments sent and not acknowledged, times the segment size: what is in
    /// the network.
    pub inflight_bytes: u32,
    /// The rate at which data was delivered lately, in bytes per second.
    pub delivery_rate: u64,
}

/// Reads `TCP_INFO`.
pub fn reading(stream: &TcpStream) -> io::Result<TcpReading> {
    // Read as bytes and by offset (linux/tcp.h, a fixed ABI): libc's struct
    // ends before the fields wanted here.
    let mut info = [0u8; 256];
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: `info` is writable for `len` bytes and the fd is open; the
    // kernel writes at most `len` bytes and sets `len` to how many.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut len,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // Fields beyond `len` stay zero, as documented.
    let u32_at =
        |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    let snd_mss = u32_at(16);
    Ok(TcpReading {
        inflight_bytes: u32_at(24).saturating_mul(snd_mss),
        rtt_us: u32_at(68),
        retransmits: u32_at(100),
        notsent_bytes: u32_at(144),
        min_rtt_us: u32_at(148),
        delivery_rate: u64::from(u32_at(160)) | u64::from(u32_at(164)) << 32,
    })
}

/// Makes the kernel space the connection's packets to at most `rate` bytes a
/// second; `None` lifts the limit.
pub fn set_max_pacing_rate(stream: &TcpStream, rate: Option<u64>) -> io::Result<()> {
    let rate: u64 = rate.unwrap_or(u64::MAX);
    // SAFETY: the value is a live u64 and its size is given.
    let done = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const rate).cast(),
            size_of::<u64>() as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Options of every lane connection, on both ends.
pub fn prepare(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    // Data the peer's kernel does not take for this long ends the connection,
    // also once the lane's thread has closed it.
    socket.set_tcp_user_timeout(Some(patience.saturating_mul(2)))
}

/// Ends the connection at once: what is still queued is dropped, the peer sees
/// a reset. After this the kernel reads no buffer of the connection any more.
pub(super) fn abort(stream: &TcpStream) {
    let unspec = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    // SAFETY: a whole, live sockaddr is passed with its size. AF_UNSPEC
    // dissolves the connection (tcp_disconnect).
    let done = unsafe {
        libc::connect(
            stream.as_raw_fd(),
            &raw const unspec,
            size_of::<libc::sockaddr>() as libc::socklen_t,
        )
    };
    if done != 0 {
        // Not connected any more, or busy: an orderly end must do.
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}
