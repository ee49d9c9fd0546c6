//! Lines of the QEMU Machine Protocol: cutting, parsing, composing. No I/O.

use serde::Deserialize;
use serde_json::Value;
use std::collections::VecDeque;
use thiserror::Error;

/// Longest line taken from a VMM. `query-qmp-schema`, the longest answer there
/// is, has some 300 KiB.
pub const MAX_LINE: usize = 4 << 20;

/// What a VMM says, one a line.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// First line of a connection.
    Greeting(Version),
    /// Something happened.
    Event(Event),
    /// Answer to the command of this id (`None`: the VMM could not read it).
    Reply {
        /// The id the command carried.
        id: Option<u64>,
        /// What it returned, or why not.
        result: Result<Value, CommandError>,
    },
}

/// Version of a QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, serde::Serialize)]
pub struct Version {
    /// 7 of 7.2.22.
    pub major: u32,
    /// 2 of 7.2.22.
    pub minor: u32,
    /// 22 of 7.2.22.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// An event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name: `STOP`, `RESUME`, `MIGRATION`, `SHUTDOWN`, …
    pub name: String,
    /// Its data, `null` if it has none.
    pub data: Value,
    /// The VMM's wall clock when it happened, in microseconds since 1970.
    pub at_us: u64,
}

/// A VMM's refusal of a command.
#[derive(Debug, Clone, PartialEq, Eq, Error, Deserialize)]
#[error("{desc} ({class})")]
pub struct CommandError {
    /// `GenericError`, `CommandNotFound`, …
    pub class: String,
    /// For people.
    pub desc: String,
}

/// A line that is not of the protocol.
#[derive(Debug, Error)]
pub enum LineError {
    /// Not JSON.
    #[error("not JSON")]
    Json(#[source] serde_json::Error),
    /// JSON, but none of the protocol's messages.
    #[error("neither greeting, event nor reply")]
    Unknown,
    /// Longer than [`MAX_LINE`].
    #[error("a line is longer than {MAX_LINE} bytes")]
    TooLong,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(rename = "QMP")]
    greeting: Option<RawGreeting>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    timestamp: Option<RawTime>,
    #[serde(rename = "return", default, deserialize_with = "present")]
    ret: Option<Value>,
    error: Option<CommandError>,
    #[serde(default)]
    id: Value,
}

#[derive(Deserialize)]
struct RawGreeting {
    version: RawVersion,
}

#[derive(Deserialize)]
struct RawVersion {
    qemu: Version,
}

#[derive(Deserialize)]
struct RawTime {
    seconds: i64,
    microseconds: i64,
}

/// `"return": null` is an answer too.
fn present<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(d).map(Some)
}

/// Parses one line. Pure: any bytes give a message or an error.
pub fn parse_line(line: &[u8]) -> Result<Message, LineError> {
    let raw: Raw = serde_json::from_slice(line).map_err(LineError::Json)?;
    if let Some(greeting) = raw.greeting {
        return Ok(Message::Greeting(greeting.version.qemu));
    }
    if let Some(name) = raw.event {
        // QEMU writes -1 for a clock it could not read.
        let at_us = raw.timestamp.map_or(0, |t| {
            let (s, us) = (t.seconds.max(0) as u64, t.microseconds.max(0) as u64);
            s.saturating_mul(1_000_000).saturating_add(us)
        });
        return Ok(Message::Event(Event {
            name,
            data: raw.data,
            at_us,
        }));
    }
    let id = raw.id.as_u64();
    match (raw.ret, raw.error) {
        (_, Some(error)) => Ok(Message::Reply {
            id,
            result: Err(error),
        }),
        (Some(value), None) => Ok(Message::Reply {
            id,
            result: Ok(value),
        }),
        (None, None) => Err(LineError::Unknown),
    }
}

/// The line (with its end) that asks for `command`.
pub fn compose(id: u64, command: &str, arguments: &Value) -> Vec<u8> {
    let mut message = serde_json::json!({ "execute": command, "id": id });
    if !arguments.is_null() {
        message["arguments"] = arguments.clone();
    }
    let mut line = message.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Cuts a byte stream into lines, empty ones skipped.
#[derive(Debug, Default)]
pub struct LineCutter {
    bytes: Vec<u8>,
    /// No line end before this.
    seen: usize,
}

impl LineCutter {
    /// Takes in bytes as they come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole line without its end; `None` until there is one.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        loop {
            let Some(at) = self.bytes[self.seen..].iter().position(|b| *b == b'\n') else {
                self.seen = self.bytes.len();
                return if self.seen > MAX_LINE {
                    Err(LineError::TooLong)
                } else {
                    Ok(None)
                };
            };
            let rest = self.bytes.split_off(self.seen + at + 1);
            let mut line = std::mem::replace(&mut self.bytes, rest);
            self.seen = 0;
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            if line.len() > MAX_LINE {
                return Err(LineError::TooLong);
            }
            if !line.is_empty() {
                return Ok(Some(line));
            }
        }
    }
}

/// The events of one connection, numbered from 0. Whoever notes the number
/// before asking for something finds all events that come after, however late
/// it looks, unless thousands came meanwhile, which it is told.
#[derive(Debug, Default)]
pub struct EventLog {
    first: u64,
    events: VecDeque<Event>,
}

impl EventLog {
    /// Events kept.
    pub const KEPT: usize = 4096;

    /// Adds one.
    pub fn push(&mut self, event: Event) {
        if self.events.len() == Self::KEPT {
            self.events.pop_front();
            self.first += 1;
        }
        self.events.push_back(event);
    }

    /// The number the next event will have.
    pub fn next(&self) -> u64 {
        self.first + self.events.len() as u64
    }

