//! The first bytes of every connection between agents.
//!
//! ```text
//! caller → called   Hello    magic "DROV", version u16, kind u8, 0 u8, gang u64, tag u64,
//!                            nonce 16 B, proof 16 B, length u8 and u8, caller, called
//! called → caller   Answer   magic "DROV", version u16, verdict u8, 0 u8,
//!                            proof 16 B, length u16, reason
//! ```
//! Numbers are little-endian. Proofs are HMAC-SHA256 of the message (without
//! the proof itself) under a key derived from the cluster secret, cut to 16
//! bytes; the answer's also covers the caller's nonce. They tell hosts of
//! another cluster, or with an old secret, apart early and with a clear
//! message. They are no replacement for TLS, inside which all of this goes
//! (see [`super::tls`]): what follows on the connection is not covered.
//!
//! This module is the codec alone; [`super::stream`] sends and receives.

use crate::config::ClusterSecret;
use crate::types::GangId;
use aws_lc_rs::hmac;
use thiserror::Error;

/// Version of the protocol between agents. Agents of different versions
/// refuse each other.
pub const VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"DROV";
const PROOF_AT: usize = 40;
/// Bytes of a [`Hello`] before its names.
pub const HELLO_FIXED: usize = 58;
/// Bytes of an [`Answer`] before its reason.
pub const ANSWER_FIXED: usize = 26;
/// Longest reason of a refusal, bytes.
pub const MAX_REASON: usize = 1024;
const MAX_NAME: usize = 63;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Requests and notices, [`super::rpc`].
    Control,
    /// Claims, fetches and load reports, [`super::rack`].
    Rack,
    /// Pages.
    Lane,
    /// The device state of one VM.
    DeviceState,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Kind::Control => 1,
            Kind::Rack => 2,
            Kind::Lane => 3,
            Kind::DeviceState => 4,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Kind::Control, Kind::Rack, Kind::Lane, Kind::DeviceState]
            .into_iter()
            .find(|k| k.code() == code)
    }
}

/// What the caller says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// What the connection is for.
    pub kind: Kind,
    /// The gang it is for; `GangId(0)` if it is for no gang in particular.
    pub gang: GangId,
    /// Tells connections of one kind and gang apart, as its users agree: the
    /// index of a lane, the VM of a device state.
    pub tag: u64,
    /// Random; ties the answer to this call.
    pub nonce: [u8; 16],
    /// The calling agent.
    pub from: String,
    /// The agent the caller means to reach.
    pub to: String,
}

/// What the called agent decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Accepted,
    /// Another version of the protocol.
    Version,
    /// The caller is not a peer, or calls from a strange address.
    Stranger,
    /// The caller has another cluster secret.
    Secret,
    /// This is not the agent the caller wants.
    NotMe,
    /// Too many connections.
    Busy,
    /// Not wanted now, for instance because no such gang is moving.
    Unwanted,
    /// One side speaks TLS, the other does not.
    Tls,
    /// The caller's certificate is another agent's.
    Certificate,
}

impl Verdict {
    const ALL: [Verdict; 9] = [
        Verdict::Accepted,
        Verdict::Version,
        Verdict::Stranger,
        Verdict::Secret,
        Verdict::NotMe,
        Verdict::Busy,
        Verdict::Unwanted,
        Verdict::Tls,
        Verdict::Certificate,
    ];

    fn code(self) -> u8 {
        Self::ALL.iter().position(|v| *v == self).unwrap_or(0) as u8
    }
}

/// What the called agent answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its decision.
    pub verdict: Verdict,
    /// Why it refuses; empty if it accepts.
    pub reason: String,
}

/// Why bytes are no valid preamble.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PreambleError {
    /// Not a Drover agent.
    #[error("it does not speak Drover's protocol")]
    Magic,
    /// Another version.
    #[error(
        "it speaks version {0} of the protocol, this agent version {VERSION}; install the same drover on both hosts"
    )]
    Version(u16),
    /// A field has an impossible value.
    #[error("its preamble has a bad {0}")]
    Field(&'static str),
    /// Fewer bytes than the message has.
    #[error("its preamble is cut short")]
    Short,
    /// The proof does not match.
    #[error("it has another cluster secret; copy the secret file from one host to all others")]
    Proof,
}

/// The key that proves membership; derived from the cluster secret.
pub struct MembershipKey(hmac::Key);

impl std::fmt::Debug for MembershipKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MembershipKey(..)")
    }
}

impl MembershipKey {
    /// Derives the key. Its own label keeps it apart from fingerprint keys.
    pub fn derive(secret: &ClusterSecret) -> Self {
        let root = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        let derived = hmac::sign(&root, b"drover membership key 1");
        MembershipKey(hmac::Key::new(hmac::HMAC_SHA256, derived.as_ref()))
    }

