//! Who is at the other end of a Unix socket, by the kernel's word.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Supplementary groups that fit without asking twice.
const USUAL_GROUPS: usize = 64;
/// More than the kernel lets a process have (`NGROUPS_MAX`).
const MOST_GROUPS: usize = 1 << 16;

/// A process as it was when it connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Its effective user id.
    pub uid: u32,
    /// Its effective group id.
    pub gid: u32,
    /// Its process id; 0 if it is in another PID namespace.
    pub pid: i32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
}

impl Caller {
    /// Reads `SO_PEERCRED` and `SO_PEERGROUPS` of a connected Unix socket.
    pub fn of(socket: &impl AsFd) -> io::Result<Caller> {
        use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
        let peer = getsockopt(socket, PeerCredentials)?;
        Ok(Caller {
            uid: peer.uid(),
            gid: peer.gid(),
            pid: peer.pid(),
            groups: groups(socket)?,
        })
    }

    /// Whether it runs with this group, as its own or a supplementary one.
    pub fn is_in(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.contains(&gid)
    }
}

fn groups(socket: &impl AsFd) -> io::Result<Vec<u32>> {
    let mut gids = vec![0u32; USUAL_GROUPS];
    loop {
        let mut len = size_of_val(gids.as_slice()) as libc::socklen_t;
        // SAFETY: `gids` is writable for `len` bytes and the fd is open; the
        // kernel writes at most `len` bytes, whole gids, and sets `len`.
        let done = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                gids.as_mut_ptr().cast(),
                &mut len,
            )
        };
        let needed = len as usize / size_of::<u32>();
        if done == 0 {
            gids.truncate(needed);
            return Ok(gids);
        }
        let error = io::Error::last_os_error();
        // Too small: the kernel has put the length it needs into `len`.
        if error.raw_os_error() != Some(libc::ERANGE)
            || needed <= gids.len()
            || needed > MOST_GROUPS
        {
            return Err(error);
        }
        gids.resize(needed, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_kernel_says_who_this_process_is() {
        let (one, _other) = UnixStream::pair().unwrap();
        let caller = Caller::of(&one).unwrap();
        assert_eq!(caller.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(caller.pid, std::process::id() as i32);
        let mut mine: Vec<u32> = nix::unistd::getgroups()
            .unwrap()
            .iter()
            .map(|gid| gid.as_raw())
            .collect();
        let mut seen = caller.groups.clone();
        mine.sort_unstable();
        seen.sort_unstable();
        assert_eq!(seen, mine);
        assert!(caller.is_in(nix::unistd::getegid().as_raw()));
        assert!(!caller.is_in(u32::MAX - 7));
    }
}
