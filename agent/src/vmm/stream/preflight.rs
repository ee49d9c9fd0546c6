//! What stream mode takes for granted, checked before a VM is touched.

use super::error::StreamVmError;
use super::filter::{MOST_HELD, MainBlock};
use super::ram::ProcessRam;
use crate::types::PAGE_SIZE;
use crate::vmm::launch::{Vmm, blocking};
use crate::vmm::preflight::{self, PreflightError, QemuFacts, RamBlock, parse_ramblocks};
use crate::vmm::qmp::{QmpError, RunState};
use crate::vmm::ram::RamError;

/// RAM blocks besides the machine's are held in the agent's memory until the
/// switch; more of them than this is refused.
pub const MAX_OTHER_RAM: u64 = 48 << 20;
const _: () = assert!(MAX_OTHER_RAM < MOST_HELD as u64);

/// Capabilities that stream mode needs.
const NEEDED: [&str; 3] = ["events", "return-path", "pause-before-switchover"];

/// The machine's RAM in the VMM's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) block: MainBlock,
    /// Where it is.
    pub(super) address: u64,
    /// Whether a page nobody has touched is zero.
    pub(super) sparse: bool,
    /// Bytes of the other blocks.
    pub(super) others: u64,
}

impl Found {
    pub(super) fn open(&self, vmm: &Vmm, writable: bool) -> Result<ProcessRam, RamError> {
        let pages = (self.block.bytes / PAGE_SIZE as u64) as u32;
        ProcessRam::open(&vmm.process, self.address, pages, writable, self.sparse)
    }
}

/// Checks a VM that is to be moved from here. Changes nothing.
pub(super) async fn check_source(vmm: &Vmm) -> Result<(QemuFacts, Found), StreamVmError> {
    let (asked, qmp) = (asked(vmm), vmm.qmp()?);
    preflight::check_version(vmm)?;
    let (state, (), (), found, machine, kvm) = tokio::try_join!(
        async { Ok(preflight::check_idle(vmm).await?) },
        async { Ok(preflight::check_capabilities(vmm, &NEEDED).await?) },
        async { Ok(preflight::check_devices(vmm).await?) },
        find_ram(vmm),
        async { qmp.machine_type().await.map_err(&asked) },
        async { qmp.kvm().await.map_err(&asked) },
    )?;
    let facts = QemuFacts {
        name: vmm.name.clone(),
        ram_bytes: found.block.bytes,
        backend: found.block.name.clone(),
        machine,
        version: qmp.version(),
        kvm,
        state_ram_bytes: found.others,
        running: state == RunState::Running,
    };
    Ok((facts, found))
}

/// Checks a VMM that waits for the VM of `facts`.
pub(super) async fn check_target(vmm: &Vmm, facts: &QemuFacts) -> Result<Found, StreamVmError> {
    let (asked, qmp) = (asked(vmm), vmm.qmp()?);
    let ((), (), (), found, machine, kvm) = tokio::try_join!(
        async { Ok(preflight::check_incoming(vmm).await?) },
        async { Ok(preflight::check_capabilities(vmm, &NEEDED).await?) },
        async { Ok(preflight::check_devices(vmm).await?) },
        find_ram(vmm),
        async { qmp.machine_type().await.map_err(&asked) },
        async { qmp.kvm().await.map_err(&asked) },
    )?;
    preflight::check_same(
        vmm,
        facts,
        found.block.bytes,
        &found.block.name,
        machine,
        kvm,
    )?;
    Ok(found)
}

fn asked(vmm: &Vmm) -> impl Fn(QmpError) -> StreamVmError + use<'_> {
    |source| {
        PreflightError::Qmp {
            vm: vmm.name.clone(),
            source,
        }
        .into()
    }
}

