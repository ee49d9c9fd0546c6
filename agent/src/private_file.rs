//! Files that nobody but their owner may read: secrets and keys.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use thiserror::Error;
use zeroize::Zeroizing;

/// Mode of a private file.
pub const PRIVATE: u32 = 0o600;
/// Mode of a file everybody may read.
pub const PUBLIC: u32 = 0o644;

/// Why a private file cannot be used.
#[derive(Debug, Error)]
pub enum PrivateFileError {
    /// The file is missing.
    #[error("{0} does not exist")]
    Missing(PathBuf),
    /// Others can read it.
    #[error("{path} has mode {mode:04o}, so others can read it; run `chmod 0600 {path}`")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Somebody else could change it.
    #[error("{path} belongs to user {owner}, not to the agent's user; run `chown {uid} {path}`")]
    Owner {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Whom it must belong to.
        uid: u32,
    },
    /// A directory, a FIFO, or much too long.
    #[error("{0} is not a regular file of a sensible length; put the right one there")]
    NotAFile(PathBuf),
    /// Not overwritten.
    #[error("{0} exists already")]
    Exists(PathBuf),
    /// Anything else.
    #[error("cannot read or write {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl PrivateFileError {
    fn from_io(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => PrivateFileError::Missing(path),
            io::ErrorKind::AlreadyExists => PrivateFileError::Exists(path),
            _ => PrivateFileError::Io { path, source },
        }
    }
}

/// Reads a file of at most `max` bytes, refusing one that others can read or
/// change. What was read is wiped from memory when dropped.
pub fn read(path: &Path, max: usize) -> Result<Zeroizing<Vec<u8>>, PrivateFileError> {
    let io = |source| PrivateFileError::from_io(path, source);
    // Checked on the open file, so that it cannot be swapped in between. Not
    // blocking on a FIFO put in its place.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    if !meta.is_file() {
        return Err(PrivateFileError::NotAFile(path.to_owned()));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(PrivateFileError::Exposed {
            path: path.to_owned(),
            mode: meta.mode() & 0o7777,
        });
    }
    let uid = nix::unistd::geteuid().as_raw();
    if meta.uid() != uid && meta.uid() != 0 {
        return Err(PrivateFileError::Owner {
            path: path.to_owned(),
            owner: meta.uid(),
            uid,
        });
    }
    // Room for all of it at once: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(max + 1));
    file.take(max as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(io)?;
    if bytes.len() > max {
        return Err(PrivateFileError::NotAFile(path.to_owned()));
    }
    Ok(bytes)
}

/// Makes a new file of mode 0600. An existing one is left alone.
pub fn create(path: &Path, bytes: &[u8]) -> Result<(), PrivateFileError> {
    write_new(path, bytes, PRIVATE).map_err(|source| PrivateFileError::from_io(path, source))
}

/// Makes a file of mode `mode`, in the place of an existing one at once: who
/// reads meanwhile sees the old content or the new one.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), PrivateFileError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let new = path.with_file_name(name);
    let written = write_new(&new, bytes, mode).and_then(|()| std::fs::rename(&new, path));
    written.map_err(|source| {
        let _ = std::fs::remove_file(&new);
        PrivateFileError::from_io(path, source)
    })
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file: File = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_others_can_read_is_refused_whatever_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        create(&path, b"secret").unwrap();
        assert_eq!(&read(&path, 100).unwrap()[..], b"secret");
        assert!(matches!(
            create(&path, b"other"),
            Err(PrivateFileError::Exists(_))
        ));
        for bit in [0o040, 0o020, 0o010, 0o004, 0o002, 0o001] {
            chmod(&path, 0o600 | bit);
            let error = read(&path, 100).unwrap_err();
            let text = error.to_string();
            assert!(
                matches!(error, PrivateFileError::Exposed { .. }) && text.contains("chmod 0600"),
                "{text}"
            );
        }
        chmod(&path, 0o400);
        read(&path, 100).unwrap();
        assert!(matches!(read(&path, 5), Err(PrivateFileError::NotAFile(_))));
        assert!(matches!(
            read(dir.path(), 5),
            Err(PrivateFileError::NotAFile(_) | PrivateFileError::Exposed { .. })
        ));
    }

    #[test]
    fn a_file_is_replaced_with_the_right_mode_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cert");
        replace(&path, b"one", PUBLIC).unwrap();
        replace(&path, b"two", PRIVATE).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, PRIVATE);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
