//! One request under way: whole messages, and an end to all trust when one is
//! not understood.

use super::client::Asked;
use super::error::LinkClientError;
use drover_vmm::wire::{Answer, Request};
use drover_vmm::{Connection, ConnectionError};
use std::sync::MutexGuard;
use std::time::Duration;

/// The connection, while one request is under way. If it breaks, it is closed:
/// what is still to come would be taken for the next answer.
pub(super) struct Session<'a> {
    pub(super) vm: &'a str,
    pub(super) doing: &'static str,
    pub(super) held: MutexGuard<'a, Option<Connection>>,
}

impl Session<'_> {
    /// How long the VMM may take for each message.
    pub(super) fn limit(&mut self, limit: Duration) -> Asked<()> {
        let connection = self.held.as_ref().ok_or(ConnectionError::Closed);
        let limited = connection.and_then(|c| Ok(c.set_limit(limit)?));
        limited.map_err(|source| self.broke(source))
    }

    /// Sends a request, or a part of one.
    pub(super) fn send(&mut self, request: &Request<'_>) -> Asked<()> {
        let connection = self.held.as_mut().ok_or(ConnectionError::Closed);
        let sent = connection.and_then(|c| Ok(c.send(|out| request.encode(out))?));
        sent.map_err(|source| {
            self.give_up();
            self.broke(source)
        })
    }

    /// Hears one answer, of which `f` makes what is wanted.
    pub(super) fn hear<T>(&mut self, f: impl FnOnce(&Answer<'_>) -> Asked<T>) -> Asked<T> {
        let heard = self.hear_once(f);
        if matches!(&heard, Err(error) if !matches!(error, LinkClientError::Refused { .. })) {
            self.give_up();
        }
        heard
    }

    fn hear_once<T>(&mut self, f: impl FnOnce(&Answer<'_>) -> Asked<T>) -> Asked<T> {
        let (vm, doing) = (self.vm, self.doing);
        let broke = |source| broke(vm, doing, source);
        let connection = self.held.as_mut().ok_or(broke(ConnectionError::Closed))?;
        let (kind, body) = connection.receive().map_err(broke)?;
        let answer = Answer::decode(kind, body).map_err(|e| broke(e.into()))?;
        f(&answer)
    }

    /// The answer is not the one that this request has.
    pub(super) fn give_up(&mut self) {
        *self.held = None;
    }

    fn broke(&self, source: ConnectionError) -> LinkClientError {
        broke(self.vm, self.doing, source)
    }
}

fn broke(vm: &str, doing: &'static str, source: ConnectionError) -> LinkClientError {
    LinkClientError::Connection {
        vm: vm.to_owned(),
        doing,
        source,
    }
}

/// An answer that is none to what was asked.
pub(super) fn wrong(vm: &str, doing: &'static str, answer: &Answer<'_>) -> LinkClientError {
    let vm = vm.to_owned();
    match answer {
        Answer::Refused { text, .. } => LinkClientError::Refused {
            vm,
            doing,
            text: text.clone(),
        },
        other => {
            let mut what = format!("{other:?}");
            what.truncate(what.floor_char_boundary(80));
            LinkClientError::Answer { vm, doing, what }
        }
    }
}
