//! `send-migration`.

use crate::guest::{Guest, PAGE};
use crate::wire::{self, ask};
use anyhow::{Context, Result};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::json;
use std::collections::BTreeSet;
use std::io::{IoSlice, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

/// So few pages go with the guest stopped.
const FEW: usize = 64;
/// After so many rounds it is stopped anyway.
const ROUNDS: usize = 200;
/// Pages of a piece of contents.
const PIECE: u64 = 64;

/// Sends the VM. When it fails, the guest may stand still.
pub(crate) fn send(guest: &Guest, to: &UnixStream, local: bool) -> Result<()> {
    ask(to, wire::START, &[]).context("beginning")?;
    if local {
        memory_fd(guest, to)?;
    }
    let mapping = json!({
        "slot": 0, "gpa": 0, "size": guest.bytes, "zone_id": "mem0",
        "virtio_mem": false, "file_offset": 0,
    });
    let config = json!({
        "vm_config": { "memory": { "size": guest.bytes, "shared": true } },
        "memory_manager_data": { "guest_ram_mappings": [mapping] },
    });
    ask(to, wire::CONFIG, config.to_string().as_bytes()).context("its configuration")?;
    if local {
        guest.run(false);
    } else {
        rounds(guest, to).context("its memory")?;
    }
    let state = json!({ "tick": guest.tick(), "seed": guest.seed });
    ask(to, wire::STATE, state.to_string().as_bytes()).context("its state")?;
    ask(to, wire::COMPLETE, &[]).context("completing")
}

fn rounds(guest: &Guest, to: &UnixStream) -> Result<()> {
    guest.take_dirty();
    memory(guest, to, &(0..guest.bytes / PAGE).collect())?;
    for _ in 0..ROUNDS {
        let dirty = guest.take_dirty();
        memory(guest, to, &dirty)?;
        if dirty.len() <= FEW {
            break;
        }
    }
    guest.run(false);
    memory(guest, to, &guest.take_dirty())
}

fn memory(guest: &Guest, mut to: &UnixStream, pages: &BTreeSet<u64>) -> Result<()> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        match ranges.last_mut() {
            Some((first, count)) if *first + *count == *page => *count += 1,
            _ => ranges.push((*page, 1)),
        }
    }
    if ranges.is_empty() {
        return Ok(());
    }
    to.write_all(&wire::head(wire::MEMORY, ranges.len() as u64 * 16))?;
    for (first, count) in &ranges {
        to.write_all(&(first * PAGE).to_le_bytes())?;
        to.write_all(&(count * PAGE).to_le_bytes())?;
    }
    let mut piece = vec![0; (PIECE * PAGE) as usize];
    for (first, count) in ranges {
        let mut page = first;
        while page < first + count {
            let n = PIECE.min(first + count - page);
            let piece = &mut piece[..(n * PAGE) as usize];
            guest.file.read_exact_at(piece, page * PAGE)?;
            to.write_all(piece)?;
            page += n;
        }
    }
    wire::answered(to, wire::MEMORY)
}

fn memory_fd(guest: &Guest, mut to: &UnixStream) -> Result<()> {
    to.write_all(&wire::head(wire::MEMORY_FD, 4))?;
    let fds = [guest.file.as_raw_fd()];
    sendmsg::<()>(
        to.as_raw_fd(),
        &[IoSlice::new(&0u32.to_le_bytes())],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )?;
    wire::answered(to, wire::MEMORY_FD).context("a descriptor")
}
