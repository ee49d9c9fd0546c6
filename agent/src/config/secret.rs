//! The cluster secret: 32 random bytes that every agent of a cluster holds.
//! Fingerprint keys and the proof of membership are derived from it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use thiserror::Error;
use zeroize::Zeroizing;

/// Bytes in the cluster secret.
pub const SECRET_LEN: usize = 32;

/// The cluster secret. Wiped from memory when dropped; never printed.
#[derive(Clone)]
pub struct ClusterSecret(Zeroizing<[u8; SECRET_LEN]>);

impl std::fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterSecret(..)")
    }
}

/// Why the cluster secret cannot be read or made.
#[derive(Debug, Error)]
pub enum SecretError {
    /// The file is missing.
    #[error(
        "{0} does not exist; make it once with `drover secret init {0}` and copy it to every host of the cluster"
    )]
    Missing(PathBuf),
    /// Others can read it.
    #[error("{path} has mode {mode:04o}, so others can read it; run `chmod 0600 {path}`")]
    Exposed {
        /// The secret file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Somebody else could change it.
    #[error("{path} belongs to user {owner}, not to the agent's user; run `chown {uid} {path}`")]
    Owner {
        /// The secret file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Whom it must belong to.
        uid: u32,
    },
    /// Not 64 hexadecimal digits.
    #[error(
        "{0} does not hold a cluster secret (64 hexadecimal digits); copy it again from another host, or make a new one with `drover secret init`"
    )]
    Malformed(PathBuf),
    /// Not overwritten: agents with different secrets refuse each other.
    #[error("{0} exists already; remove it first if the whole cluster is to get a new secret")]
    Exists(PathBuf),
    /// The system has no randomness to give.
    #[error("the system gave no random bytes for a new secret")]
    Random,
    /// Anything else.
    #[error("cannot read or write {path}")]
    Io {
        /// The secret file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl ClusterSecret {
    /// A secret of the given bytes; for tests and simulations.
    pub fn from_bytes(bytes: [u8; SECRET_LEN]) -> Self {
        ClusterSecret(Zeroizing::new(bytes))
    }

    /// The secret bytes, to derive keys from.
    pub fn as_bytes(&self) -> &[u8; SECRET_LEN] {
        &self.0
    }

    /// Reads the secret, refusing a file that others can read or change.
    pub fn load(path: &Path) -> Result<Self, SecretError> {
        let io = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => SecretError::Missing(path.to_owned()),
            _ => SecretError::Io {
                path: path.to_owned(),
                source,
            },
        };
        // Checked on the open file, so that it cannot be swapped in between.
        // Not blocking on a FIFO put in its place.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        if !meta.is_file() {
            return Err(SecretError::Malformed(path.to_owned()));
        }
        if meta.mode() & 0o077 != 0 {
            return Err(SecretError::Exposed {
                path: path.to_owned(),
                mode: meta.mode() & 0o7777,
            });
        }
        let uid = nix::unistd::geteuid().as_raw();
        if meta.uid() != uid && meta.uid() != 0 {
            return Err(SecretError::Owner {
                path: path.to_owned(),
                owner: meta.uid(),
                uid,
            });
        }
        let mut text = Zeroizing::new(Vec::with_capacity(256));
        file.take(256).read_to_end(&mut text).map_err(io)?;
        let secret = decode_hex(text.trim_ascii());
        secret.ok_or_else(|| SecretError::Malformed(path.to_owned()))
    }

    /// Makes a new secret file of mode 0600. An existing file is left alone.
    pub fn create(path: &Path) -> Result<(), SecretError> {
        let mut bytes = Zeroizing::new([0; SECRET_LEN]);
        aws_lc_rs::rand::fill(&mut bytes[..]).map_err(|_| SecretError::Random)?;
        let mut text = Zeroizing::new(String::with_capacity(2 * SECRET_LEN + 1));
        for byte in bytes.iter() {
            for nibble in [byte >> 4, byte & 15] {
                text.push(char::from(b"0123456789abcdef"[usize::from(nibble)]));
            }
        }
        text.push('\n');
        let io = |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => SecretError::Exists(path.to_owned()),
            _ => SecretError::Io {
                path: path.to_owned(),
                source,
            },
        };
        let mut file: File = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(io)?;
        file.write_all(text.as_bytes()).map_err(io)?;
        file.sync_all().map_err(io)
    }
}

/// Decodes exactly [`SECRET_LEN`] bytes of hexadecimal digits.
fn decode_hex(text: &[u8]) -> Option<ClusterSecret> {
    if text.len() != 2 * SECRET_LEN {
        return None;
    }
    let digit = |c: u8| char::from(c).to_digit(16);
    let mut bytes = Zeroizing::new([0; SECRET_LEN]);
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(ClusterSecret(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_created_secret_is_private_and_loads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        ClusterSecret::create(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);
        let first = ClusterSecret::load(&path).unwrap();
        assert_ne!(first.as_bytes(), &[0; 32]);
        assert!(matches!(
            ClusterSecret::create(&path),
            Err(SecretError::Exists(_))
        ));
        let again = ClusterSecret::load(&path).unwrap();
        assert_eq!(first.as_bytes(), again.as_bytes());
    }

    #[test]
    fn a_readable_or_broken_secret_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        assert!(matches!(
            ClusterSecret::load(&path),
            Err(SecretError::Missing(_))
        ));
        ClusterSecret::create(&path).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        let error = ClusterSecret::load(&path).unwrap_err();
        assert!(error.to_string().contains("chmod 0600"), "{error}");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        for bad in ["", "abc", &"g".repeat(64), &"ab".repeat(33)] {
            std::fs::write(&path, bad).unwrap();
            assert!(matches!(
                ClusterSecret::load(&path),
                Err(SecretError::Malformed(_))
            ));
        }
    }
}
