//! Two serial ports, as far as the guests use them: what they say goes to a
//! file, what they are told comes through a socket.

use anyhow::{Context, Result};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const OUT: std::ops::Range<u16> = 0x3f8..0x400;
const IN: std::ops::Range<u16> = 0x2f8..0x300;
/// Line status: the transmitter is empty; there is something to read.
const EMPTY: u8 = 0x60;
const READY: u8 = 1;
/// What waits for a guest that does not read.
const MOST: usize = 4096;

/// Both ports. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Serial(Arc<Mutex<Ports>>);

struct Ports {
    out: File,
    told: VecDeque<u8>,
}

impl Serial {
    /// Opens the file and listens on the socket.
    pub(crate) fn start(out: &Path, commands: &Path) -> Result<Serial> {
        let out = File::options()
            .create(true)
            .append(true)
            .open(out)
            .with_context(|| out.display().to_string())?;
        let _stale = std::fs::remove_file(commands);
        let listener =
            UnixListener::bind(commands).with_context(|| commands.display().to_string())?;
        let serial = Serial(Arc::new(Mutex::new(Ports {
            out,
            told: VecDeque::new(),
        })));
        let ports = serial.clone();
        std::thread::Builder::new()
            .name("commands".into())
            .spawn(move || {
                for client in listener.incoming().flatten() {
                    // As QEMU does it: what the guest has not read of an earlier
                    // client is dropped. A command is asked again and again, and
                    // a slow guest should not do it as often.
                    ports.lock().told.clear();
                    for byte in BufReader::new(client).bytes().map_while(Result::ok) {
                        let told = &mut ports.lock().told;
                        if told.len() < MOST {
                            told.push_back(byte);
                        }
                    }
                }
            })?;
        Ok(serial)
    }

    fn lock(&self) -> MutexGuard<'_, Ports> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest writes to a port.
    pub(crate) fn write(&self, port: u16, bytes: &[u8]) -> std::io::Result<()> {
        if port == OUT.start {
            self.lock().out.write_all(bytes)?;
        }
        Ok(())
    }

    /// The guest reads a port; those without a device have all bits set.
    pub(crate) fn read(&self, port: u16, into: &mut [u8]) {
        let mut ports = self.lock();
        into.fill(match port {
            _ if port == IN.start => ports.told.pop_front().unwrap_or(0),
            _ if port == IN.start + 5 && !ports.told.is_empty() => EMPTY | READY,
            _ if port == IN.start + 5 || port == OUT.start + 5 => EMPTY,
            _ if IN.contains(&port) || OUT.contains(&port) => 0,
            _ => 0xff,
        });
    }

    /// What the guest has not read yet.
    pub(crate) fn pending(&self) -> Vec<u8> {
        self.lock().told.iter().copied().collect()
    }

    pub(crate) fn set_pending(&self, told: &[u8]) {
        self.lock().told = told.iter().copied().take(MOST).collect();
    }
}
