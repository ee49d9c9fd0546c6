//! The beginning of a connection to a VMM: who it is, and its RAM.

use super::client::Asked;
use super::error::LinkClientError;
use super::session::wrong;
use crate::types::PAGE_SIZE;
use drover_vmm::Connection;
use drover_vmm::wire::{Answer, LogKind, RegionInfo, Request};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long for the first: it may have to see first that an agent has died, in
/// the middle of what that had asked.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// What a VMM says of itself, and what it is asked by from here on.
#[derive(Debug)]
pub(super) struct Greeting {
    pub(super) connection: Connection,
    pub(super) log: LogKind,
    pub(super) regions: Vec<RegionInfo>,
    /// Guest RAM, all of it.
    pub(super) file: File,
    pub(super) len: u64,
    pub(super) pid: i32,
}

impl Greeting {
    /// Connects to the VMM of `vm` at its socket.
    pub(super) fn exchange(vm: &str, socket: &Path) -> Asked<Greeting> {
        let stream = UnixStream::connect(socket).map_err(|source| LinkClientError::Connect {
            vm: vm.to_owned(),
            socket: socket.to_owned(),
            source,
        })?;
        let doing = "greeting";
        let broke = |source| LinkClientError::Connection {
            vm: vm.to_owned(),
            doing,
            source,
        };
        let mut connection = Connection::new(stream).map_err(broke)?;
        let said = (|| {
            let pid = connection.peer_pid()?;
            connection.set_limit(GREETING_LIMIT)?;
            connection.send(|out| Request::Hello.encode(out))?;
            Ok::<_, std::io::Error>(pid)
        })();
        let pid = said.map_err(|e| broke(e.into()))?;
        let (kind, body, mut fds) = connection.receive_with_fds().map_err(broke)?;
        let answer = Answer::decode(kind, body).map_err(|e| broke(e.into()))?;
        let Answer::Welcome {
            log,
            regions,
            fds: announced,
            ..
        } = answer
        else {
            return Err(wrong(vm, doing, &answer));
        };
        let layout = |what: String| LinkClientError::Layout {
            vm: vm.to_owned(),
            what,
        };
        if announced != 1 || fds.len() != 1 {
            return Err(layout(format!("{announced} files ({} came)", fds.len())));
        }
        let file = File::from(fds.remove(0));
        let len = covered(&regions).map_err(layout)?;
        Ok(Greeting {
            connection,
            log,
            regions,
            file,
            len,
            pid,
        })
    }

    /// The path of guest RAM, if there is one that leads there. A memfd, or a file
    /// that was removed, is found by our own descriptor.
    pub(super) fn path(file: &File) -> PathBuf {
        let fd = PathBuf::from(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            file.as_raw_fd()
        ));
        let named = std::fs::read_link(&fd);
        match named {
            Ok(path) if same(file, std::fs::metadata(&path)) => path,
            _ => fd,
        }
    }

    /// Whether the VMM is the one of an earlier connection.
    pub(super) fn is_of(&self, pid: i32, regions: &[RegionInfo], file: &File) -> bool {
        self.pid == pid && self.regions == regions && same(file, self.file.metadata())
    }
}

fn same(file: &File, other: std::io::Result<std::fs::Metadata>) -> bool {
    let id = |m: &std::fs::Metadata| (m.dev(), m.ino());
    matches!((&file.metadata(), &other), (Ok(a), Ok(b)) if id(a) == id(b))
}

/// How long a file is that the regions, wherever the guest has them, make up
/// without gap and without overlap.
fn covered(regions: &[RegionInfo]) -> Result<u64, String> {
    let mut parts: Vec<_> = regions.iter().map(|r| r.offset..r.offset + r.len).collect();
    parts.sort_by_key(|part| part.start);
    let end = parts.iter().try_fold(0, |at, part| {
        if part.start == at {
            Ok(part.end)
        } else {
            Err(at)
        }
    });
    match end {
        Ok(len) if len / PAGE_SIZE as u64 <= u64::from(u32::MAX) => Ok(len),
        Ok(len) => Err(format!("{len} bytes")),
        Err(at) => Err(format!("not made of one part at {at:#x} of its file")),
    }
}
