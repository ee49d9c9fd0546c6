//! What the kernel knows about a lane's TCP connection.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// The part of `TCP_INFO` that tells of queues on the way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Mean deviation of the round-trip time.
    pub rtt_deviation: Duration,
    /// Shortest round-trip time the kernel remembers (five minutes).
    pub min_rtt: Duration,
    /// Segments sent again since the connection began.
    pub retransmits: u32,
    /// Data segments sent since the connection began, repeats included.
    pub data_segments: u32,
    /// Time since data was last sent.
    pub idle: Duration,
    /// Largest payload of a segment, bytes.
    pub mss: u32,
}

/// Length of `struct tcp_info` up to and with `tcpi_data_segs_out` (Linux 4.6).
const NEEDED: usize = 160;

impl TcpInfo {
    /// Asks the kernel.
    ///
    /// # Errors
    /// `ENOTSOCK` or `EOPNOTSUPP` if `socket` is no TCP socket;
    /// `Unsupported` if the kernel reports less than is needed here.
    pub fn read(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let mut raw = [0u8; 256];
        let mut len = raw.len() as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes to `raw`, which is
        // that long, and the number it wrote to `len`.
        let status = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                raw.as_mut_ptr().cast(),
                &mut len,
            )
        };
        if status != 0 {
            return Err(io::Error::last_os_error());
        }
        Self::parse(&raw[..len as usize]).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel's TCP_INFO ends before min_rtt: Linux 4.6 or newer is needed",
            )
        })
    }

    /// Reads the kernel's bytes; the offsets are those of the kernel's
    /// `struct tcp_info`, which only ever grows at its end.
    fn parse(raw: &[u8]) -> Option<Self> {
        if raw.len() < NEEDED {
            return None;
        }
        let word = |at: usize| {
            let bytes = [raw[at], raw[at + 1], raw[at + 2], raw[at + 3]];
            u32::from_ne_bytes(bytes)
        };
        let micros = |at: usize| Duration::from_micros(word(at).into());
        Some(TcpInfo {
            mss: word(16),
            idle: Duration::from_millis(word(44).into()),
            rtt: micros(68),
            rtt_deviation: micros(72),
            retransmits: word(100),
            min_rtt: micros(148),
            data_segments: word(156),
        })
    }

    /// Time spent in queues, on the cautious side: twice the deviation is not
    /// counted. What scatters is a receiver that waits before it acknowledges,
    /// or a CPU that was busy; a queue that stands is steady.
    pub fn queue(&self) -> Duration {
        self.rtt
            .saturating_sub(self.rtt_deviation * 2)
            .saturating_sub(self.min_rtt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn tells_of_a_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        sender.write_all(&[7; 4096]).unwrap();
        receiver.read_exact(&mut [0; 4096]).unwrap();
        let info = TcpInfo::read(sender.as_fd()).unwrap();
        assert!(info.data_segments >= 1);
        assert!(info.min_rtt > Duration::ZERO && info.min_rtt < Duration::from_secs(1));
        assert!(info.mss >= 500);
        assert!(info.queue() <= info.rtt);
    }

    #[test]
    fn refuses_what_is_no_tcp_socket() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(TcpInfo::read(file.as_fd()).is_err());
        assert_eq!(TcpInfo::parse(&[0; NEEDED - 1]), None);
    }
}
