//! Bugs on purpose, so that the fault matrix can be shown to notice them:
//! `cargo xtask chaos --plant NAME`. They exist only in agents built with the
//! feature `planted-bugs`, which no release is, and only if `[debug] plant` in
//! agent.toml names one; other agents refuse that key.

/// A bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// The target resumes the VM before the last pages have been sent.
    EarlyResume,
    /// Pages that were under way on a lane that broke are not sent again.
    SkipResend,
}

/// Whether this agent has the bug.
#[cfg(not(feature = "planted-bugs"))]
#[inline(always)]
pub const fn has(_: Plant) -> bool {
    false
}

#[cfg(feature = "planted-bugs")]
pub use planted::{has, parse, plant};

#[cfg(feature = "planted-bugs")]
mod planted {
    use super::Plant;
    use std::sync::OnceLock;

    static PLANTED: OnceLock<Plant> = OnceLock::new();

    /// Whether this agent has the bug.
    pub fn has(bug: Plant) -> bool {
        PLANTED.get() == Some(&bug)
    }

    /// Gives this agent a bug, for good.
    pub fn plant(bug: Plant) {
        tracing::error!(?bug, "this agent has a bug on purpose: it loses VMs' data");
        let _first_counts = PLANTED.set(bug);
    }

    /// The bug called so.
    pub fn parse(name: &str) -> Option<Plant> {
        match name {
            "early-resume" => Some(Plant::EarlyResume),
            "skip-resend" => Some(Plant::SkipResend),
            _ => None,
        }
    }
}
