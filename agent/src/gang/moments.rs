//! Moments: places in a handover where a test can stop an agent, look at it,
//! kill it. Off unless `[debug] moments = "DIR"` in agent.toml.
//!
//! At moment `M` of VM `V` the agent makes the file `DIR/M.V.reached` (or
//! `DIR/M.reached`, for moments of the whole gang) and then, while
//! `DIR/M.V.hold` (`DIR/M.hold`) exists, waits; for [`HOLD_LIMIT`] at most.
//! Only the step that has come to the moment waits: the agent goes on
//! answering, other VMs go on moving.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The longest that a hold is kept.
pub const HOLD_LIMIT: Duration = Duration::from_secs(60);
/// How often a held step looks whether it may go on.
const LOOK: Duration = Duration::from_millis(2);

/// Whose moment it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Party {
    /// The agent a VM leaves.
    Source,
    /// The agent a VM comes to.
    Target,
    /// The agent that drives the gang, for one VM.
    Coordinator,
    /// The agent that drives the gang, for all of it: no VM in the file names.
    Gang,
}

macro_rules! moments {
    ($($(#[doc = $doc:literal])* $variant:ident, $name:literal, $party:ident;)*) => {
        /// A step of a handover, in the order in which one goes through them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Moment {
            $($(#[doc = $doc])* $variant,)*
        }

        impl Moment {
            /// All of them: the coordinator's, the source's, the target's.
            pub const ALL: &'static [Moment] = &[$(Moment::$variant,)*];

            /// What it is called in file names.
            pub fn name(self) -> &'static str {
                match self {
                    $(Moment::$variant => $name,)*
                }
            }

            /// Whose it is.
            pub fn party(self) -> Party {
                match self {
                    $(Moment::$variant => Party::$party,)*
                }
            }
        }
    };
}

moments! {
    /// Every VM has been checked at both its ends.
    Checked, "checked", Gang;
    /// The gang is open at every agent.
    Opened, "opened", Gang;
    /// Targets wait, sources send.
    Started, "started", Gang;
    /// It is this VM's turn; its source is about to be told.
    SwitchGranted, "switch-granted", Coordinator;
    /// Every VM is where it stays; the agents are about to be told.
    Closing, "closing", Gang;

    /// The journal says *moving*.
    JournalMoving, "journal-moving", Source;
    /// Pre-copy runs.
    Precopy, "precopy", Source;
    /// The rest fits the downtime limit.
    Ready, "ready", Source;
    /// It is this VM's turn; it still runs.
    Switch, "switch", Source;
    /// The guest has been stopped.
    Paused, "paused", Source;
    /// The last pages have been sent and acknowledged.
    LastPages, "last-pages", Source;
    /// The target has compared all pages: equal.
    Sealed, "sealed", Source;
    /// Both VMMs say that the device state has arrived.
    DeviceSent, "device-sent", Source;
    /// Just before *committed* is written.
    Committing, "committing", Source;
    /// Just after *committed* has reached the disk.
    Committed, "committed", Source;
    /// `Resume` is on its way. Held: its answer is not looked at.
    ResumeSent, "resume-sent", Source;
    /// The target has confirmed that the VM is there.
    Resumed, "resumed", Source;
    /// Just before the source's VMM is ended.
    EndingSource, "ending-source", Source;
    /// The source's VMM has ended; the journal does not know yet.
    SourceEnded, "source-ended", Source;
    /// The guest has been let run on after a failure; the journal and the
    /// target do not know yet.
    RolledBack, "rolled-back", Source;

    /// The incoming VMM is about to be started; the journal says *moving*.
    Preparing, "preparing", Target;
    /// The incoming VMM waits.
    Prepared, "prepared", Target;
    /// The source has sent everything; the pages are about to be compared.
    Sealing, "sealing", Target;
    /// The VMM listens for device state.
    DeviceExpected, "device-expected", Target;
    /// The VMM has all device state; the source does not know yet.
    DeviceArrived, "device-arrived", Target;
    /// `Resume` has come.
    ResumeReceived, "resume-received", Target;
    /// The journal says *committed*; the guest still stands.
    TargetCommitted, "target-committed", Target;
    /// The guest runs; the source does not know yet.
    TargetRunning, "target-running", Target;
}

/// See the module. Cloning shares the directory.
#[derive(Debug, Clone, Default)]
pub struct Moments(Option<Arc<Path>>);

impl Moments {
    /// Those of an agent with `[debug] moments` set to this, if it is.
    pub fn new(dir: Option<PathBuf>) -> Self {
        if let Some(dir) = &dir
            && let Err(error) = std::fs::create_dir_all(dir)
        {
            tracing::warn!(%error, dir = %dir.display(), "no directory for [debug] moments");
        }
        Moments(dir.map(Arc::from))
    }

    /// A VM has come to `moment`.
    pub async fn reach(&self, moment: Moment, vm: &str) {
        if let Some(dir) = &self.0 {
            hold(dir, &format!("{}.{vm}", moment.name())).await;
        }
    }

    /// The gang has come to `moment`.
    pub async fn reach_gang(&self, moment: Moment) {
        if let Some(dir) = &self.0 {
            hold(dir, moment.name()).await;
        }
    }
}

async fn hold(dir: &Path, stem: &str) {
    let reached = dir.join(format!("{stem}.reached"));
    if let Err(error) = std::fs::write(&reached, b"") {
        tracing::warn!(%error, file = %reached.display(), "moment cannot be shown");
    }
    let hold = dir.join(format!("{stem}.hold"));
    let until = Instant::now() + HOLD_LIMIT;
    while hold.exists() && Instant::now() < until {
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_moment_has_a_name_of_its_own() {
        let names: BTreeSet<&str> = Moment::ALL.iter().map(|m| m.name()).collect();
        assert_eq!(names.len(), Moment::ALL.len());
        let kebab = |name: &str| name.chars().all(|c| c.is_ascii_lowercase() || c == '-');
        assert!(names.iter().all(|name| kebab(name)));
    }

    #[tokio::test]
    async fn a_hold_lasts_until_it_is_removed_and_nothing_waits_without_one() {
        let dir = tempfile::tempdir().unwrap();
        let moments = Moments::new(Some(dir.path().to_owned()));
        moments.reach(Moment::Paused, "vm1").await;
        assert!(dir.path().join("paused.vm1.reached").exists());

        let file = dir.path().join("closing.hold");
        std::fs::write(&file, b"").unwrap();
        let held = moments.reach_gang(Moment::Closing);
        tokio::pin!(held);
        let short = Duration::from_millis(50);
        assert!(tokio::time::timeout(short, &mut held).await.is_err());
        assert!(dir.path().join("closing.reached").exists());
        std::fs::remove_file(&file).unwrap();
        let long = Duration::from_secs(10);
        assert!(tokio::time::timeout(long, held).await.is_ok());

        Moments::default().reach(Moment::Paused, "vm1").await;
    }
}