    fn proof(&self, label: &[u8], parts: &[&[u8]]) -> [u8; 16] {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(label);
        for part in parts {
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part);
        }
        let mut proof = [0; 16];
        proof.copy_from_slice(&context.sign().as_ref()[..16]);
        proof
    }

    fn check(&self, label: &[u8], parts: &[&[u8]], claimed: &[u8]) -> Result<(), PreambleError> {
        let proof = self.proof(label, parts);
        aws_lc_rs::constant_time::verify_slices_are_equal(&proof, claimed)
            .map_err(|_| PreambleError::Proof)
    }
}

impl Hello {
    /// The bytes to send. Names longer than 63 bytes cannot come out of a
    /// configuration and are cut.
    pub fn encode(&self, key: &MembershipKey) -> Vec<u8> {
        let from = &self.from.as_bytes()[..self.from.len().min(MAX_NAME)];
        let to = &self.to.as_bytes()[..self.to.len().min(MAX_NAME)];
        let mut bytes = Vec::with_capacity(HELLO_FIXED + from.len() + to.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[self.kind.code(), 0]);
        bytes.extend_from_slice(&self.gang.0.to_le_bytes());
        bytes.extend_from_slice(&self.tag.to_le_bytes());
        bytes.extend_from_slice(&self.nonce);
        bytes.extend_from_slice(&[0; 16]);
        bytes.extend_from_slice(&[from.len() as u8, to.len() as u8]);
        bytes.extend_from_slice(from);
        bytes.extend_from_slice(to);
        let proof = key.proof(b"hello", &[&bytes[..PROOF_AT], &bytes[PROOF_AT + 16..]]);
        bytes[PROOF_AT..PROOF_AT + 16].copy_from_slice(&proof);
        bytes
    }

    /// From the first [`HELLO_FIXED`] bytes: how many bytes of names follow.
    pub fn names_len(fixed: &[u8]) -> Result<usize, PreambleError> {
        check_head(fixed, HELLO_FIXED)?;
        let (from, to) = (usize::from(fixed[56]), usize::from(fixed[57]));
        if !(1..=MAX_NAME).contains(&from) || !(1..=MAX_NAME).contains(&to) {
            return Err(PreambleError::Field("name"));
        }
        Ok(from + to)
    }

    /// Decodes a whole hello and checks its proof.
    pub fn decode(bytes: &[u8], key: &MembershipKey) -> Result<Self, PreambleError> {
        let hello = Self::decode_unproven(bytes)?;
        let (before, after) = (&bytes[..PROOF_AT], &bytes[PROOF_AT + 16..]);
        key.check(b"hello", &[before, after], &bytes[PROOF_AT..PROOF_AT + 16])?;
        Ok(hello)
    }

    /// Decodes a whole hello without looking at its proof: for fuzzing, which
    /// would never get past it.
    pub fn decode_unproven(bytes: &[u8]) -> Result<Self, PreambleError> {
        let names = Self::names_len(bytes)?;
        if bytes.len() != HELLO_FIXED + names {
            return Err(PreambleError::Short);
        }
        let kind = Kind::from_code(bytes[6]).ok_or(PreambleError::Field("kind"))?;
        if bytes[7] != 0 {
            return Err(PreambleError::Field("reserved byte"));
        }
        let (from, to) = bytes[HELLO_FIXED..].split_at(usize::from(bytes[56]));
        let name = |bytes: &[u8]| {
            let text = std::str::from_utf8(bytes).ok();
            let name = text.filter(|n| crate::config::is_name(n));
            name.map(str::to_owned).ok_or(PreambleError::Field("name"))
        };
        Ok(Hello {
            kind,
            gang: GangId(u64_at(bytes, 8)),
            tag: u64_at(bytes, 16),
            nonce: array_at(bytes, 24),
            from: name(from)?,
            to: name(to)?,
        })
    }
}

impl Answer {
    /// The bytes to send in answer to a hello with this `nonce`.
    pub fn encode(&self, key: &MembershipKey, nonce: &[u8; 16]) -> Vec<u8> {
        let mut end = self.reason.len().min(MAX_REASON);
        while !self.reason.is_char_boundary(end) {
            end -= 1;
        }
        let reason = &self.reason.as_bytes()[..end];
        let mut bytes = Vec::with_capacity(ANSWER_FIXED + reason.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[self.verdict.code(), 0]);
        let proof = key.proof(b"answer", &[&bytes, nonce, reason]);
        bytes.extend_from_slice(&proof);
        bytes.extend_from_slice(&(reason.len() as u16).to_le_bytes());
        bytes.extend_from_slice(reason);
        bytes
    }

    /// From the first [`ANSWER_FIXED`] bytes: how many bytes of reason follow.
    pub fn reason_len(fixed: &[u8]) -> Result<usize, PreambleError> {
        // A refusal for the version has to be readable across versions.
        if fixed.len() < ANSWER_FIXED {
            return Err(PreambleError::Short);
        }
        if fixed[..4] != MAGIC {
            return Err(PreambleError::Magic);
        }
        let len = usize::from(u16::from_le_bytes([fixed[24], fixed[25]]));
        if len > MAX_REASON {
            return Err(PreambleError::Field("reason"));
        }
        Ok(len)
    }