    /// Events from number `from` on; `None` if some of them are not kept any more.
    pub fn since(&self, from: u64) -> Option<impl Iterator<Item = &Event>> {
        let skip = from.checked_sub(self.first)?;
        Some(
            self.events
                .iter()
                .skip(usize::try_from(skip).unwrap_or(usize::MAX)),
        )
    }

    /// Whether the VMM has said that it ends, and never on this connection
    /// that it let its guest run. Events come in the order of what they tell,
    /// and after SHUTDOWN QEMU's main loop takes no command any more (unless
    /// `-no-shutdown` keeps it, which this cannot see). `false` also if events
    /// are missing.
    pub fn ended_unresumed(&self) -> bool {
        let Some(mut events) = self.since(0) else {
            return false;
        };
        let told = events.find(|event| matches!(event.name.as_str(), "RESUME" | "SHUTDOWN"));
        told.is_some_and(|event| event.name == "SHUTDOWN")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn reads_what_qemu_writes() {
        let greeting = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;
        let v = Version {
            major: 7,
            minor: 2,
            micro: 22,
        };
        assert_eq!(parse_line(greeting).unwrap(), Message::Greeting(v));
        assert!(
            v < Version {
                major: 8,
                minor: 0,
                micro: 0
            }
        );
        let event = br#"{"timestamp": {"seconds": 5, "microseconds": 7}, "event": "MIGRATION", "data": {"status": "completed"}}"#;
        let Message::Event(e) = parse_line(event).unwrap() else {
            panic!()
        };
        assert_eq!((e.name.as_str(), e.at_us), ("MIGRATION", 5_000_007));
        assert_eq!(e.data["status"], "completed");
        let reply = |line: &str| match parse_line(line.as_bytes()).unwrap() {
            Message::Reply { id, result } => (id, result),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            reply(r#"{"return": {}, "id": 3}"#),
            (Some(3), Ok(json!({})))
        );
        assert_eq!(reply(r#"{"return": null}"#), (None, Ok(Value::Null)));
        let (_, refused) = reply(r#"{"id":1,"error":{"class":"GenericError","desc":"no"}}"#);
        assert_eq!(refused.unwrap_err().to_string(), "no (GenericError)");
        assert!(matches!(parse_line(b"{}"), Err(LineError::Unknown)));
        assert!(matches!(parse_line(b"x"), Err(LineError::Json(_))));
    }

    #[test]
    fn endless_lines_are_refused() {
        let mut cutter = LineCutter::default();
        for _ in 0..MAX_LINE / 4096 {
            cutter.push(&[b'x'; 4096]);
            assert!(cutter.next_line().unwrap().is_none());
        }
        cutter.push(b"x");
        assert!(matches!(cutter.next_line(), Err(LineError::TooLong)));
    }

    #[test]
    fn lost_events_are_not_silent() {
        let mut log = EventLog::default();
        let event = |i: usize| Event {
            name: i.to_string(),
            data: Value::Null,
            at_us: 0,
        };
        for i in 0..EventLog::KEPT + 2 {
            log.push(event(i));
        }
        assert!(log.since(1).is_none());
        assert_eq!(log.since(2).unwrap().count(), EventLog::KEPT);
        assert_eq!(
            log.since(log.next() - 1).unwrap().next().unwrap().name,
            "4097"
        );
        assert_eq!(log.since(log.next()).unwrap().count(), 0);
    }

    #[test]
    fn a_vmm_that_ended_before_it_was_told_to_run_is_told_from_one_that_ran() {
        let log = |names: &[&str]| {
            let mut log = EventLog::default();
            for name in names {
                let (name, data) = (name.to_string(), Value::Null);
                log.push(Event {
                    name,
                    data,
                    at_us: 0,
                });
            }
            log
        };
        assert!(log(&["MIGRATION", "SHUTDOWN"]).ended_unresumed());
        assert!(!log(&["MIGRATION"]).ended_unresumed());
        assert!(!log(&["RESUME", "SHUTDOWN"]).ended_unresumed());
        assert!(!log(&["RESUME", "STOP", "SHUTDOWN"]).ended_unresumed());
        let mut lost = log(&["SHUTDOWN"]);
        for _ in 0..EventLog::KEPT {
            lost.push(lost.events[0].clone());
        }
        assert!(!lost.ended_unresumed());
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_line(&bytes);
        }

        #[test]
        fn json_never_panics(key in "(QMP|event|return|error|id|data|timestamp)", inner in "(null|1|\\{\\}|\\[\\]|\"x\"|\\{\"class\":\"a\",\"desc\":\"b\"\\})") {
            let _ = parse_line(format!("{{\"{key}\":{inner}}}").as_bytes());
        }

        #[test]
        fn lines_survive_any_cut(lines in prop::collection::vec("[a-z]{1,30}", 1..10), step in 1usize..17) {
            let bytes = lines.join("\r\n").into_bytes();
            let mut cutter = LineCutter::default();
            let mut got = Vec::new();
            for chunk in bytes.chunks(step).chain([&b"\n"[..]]) {
                cutter.push(chunk);
                while let Some(line) = cutter.next_line().unwrap() {
                    got.push(String::from_utf8(line).unwrap());
                }
            }
            prop_assert_eq!(got, lines);
        }

        #[test]
        fn composed_commands_are_one_line(id: u64, text in ".{0,40}") {
            let line = compose(id, "x", &json!({ "a": text }));
            prop_assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
            let back: Value = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(back["id"].as_u64(), Some(id));
            prop_assert_eq!(back["arguments"]["a"].as_str(), Some(text.as_str()));
        }
    }
}
