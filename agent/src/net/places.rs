//! Room for connections: so many of all kinds together, and so many of each
//! kind for one peer, so that one that opens connections without end takes
//! neither the others' places nor this agent's memory.

use super::preamble::{Hello, Kind};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Connections of one peer at a time, by kind. Honest agents have one for
/// control and two to the rack; the rest is for those that died and are not
/// known to be dead yet.
#[derive(Debug, Clone, Copy)]
pub struct PeerLimits {
    /// `Control`.
    pub control: usize,
    /// `Rack`.
    pub rack: usize,
    /// `Lane`, of all gangs together.
    pub lanes: usize,
    /// `DeviceState`.
    pub device_state: usize,
}

impl Default for PeerLimits {
    fn default() -> Self {
        PeerLimits {
            control: 8,
            rack: 8,
            lanes: 32,
            device_state: 64,
        }
    }
}

impl PeerLimits {
    fn of(&self, kind: Kind) -> usize {
        match kind {
            Kind::Control => self.control,
            Kind::Rack => self.rack,
            Kind::Lane => self.lanes,
            Kind::DeviceState => self.device_state,
        }
    }
}

/// The connections that are open.
#[derive(Debug)]
pub(super) struct Places {
    all: usize,
    limits: PeerLimits,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_peer: HashMap<(String, Kind), usize>,
}

/// The right to one open connection; gives it back when dropped.
#[derive(Debug)]
pub struct ConnectionPermit {
    places: Arc<Places>,
    key: (String, Kind),
}

impl Places {
    pub(super) fn new(all: usize, limits: PeerLimits) -> Arc<Self> {
        Arc::new(Places {
            all,
            limits,
            taken: Mutex::default(),
        })
    }

    /// A place for the caller, or what to tell it.
    pub(super) fn take(self: &Arc<Self>, hello: &Hello) -> Result<ConnectionPermit, String> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.all >= self.all {
            return Err("too many connections are open; try again".to_owned());
        }
        let key = (hello.from.clone(), hello.kind);
        let most = self.limits.of(hello.kind);
        let of_peer = taken.by_peer.entry(key.clone()).or_default();
        if *of_peer >= most {
            return Err(format!(
                "{} has {most} connections of this kind open already; try again",
                hello.from
            ));
        }
        *of_peer += 1;
        taken.all += 1;
        Ok(ConnectionPermit {
            places: self.clone(),
            key,
        })
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let taken = &self.places.taken;
        let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all = taken.all.saturating_sub(1);
        if let Some(of_peer) = taken.by_peer.get_mut(&self.key) {
            *of_peer = of_peer.saturating_sub(1);
            if *of_peer == 0 {
                taken.by_peer.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::GangId;

    fn hello(from: &str, kind: Kind) -> Hello {
        Hello {
            kind,
            gang: GangId(1),
            tag: 0,
            nonce: [0; 16],
            from: from.to_owned(),
            to: "b1".to_owned(),
        }
    }

    #[test]
    fn one_peer_cannot_take_the_others_places() {
        let limits = PeerLimits {
            control: 2,
            rack: 1,
            ..PeerLimits::default()
        };
        let places = Places::new(4, limits);
        let first = places.take(&hello("a1", Kind::Control)).unwrap();
        let _second = places.take(&hello("a1", Kind::Control)).unwrap();
        let refused = places.take(&hello("a1", Kind::Control)).unwrap_err();
        assert!(refused.contains("a1 has 2 connections"), "{refused}");
        let _rack = places.take(&hello("a1", Kind::Rack)).unwrap();
        let _other = places.take(&hello("a2", Kind::Control)).unwrap();
        let refused = places.take(&hello("a3", Kind::Control)).unwrap_err();
        assert!(refused.contains("too many"), "{refused}");
        drop(first);
        drop(places.take(&hello("a1", Kind::Control)).unwrap());
        assert_eq!(places.taken.lock().unwrap().by_peer.len(), 3);
    }
}
