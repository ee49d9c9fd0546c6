//! The handover's durable record: one small file a VM in flight, replaced
//! atomically and fsynced *before* the act that it announces.
//!
//! Whoever reads the state directory after a crash can tell from it alone
//! which side owns a VM: a source that has written `committed` must never run
//! its copy again, and one that has not must never let the target run.

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// The VM belongs to the source. Either side may give up.
    Moving,
    /// The point of no return has been passed: the VM belongs to the target.
    Committed,
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
}

/// Why a record could not be written or read.
#[derive(Debug, thiserror::Error)]
#[error(
    "handover journal {path}: {source}; VM stays where it is. \
     Make the state directory writable and give it space"
)]
pub struct JournalError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The journal of one agent, a directory below its state directory.
#[derive(Debug, Clone)]
pub struct Journal {
    dir: PathBuf,
}

impl Journal {
    /// Opens (and makes) `state_dir/handover`.
    pub fn open(state_dir: &Path) -> Result<Self, JournalError> {
        let dir = state_dir.join("handover");
        fs::create_dir_all(&dir).map_err(|source| JournalError {
            path: dir.clone(),
            source,
        })?;
        Ok(Journal { dir })
    }

    fn path(&self, vm: &str) -> PathBuf {
        self.dir.join(format!("{vm}.json"))
    }

    /// Makes `record` durable. Returns only after it and its directory entry
    /// have reached the disk.
    pub fn write(&self, record: &Record) -> Result<(), JournalError> {
        let path = self.path(&record.vm);
        let put = || -> io::Result<()> {
            let tmp = path.with_extension("tmp");
            let mut file = File::create(&tmp)?;
            serde_json::to_writer(&mut file, record)?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&tmp, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        put().map_err(|source| JournalError {
            path: path.clone(),
            source,
        })
    }

    /// Forgets a VM whose handover has ended.
    pub fn forget(&self, vm: &str) -> Result<(), JournalError> {
        let path = self.path(vm);
        match fs::remove_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(|source| JournalError { path, source }),
        }
    }

    /// Every record that a run of the agent has left behind.
    pub fn left(&self) -> Result<Vec<Record>, JournalError> {
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| JournalError { path, source }
        };
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(fail(&self.dir))? {
            let path = entry.map_err(fail(&self.dir))?.path();
            if path.extension().is_some_and(|e| e == "json") {
                let text = fs::read(&path).map_err(fail(&path))?;
                let record = parse_record(&text)
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
                    .map_err(fail(&path))?;
                records.push(record);
            }
        }
        Ok(records)
    }
}

/// Parses one record.
pub fn parse_record(text: &[u8]) -> Result<Record, serde_json::Error> {
    serde_json::from_slice(text)
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
        }
    }

    #[test]
    fn what_was_written_is_found_again_and_the_last_word_counts() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.write(&record(Step::Moving)).unwrap();
        journal.write(&record(Step::Committed)).unwrap();
        assert_eq!(
            Journal::open(dir.path()).unwrap().left().unwrap(),
            [record(Step::Committed)]
        );
        journal.forget("web-1").unwrap();
        journal.forget("web-1").unwrap();
        assert!(journal.left().unwrap().is_empty());
    }

    #[test]
    fn a_journal_that_cannot_be_written_says_where_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        fs::remove_dir_all(dir.path()).unwrap();
        let error = journal
            .write(&record(Step::Moving))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("web-1.json") && error.contains("writable"),
            "{error}"
        );
    }
}
