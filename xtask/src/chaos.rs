//! `cargo xtask chaos`: the fault matrix, and the bugs it has to notice.
use crate::build;
use crate::lab::{self, Passed};
use anyhow::Result;

pub(crate) fn run(passed: &Passed) -> Result<()> {
    let plants = |arg: &String| arg == "--plant" || arg.starts_with("--plant=");
    if passed.args.iter().any(plants) {
        build::planted()?;
    }
    lab::run(Some("chaos"), passed)
}
