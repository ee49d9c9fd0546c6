//! The agent's configuration: `agent.toml`, the cluster secret, and the
//! reader that reports every mistake of a TOML file at once.

mod agent;
mod check;
pub mod document;
pub mod secret;
mod units;
mod value;

pub use agent::{AgentConfig, Checks, FencingConfig, LogConfig, LogFormat, PeerConfig};
pub use document::{Problem, Problems};
pub use secret::{ClusterSecret, SecretError};
pub use units::{ByteSize, IpPrefix, PrefixError, SizeError};
pub use value::{FromToml, Refused};

/// Whether `name` can name an agent, a rack, a gang or a VM: 1 to 63 letters,
/// digits, `.`, `_` or `-`, the first a letter or digit. Names become parts of
/// file names and of metric labels.
pub fn is_name(name: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
    (1..=63).contains(&name.len())
        && name.bytes().all(allowed)
        && name.as_bytes()[0].is_ascii_alphanumeric()
}

/// What to write where [`is_name`] said no.
pub const NAME_RULE: &str =
    "use 1 to 63 letters, digits, `.`, `_` or `-`, starting with a letter or digit";
