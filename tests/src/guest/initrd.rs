//! The guest's initial RAM disk: one static init and the modules it loads.
//!
//! It is kept small on purpose: the kernel poisons the pages of a freed
//! initrd, and a large one would make guests look more alike than they are.

use super::kernel::Kernel;
use crate::cache;
use anyhow::{Context, Result};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// In the order of their dependencies.
const MODULES: &[&str] = &[
    "kernel/drivers/virtio/virtio_ring.ko",
    "kernel/drivers/virtio/virtio.ko",
    "kernel/drivers/virtio/virtio_pci_legacy_dev.ko",
    "kernel/drivers/virtio/virtio_pci_modern_dev.ko",
    "kernel/drivers/virtio/virtio_pci.ko",
    "kernel/drivers/block/virtio_blk.ko",
];

/// Builds (or finds) the initrd for this kernel.
///
/// # Errors
/// When `rustc` fails or the kernel has no such modules.
pub fn ensure(kernel: &Kernel) -> Result<PathBuf> {
    let tests = cache::workspace().join("tests");
    let source = tests.join("guests/linux/init.rs");
    let version = kernel
        .vmlinuz
        .file_name()
        .unwrap_or_default()
        .as_encoded_bytes();
    let inputs = [fs::read(&source)?, fs::read(tests.join("src/pattern.rs"))?];
    let modules = MODULES.join(" ");
    let dir = cache::built(
        "initrd",
        &[&inputs[0], &inputs[1], version, modules.as_bytes()],
        |dir| {
            let init = dir.join("init");
            compile(&source, &init)?;
            let mut cpio = Cpio::default();
            cpio.entry("dev", 0o040_755, 0, &[]);
            // Rust's runtime opens these before main, when devtmpfs is not yet there.
            cpio.entry("dev/console", 0o020_600, 5 << 8 | 1, &[]);
            cpio.entry("dev/null", 0o020_666, 1 << 8 | 3, &[]);
            cpio.entry("mod", 0o040_755, 0, &[]);
            for (i, module) in MODULES.iter().enumerate() {
                let path = kernel.modules.join(module);
                let content =
                    fs::read(&path).with_context(|| format!("kernel module {}", path.display()))?;
                cpio.entry(&format!("mod/{i:02}.ko"), 0o100_644, 0, &content);
            }
            cpio.entry("init", 0o100_755, 0, &fs::read(&init)?);
            let mut file = fs::File::create(dir.join("initrd.cpio"))?;
            file.write_all(&cpio.finish())?;
            Ok(())
        },
    )?;
    Ok(dir.join("initrd.cpio"))
}

fn compile(source: &Path, out: &Path) -> Result<()> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let flags = [
        "opt-level=2",
        "target-feature=+crt-static",
        "panic=abort",
        "strip=symbols",
    ];
    let mut command = Command::new(rustc);
    command.args(["--edition", "2024", "--target", "x86_64-unknown-linux-gnu"]);
    for flag in flags {
        command.args(["-C", flag]);
    }
    cache::run(command.arg(source).arg("-o").arg(out)).map(drop)
}

/// A "newc" archive in memory, the format the kernel unpacks.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    /// Appends one entry; `rdev` is `major << 8 | minor` of a device node.
    fn entry(&mut self, name: &str, mode: u32, rdev: u32, content: &[u8]) {
        self.entries += 1;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            rdev >> 8,
            rdev & 0xff,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for f in fields {
            self.bytes.extend_from_slice(format!("{f:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_entries_are_aligned_and_ended() {
        let mut cpio = Cpio::default();
        cpio.entry("a", 0o100_644, 0, b"xyz");
        let bytes = cpio.finish();
        assert_eq!(&bytes[..6], b"070701");
        // Header and name "a\0" are 112 bytes, the content 3, padded to 4.
        assert_eq!(&bytes[112..115], b"xyz");
        assert_eq!(&bytes[116..122], b"070701");
        assert!(bytes.len().is_multiple_of(4));
    }
}
