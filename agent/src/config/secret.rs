//! The cluster secret: 32 random bytes that every agent of a cluster holds.
//! Fingerprint keys and the proof of membership are derived from it.

use crate::private_file::{self, PrivateFileError};
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
    /// Readable for others, somebody else's, or not readable at all.
    #[error(transparent)]
    File(PrivateFileError),
}

impl From<PrivateFileError> for SecretError {
    fn from(error: PrivateFileError) -> Self {
        match error {
            PrivateFileError::Missing(path) => SecretError::Missing(path),
            PrivateFileError::NotAFile(path) => SecretError::Malformed(path),
            PrivateFileError::Exists(path) => SecretError::Exists(path),
            other => SecretError::File(other),
        }
    }
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
        let text = private_file::read(path, 255)?;
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
        Ok(private_file::create(path, text.as_bytes())?)
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
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

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

    /// Secrets are bytes, not text: none is refused for how it ends.
    #[test]
    fn a_secret_that_ends_like_a_line_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        for end in ["0a", "0d", "20", "00"] {
            let path = dir.path().join(end);
            private_file::create(&path, format!("{}{end}\n", "5a".repeat(31)).as_bytes()).unwrap();
            let secret = ClusterSecret::load(&path).unwrap();
            assert_eq!(format!("{:02x}", secret.as_bytes()[31]), end);
        }
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
