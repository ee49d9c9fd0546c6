//! `chplay`, which plays a Cloud Hypervisor, as tests run it.

use crate::cache;
use crate::topology::Host;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

const START: Duration = Duration::from_secs(20);

/// The program, of this workspace's release build.
///
/// # Errors
/// When it is not there, with what to run.
pub fn binary() -> Result<PathBuf> {
    let path = cache::target_dir().join("release/chplay");
    if !path.is_file() {
        bail!(
            "{} is missing: run `cargo build --release -p tests --bins`",
            path.display()
        );
    }
    Ok(path)
}

/// A running one. Dropping it ends it; it ends with the thread that started it,
/// too.
#[derive(Debug)]
pub struct ChPlay {
    child: Child,
    control: PathBuf,
}

/// What one says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// `running`, `paused` or `none`.
    pub state: String,
    /// What its guest has counted to.
    pub tick: u64,
    /// How its last migration failed.
    pub error: String,
}

impl ChPlay {
    /// Starts one on a host: with a guest of so many MiB, or to wait for one.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(host: &Host, vm: &str, guest: Option<(u64, u64)>) -> Result<ChPlay> {
        let control = host.run_dir.join(format!("{vm}.chplay"));
        let mut command = host.ns.command(binary()?);
        command.args(["--name", vm, "--control"]).arg(&control);
        if let Some((mib, seed)) = guest {
            command.args(["--ram-mib", &mib.to_string(), "--seed", &seed.to_string()]);
        }
        let child = command.stdin(Stdio::null()).spawn().context("chplay")?;
        let mut playing = ChPlay { child, control };
        let until = Instant::now() + START;
        while UnixStream::connect(&playing.control).is_err() {
            if let Some(status) = playing.child.try_wait()? {
                bail!("chplay of {vm} ended ({status})");
            }
            if Instant::now() > until {
                bail!("chplay of {vm} does not come up");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(playing)
    }

    fn ask(&self, line: &str) -> Result<String> {
        let mut stream = UnixStream::connect(&self.control).context("chplay has ended")?;
        stream.set_read_timeout(Some(START))?;
        stream.write_all(format!("{line}\n").as_bytes())?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer.trim_end().to_owned())
    }

    fn tell(&self, line: &str) -> Result<()> {
        match &*self.ask(line)? {
            "ok" => Ok(()),
            other => bail!("{line}: {other}"),
        }
    }

    /// `send-migration` to a socket.
    ///
    /// # Errors
    /// When it cannot connect.
    pub fn send(&self, to: &Path) -> Result<()> {
        self.tell(&format!("send {}", to.display()))
    }

    /// The same with `local=on`.
    ///
    /// # Errors
    /// As [`ChPlay::send`].
    pub fn send_local(&self, to: &Path) -> Result<()> {
        self.tell(&format!("send {} local", to.display()))
    }

    /// `receive-migration` on a socket; returns when it listens.
    ///
    /// # Errors
    /// When it cannot.
    pub fn receive(&self, at: &Path) -> Result<()> {
        self.tell(&format!("receive {}", at.display()))
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// When it has ended.
    pub fn status(&self) -> Result<Status> {
        let said = self.ask("status")?;
        let mut words = said.splitn(2, ' ');
        let state = words.next().unwrap_or_default().to_owned();
        let rest = words.next().unwrap_or_default();
        let (tick, error) = match &*state {
            "none" => (0, rest),
            _ => {
                let (tick, error) = rest.split_once(' ').unwrap_or((rest, ""));
                (tick.parse()?, error)
            }
        };
        Ok(Status {
            state,
            tick,
            error: error.to_owned(),
        })
    }

    /// Whether the process has ended, as a source's does that has sent its VM.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }
}

impl Drop for ChPlay {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _ = self.child.wait();
    }
}
