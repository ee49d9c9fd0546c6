//! The operator's policy file (`configs/policy.toml` explains every key).
//!
//! [`parse`] is pure: text in, [`Policy`] or the first thing wrong with it
//! out, with its line and what to do about it. [`PolicyWatch`] keeps a file's
//! policy current while the agent runs.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

mod schema;
mod watch;

pub use schema::parse;
pub use watch::PolicyWatch;

/// Everything the policy file says.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// The profile of migrations that ask for none.
    pub profile: ProfileName,
    /// What one rack's uplink carries each way, wire bytes per second.
    pub capacity: f64,
    /// One for each [`ProfileName`], in its order.
    pub profiles: [Profile; 4],
    /// When pre-copy ends.
    pub rounds: Rounds,
    /// Memory, threads and patience.
    pub limits: Limits,
    /// How pages are compressed.
    pub compress: Compress,
    /// The meter and its reports.
    pub meter: MeterPolicy,
}

impl Policy {
    /// The settings of a profile.
    pub fn profile(&self, name: ProfileName) -> &Profile {
        &self.profiles[name as usize]
    }
}

/// Names of the profiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProfileName {
    /// Unnoticeable.
    Background,
    /// Tenants keep their speed and latency.
    Normal,
    /// Done soon.
    Urgent,
    /// Everything there is.
    Evacuate,
}

impl ProfileName {
    /// All of them, in the order of [`Policy::profiles`].
    pub const ALL: [ProfileName; 4] = [
        ProfileName::Background,
        ProfileName::Normal,
        ProfileName::Urgent,
        ProfileName::Evacuate,
    ];

    /// The name as the file and the command line have it.
    pub fn as_str(self) -> &'static str {
        match self {
            ProfileName::Background => "background",
            ProfileName::Normal => "normal",
            ProfileName::Urgent => "urgent",
            ProfileName::Evacuate => "evacuate",
        }
    }
}

impl fmt::Display for ProfileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for ProfileName {
    type Err = UnknownProfile;

    fn from_str(name: &str) -> Result<Self, UnknownProfile> {
        Self::ALL
            .into_iter()
            .find(|profile| profile.as_str() == name)
            .ok_or_else(|| UnknownProfile(name.to_owned()))
    }
}

/// No profile has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no profile {0:?}: it is background, normal, urgent or evacuate")]
pub struct UnknownProfile(pub String);

/// How migration shares the core link. Shares are of the capacity, 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Profile {
    /// Migration never uses more than this.
    pub share: f64,
    /// Migration is never pushed below this.
    pub floor: f64,
    /// Kept free above tenants and migration together.
    pub headroom: f64,
    /// A tenant active within this time counts as active.
    pub reaction: Duration,
    /// Time to grow from nothing to the whole link.
    pub probe: Duration,
    /// Delay in queues at which migration gives way; `None`: ignored.
    pub queue: Option<Duration>,
    /// For guests that stand still.
    pub stop_copy: f64,
}

/// When pre-copy ends though the rest does not fit the downtime limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Rounds {
    /// Most rounds.
    pub max_rounds: u32,
    /// Longest pre-copy.
    pub max_precopy: Duration,
    /// A round that leaves more than this percentage of what the round before
    /// left has gained nothing.
    pub stuck_percent: u32,
    /// So many of those in a row end pre-copy.
    pub stuck_rounds: u32,
    /// What then happens.
    pub then: Then,
}

/// What happens when pre-copy ends without the rest being small enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// The VM stays where it is.
    Fail,
    /// Stop-and-copy, however long it takes.
    ForceSwitch,
}

/// Memory, threads and patience of one agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Guests scanned at the same time.
    pub scan_threads: u32,
    /// Connections to one other agent.
    pub lanes_per_pair: u32,
    /// Bytes of overwritten content that references still need.
    pub side_cache_bytes: u64,
    /// Longest wait for a claim.
    pub claim_deadline: Duration,
    /// Longest wait for a page from its holder.
    pub fetch_deadline: Duration,
}

/// How pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Compress {
    /// Whether.
    pub mode: CompressMode,
    /// zstd's level.
    pub level: i32,
}

/// Whether pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CompressMode {
    /// All pages go as they are.
    Never,
    /// While the core link, not the CPU, is the limit.
    Auto,
    /// All pages.
    Always,
}

/// The meter and its reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MeterPolicy {
    /// Refuse to migrate when the uplinks cannot be counted.
    pub required: bool,
    /// How often agents of a rack tell each other what they counted.
    pub report: Duration,
}

/// What is wrong with a policy, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}; {remedy}")]
pub struct PolicyProblem {
    /// Line in the text, from 1.
    pub line: usize,
    /// What is wrong.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

/// Why a policy file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It cannot be read.
    #[error("cannot read the policy {}: check the path and its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is larger than any policy.
    #[error("the policy {} is larger than {} KiB: is it the right file?", path.display(), MAX_FILE / 1024)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It says something that cannot be.
    #[error("policy {}, {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What and where.
        problem: PolicyProblem,
    },
    /// The file wants the meter, and this binary has none.
    #[error(
        "policy {} wants the meter ([meter] required = true), but this binary was built without it: \
         build it with `cargo xtask build`, or set `required = false` to pace by delay alone",
        path.display()
    )]
    NoMeter {
        /// The file.
        path: PathBuf,
    },
}

/// No policy is longer.
const MAX_FILE: u64 = 256 * 1024;

/// Reads and checks a policy file.
///
/// # Errors
/// See [`PolicyError`]; [`PolicyError::NoMeter`] is for [`check_meter`] alone.
pub fn load(path: &Path) -> Result<Policy, PolicyError> {
    use std::io::Read;
    let read = |source| PolicyError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    std::fs::File::open(path)
        .map_err(read)?
        .take(MAX_FILE + 1)
        .read_to_string(&mut text)
        .map_err(read)?;
    if text.len() as u64 > MAX_FILE {
        return Err(PolicyError::TooLarge {
            path: path.to_owned(),
        });
    }
    parse(&text).map_err(|problem| PolicyError::Invalid {
        path: path.to_owned(),
        problem,
    })
}

/// Refuses a policy that needs the meter if the binary has none.
///
/// # Errors
/// [`PolicyError::NoMeter`].
pub fn check_meter(policy: &Policy, path: &Path) -> Result<(), PolicyError> {
    if policy.meter.required && super::meter::object().is_none() {
        return Err(PolicyError::NoMeter {
            path: path.to_owned(),
        });
    }
    Ok(())
}
