//! `cargo xtask build-ebpf`: the meter, and the bad link of the tests, for
//! `bpfel-unknown-none`.
use crate::setup::{BpfRust, bpf_rust};
use crate::shell::{self, cargo_bin, root, target, which};
use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use std::process::Command;

const BPF_TARGET: &str = "bpfel-unknown-none";

/// The programs: the agent's build script embeds the first, the tests load
/// the second.
const PROGRAMS: [&str; 2] = ["drover-meter", "drover-link-faults"];

/// Where the objects are looked for.
fn object(program: &str) -> PathBuf {
    target().join(format!("bpf/{program}.o"))
}

pub(crate) fn run() -> Result<()> {
    let Some(rust) = bpf_rust() else {
        bail!("no toolchain here builds for {BPF_TARGET}: run `cargo xtask setup`");
    };
    if which("bpf-linker").is_none() {
        bail!("bpf-linker is missing: run `cargo xtask setup`");
    }
    let mut cargo = match rust {
        BpfRust::Nightly => {
            let mut cargo = Command::new("rustup");
            cargo.args(["run", "nightly", "cargo"]).env_remove("RUSTC");
            cargo
        }
        BpfRust::Debian => {
            let mut cargo = Command::new("/usr/bin/cargo");
            cargo
                .env("RUSTC", "/usr/bin/rustc")
                .env("RUSTC_BOOTSTRAP", "1");
            cargo
        }
    };
    // What the outer cargo and rustup say about the host's toolchain.
    for name in [
        "RUSTUP_TOOLCHAIN",
        "CARGO",
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
    ] {
        cargo.env_remove(name);
    }
    let built_in = target().join("bpf-build");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::env::split_paths(&path).chain(cargo_bin()))?;
    shell::run(
        cargo
            .current_dir(root())
            .env("PATH", path)
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .args(["build", "--release", "--quiet", "-Zbuild-std=core"])
            .args(["--target", BPF_TARGET, "--package", "drover-ebpf"])
            .args(PROGRAMS.iter().flat_map(|program| ["--bin", program]))
            .args(["--features", "bpf", "--target-dir"])
            .arg(&built_in),
    )
    .with_context(|| format!("the eBPF programs were not built (with {})", rust.name()))?;

    let dir = target().join("bpf");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    for program in PROGRAMS {
        let built = built_in.join(BPF_TARGET).join("release").join(program);
        let new =
            std::fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
        // An object that did not change keeps its date, so that the agent is
        // not built again for nothing.
        let object = object(program);
        if std::fs::read(&object).is_ok_and(|old| old == new) {
            continue;
        }
        std::fs::write(&object, new)
            .with_context(|| format!("cannot write {}", object.display()))?;
        eprintln!("build-ebpf: {} (with {})", object.display(), rust.name());
    }
    Ok(())
}
