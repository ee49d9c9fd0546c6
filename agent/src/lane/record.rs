//! TLS 1.3 records, as lanes write and read them once the handshake is done:
//! the keys come out of the connection that did it ([`LaneKeys`]), so that
//! frames are encrypted from the buffer they were staged in straight into the
//! registered buffer the network card reads, and decrypted where the kernel
//! put them.
//!
//! ```text
//! header: 23, 3, 3, length u16   |   content … , content type u8   |   tag 16 B
//!         (authenticated)        |            (encrypted)
//! ```

use super::aead::{KEY_LEN, Key, NONCE_LEN};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};
use std::io;
use std::net::TcpStream;
use zeroize::Zeroizing;

/// Bytes before a record's body.
pub const HEADER: usize = 5;
/// Bytes of content a record carries at most.
pub const MAX_PLAIN: usize = 1 << 14;
/// Bytes of an authentication tag.
pub const TAG: usize = 16;
/// Bytes a record is longer than its content: header, content type, tag.
pub const OVERHEAD: usize = HEADER + 1 + TAG;
/// Bytes a record's body has at most: content, type, padding, tag.
pub const MAX_BODY: usize = MAX_PLAIN + 256;
/// Records sealed with one key before a lane gets fresh ones. AES-GCM may be
/// used for 2^24.5 full records (RFC 8446, 5.5); a lane is replaced in order at
/// a third of that, which is 128 GiB.
pub const KEY_RECORDS: u64 = 1 << 23;
/// Records after which sealing is refused, whatever happens.
const KEY_RECORDS_LAST: u64 = 1 << 24;
/// The outer content type of every record after the handshake.
pub(super) const OUTER: u8 = 23;

/// What a record contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A close notification or an error.
    Alert = 21,
    /// Tickets and key updates, which agents do not send each other.
    Handshake = 22,
    /// Frames.
    Data = 23,
}

/// Why a record cannot be sealed or opened. The connection cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not a record, or one longer than TLS allows.
    #[error("what came is no TLS record of a lane: {0}")]
    Malformed(&'static str),
    /// The tag does not fit: this is not what the peer sent.
    #[error(
        "record {0} cannot be authenticated: it was changed or cut out on the way, or is not of this connection"
    )]
    Forged(u64),
    /// The peer reports an error.
    #[error("the peer ended the connection with TLS alert {0}")]
    Alert(u8),
    /// A message after the handshake that agents do not send.
    #[error("the peer sent a TLS handshake message in the middle of a lane")]
    Handshake,
    /// Content after the close notification.
    #[error("data came after the end of the connection")]
    AfterEnd,
    /// Nothing but empty records.
    #[error("the peer sends empty TLS records")]
    Empty,
    /// The key has sealed as much as it may.
    #[error("the connection's keys are used up; the lane gets new ones")]
    UsedUp,
    /// Cannot happen while lengths are computed with [`sealed_len`].
    #[error("no room to seal a record")]
    Room,
}

/// Length of `plain` bytes of content as records.
pub fn sealed_len(plain: usize) -> usize {
    plain + plain.div_ceil(MAX_PLAIN) * OVERHEAD
}

/// Bytes of content whose records fit `room` bytes.
pub fn plain_room(room: usize) -> usize {
    room.saturating_sub(room.div_ceil(MAX_PLAIN + OVERHEAD) * OVERHEAD)
}

/// Length of a record's body, from its header.
pub fn body_len(header: &[u8; HEADER]) -> Result<usize, RecordError> {
    let [kind, major, minor, high, low] = *header;
    if (kind, major, minor) != (OUTER, 3, 3) {
        return Err(RecordError::Malformed("wrong header"));
    }
    match usize::from(u16::from_be_bytes([high, low])) {
        len if len > MAX_BODY => Err(RecordError::Malformed("too long")),
        len if len <= TAG => Err(RecordError::Malformed("too short")),
        len => Ok(len),
    }
}

/// The key of one direction, and how many records it was used for.
pub(super) struct RecordKey {
    key: Key,
    iv: Zeroizing<[u8; NONCE_LEN]>,
    sequence: u64,
}

impl RecordKey {
    pub(super) fn new(key: &[u8], iv: &[u8], sequence: u64) -> io::Result<RecordKey> {
        let unusable = || io::Error::other("TLS gave keys that lanes cannot use");
        let iv = iv.try_into().map_err(|_| unusable())?;
        Ok(RecordKey {
            key: Key::new(key).ok_or_else(unusable)?,
            iv: Zeroizing::new(iv),
            sequence,
        })
    }

