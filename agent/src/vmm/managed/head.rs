//! The beginning of a stream: read when QEMU connects, so that it is known what
//! the VM is, while QEMU waits for the rest to be taken.

use super::cloud_hypervisor;
use super::error::ManagedError;
use crate::types::PAGE_SIZE;
use crate::vmm::qemu_stream::channel::{FIRST, Kind, kind};
use crate::vmm::qemu_stream::main_channel::StreamParser;
use crate::vmm::qemu_stream::{Item, Parse, Phase, StreamError};
use crate::vmm::stream::{MAX_OTHER_RAM, MainBlock};
use std::io::ErrorKind;
use std::time::Duration;
use tokio::net::UnixStream;

/// Bytes that are read at once: little beyond the head.
const STEP: usize = 4 << 10;
/// No head is longer: 1024 blocks with long names.
const LONGEST: usize = 512 << 10;

/// What has connected.
#[derive(Debug)]
pub(super) enum Head {
    /// A QEMU.
    Qemu(QemuHead),
    /// A Cloud Hypervisor, which has said this.
    CloudHypervisor(Vec<u8>),
}

/// What a stream of QEMU's begins with.
#[derive(Debug)]
pub(super) struct QemuHead {
    /// All that was read.
    pub(super) bytes: Vec<u8>,
    /// The machine's RAM.
    pub(super) main: MainBlock,
}

/// Reads the head of `vm`'s stream.
pub(super) async fn read(
    vm: &str,
    from: &UnixStream,
    limit: Duration,
) -> Result<Head, ManagedError> {
    let reading = tokio::time::timeout(limit, read_untimed(vm, from));
    reading.await.unwrap_or_else(|_| {
        Err(ManagedError::Silent {
            vm: vm.to_owned(),
            what: format!(
                "its VMM did not begin its migration within {} s",
                limit.as_secs()
            ),
        })
    })
}

async fn read_untimed(vm: &str, from: &UnixStream) -> Result<Head, ManagedError> {
    let unfit = |why: String| ManagedError::Unfit {
        vm: vm.to_owned(),
        why,
    };
    let stream = |source: StreamError| ManagedError::Stream {
        vm: vm.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let mut parser = StreamParser::default();
    let (mut at, mut blocks) = (0, Vec::new());
    while bytes.len() < LONGEST {
        more(vm, from, &mut bytes).await?;
        if let Some(first) = bytes.first_chunk::<FIRST>() {
            if *first == cloud_hypervisor::FIRST {
                return Ok(Head::CloudHypervisor(bytes));
            }
            match kind(*first) {
                Ok(Kind::Main) => {}
                Ok(Kind::Multifd) => return Err(unfit(PARALLEL.to_owned())),
                Err(fault) => return Err(unfit(fault.to_string())),
            }
        }
        while let Some((item, used)) = parser.next(&bytes[at..]).map_err(stream)? {
            at += used;
            match item {
                Item::Block { name, bytes, .. } => {
                    blocks.push((String::from_utf8_lossy(name).into_owned(), bytes));
                }
                Item::SectionEnd(Phase::Setup) => {
                    let main = main_block(&blocks).map_err(unfit)?;
                    return Ok(Head::Qemu(QemuHead { bytes, main }));
                }
                Item::Raw(_) => {
                    let what = parser.raw().map(|from| from.to_string());
                    return Err(unfit(what.unwrap_or_default()));
                }
                _ => {}
            }
        }
    }
    Err(unfit(format!(
        "its list of RAM blocks is not whole in {LONGEST} bytes"
    )))
}

/// Said of multifd.
const PARALLEL: &str = "it uses more than one connection: leave out --parallel";

async fn more(vm: &str, from: &UnixStream, bytes: &mut Vec<u8>) -> Result<(), ManagedError> {
    let failed = |source| ManagedError::Socket {
        vm: vm.to_owned(),
        doing: "reading the beginning of the stream",
        source,
    };
    let begun = bytes.len();
    bytes.resize(begun + STEP, 0);
    loop {
        from.readable().await.map_err(failed)?;
        match from.try_read(&mut bytes[begun..]) {
            Ok(0) => {
                return Err(ManagedError::Silent {
                    vm: vm.to_owned(),
                    what: "its VMM closed its migration's socket: see its manager's log".to_owned(),
                });
            }
            Ok(read) => {
                bytes.truncate(begun + read);
                return Ok(());
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// The machine's RAM is the largest block; what the others have is held in the
/// agent's memory.
fn main_block(blocks: &[(String, u64)]) -> Result<MainBlock, String> {
    let main = blocks.iter().max_by_key(|(_, bytes)| *bytes);
    let (name, bytes) = main.ok_or("its stream lists no RAM blocks")?;
    let others: u64 = blocks.iter().map(|(_, bytes)| bytes).sum::<u64>() - bytes;
    if others > MAX_OTHER_RAM {
        return Err(format!(
            "{others} bytes of RAM blocks besides `{name}` would be held in the agent's memory, at \
             most {MAX_OTHER_RAM} are: all guest RAM has to be one block, without NUMA nodes of its \
             own and DIMMs, and video memory small"
        ));
    }
    let pages = bytes / PAGE_SIZE as u64;
    if !bytes.is_multiple_of(PAGE_SIZE as u64) || u32::try_from(pages).is_err() || pages == 0 {
        return Err(format!("its block `{name}` has {bytes} bytes"));
    }
    Ok(MainBlock {
        name: name.clone(),
        bytes: *bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::qemu_stream::samples;
    use tokio::io::AsyncWriteExt;

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn the_head_tells_the_machines_ram_and_nothing_is_lost() {
        let (_, stream) = samples::streams().swap_remove(0);
        let (mut qemu, agent) = UnixStream::pair().unwrap();
        let sent = stream.clone();
        let writing = tokio::spawn(async move {
            for piece in sent.chunks(100) {
                qemu.write_all(piece).await.unwrap();
            }
        });
        let Head::Qemu(head) = read("g1", &agent, LIMIT).await.unwrap() else {
            panic!("it is QEMU's");
        };
        let (name, bytes) = samples::BLOCKS[0];
        assert_eq!((head.main.name.as_bytes(), head.main.bytes), (name, bytes));
        assert!(stream.starts_with(&head.bytes));
        drop(agent);
        let _broken_off = writing.await;
    }

    #[tokio::test]
    async fn what_is_no_stream_is_refused_with_what_to_leave_out() {
        let said = async |bytes: &[u8]| {
            let (mut qemu, agent) = UnixStream::pair().unwrap();
            qemu.write_all(bytes).await.unwrap();
            drop(qemu);
            read("g1", &agent, LIMIT).await.unwrap_err().to_string()
        };
        assert!(
            said(&0x1122_3344u32.to_be_bytes())
                .await
                .contains("--parallel")
        );
        assert!(said(&[0x16, 3, 1, 0]).await.contains("by QEMU"));
        assert!(said(b"QEVM").await.contains("closed"));
        assert!(said(b"HTTP/1.1").await.contains("magic"));
    }

    #[test]
    fn ram_in_several_blocks_is_refused() {
        let block = |name: &str, bytes: u64| (name.to_owned(), bytes);
        let one = [block("pc.ram", 1 << 30), block("vga.vram", 16 << 20)];
        assert_eq!(main_block(&one).unwrap().name, "pc.ram");
        let two = [block("ram-node0", 1 << 30), block("ram-node1", 1 << 30)];
        assert!(main_block(&two).unwrap_err().contains("NUMA"));
        assert!(main_block(&[]).is_err());
    }
}
