//! The process at the other end of a Unix socket. Not `SO_PEERCRED`, which
//! names whoever opened the connection: libvirt does, and hands it to QEMU.

use super::error::PeerError;
use crate::vmm::process::VmProcess;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use nix::sys::stat::fstat;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// A message's header, and `struct unix_diag_req`.
const REQUEST_BYTES: usize = 40;
/// A message's header, and `struct unix_diag_msg`.
const ANSWER_BYTES: usize = 32;
const HEADER_BYTES: usize = 16;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const UDIAG_SHOW_PEER: u32 = 4;
const UNIX_DIAG_PEER: u16 = 2;
/// How often holders are looked for.
const LOOK: Duration = Duration::from_millis(20);

/// The only process that holds the other end of `socket`; waits for it to be the
/// only one, and for the other end to be accepted.
pub(super) fn holder(socket: impl AsFd, limit: Duration) -> Result<VmProcess, PeerError> {
    let until = Instant::now() + limit;
    loop {
        // An end that has not been accepted has none yet.
        let inode = peer_inode(&socket)?;
        let found = match inode {
            0 => Vec::new(),
            inode => holders(inode).map_err(PeerError::Proc)?,
        };
        if let [pid] = found[..] {
            let process = VmProcess::open(pid)?;
            // What was opened by number is what was looked at before.
            if holds(pid, inode) {
                return Ok(process);
            }
        }
        if Instant::now() > until {
            let holders = found.len();
            return Err(PeerError::Holders { holders });
        }
        std::thread::sleep(LOOK);
    }
}

fn peer_inode(of: impl AsFd) -> Result<u32, PeerError> {
    let failed = |doing| {
        move |errno: Errno| PeerError::Diagnosis {
            doing,
            source: errno.into(),
        }
    };
    let own = fstat(of).map_err(failed("looking at the socket"))?.st_ino;
    // Inodes of sockets have 32 bits.
    let own = u32::try_from(own).map_err(|_| PeerError::Answer)?;
    let diag = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    );
    let diag = diag.map_err(failed("opening it"))?;
    let sent = send(diag.as_raw_fd(), &request(own), MsgFlags::empty());
    sent.map_err(failed("asking"))?;
    let mut answer = [0; 512];
    let read = recv(diag.as_raw_fd(), &mut answer, MsgFlags::empty());
    let read = read.map_err(failed("hearing its answer"))?;
    match parse(&answer[..read]) {
        Some(Ok(inode)) => Ok(inode),
        Some(Err(Errno::ENOENT)) => Err(PeerError::OtherNamespace),
        Some(Err(errno)) => Err(failed("asking")(errno)),
        None => Err(PeerError::Answer),
    }
}

