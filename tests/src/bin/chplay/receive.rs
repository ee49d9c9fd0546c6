//! `receive-migration`.

use crate::Vmm;
use crate::guest::Guest;
use crate::wire::{self, answer, command, payload};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

/// Takes one VM in. When it fails there is none.
pub(crate) fn receive(listener: &UnixListener, vmm: &Vmm) -> Result<()> {
    let (stream, _) = listener.accept()?;
    let mut guest = None;
    let taken = take(&stream, vmm, &mut guest);
    if taken.is_err() {
        // The source lets it run.
        let _ = answer(&stream, false);
        if let Some(guest) = guest {
            guest.end();
        }
    }
    taken
}

fn take(stream: &UnixStream, vmm: &Vmm, guest: &mut Option<Arc<Guest>>) -> Result<()> {
    let mut loaded = false;
    loop {
        let (number, length) = command(stream).context("the next command")?;
        match (number, &guest) {
            (wire::START, None) => {}
            (wire::CONFIG, None) => {
                let config: Value = serde_json::from_slice(&payload(stream, length)?)?;
                let mapping = &config["memory_manager_data"]["guest_ram_mappings"][0];
                let bytes = mapping["size"].as_u64().context("no size")?;
                *guest = Some(Guest::new(bytes, 0)?);
                vmm.has(guest.clone());
            }
            (wire::MEMORY, Some(guest)) if !loaded => memory(guest, stream, length)?,
            (wire::STATE, Some(guest)) if !loaded => {
                let state: Value = serde_json::from_slice(&payload(stream, length)?)?;
                guest.set_tick(state["tick"].as_u64().context("no tick")?);
                loaded = true;
            }
            (wire::COMPLETE, Some(guest)) if loaded => {
                guest.run(true);
                return answer(stream, true);
            }
            (other, _) => bail!("command {other} came when it may not"),
        }
        answer(stream, true)?;
    }
}

fn memory(guest: &Guest, mut from: &UnixStream, length: u64) -> Result<()> {
    let table = payload(from, length)?;
    for range in table.chunks(16) {
        let word =
            |at: usize| Ok::<_, anyhow::Error>(u64::from_le_bytes(range[at..at + 8].try_into()?));
        let (mut at, end) = (word(0)?, word(0)? + word(8)?);
        let mut piece = vec![0; 64 << 10];
        while at < end {
            let n = (piece.len() as u64).min(end - at) as usize;
            from.read_exact(&mut piece[..n])?;
            guest.file.write_all_at(&piece[..n], at)?;
            at += n as u64;
        }
    }
    Ok(())
}
