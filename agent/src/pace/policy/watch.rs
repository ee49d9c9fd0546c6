//! Keeps a policy current while its file changes.

use super::{Policy, PolicyError, load};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// A policy file and what it last said that was valid.
#[derive(Debug)]
pub struct PolicyWatch {
    path: PathBuf,
    policy: Arc<Policy>,
    seen: Option<Stamp>,
}

/// What tells one version of a file from another. Editors replace files, so
/// the inode belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: SystemTime,
    len: u64,
    inode: u64,
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        let meta = std::fs::metadata(path).ok()?;
        Some(Stamp {
            modified: meta.modified().ok()?,
            len: meta.len(),
            inode: meta.ino(),
        })
    }
}

impl PolicyWatch {
    /// Loads the file for the first time.
    ///
    /// # Errors
    /// The file has to be valid now; see [`load`].
    pub fn open(path: &Path) -> Result<Self, PolicyError> {
        // Stamped before it is read: a change in between is seen next time.
        let seen = Stamp::of(path);
        Ok(PolicyWatch {
            path: path.to_owned(),
            policy: Arc::new(load(path)?),
            seen,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The last valid policy.
    pub fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy)
    }

    /// Looks at the file again, cheaply: call it about once a second. Returns
    /// the new policy if the file changed and is valid.
    ///
    /// # Errors
    /// The file changed and is not valid, or cannot be read. The policy of
    /// before stays, and the same fault is reported once, not at every call.
    pub fn poll(&mut self) -> Result<Option<Arc<Policy>>, PolicyError> {
        let now = Stamp::of(&self.path);
        if now == self.seen {
            return Ok(None);
        }
        self.seen = now;
        self.reload()
    }

    /// Reads the file whether it seems changed or not (`SIGHUP`).
    ///
    /// # Errors
    /// As [`PolicyWatch::poll`].
    pub fn reload(&mut self) -> Result<Option<Arc<Policy>>, PolicyError> {
        let new = load(&self.path)?;
        if new == *self.policy {
            return Ok(None);
        }
        self.policy = Arc::new(new);
        Ok(Some(self.policy()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_a_valid_change_and_keeps_the_old_policy_over_an_invalid_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.toml");
        std::fs::write(&path, "[core_link]\ncapacity_mbit = 400\n").unwrap();
        let mut watch = PolicyWatch::open(&path).unwrap();
        assert!(watch.poll().unwrap().is_none());

        std::fs::write(&path, "[core_link]\ncapacity_mbit = 1000\n").unwrap();
        let new = watch.poll().unwrap().expect("the file changed");
        assert_eq!(new.capacity, 125e6);

        std::fs::write(&path, "[core_link]\ncapacity = 10\n").unwrap();
        let error = watch.poll().unwrap_err().to_string();
        assert!(error.contains("policy.toml, line 2"), "{error}");
        assert_eq!(watch.policy().capacity, 125e6);
        assert!(watch.poll().unwrap().is_none(), "reported once");

        std::fs::remove_file(&path).unwrap();
        assert!(matches!(watch.poll(), Err(PolicyError::Read { .. })));
        assert_eq!(watch.policy().capacity, 125e6);
    }
}