fn request(inode: u32) -> [u8; REQUEST_BYTES] {
    let mut request = [0; REQUEST_BYTES];
    let mut put = |at: usize, bytes: &[u8]| request[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(REQUEST_BYTES as u32).to_ne_bytes());
    put(4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(6, &NLM_F_REQUEST.to_ne_bytes());
    put(HEADER_BYTES, &[libc::AF_UNIX as u8]);
    // In whatever state, this inode, and whichever socket has it.
    put(20, &u32::MAX.to_ne_bytes());
    put(24, &inode.to_ne_bytes());
    put(28, &UDIAG_SHOW_PEER.to_ne_bytes());
    put(32, &[0xff; 8]);
    request
}

/// The peer's inode in an answer, or the kernel's refusal.
fn parse(answer: &[u8]) -> Option<Result<u32, Errno>> {
    let u16_at = |at: usize| {
        let bytes = answer.get(at..at + 2)?;
        Some(u16::from_ne_bytes(bytes.try_into().ok()?))
    };
    let u32_at = |at: usize| {
        let bytes = answer.get(at..at + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    match u16_at(4)? {
        NLMSG_ERROR => {
            let errno = u32_at(HEADER_BYTES)? as i32;
            return Some(Err(Errno::from_raw(-errno)));
        }
        SOCK_DIAG_BY_FAMILY => {}
        _ => return None,
    }
    let mut at = ANSWER_BYTES;
    loop {
        let len = usize::from(u16_at(at)?);
        if u16_at(at + 2)? == UNIX_DIAG_PEER {
            return Some(Ok(u32_at(at + 4)?));
        }
        // Attributes are aligned to 4 bytes; none is shorter than its head.
        at += len.max(4).next_multiple_of(4);
    }
}

/// Processes with a descriptor of the socket. Those that go, or that may not be
/// looked at, are passed over.
fn holders(inode: u32) -> io::Result<Vec<i32>> {
    let pids = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let own = std::process::id() as i32;
    Ok(pids
        .filter(|pid| *pid != own && holds(*pid, inode))
        .collect())
}

fn holds(pid: i32, inode: u32) -> bool {
    let socket = format!("socket:[{inode}]");
    descriptors(pid).any(|link| link == Path::new(&socket))
}

/// Whether the VMM runs its guest by KVM.
pub(super) fn has_kvm(process: &VmProcess) -> bool {
    descriptors(process.pid()).any(|link| link == Path::new("anon_inode:kvm-vm"))
}

fn descriptors(pid: i32) -> impl Iterator<Item = std::path::PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    entries
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::{Command, Stdio};

    const LIMIT: Duration = Duration::from_secs(10);

    /// As libvirt does: one process opens the connection, another gets it.
    #[test]
    fn the_process_that_was_handed_the_connection_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("g1.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let opened = UnixStream::connect(&path).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let mut child = Command::new("cat")
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(opened)))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let found = holder(&accepted, LIMIT).unwrap();
        assert_eq!(found.pid(), child.id() as i32);
        assert!(!has_kvm(&found));
        // It is that connection.
        (&accepted).write_all(b"hello").unwrap();
        drop(accepted);
        let mut said = String::new();
        child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        assert_eq!(said, "hello");
        child.wait().unwrap();
    }

    #[test]
    fn an_end_that_is_accepted_late_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("g1.sock");
        // Its own holder does not count: the end of a child's does.
        let listener = UnixListener::bind(&path).unwrap();
        let opened = UnixStream::connect(&path).unwrap();
        let accepting = std::thread::spawn(move || {
            std::thread::sleep(4 * LOOK);
            let (accepted, _) = listener.accept().unwrap();
            Command::new("cat")
                .stdin(Stdio::from(std::os::fd::OwnedFd::from(accepted)))
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        });
        let found = holder(&opened, LIMIT).unwrap();
        drop(opened);
        let mut child = accepting.join().unwrap();
        assert_eq!(found.pid(), child.id() as i32);
        child.wait().unwrap();
    }

    #[test]
    fn an_end_that_nobody_else_holds_is_not_taken_for_anybodys() {
        let (one, _other) = UnixStream::pair().unwrap();
        let error = holder(&one, Duration::ZERO).unwrap_err();
        assert!(
            matches!(error, PeerError::Holders { holders: 0 }),
            "{error}"
        );
    }

    #[test]
    fn answers_of_any_sort_are_parsed_or_refused() {
        let mut answer = [0; ANSWER_BYTES + 16];
        answer[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        let attribute = |kind: u16, value: u32| {
            let mut bytes = [0; 8];
            bytes[..2].copy_from_slice(&8u16.to_ne_bytes());
            bytes[2..4].copy_from_slice(&kind.to_ne_bytes());
            bytes[4..].copy_from_slice(&value.to_ne_bytes());
            bytes
        };
        answer[32..40].copy_from_slice(&attribute(9, 5));
        answer[40..48].copy_from_slice(&attribute(UNIX_DIAG_PEER, 77));
        assert_eq!(parse(&answer), Some(Ok(77)));
        for len in 0..47 {
            assert_eq!(parse(&answer[..len]), None, "{len}");
        }
        // Attributes without a length do not keep it for ever.
        answer[32..].fill(0);
        assert_eq!(parse(&answer), None);
        answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        answer[16..20].copy_from_slice(&(-libc::ENOENT).to_ne_bytes());
        assert_eq!(parse(&answer), Some(Err(Errno::ENOENT)));
    }
}