    pub(super) fn from_tls(
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> io::Result<RecordKey> {
        match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
                RecordKey::new(key.as_ref(), iv.as_ref(), sequence)
            }
            _ => Err(io::Error::other(
                "the peer agreed on a cipher suite that lanes do not speak",
            )),
        }
    }

    /// Records so far.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The next record's nonce; each is given out once.
    fn nonce(&mut self) -> [u8; NONCE_LEN] {
        let mut nonce = *self.iv;
        for (byte, count) in nonce[NONCE_LEN - 8..]
            .iter_mut()
            .zip(self.sequence.to_be_bytes())
        {
            *byte ^= count;
        }
        self.sequence += 1;
        nonce
    }

    /// Seals `plain` (at most [`MAX_PLAIN`]) as one record of content type
    /// `kind` into `record`, which is exactly as long as that becomes.
    pub(super) fn seal(
        &mut self,
        kind: u8,
        plain: &[u8],
        record: &mut [u8],
    ) -> Result<(), RecordError> {
        if self.sequence >= KEY_RECORDS_LAST {
            return Err(RecordError::UsedUp);
        }
        let Some((header, body)) = record.split_first_chunk_mut::<HEADER>() else {
            return Err(RecordError::Room);
        };
        if plain.len() > MAX_PLAIN || body.len() != plain.len() + 1 + TAG {
            return Err(RecordError::Room);
        }
        let len = (body.len() as u16).to_be_bytes();
        *header = [OUTER, 3, 3, len[0], len[1]];
        let (text, tag) = body.split_at_mut(plain.len() + 1);
        text[..plain.len()].copy_from_slice(plain);
        text[plain.len()] = kind;
        let nonce = self.nonce();
        let sealed = self.key.seal(nonce, header, text);
        tag.copy_from_slice(sealed.ok_or(RecordError::Room)?.as_ref());
        Ok(())
    }

    /// Opens a record's body in place. Returns what it contains, as a range
    /// from the start of `body`.
    pub(super) fn open<'b>(
        &mut self,
        header: &[u8; HEADER],
        body: &'b mut [u8],
    ) -> Result<(u8, &'b [u8]), RecordError> {
        let number = self.sequence;
        let nonce = self.nonce();
        let opened = self.key.open(nonce, header, body);
        let inner = opened.ok_or(RecordError::Forged(number))?;
        // Zeros after the content type are padding.
        let end = inner.iter().rposition(|&byte| byte != 0);
        let end = end.ok_or(RecordError::Malformed("no content type"))?;
        if end > MAX_PLAIN {
            return Err(RecordError::Malformed("too long"));
        }
        Ok((inner[end], &inner[..end]))
    }
}

/// The keys of a lane's two directions.
pub struct LaneKeys {
    pub(super) seal: RecordKey,
    pub(super) open: RecordKey,
}

impl LaneKeys {
    /// Both ends' keys from random bytes, without any handshake: to measure
    /// and test lanes with.
    pub(super) fn pair() -> io::Result<(LaneKeys, LaneKeys)> {
        let mut bytes = Zeroizing::new([[0u8; KEY_LEN + NONCE_LEN]; 2]);
        for direction in bytes.iter_mut() {
            aws_lc_rs::rand::fill(direction).map_err(|_| io::Error::other("no random bytes"))?;
        }
        let key = |n: usize| RecordKey::new(&bytes[n][..KEY_LEN], &bytes[n][KEY_LEN..], 0);
        let keys = |seal, open| {
            Ok::<_, io::Error>(LaneKeys {
                seal: key(seal)?,
                open: key(open)?,
            })
        };
        Ok((keys(0, 1)?, keys(1, 0)?))
    }

    /// The keys of the caller, or of the called one, of every connection of a
    /// test: ends that meet over a proxy have no other way to agree.
    #[cfg(test)]
    pub(super) fn testing(caller: bool) -> LaneKeys {
        let key = |n: u8| RecordKey::new(&[n; KEY_LEN], &[n; NONCE_LEN], 1).unwrap();
        let (seal, open) = if caller { (1, 2) } else { (2, 1) };
        LaneKeys {
            seal: key(seal),
            open: key(open),
        }
    }
}

/// A lane's connection: in blocking mode, past its preamble.
pub struct LaneStream {
    pub(super) tcp: TcpStream,
    pub(super) keys: Option<LaneKeys>,
}

impl LaneStream {
    /// A connection whose TLS handshake left `secrets`; without any it is not
    /// encrypted.
    pub fn new(tcp: TcpStream, secrets: Option<ExtractedSecrets>) -> io::Result<LaneStream> {
        let keys = secrets.map(|ExtractedSecrets { tx, rx }| {
            Ok::<_, io::Error>(LaneKeys {
                seal: RecordKey::from_tls(tx)?,
                open: RecordKey::from_tls(rx)?,
            })
        });
        Ok(LaneStream {
            tcp,
            keys: keys.transpose()?,
        })
    }

    /// A connection that is not encrypted.
    pub fn plain(tcp: TcpStream) -> LaneStream {
        LaneStream { tcp, keys: None }
    }
}
