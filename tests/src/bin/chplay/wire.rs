//! Requests and answers, as the protocol's description has them.

use anyhow::{Result, bail, ensure};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

pub(crate) const START: u16 = 1;
pub(crate) const CONFIG: u16 = 2;
pub(crate) const STATE: u16 = 3;
pub(crate) const MEMORY: u16 = 4;
pub(crate) const COMPLETE: u16 = 5;
pub(crate) const MEMORY_FD: u16 = 7;

pub(crate) fn head(command: u16, length: u64) -> [u8; 16] {
    let mut head = [0; 16];
    head[..2].copy_from_slice(&command.to_le_bytes());
    head[8..].copy_from_slice(&length.to_le_bytes());
    head
}

/// Sends a command and its payload, and waits for Ok.
pub(crate) fn ask(mut to: &UnixStream, command: u16, payload: &[u8]) -> Result<()> {
    to.write_all(&head(command, payload.len() as u64))?;
    to.write_all(payload)?;
    answered(to, command)
}

/// Waits for Ok.
pub(crate) fn answered(mut by: &UnixStream, command: u16) -> Result<()> {
    let mut answer = [0; 16];
    by.read_exact(&mut answer)?;
    ensure!(answer[2..] == [0; 14], "an odd answer: {answer:?}");
    match answer[..2] {
        [1, 0] => Ok(()),
        _ => bail!("command {command} was refused"),
    }
}

/// The next command and the length of its payload.
pub(crate) fn command(mut from: &UnixStream) -> Result<(u16, u64)> {
    let mut head = [0; 16];
    from.read_exact(&mut head)?;
    let [c0, c1, v0, v1, _, _, _, _, length @ ..] = head;
    ensure!([v0, v1] == [0, 0], "version {v0} {v1}");
    Ok((u16::from_le_bytes([c0, c1]), u64::from_le_bytes(length)))
}

pub(crate) fn payload(mut from: &UnixStream, length: u64) -> Result<Vec<u8>> {
    let mut payload = vec![0; length as usize];
    from.read_exact(&mut payload)?;
    Ok(payload)
}

pub(crate) fn answer(mut to: &UnixStream, ok: bool) -> Result<()> {
    let status = if ok { 1 } else { 2 };
    Ok(to.write_all(&head(status, 0))?)
}
