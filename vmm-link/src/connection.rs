//! A connection between agent and VMM: whole frames, and descriptors.

use crate::wire::{HEADER, Header, MAX_FDS, WireError};
use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg, sockopt::PeerCredentials,
};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use thiserror::Error;

/// Why a connection cannot go on.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// The other side has closed it, between two messages.
    #[error("the connection was closed")]
    Closed,
    /// Sending or receiving failed, or took too long.
    #[error("the connection broke")]
    Io(#[from] io::Error),
    /// What came is not of the protocol.
    #[error("the other side does not keep to the protocol")]
    Wire(#[from] WireError),
    /// Another user's process.
    #[error(
        "process {pid} of user {uid} is on the other side; root or this process's own user has to be"
    )]
    Peer {
        /// Its number.
        pid: i32,
        /// Its user.
        uid: u32,
    },
}

/// One connection. Both sides use it; each message is sent whole.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    out: Vec<u8>,
    body: Vec<u8>,
}

impl Connection {
    /// Takes a connected socket, if root or our own user is on its other side.
    ///
    /// # Errors
    /// Somebody else is, or the socket cannot be asked.
    pub fn new(stream: UnixStream) -> Result<Connection, ConnectionError> {
        let peer =
            nix::sys::socket::getsockopt(&stream, PeerCredentials).map_err(io::Error::from)?;
        if peer.uid() != 0 && peer.uid() != nix::unistd::geteuid().as_raw() {
            return Err(ConnectionError::Peer {
                pid: peer.pid(),
                uid: peer.uid(),
            });
        }
        Ok(Connection {
            stream,
            out: Vec::new(),
            body: Vec::new(),
        })
    }

    /// The process on the other side (of its `connect` or `listen`).
    ///
    /// # Errors
    /// The socket cannot be asked.
    pub fn peer_pid(&self) -> io::Result<i32> {
        Ok(nix::sys::socket::getsockopt(&self.stream, PeerCredentials)?.pid())
    }

    /// How long sending or receiving may stand still from now on.
    ///
    /// # Errors
    /// The socket refuses it.
    pub fn set_limit(&self, limit: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(limit))?;
        self.stream.set_write_timeout(Some(limit))
    }

    /// As [`Connection::receive`], but a message may be as long in coming as it
    /// likes; once it has begun, `limit` holds.
    ///
    /// # Errors
    /// As [`Connection::receive`].
    pub fn receive_some_day(&mut self, limit: Duration) -> Result<(u16, &[u8]), ConnectionError> {
        self.stream.set_read_timeout(None)?;
        let (header, first) = self.begin()?;
        self.stream.set_read_timeout(Some(limit))?;
        self.go_on(header, first)
    }

    /// Another handle of the socket, to shut it down from elsewhere.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn handle(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// Ends the connection for both sides: what comes next is not to be trusted.
    pub fn close(&self) {
        // Fails only if it has ended already.
        let _over = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Sends what `encode` appends: whole frames.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send(&mut self, encode: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        self.out.clear();
        encode(&mut self.out);
        self.stream.write_all(&self.out)
    }

    /// As [`Connection::send`], with descriptors beside its first byte.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send_with(
        &mut self,
        fds: &[BorrowedFd<'_>],
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> io::Result<()> {
        self.out.clear();
        encode(&mut self.out);
        let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = loop {
            let message = [ControlMessage::ScmRights(&raw)];
            let part = [IoSlice::new(&self.out)];
            match sendmsg::<()>(
                self.stream.as_raw_fd(),
                &part,
                &message,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Err(nix::errno::Errno::EINTR) => {}
                done => break done?,
            }
        };
        self.stream.write_all(&self.out[sent..])
    }

    /// Receives a frame: its kind and its body.
    ///
    /// # Errors
    /// Nothing whole or nothing valid comes.
    pub fn receive(&mut self) -> Result<(u16, &[u8]), ConnectionError> {
        let (header, first) = self.begin()?;
        self.go_on(header, first)
    }

    /// As [`Connection::receive`], with the descriptors that come along.
    ///
    /// # Errors
    /// As [`Connection::receive`], or more descriptors than may be.
    pub fn receive_with_fds(&mut self) -> Result<(u16, &[u8], Vec<OwnedFd>), ConnectionError> {
        let mut header = [0; HEADER];
        let (first, fds) = self.receive_fds(&mut header)?;
        if first == 0 {
            return Err(ConnectionError::Closed);
        }
        let (kind, body) = self.go_on(header, first)?;
        Ok((kind, body, fds))
    }

    /// The first bytes of a header, at least one.
    fn begin(&mut self) -> Result<([u8; HEADER], usize), ConnectionError> {
        let mut header = [0; HEADER];
        loop {
            match self.stream.read(&mut header) {
                Ok(0) => return Err(ConnectionError::Closed),
                Ok(first) => return Ok((header, first)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The rest of a message of whose header `first` bytes are there.
    fn go_on(
        &mut self,
        mut header: [u8; HEADER],
        first: usize,
    ) -> Result<(u16, &[u8]), ConnectionError> {
        self.stream.read_exact(&mut header[first..])?;
        let header = Header::decode(header)?;
        self.body.resize(header.len, 0);
        self.stream.read_exact(&mut self.body)?;
        Ok((header.kind, &self.body))
    }

    fn receive_fds(&self, into: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), ConnectionError> {
        let mut space = cmsg_space!([i32; MAX_FDS]);
        let mut part = [IoSliceMut::new(into)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = loop {
            match recvmsg::<()>(self.stream.as_raw_fd(), &mut part, Some(&mut space), flags) {
                Err(nix::errno::Errno::EINTR) => {}
                done => break done.map_err(io::Error::from)?,
            }
        };
        let mut fds = Vec::new();
        for control in message.cmsgs().map_err(io::Error::from)? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                fds.extend(raw.into_iter().map(owned));
            }
        }
        Ok((message.bytes, fds))
    }
}

/// A descriptor that the kernel has just put into our table.
#[allow(unsafe_code)]
fn owned(raw: i32) -> OwnedFd {
    // SAFETY: recvmsg made it for us and told nobody else.
    unsafe { OwnedFd::from_raw_fd(raw) }
}
