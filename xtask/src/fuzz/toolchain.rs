//! Which compiler builds the targets. Coverage counters and AddressSanitizer
//! are unstable options: nightly takes them, and so does a stable compiler that
//! is told to behave as the compiler's own build does.

use crate::shell::{self, output};
use std::fmt;
use std::process::Command;

/// What is fuzzed: the only platform the agent runs on.
pub(super) const TRIPLE: &str = "x86_64-unknown-linux-gnu";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Toolchain {
    /// rustup's nightly.
    Nightly(String),
    /// The toolchain that builds everything else, unstable options allowed.
    Bootstrap(String),
}

impl Toolchain {
    pub(super) fn find() -> Toolchain {
        let version = |command: &mut Command| output(command).map(|v| v.trim().to_owned());
        match version(Command::new("rustup").args(["run", "nightly", "rustc", "--version"])) {
            Some(nightly) => Toolchain::Nightly(nightly),
            None => Toolchain::Bootstrap(
                version(Command::new("rustc").arg("--version")).unwrap_or_else(|| "rustc".into()),
            ),
        }
    }

    /// A cargo that uses it, in the repository.
    pub(super) fn cargo(&self) -> Command {
        match self {
            // rustup's cargo, which understands `+nightly`. What cargo and
            // rustup told this program about its own toolchain is not for that
            // one.
            Toolchain::Nightly(_) => {
                let mut cargo = Command::new("cargo");
                cargo
                    .current_dir(shell::root())
                    .arg("+nightly")
                    .env_remove("RUSTUP_TOOLCHAIN")
                    .env_remove("CARGO")
                    .env_remove("RUSTC");
                cargo
            }
            Toolchain::Bootstrap(_) => {
                let mut cargo = shell::cargo();
                cargo.env("RUSTC_BOOTSTRAP", "1");
                cargo
            }
        }
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Toolchain::Nightly(version) => write!(f, "built with {version}"),
            Toolchain::Bootstrap(version) => write!(
                f,
                "rustup has no nightly: built with {version} and RUSTC_BOOTSTRAP=1, which lets it \
                 take the unstable options that libFuzzer needs"
            ),
        }
    }
}
