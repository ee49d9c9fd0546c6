//! The envelope of each RPC message.

use thiserror::Error;

/// One message between agents, its content still encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Envelope<'a> {
    /// A request; the response has the same id.
    Request {
        /// Chosen by the caller, unique on the connection.
        id: u64,
        /// The encoded request.
        body: &'a [u8],
    },
    /// The answer to a request.
    Response {
        /// Id of the request.
        id: u64,
        /// The encoded response.
        body: &'a [u8],
    },
    /// A message without answer.
    Notice {
        /// The encoded request type.
        body: &'a [u8],
    },
    /// The request was not handled at all.
    Fault {
        /// Id of the request.
        id: u64,
        /// Why, as text.
        why: &'a [u8],
    },
    /// I am alive, are you?
    Ping,
    /// Answer to a ping.
    Pong,
}

/// Bytes that are no [`Envelope`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a malformed message")]
pub struct MalformedEnvelope;

const HEADER: usize = 9;

impl<'a> Envelope<'a> {
    /// Appends the encoded envelope.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (kind, id, body): (u8, u64, &[u8]) = match *self {
            Envelope::Request { id, body } => (1, id, body),
            Envelope::Response { id, body } => (2, id, body),
            Envelope::Notice { body } => (3, 0, body),
            Envelope::Fault { id, why } => (4, id, why),
            Envelope::Ping => (5, 0, &[]),
            Envelope::Pong => (6, 0, &[]),
        };
        out.push(kind);
        out.extend_from_slice(&id.to_le_bytes());
        out.extend_from_slice(body);
    }

    /// Decodes the payload of a frame.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, MalformedEnvelope> {
        let (header, body) = bytes
            .split_first_chunk::<HEADER>()
            .ok_or(MalformedEnvelope)?;
        let [kind, id @ ..] = *header;
        let id = u64::from_le_bytes(id);
        match (kind, id, body) {
            (1, id, body) => Ok(Envelope::Request { id, body }),
            (2, id, body) => Ok(Envelope::Response { id, body }),
            (3, 0, body) => Ok(Envelope::Notice { body }),
            (4, id, why) => Ok(Envelope::Fault { id, why }),
            (5, 0, []) => Ok(Envelope::Ping),
            (6, 0, []) => Ok(Envelope::Pong),
            _ => Err(MalformedEnvelope),
        }
    }
}

/// Decodes a message that must fill `bytes` exactly.
pub(super) fn decode_body<T: serde::de::DeserializeOwned>(
    bytes: &[u8],
) -> Result<T, MalformedEnvelope> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        _ => Err(MalformedEnvelope),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_decodes_encodes_to_the_same_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..40), kind in 0u8..8, zero_id in any::<bool>()) {
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            if zero_id && bytes.len() >= HEADER {
                bytes[1..HEADER].fill(0);
            }
            if let Ok(envelope) = Envelope::decode(&bytes) {
                let mut again = Vec::new();
                envelope.encode(&mut again);
                prop_assert_eq!(again, bytes);
            }
        }

        #[test]
        fn roundtrip(id in any::<u64>(), body in prop::collection::vec(any::<u8>(), 0..40)) {
            for envelope in [
                Envelope::Request { id, body: &body },
                Envelope::Response { id, body: &body },
                Envelope::Notice { body: &body },
                Envelope::Fault { id, why: &body },
                Envelope::Ping,
                Envelope::Pong,
            ] {
                let mut bytes = Vec::new();
                envelope.encode(&mut bytes);
                prop_assert_eq!(Envelope::decode(&bytes), Ok(envelope));
            }
        }

        #[test]
        fn bodies_never_panic_and_trailing_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = decode_body::<Vec<String>>(&bytes);
            let mut padded = postcard::to_stdvec(&("x", 7u32)).unwrap();
            padded.push(0);
            prop_assert_eq!(decode_body::<(String, u32)>(&padded), Err(MalformedEnvelope));
        }
    }
}
