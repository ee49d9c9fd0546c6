//! The VMs that somebody else started and this agent adopted: remembered over
//! a restart of the agent, which finds those it started itself by their run
//! directories.

use crate::config::is_name;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// One adopted VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AdoptedVm {
    /// Its name, and its definition's.
    pub(super) name: String,
    /// Its QMP socket.
    pub(super) qmp: PathBuf,
}

/// A folder with a file a VM.
#[derive(Debug)]
pub(super) struct Adopted(PathBuf);

impl Adopted {
    /// Below the agent's state directory.
    pub(super) fn open(state_dir: &Path) -> io::Result<Self> {
        let dir = state_dir.join("adopted");
        fs::create_dir_all(&dir)?;
        Ok(Adopted(dir))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.json"))
    }

    pub(super) fn remember(&self, name: &str, qmp: &Path) -> io::Result<()> {
        let vm = AdoptedVm {
            name: name.to_owned(),
            qmp: qmp.to_owned(),
        };
        let tmp = self.path(name).with_extension("tmp");
        let text = serde_json::to_vec(&vm)?;
        let file = fs::File::create(&tmp)?;
        io::Write::write_all(&mut &file, &text)?;
        file.sync_all()?;
        fs::rename(&tmp, self.path(name))
    }

    pub(super) fn forget(&self, name: &str) {
        match fs::remove_file(self.path(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(vm = %name, %error, "the VM will be looked for at the next start");
            }
            _ => {}
        }
    }

    pub(super) fn all(&self) -> Vec<AdoptedVm> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let files = entries.map(|e| e.path());
        let texts = files
            .filter(|path| path.extension().is_some_and(|e| e == "json"))
            .filter_map(|path| fs::read(path).ok());
        texts
            .filter_map(|text| serde_json::from_slice(&text).ok())
            .filter(|vm: &AdoptedVm| is_name(&vm.name))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adopted_vms_are_found_by_the_next_run() {
        let dir = tempfile::tempdir().unwrap();
        let adopted = Adopted::open(dir.path()).unwrap();
        adopted
            .remember("web1", Path::new("/run/web1.qmp"))
            .unwrap();
        adopted
            .remember("web2", Path::new("/run/web2.qmp"))
            .unwrap();
        adopted.forget("web1");
        adopted.forget("web1");
        let again = Adopted::open(dir.path()).unwrap().all();
        let web2 = AdoptedVm {
            name: "web2".into(),
            qmp: "/run/web2.qmp".into(),
        };
        assert_eq!(again, [web2]);
    }
}