/// The block that holds guest-physical address 0, which has to be all of guest
/// RAM, and where it is mapped.
async fn find_ram(vmm: &Vmm) -> Result<Found, StreamVmError> {
    let (asked, qmp) = (asked(vmm), vmm.qmp()?);
    let vm = &vmm.name;
    let (blocks, at_zero, plugged) = tokio::try_join!(
        async { qmp.human("info ramblock").await.map_err(&asked) },
        async { qmp.human("gpa2hva 0").await.map_err(&asked) },
        async { qmp.memory_device_count().await.map_err(&asked) },
    )?;
    let unclear = |command: &'static str| {
        move |what: String| PreflightError::Monitor {
            vm: vm.clone(),
            version: qmp.version(),
            command,
            what,
        }
    };
    let blocks = parse_ramblocks(&blocks).map_err(unclear("info ramblock"))?;
    let (name, address) = parse_gpa2hva(&at_zero).map_err(unclear("gpa2hva 0"))?;
    let no_block = |why: String| StreamVmError::NoBlock {
        vm: vm.clone(),
        why,
    };
    if plugged > 0 {
        return Err(no_block(format!("it has {plugged} memory devices")));
    }
    // `ram`, or `/objects/ram` with machine types before 4.0.
    let is_main = |b: &&RamBlock| b.name.rsplit('/').next() == name.rsplit('/').next();
    let main = match blocks.iter().filter(is_main).collect::<Vec<_>>().as_slice() {
        [one] => (*one).clone(),
        found => {
            let count = found.len();
            return Err(no_block(format!("{count} RAM blocks are called `{name}`")));
        }
    };
    let total = qmp.base_memory().await.map_err(&asked)?;
    if main.used != total {
        return Err(no_block(format!(
            "its block `{name}` has {} of {total} bytes",
            main.used
        )));
    }
    let others = blocks.iter().filter(|b| b.name != main.name);
    let bytes = others.clone().map(|b| b.used).sum();
    if bytes > MAX_OTHER_RAM {
        let largest = others.max_by_key(|b| b.used).map(|b| b.name.clone());
        return Err(StreamVmError::OtherRam {
            vm: vm.clone(),
            main: main.name,
            bytes,
            largest: largest.unwrap_or_default(),
            most: MAX_OTHER_RAM,
        });
    }
    let sparse = mapped(vmm, address, main.used).await?;
    Ok(Found {
        block: MainBlock {
            name: main.name,
            bytes: main.used,
        },
        address,
        sparse,
        others: bytes,
    })
}

/// Whether all of it is anonymous memory; that it is mapped at all is checked.
async fn mapped(vmm: &Vmm, address: u64, bytes: u64) -> Result<bool, StreamVmError> {
    let process = vmm.process.clone();
    let rows = blocking(move || process.maps()).await;
    let rows = rows.map_err(|source| StreamVmError::Ram {
        vm: vmm.name.clone(),
        source: source.into(),
    })?;
    let (mut at, mut sparse) = (address, true);
    for row in &rows {
        if row.start <= at && at < row.end && row.perms[0] && row.perms[1] {
            at = row.end;
            sparse &= row.inode == 0 && !row.shared;
        }
    }
    match at >= address + bytes {
        true => Ok(sparse),
        false => Err(StreamVmError::NoBlock {
            vm: vmm.name.clone(),
            why: format!("only {:#x} bytes at {address:#x} are mapped", at - address),
        }),
    }
}

/// Name and address in `Host virtual address for 0x0 (pc.ram) is 0x7f…`.
fn parse_gpa2hva(text: &str) -> Result<(String, u64), String> {
    let parse = || {
        let (_, rest) = text.trim().split_once(" (")?;
        let (name, address) = rest.rsplit_once(") is 0x")?;
        let address = u64::from_str_radix(address.trim(), 16).ok()?;
        let whole = address.is_multiple_of(PAGE_SIZE as u64) && !name.is_empty();
        whole.then(|| (name.to_owned(), address))
    };
    parse().ok_or_else(|| format!("unknown answer `{}`", text.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_guest_ram_is() {
        let said = "Host virtual address for 0x0 (pc.ram) is 0x7f5e40000000\r\n";
        let found = parse_gpa2hva(said).unwrap();
        assert_eq!(found, ("pc.ram".to_owned(), 0x7f5e_4000_0000));
        for wrong in [
            "",
            "No memory is mapped at address 0x0\r\n",
            "Memory at address 0x0 is not RAM",
            "Host virtual address for 0x0 (pc.ram) is 0x7f5e40000123",
            "Host virtual address for 0x0 () is 0x7f5e40000000",
        ] {
            assert!(parse_gpa2hva(wrong).is_err(), "{wrong}");
        }
    }
}
