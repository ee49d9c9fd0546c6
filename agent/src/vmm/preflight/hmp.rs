//! Texts of QEMU's human monitor.

/// A line of `info ramblock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// `ram`, `0000:00:01.0/vga.vram`, `/rom@etc/acpi/tables`.
    pub name: String,
    /// Bytes in use.
    pub used: u64,
    /// Bytes set aside.
    pub total: u64,
}

/// Parses `info ramblock`. Pure. Newer QEMUs have more columns at the end.
pub fn parse_ramblocks(text: &str) -> Result<Vec<RamBlock>, String> {
    let mut lines = text.lines().filter(|l| !l.trim().is_empty());
    match lines.next() {
        Some(head) if head.contains("Block Name") && head.contains("PSize") => {}
        other => return Err(format!("unknown head line {other:?}")),
    }
    lines
        .map(|line| {
            let parse = || {
                let fields: Vec<&str> = line.split_whitespace().collect();
                let numbers = fields.iter().position(|f| f.starts_with("0x"))?;
                let hex = |at: usize| {
                    u64::from_str_radix(fields.get(numbers + at)?.strip_prefix("0x")?, 16).ok()
                };
                // The two fields before the numbers are the page size: `4 KiB`.
                let name = fields.get(..numbers.checked_sub(2)?)?.join(" ");
                (!name.is_empty()).then_some(())?;
                hex(0)?;
                Some(RamBlock {
                    name,
                    used: hex(1)?,
                    total: hex(2)?,
                })
            };
            parse().ok_or_else(|| format!("unknown line `{line}`"))
        })
        .collect()
}

/// Type and id of each device in `info qtree`. Pure.
pub fn parse_devices(text: &str) -> Vec<(String, String)> {
    text.lines()
        .filter_map(|line| {
            let rest = line.trim_start().strip_prefix("dev: ")?;
            let (kind, id) = rest.split_once(", id ").unwrap_or((rest, ""));
            Some((
                kind.trim().to_owned(),
                id.trim().trim_matches('"').to_owned(),
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const QEMU_7_2: &str = "              Block Name    PSize              Offset               Used              Total\r\n                     ram    4 KiB  0x0000000000000000 0x0000000001000000 0x0000000001000000\r\n    /rom@etc/acpi/tables    2 MiB  0x0000000001080000 0x0000000000020000 0x0000000000200000\r\n";
    const QEMU_9: &str = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n                 pc.bios    4 KiB  0x0000000040000000 0x0000000000040000 0x0000000000040000 0x00007f4a1be00000  ro\n";

    #[test]
    fn ram_blocks_of_old_and_new() {
        let blocks = parse_ramblocks(QEMU_7_2).unwrap();
        assert_eq!(blocks.len(), 2);
        assert_eq!((blocks[0].name.as_str(), blocks[0].used), ("ram", 16 << 20));
        assert_eq!((blocks[1].used, blocks[1].total), (0x20000, 0x200000));
        assert_eq!(parse_ramblocks(QEMU_9).unwrap()[0].name, "pc.bios");
        assert!(parse_ramblocks("").is_err());
        assert!(parse_ramblocks(&QEMU_7_2.replace("0x0000000001000000", "much")).is_err());
    }

    #[test]
    fn devices_of_a_tree() {
        let text = "bus: main-system-bus\r\n  type System\r\n  dev: q35-pcihost, id \"\"\r\n    bus: pcie.0\r\n      dev: vfio-pci, id \"gpu 1\"\r\n        addr = 02.0\r\n";
        let devices = parse_devices(text);
        assert_eq!(devices[0], ("q35-pcihost".into(), "".into()));
        assert_eq!(devices[1], ("vfio-pci".into(), "gpu 1".into()));
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,200}", tail in "[ 0-9a-fxKMiB]{0,80}") {
            let _ = parse_devices(&text);
            let _ = parse_ramblocks(&text);
            let _ = parse_ramblocks(&format!("Block Name PSize\n{tail}"));
        }
    }
}
