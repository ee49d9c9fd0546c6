//! What a definition starts: `[qemu]`, or another VMM in `[vmm]`.

use super::{Family, Kind, uses};
use serde::Deserialize;
use std::path::PathBuf;
use toml::Spanned;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawQemu {
    binary: Spanned<PathBuf>,
    args: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawLinked {
    pub(super) binary: Spanned<PathBuf>,
    args: Vec<Spanned<String>>,
    #[serde(default)]
    incoming_args: Vec<Spanned<String>>,
}

/// The table that says what to start.
pub(super) struct Program {
    pub(super) family: Family,
    pub(super) binary: PathBuf,
    pub(super) args: Vec<String>,
    pub(super) incoming_args: Vec<String>,
}

/// Where something is wrong, and what.
pub(super) type Wrong = (usize, String);

impl Program {
    pub(super) fn qemu(raw: RawQemu, kind: Kind) -> Result<Program, Wrong> {
        absolute("qemu", &raw.binary, "/usr/bin/qemu-system-x86_64")?;
        let (mut uses_ram, mut has_file) = (false, false);
        for arg in &raw.args {
            let at = arg.span().start;
            check_arg(arg.get_ref()).map_err(|what| (at, format!("qemu.args: {what}")))?;
            uses_ram |= uses(arg.get_ref(), "ram");
            has_file |= arg.get_ref().contains("mem-path=");
        }
        let at = raw.binary.span().start;
        if kind == Kind::KvmLog {
            let what = "kind: kvm-log is for VMMs that embed drover-vmm, in a table [vmm]; QEMU is qemu-direct, qemu-stream or auto";
            return Err((at, what.into()));
        }
        // RAM that is not in a file is the VMM's own; a file in any other place
        // would be nobody's.
        if !uses_ram && (has_file || kind == Kind::QemuDirect) {
            let what = "qemu.args: no argument uses {ram}; give the VM RAM the agent can share: -object memory-backend-file,id=ram,size={ram_size},mem-path={ram},share=on -machine …,memory-backend=ram";
            return Err((at, what.into()));
        }
        Ok(Program {
            family: Family::Qemu,
            binary: raw.binary.into_inner(),
            args: plain(raw.args),
            incoming_args: Vec::new(),
        })
    }

    pub(super) fn linked(raw: RawLinked, kind: Kind) -> Result<Program, Wrong> {
        absolute("vmm", &raw.binary, "/usr/bin/my-vmm")?;
        for arg in raw.args.iter().chain(&raw.incoming_args) {
            let at = arg.span().start;
            no_zero(arg.get_ref()).map_err(|what| (at, format!("vmm.args: {what}")))?;
        }
        let at = raw.binary.span().start;
        if !matches!(kind, Kind::Auto | Kind::KvmLog) {
            let what = format!("kind: {kind} is for QEMU, in a table [qemu]; this VMM is kvm-log");
            return Err((at, what));
        }
        if !raw.args.iter().any(|arg| uses(arg.get_ref(), "link")) {
            let what = "vmm.args: no argument uses {link}: tell the VMM to serve drover-vmm's socket there";
            return Err((at, what.into()));
        }
        Ok(Program {
            family: Family::Linked,
            binary: raw.binary.into_inner(),
            args: plain(raw.args),
            incoming_args: plain(raw.incoming_args),
        })
    }
}

fn absolute(table: &str, binary: &Spanned<PathBuf>, example: &str) -> Result<(), Wrong> {
    match binary.get_ref().is_absolute() {
        true => Ok(()),
        false => {
            let what = format!("{table}.binary: must be an absolute path, e.g. {example}");
            Err((binary.span().start, what))
        }
    }
}

fn plain(args: Vec<Spanned<String>>) -> Vec<String> {
    args.into_iter().map(Spanned::into_inner).collect()
}

/// Refuses arguments of QEMU's that are the agent's business.
pub(super) fn check_arg(arg: &str) -> Result<(), String> {
    let name = arg
        .strip_prefix("--")
        .or(arg.strip_prefix('-'))
        .unwrap_or("");
    match name {
        "S" | "incoming" | "daemonize" | "pidfile" | "D" | "loadvm" => Err(format!(
            "leave out `{arg}`: the agent decides how and when the VM starts"
        )),
        "mem-path" => {
            Err("`-mem-path` cannot be shared: use -object memory-backend-file,…,share=on".into())
        }
        "runas" | "chroot" | "run-with" => {
            Err(format!("`{arg}` is not supported yet: leave it out"))
        }
        _ => no_zero(arg),
    }
}

fn no_zero(arg: &str) -> Result<(), String> {
    match arg.contains('\0') {
        true => Err("an argument holds a zero byte".into()),
        false => Ok(()),
    }
}