    /// Decodes a whole answer. An acceptance must prove that the called agent
    /// has the cluster secret too; refusals are taken at their word, since the
    /// most likely one is that the secrets differ.
    pub fn decode(
        bytes: &[u8],
        key: &MembershipKey,
        nonce: &[u8; 16],
    ) -> Result<Self, PreambleError> {
        let len = Self::reason_len(bytes)?;
        if bytes.len() != ANSWER_FIXED + len {
            return Err(PreambleError::Short);
        }
        let verdict = Verdict::ALL.get(usize::from(bytes[6]));
        let verdict = *verdict.ok_or(PreambleError::Field("verdict"))?;
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        let reason = &bytes[ANSWER_FIXED..];
        if verdict == Verdict::Accepted {
            if version != VERSION {
                return Err(PreambleError::Version(version));
            }
            key.check(b"answer", &[&bytes[..8], nonce, reason], &bytes[8..24])?;
        }
        Ok(Answer {
            verdict,
            reason: printable(reason),
        })
    }
}

/// A peer's text, safe to show: no control characters.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let safe = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(safe).collect()
}

fn check_head(bytes: &[u8], least: usize) -> Result<(), PreambleError> {
    if bytes.len() < least {
        return Err(PreambleError::Short);
    }
    if bytes[..4] != MAGIC {
        return Err(PreambleError::Magic);
    }
    match u16::from_le_bytes([bytes[4], bytes[5]]) {
        VERSION => Ok(()),
        other => Err(PreambleError::Version(other)),
    }
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(byte: u8) -> MembershipKey {
        MembershipKey::derive(&ClusterSecret::from_bytes([byte; 32]))
    }

    fn hello() -> impl Strategy<Value = Hello> {
        let name = "[a-z0-9][a-z0-9._-]{0,62}";
        (
            0..4u8,
            any::<u64>(),
            any::<u64>(),
            any::<[u8; 16]>(),
            name,
            name,
        )
            .prop_map(|(kind, gang, tag, nonce, from, to)| Hello {
                kind: Kind::from_code(kind + 1).unwrap(),
                gang: GangId(gang),
                tag,
                nonce,
                from,
                to,
            })
    }

    fn answer() -> impl Strategy<Value = Answer> {
        (0..9usize, "[ -~]{0,80}").prop_map(|(verdict, reason)| Answer {
            verdict: Verdict::ALL[verdict],
            reason,
        })
    }

    proptest! {
        #[test]
        fn hello_roundtrip(hello in hello()) {
            let bytes = hello.encode(&key(1));
            prop_assert_eq!(Hello::names_len(&bytes).unwrap() + HELLO_FIXED, bytes.len());
            prop_assert_eq!(Hello::decode(&bytes, &key(1)), Ok(hello));
            prop_assert_eq!(Hello::decode(&bytes, &key(2)), Err(PreambleError::Proof));
        }

        #[test]
        fn a_changed_hello_is_refused(hello in hello(), at in 0..58usize, bit in 0..8u8) {
            let mut bytes = hello.encode(&key(1));
            bytes[at] ^= 1 << bit;
            prop_assert!(Hello::decode(&bytes, &key(1)).is_err());
        }

        #[test]
        fn answer_roundtrip(answer in answer(), nonce in any::<[u8; 16]>()) {
            let bytes = answer.encode(&key(1), &nonce);
            prop_assert_eq!(Answer::reason_len(&bytes).unwrap() + ANSWER_FIXED, bytes.len());
            prop_assert_eq!(Answer::decode(&bytes, &key(1), &nonce), Ok(answer));
        }

        #[test]
        fn decoding_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..200), valid in any::<bool>()) {
            if valid && bytes.len() >= 6 {
                bytes[..6].copy_from_slice(b"DROV\x01\0");
            }
            let _ = Hello::decode(&bytes, &key(1));
            let _ = Hello::decode_unproven(&bytes);
            let _ = Answer::decode(&bytes, &key(1), &[0; 16]);
        }
    }

    #[test]
    fn only_a_member_can_accept_and_only_this_call() {
        let yes = Answer {
            verdict: Verdict::Accepted,
            reason: String::new(),
        };
        let bytes = yes.encode(&key(1), &[1; 16]);
        assert!(Answer::decode(&bytes, &key(1), &[1; 16]).is_ok());
        assert_eq!(
            Answer::decode(&bytes, &key(2), &[1; 16]),
            Err(PreambleError::Proof)
        );
        assert_eq!(
            Answer::decode(&bytes, &key(1), &[2; 16]),
            Err(PreambleError::Proof)
        );
    }

    #[test]
    fn a_refusal_is_read_across_versions_and_shown_safely() {
        let no = Answer {
            verdict: Verdict::Version,
            reason: "old\x1b[2J".into(),
        };
        let mut bytes = no.encode(&key(1), &[0; 16]);
        bytes[4] = 9;
        let read = Answer::decode(&bytes, &key(2), &[0; 16]).unwrap();
        assert_eq!(read.verdict, Verdict::Version);
        assert_eq!(read.reason, "old [2J");
    }
}
