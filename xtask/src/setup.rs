//! `cargo xtask setup`: everything the project needs that cargo does not
//! fetch by itself. Does nothing that is done already.
use crate::shell::{self, cargo_bin, is_root, output, which};
use anyhow::{Result, bail};
use std::path::PathBuf;
use std::process::Command;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only report what is missing; fail if anything is
    #[arg(long)]
    check: bool,
}

/// The kernel of the lab's Linux guests. The lab downloads and unpacks it the
/// first time; here it only has to be known to apt.
const GUEST_KERNEL: &str = "linux-image-cloud-amd64";

/// Debian packages that builds, tests and labs use.
const PACKAGES: &[&str] = &[
    // aws-lc-sys and zstd-sys are C
    "gcc",
    "g++",
    "cmake",
    "make",
    // the lab: guests, their file systems, racks in network namespaces
    "qemu-system-x86",
    "busybox-static",
    "e2fsprogs",
    "iproute2",
    // the meter's tests look at what is attached
    "bpftool",
    // VMs of libvirt's: not libvirt-daemon-system, which would start services
    // and make users; the tests start daemons of their own
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-clients",
];

/// To build for `bpfel-unknown-none` where there is no nightly with rust-src.
const BPF_TOOLCHAIN: &[&str] = &["rustc-web", "cargo-web", "rust-web-src"];

/// To install bpf-linker.
const LINKER_PACKAGES: &[&str] = &[
    "llvm-22-dev",
    "libpolly-22-dev",
    "libzstd-dev",
    "zlib1g-dev",
];
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";
const LINKER_VERSION: &str = "0.13.0";

/// Installs what is missing.
pub(crate) fn everything() -> Result<()> {
    run(&Args { check: false })
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut packages = PACKAGES.to_vec();
    let rust = bpf_rust();
    if rust.is_none() {
        packages.extend(BPF_TOOLCHAIN);
    }
    let linker = which("bpf-linker");
    if linker.is_none() {
        packages.extend(LINKER_PACKAGES);
    }
    let missing = missing_packages(&packages);
    let kernel = knows_guest_kernel();

    let mut wanted: Vec<String> = Vec::new();
    if !missing.is_empty() {
        wanted.push(format!("Debian packages: {}", missing.join(" ")));
    }
    if linker.is_none() {
        wanted.push(format!("bpf-linker {LINKER_VERSION} (cargo install)"));
    }
    if !kernel {
        wanted.push(format!("apt's package lists (for {GUEST_KERNEL})"));
    }
    if wanted.is_empty() {
        eprintln!(
            "setup: everything is there ({} Debian packages, bpf-linker, {}, apt knows the guests' kernel)",
            packages.len(),
            rust.map_or("Debian's rustc-web", BpfRust::name),
        );
        return Ok(());
    }
    eprintln!("setup: missing\n  {}", wanted.join("\n  "));
    if args.check {
        bail!("something is missing; `cargo xtask setup` installs it");
    }

    if !missing.is_empty() {
        install(&missing)?;
    }
    if linker.is_none() {
        install_linker()?;
    }
    if !knows_guest_kernel() {
        update_lists()?;
    }
    if bpf_rust().is_none() {
        bail!(
            "no toolchain builds for bpfel-unknown-none yet: run `rustup toolchain install nightly -c rust-src`, \
             or install Debian's {}",
            BPF_TOOLCHAIN.join(" ")
        );
    }
    eprintln!("setup: done");
    Ok(())
}

/// A toolchain that can build `core` for BPF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BpfRust {
    /// rustup's nightly with the rust-src component.
    Nightly,
    /// Debian's rustc-web with its sources, told that it may use -Z options.
    Debian,
}

impl BpfRust {
    pub(crate) fn name(self) -> &'static str {
        match self {
            BpfRust::Nightly => "nightly with rust-src",
            BpfRust::Debian => "Debian's rustc-web",
        }
    }
}

/// The toolchain to use, if there is one.
pub(crate) fn bpf_rust() -> Option<BpfRust> {
    let source = |sysroot: &str| {
        PathBuf::from(sysroot.trim())
            .join("lib/rustlib/src/rust/library/core/Cargo.toml")
            .is_file()
    };
    let nightly = || {
        let sysroot =
            output(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]))?;
        source(&sysroot).then_some(BpfRust::Nightly)
    };
    let debian = || {
        let cargo = PathBuf::from("/usr/bin/cargo").is_file();
        let sysroot = output(Command::new("/usr/bin/rustc").args(["--print", "sysroot"]))?;
        (cargo && source(&sysroot)).then_some(BpfRust::Debian)
    };
    nightly().or_else(debian)
}

/// Whether apt can download the guests' kernel.
fn knows_guest_kernel() -> bool {
    output(Command::new("apt-cache").args(["show", "--no-all-versions", GUEST_KERNEL]))
        .is_some_and(|text| text.contains("Package:"))
}

/// Those of `wanted` that dpkg does not report as installed. Without dpkg:
/// all, so that they are at least named.
fn missing_packages(wanted: &[&'static str]) -> Vec<&'static str> {
    // dpkg-query exits with 1 if it does not know one of them: that is not a
    // failure here, so its output is read whatever the status.
    let known = Command::new("dpkg-query")
        .args(["-W", "-f=${Package} ${db:Status-Status}\n"])
        .args(wanted)
        .output()
        .map(|out| String::from_utf8_lossy(&out.stdout).into_owned())
        .unwrap_or_default();
    wanted
        .iter()
        .copied()
        .filter(|name| {
            !known
                .lines()
                .any(|line| line == format!("{name} installed"))
        })
        .collect()
}

fn install(packages: &[&str]) -> Result<()> {
    let by_hand = format!(
        "apt-get install --no-install-recommends {}",
        packages.join(" ")
    );
    if which("apt-get").is_none() {
        bail!(
            "this is not a Debian system: install the equivalents of: {}",
            packages.join(" ")
        );
    }
    if !is_root() {
        bail!("installing packages needs root; run this once as root: {by_hand}");
    }
    update_lists()?;
    shell::run(
        apt()
            .args(["install", "-q", "-y", "--no-install-recommends"])
            .args(packages),
    )
}

fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt
}

fn update_lists() -> Result<()> {
    if !is_root() {
        bail!("updating apt's package lists needs root; run this once as root: apt-get update");
    }
    shell::run(apt().args(["update", "-q"]))
}

fn install_linker() -> Result<()> {
    let mut cargo = Command::new("cargo");
    shell::run(
        cargo
            .env("LLVM_PREFIX", LLVM_PREFIX)
            .args([
                "install",
                "bpf-linker",
                "--locked",
                "--version",
                LINKER_VERSION,
            ])
            .args(["--no-default-features", "--features", "llvm-22"]),
    )?;
    if which("bpf-linker").is_none() {
        bail!(
            "bpf-linker was installed, but is neither on PATH nor in {:?}",
            cargo_bin()
        );
    }
    Ok(())
}
