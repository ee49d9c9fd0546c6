//! A QMP client. Reading and writing go through separate handles: a shared
//! buffered one loses events.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a command may take to be answered, unless told otherwise.
const ANSWER: Duration = Duration::from_secs(20);

/// An event as QEMU sent it.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `STOP`, `RESUME`, `MIGRATION` and so on.
    pub name: String,
    /// Its data, null if it has none.
    pub data: Value,
    /// QEMU's own time stamp, in microseconds since 1970.
    pub at_us: u64,
}

impl Event {
    fn from(message: &Value) -> Event {
        let stamp = |key: &str| message["timestamp"][key].as_u64().unwrap_or(0);
        Event {
            name: message["event"].as_str().unwrap_or_default().to_string(),
            data: message["data"].clone(),
            at_us: stamp("seconds") * 1_000_000 + stamp("microseconds"),
        }
    }
}

/// A connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    half_line: Vec<u8>,
    events: VecDeque<Event>,
    seen: Vec<Event>,
    next_id: u64,
    patience: Duration,
}

impl Qmp {
    /// Connects and leaves the capabilities mode.
    ///
    /// # Errors
    /// When nothing listens on `socket`, or it is no QMP server.
    pub fn connect(socket: &Path) -> Result<Qmp> {
        Qmp::connect_within(socket, ANSWER)
    }

    /// As [`Qmp::connect`], with so much time for each answer.
    ///
    /// # Errors
    /// As [`Qmp::connect`].
    pub fn connect_within(socket: &Path, patience: Duration) -> Result<Qmp> {
        let writer =
            UnixStream::connect(socket).with_context(|| format!("QMP at {}", socket.display()))?;
        let reader = BufReader::new(writer.try_clone()?);
        let mut qmp = Qmp {
            reader,
            writer,
            half_line: Vec::new(),
            events: VecDeque::new(),
            seen: Vec::new(),
            next_id: 0,
            patience,
        };
        let greeting = qmp.message(Instant::now() + patience)?;
        if greeting.is_none_or(|g| g.get("QMP").is_none()) {
            bail!("{} did not greet like QMP", socket.display());
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// The next message, or `None` when none came until `until`.
    fn message(&mut self, until: Instant) -> Result<Option<Value>> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            self.reader
                .get_ref()
                .set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            match self.reader.read_until(b'\n', &mut self.half_line) {
                Ok(0) => bail!("QEMU closed the QMP connection"),
                Ok(_) if self.half_line.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.half_line);
                    return Ok(Some(serde_json::from_slice(&line)?));
                }
                Ok(_) => (),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if Instant::now() >= until {
                        return Ok(None);
                    }
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Runs a command and returns what it answers; events that come meanwhile
    /// are kept for [`Qmp::wait_event`].
    ///
    /// # Errors
    /// When QEMU refuses, dies, or does not answer in time.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.next_id += 1;
        let id = self.next_id;
        let line = format!(
            "{}\n",
            json!({"execute": command, "arguments": arguments, "id": id})
        );
        self.writer.write_all(line.as_bytes())?;
        let until = Instant::now() + self.patience;
        loop {
            let message = self
                .message(until)?
                .with_context(|| format!("QEMU did not answer {command}"))?;
            if message.get("event").is_some() {
                self.keep(&message);
            } else if message["id"] == id {
                match message.get("error") {
                    Some(error) => bail!("{command}: {error}"),
                    None => return Ok(message["return"].clone()),
                }
            }
        }
    }

    /// Waits for the first event that `wanted` accepts; earlier ones go.
    ///
    /// # Errors
    /// When none comes within `patience` or QEMU dies.
    pub fn wait_event(
        &mut self,
        patience: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event> {
        let until = Instant::now() + patience;
        loop {
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return Ok(event);
                }
            }
            let message = self
                .message(until)?
                .with_context(|| format!("no such event within {patience:?}"))?;
            if message.get("event").is_some() {
                self.keep(&message);
            }
        }
    }

    fn keep(&mut self, message: &Value) {
        let event = Event::from(message);
        self.seen.push(event.clone());
        self.events.push_back(event);
    }

    /// When the last event of this name was sent, in microseconds since 1970.
    /// Only what was received while waiting for something counts.
    pub fn last_at(&self, name: &str) -> Option<u64> {
        self.seen
            .iter()
            .rev()
            .find(|e| e.name == name)
            .map(|e| e.at_us)
    }

    /// Takes in what was sent until now, or until QEMU ended.
    pub fn drain(&mut self) {
        while let Ok(Some(message)) = self.message(Instant::now() + Duration::from_millis(50)) {
            if message.get("event").is_some() {
                self.keep(&message);
            }
        }
    }

    /// The run state: `running`, `paused`, `postmigrate`, …
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn status(&mut self) -> Result<String> {
        Ok(self.execute("query-status", json!({}))?["status"]
            .as_str()
            .unwrap_or_default()
            .to_string())
    }

    /// Switches migration capabilities.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn capabilities(&mut self, set: &[(&str, bool)]) -> Result<()> {
        let list: Vec<Value> = set
            .iter()
            .map(|(c, on)| json!({"capability": c, "state": on}))
            .collect();
        self.execute("migrate-set-capabilities", json!({"capabilities": list}))
            .map(drop)
    }

    /// Waits until the migration has come to an end and returns its last event.
    ///
    /// # Errors
    /// When it fails, or takes longer than `patience`.
    pub fn migration_completed(&mut self, patience: Duration) -> Result<Event> {
        let ended = |e: &Event| {
            e.name == "MIGRATION"
                && matches!(e.data["status"].as_str(), Some("completed" | "failed"))
        };
        let event = self
            .wait_event(patience, ended)
            .context("waiting for the migration to end")?;
        if event.data["status"] == "failed" {
            let why = self.execute("query-migrate", json!({}))?;
            bail!("QEMU's migration failed: {why}");
        }
        Ok(event)
    }
}
