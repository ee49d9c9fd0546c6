//! The handover's durable record: one small file a VM in flight, replaced
//! atomically and fsynced *before* the act that it announces.
//!
//! Whoever reads the state directory after a crash can tell from it alone
//! which side owns a VM: a source that has written `committed` must never run
//! its copy again, and one that has not must never let the target run. What
//! follows from a record is in [`super::handover::machine`].

use crate::config::is_name;
use crate::types::GangId;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Which end of a VM's move wrote a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The VM leaves this host.
    Source,
    /// The VM arrives at this host.
    Target,
}

/// How far the handover of one VM has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// The VM belongs to the source.
    Moving,
    /// The point of no return has been passed: the VM belongs to the target.
    Committed,
    /// Of a source: the VM has stayed, and its guest needs nothing more; only
    /// the target may not know yet.
    Returned,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The gang.
    pub gang: GangId,
    /// The VM's name.
    pub vm: String,
    /// Who wrote it.
    pub side: Side,
    /// How far it has come.
    pub step: Step,
    /// The agent at the other end.
    pub peer: String,
    /// Of a source that moves a VM: whether the guest, found stopped, is to be
    /// let run again, since it was the agent that stopped it. Of a commitment:
    /// whether the guest is to run at the target.
    pub run: bool,
}

/// Why a record could not be written or read.
#[derive(Debug, thiserror::Error)]
#[error(
    "handover journal {path}: {source}; VM stays where it is. \
     Make the state directory writable and give it space"
)]
pub struct JournalError {
    path: PathBuf,
    replaced: bool,
    #[source]
    source: io::Error,
}

impl JournalError {
    /// Whether a record that could not be written may be on the disk all the
    /// same: it took its place, but its directory was not flushed.
    pub fn may_be_written(&self) -> bool {
        self.replaced
    }
}

/// Ending of the names of files that are being written.
const UNFINISHED: &str = "tmp";

/// The journal of one agent, a directory below its state directory.
#[derive(Debug, Clone)]
pub struct Journal {
    dir: PathBuf,
}

impl Journal {
    /// Opens (and makes) `state_dir/handover`. What an agent had begun to write
    /// there when it died never counted, and is removed.
    pub fn open(state_dir: &Path) -> Result<Self, JournalError> {
        let dir = state_dir.join("handover");
        fs::create_dir_all(&dir).map_err(|e| fail(&dir)(e))?;
        for entry in fs::read_dir(&dir).map_err(|e| fail(&dir)(e))?.flatten() {
            if entry.path().extension().is_some_and(|e| e == UNFINISHED) {
                let _read_only = fs::remove_file(entry.path());
            }
        }
        Ok(Journal { dir })
    }

    /// Every gang has a record of its own, so that one which waits for the
    /// other side to hear of it is in no later gang's way.
    fn path(&self, vm: &str, gang: GangId) -> PathBuf {
        self.dir.join(format!("{vm}.{gang}.json"))
    }

    /// Whether a record can be written now. Asked before a gang starts: no VM
    /// is touched on a host whose journal is full or read-only.
    pub fn check(&self) -> Result<(), JournalError> {
        let path = self.dir.join("check").with_extension(UNFINISHED);
        let put = || -> io::Result<()> {
            let mut file = File::create(&path)?;
            // As much as the longest record, in case the file system is nearly full.
            file.write_all(&[b' '; 1024])?;
            file.sync_all()?;
            fs::remove_file(&path)
        };
        put().map_err(|error| {
            let _not_made = fs::remove_file(&path);
            fail(&path)(error)
        })
    }

    /// Makes `record` durable. Returns only after it and its directory entry
    /// have reached the disk.
    pub fn write(&self, record: &Record) -> Result<(), JournalError> {
        let path = self.path(&record.vm, record.gang);
        let tmp = path.with_extension(UNFINISHED);
        let mut replaced = false;
        let put = |replaced: &mut bool| -> io::Result<()> {
            let mut file = File::create(&tmp)?;
            serde_json::to_writer(&mut file, record)?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            // From here on nobody knows which of the two is on the disk.
            *replaced = true;
            fs::rename(&tmp, &path)?;
            self.sync()
        };
        put(&mut replaced).map_err(|source| {
            // On a full disk there is an empty file now.
            let _not_made = fs::remove_file(&tmp);
            JournalError {
                path: path.clone(),
                replaced,
                source,
            }
        })
    }

