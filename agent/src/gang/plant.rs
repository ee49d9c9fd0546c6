//! Bugs on purpose, so that the fault matrix can be shown to notice them:
//! `cargo xtask chaos --plant NAME`. They exist only in agents built with the
//! feature `planted-bugs`, which no release is, and there only if the variable
//! `DROVER_PLANT` of their environment names one.

use std::str::FromStr;

/// The variable.
pub const VARIABLE: &str = "DROVER_PLANT";

/// A bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// The target resumes the VM although the last pages have not been sent.
    EarlyResume,
    /// Pages that were under way on a lane that broke are not sent again.
    SkipResend,
}

impl Plant {
    /// All of them.
    pub const ALL: [Plant; 2] = [Plant::EarlyResume, Plant::SkipResend];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Plant::EarlyResume => "early-resume",
            Plant::SkipResend => "skip-resend",
        }
    }
}

impl FromStr for Plant {
    type Err = String;

    fn from_str(name: &str) -> Result<Plant, String> {
        let found = Plant::ALL.into_iter().find(|bug| bug.name() == name);
        found.ok_or_else(|| {
            let names = Plant::ALL.map(Plant::name).join(", ");
            format!("there is no bug {name:?}; there are: {names}")
        })
    }
}

/// Whether this agent has the bug.
#[cfg(not(feature = "planted-bugs"))]
#[inline(always)]
pub const fn has(_: Plant) -> bool {
    false
}

/// Whether this agent has the bug.
///
/// # Panics
/// When the variable names a bug that is none: a test would test nothing.
#[cfg(feature = "planted-bugs")]
pub fn has(bug: Plant) -> bool {
    use std::sync::OnceLock;
    static PLANTED: OnceLock<Option<Plant>> = OnceLock::new();
    let planted = PLANTED.get_or_init(|| {
        let name = std::env::var(VARIABLE).ok()?;
        let planted: Plant = name.parse().unwrap_or_else(|why| panic!("{why}"));
        tracing::error!(bug = %name, "this agent has a bug on purpose: it loses VMs' data");
        Some(planted)
    });
    *planted == Some(bug)
}