    /// Forgets a VM whose handover has ended.
    pub fn forget(&self, vm: &str, gang: GangId) -> Result<(), JournalError> {
        let path = self.path(vm, gang);
        match fs::remove_file(&path).and_then(|()| self.sync()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(fail(&path)),
        }
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    /// Every record that a run of the agent has left behind, and why the
    /// others cannot be read.
    pub fn left(&self) -> Result<(Vec<Record>, Vec<JournalError>), JournalError> {
        let (mut records, mut bad) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.dir).map_err(|e| fail(&self.dir)(e))? {
            let path = entry.map_err(|e| fail(&self.dir)(e))?.path();
            if path.extension().is_some_and(|e| e == "json") {
                let invalid = |e| io::Error::new(io::ErrorKind::InvalidData, e);
                let record = fs::read(&path).and_then(|text| parse_record(&text).map_err(invalid));
                match record {
                    Ok(record) => records.push(record),
                    Err(error) => bad.push(fail(&path)(error)),
                }
            }
        }
        Ok((records, bad))
    }
}

fn fail(path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError {
        path,
        replaced: false,
        source,
    }
}

/// Parses one record. Names in it become paths: they are names.
pub fn parse_record(text: &[u8]) -> Result<Record, serde_json::Error> {
    use serde::de::Error;
    let record: Record = serde_json::from_slice(text)?;
    match is_name(&record.vm) && is_name(&record.peer) {
        true => Ok(record),
        false => Err(serde_json::Error::custom("vm or peer is not a name")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: Step) -> Record {
        Record {
            gang: GangId(7),
            vm: "web-1".into(),
            side: Side::Source,
            step,
            peer: "b1".into(),
            run: true,
        }
    }

    #[test]
    fn what_was_written_is_found_again_and_the_last_word_counts() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.write(&record(Step::Moving)).unwrap();
        journal.write(&record(Step::Committed)).unwrap();
        let later = Record {
            gang: GangId(8),
            ..record(Step::Moving)
        };
        journal.write(&later).unwrap();
        let (mut left, bad) = Journal::open(dir.path()).unwrap().left().unwrap();
        left.sort_by_key(|r| r.gang);
        assert_eq!(left, [record(Step::Committed), later]);
        assert!(bad.is_empty());
        journal.forget("web-1", GangId(7)).unwrap();
        journal.forget("web-1", GangId(7)).unwrap();
        assert_eq!(journal.left().unwrap().0.len(), 1);
    }

    #[test]
    fn what_was_not_written_to_its_end_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.write(&record(Step::Moving)).unwrap();
        let unfinished = dir.path().join("handover/web-1.0000000000000007.tmp");
        fs::write(&unfinished, b"{").unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        assert!(!unfinished.exists());
        assert_eq!(journal.left().unwrap().0, [record(Step::Moving)]);
        // A directory in its place: what was begun is not left behind.
        fs::create_dir(dir.path().join("handover/web-2.0000000000000007.json")).unwrap();
        let other = Record {
            vm: "web-2".into(),
            ..record(Step::Moving)
        };
        journal.write(&other).unwrap_err();
        assert!(
            !unfinished
                .with_file_name("web-2.0000000000000007.tmp")
                .exists()
        );
    }

    #[test]
    fn a_record_that_cannot_be_read_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.write(&record(Step::Moving)).unwrap();
        fs::write(dir.path().join("handover/x.json"), b"{").unwrap();
        let text = serde_json::to_string(&record(Step::Moving)).unwrap();
        let escape = text.replace("web-1", "../../etc");
        fs::write(dir.path().join("handover/y.json"), escape).unwrap();
        let (left, bad) = journal.left().unwrap();
        assert_eq!((left.len(), bad.len()), (1, 2));
    }

    #[test]
    fn a_journal_that_cannot_be_written_says_where_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.check().unwrap();
        fs::remove_dir_all(dir.path()).unwrap();
        assert!(journal.check().is_err());
        let error = journal
            .write(&record(Step::Moving))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("web-1.") && error.contains("writable"),
            "{error}"
        );
    }
}
