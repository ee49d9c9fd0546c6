//! Messages between the agents of a rack, as the payloads of frames.
//!
//! ```text
//! 1 claim        ticket u64, gang u64, op u8, holder u16, count u32, fingerprints 16 B each
//! 2 claim reply  ticket u64, count u32 (ffffffff: done), answers 3 B each (how u8, holder u16)
//! 3 fetch        ticket u64, gang u64, limit ms u32, count u32, (fingerprint 16 B, domain u16) each
//! 4 pages        ticket u64, count u32, (index u32, status u8, page 4096 B if status 0) each
//! 5 report       bytes
//! ```
//! Little-endian. A message must fill its frame exactly.

use super::{ClaimAnswer, ClaimOp, ClaimReply, MAX_CLAIM, MAX_FETCH, MAX_REPORT, Wanted};
use crate::types::{Fingerprint, GangId, HolderId, PAGE_SIZE, Page};
use thiserror::Error;

/// Most pages in one `pages` message.
pub const MAX_PAGES: usize = 32;

/// Longest payload: the longest of all messages.
pub const MAX_FRAME: usize = {
    let pages = 13 + MAX_PAGES * (5 + PAGE_SIZE);
    let claim = 24 + MAX_CLAIM * 16;
    if pages > claim { pages } else { claim }
};

const DONE: u32 = u32::MAX;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// Do this with your claims.
    Claim {
        /// Chosen by the asker; comes back in the reply.
        ticket: u64,
        /// The gang it is for.
        gang: GangId,
        /// What to do.
        op: ClaimOp,
    },
    /// Answer to `Claim`.
    ClaimReply {
        /// The asker's number.
        ticket: u64,
        /// The reply.
        reply: ClaimReply,
    },
    /// Send me these pages.
    Fetch {
        /// Chosen by the asker; comes back with the pages.
        ticket: u64,
        /// The gang it is for.
        gang: GangId,
        /// How long to wait for pages that have not arrived, ms.
        limit_ms: u32,
        /// The pages.
        wanted: Vec<Wanted>,
    },
    /// Some of the pages of a `Fetch`.
    Pages {
        /// The asker's number.
        ticket: u64,
        /// Index in the fetch, and what became of the page.
        pages: Vec<(u32, PageStatus<'a>)>,
    },
    /// A load report.
    Report(&'a [u8]),
}

/// What became of a page that was to be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageStatus<'a> {
    /// Its content.
    Page(&'a Page),
    /// It has not arrived in time.
    NotInTime,
    /// It is not there.
    Gone,
}

/// Why bytes are no [`Message`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum WireError {
    /// An unknown message.
    #[error("unknown message type {0}")]
    Type(u8),
    /// Fewer or more bytes than the message has.
    #[error("a message of the wrong length")]
    Length,
    /// More items than allowed.
    #[error("a message with too many items")]
    Count,
    /// A field has an impossible value.
    #[error("a message with a bad {0}")]
    Field(&'static str),
}

impl Message<'_> {
    /// Appends the encoded message. The caller keeps to the caps.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Message::Claim { ticket, gang, op } => {
                let (code, holder) = match op {
                    ClaimOp::Claim { holder, .. } => (0, holder),
                    ClaimOp::Confirm { holder, .. } => (1, holder),
                    ClaimOp::Reassign { holder, .. } => (2, holder),
                    ClaimOp::Release { holder, .. } => (3, holder),
                    ClaimOp::Forget { holder } => (4, holder),
                };
                out.push(1);
                out.extend_from_slice(&ticket.to_le_bytes());
                out.extend_from_slice(&gang.0.to_le_bytes());
                out.push(code);
                out.extend_from_slice(&holder.0.to_le_bytes());
                out.extend_from_slice(&(op.fps().len() as u32).to_le_bytes());
                for fp in op.fps() {
                    out.extend_from_slice(&fp.0);
                }
            }
            Message::ClaimReply { ticket, reply } => {
                out.push(2);
                out.extend_from_slice(&ticket.to_le_bytes());
                let ClaimReply::Claims(answers) = reply else {
                    out.extend_from_slice(&DONE.to_le_bytes());
                    return;
                };
                out.extend_from_slice(&(answers.len() as u32).to_le_bytes());
                for answer in answers {
                    let (how, holder) = match answer {
                        ClaimAnswer::Yours => (0, HolderId(0)),
                        ClaimAnswer::Held { holder, arrived } => (1 + u8::from(*arrived), *holder),
                    };
                    out.push(how);
                    out.extend_from_slice(&holder.0.to_le_bytes());
                }
            }
            Message::Fetch {
                ticket,
                gang,
                limit_ms,
                wanted,
            } => {
                out.push(3);
                out.extend_from_slice(&ticket.to_le_bytes());
                out.extend_from_slice(&gang.0.to_le_bytes());
                out.extend_from_slice(&limit_ms.to_le_bytes());
                out.extend_from_slice(&(wanted.len() as u32).to_le_bytes());
                for page in wanted {
                    out.extend_from_slice(&page.fp.0);
                    out.extend_from_slice(&page.domain.to_le_bytes());
                }
            }
            Message::Pages { ticket, pages } => {
                encode_pages_head(*ticket, pages.len() as u32, out);
                for (index, status) in pages {
                    encode_page(*index, *status, out);
                }
            }
            Message::Report(report) => {
                out.push(5);
                out.extend_from_slice(report);
            }
        }
    }
}

/// Appends the start of a `pages` message; `count` pages must follow.
pub(super) fn encode_pages_head(ticket: u64, count: u32, out: &mut Vec<u8>) {
    out.push(4);
    out.extend_from_slice(&ticket.to_le_bytes());
    out.extend_from_slice(&count.to_le_bytes());
}

/// Appends one page of a `pages` message.
pub(super) fn encode_page(index: u32, status: PageStatus<'_>, out: &mut Vec<u8>) {
    out.extend_from_slice(&index.to_le_bytes());
    match status {
        PageStatus::Page(page) => {
            out.push(0);
            out.extend_from_slice(page);
        }
        PageStatus::NotInTime => out.push(1),
        PageStatus::Gone => out.push(2),
    }
}

/// Decodes one message.
pub fn decode(bytes: &[u8]) -> Result<Message<'_>, WireError> {
    let mut input = Input(bytes);
    let message = match input.u8()? {
        1 => decode_claim(&mut input)?,
        2 => decode_reply(&mut input)?,
        3 => decode_fetch(&mut input)?,
        4 => decode_pages(&mut input)?,
        5 => {
            let report = std::mem::take(&mut input.0);
            if report.len() > MAX_REPORT {
                return Err(WireError::Count);
            }
            Message::Report(report)
        }
        other => return Err(WireError::Type(other)),
    };
    match input.0 {
        [] => Ok(message),
        _ => Err(WireError::Length),
    }
}

fn decode_claim<'a>(input: &mut Input<'a>) -> Result<Message<'a>, WireError> {
    let ticket = input.u64()?;
    let gang = GangId(input.u64()?);
    let code = input.u8()?;
    let holder = HolderId(input.u16()?);
    let count = input.count(MAX_CLAIM, 16)?;
    let mut fps = Vec::with_capacity(count);
    for _ in 0..count {
        fps.push(Fingerprint(*input.take()?));
    }
    let op = match code {
        0 => ClaimOp::Claim { fps, holder },
        1 => ClaimOp::Confirm { fps, holder },
        2 => ClaimOp::Reassign { fps, holder },
        3 => ClaimOp::Release { fps, holder },
        4 if fps.is_empty() => ClaimOp::Forget { holder },
        _ => return Err(WireError::Field("operation")),
    };
    Ok(Message::Claim { ticket, gang, op })
}

fn decode_reply<'a>(input: &mut Input<'a>) -> Result<Message<'a>, WireError> {
    let ticket = input.u64()?;
    if input.0 == DONE.to_le_bytes() {
        input.0 = &[];
        let reply = ClaimReply::Done;
        return Ok(Message::ClaimReply { ticket, reply });
    }
    let count = input.count(MAX_CLAIM, 3)?;
    let mut answers = Vec::with_capacity(count);
    for _ in 0..count {
        let (how, holder) = (input.u8()?, HolderId(input.u16()?));
        answers.push(match (how, holder) {
            (0, HolderId(0)) => ClaimAnswer::Yours,
            (1 | 2, holder) => ClaimAnswer::Held {
                holder,
                arrived: how == 2,
            },
            _ => return Err(WireError::Field("answer")),
        });
    }
    let reply = ClaimReply::Claims(answers);
    Ok(Message::ClaimReply { ticket, reply })
}

fn decode_fetch<'a>(input: &mut Input<'a>) -> Result<Message<'a>, WireError> {
    let ticket = input.u64()?;
    let gang = GangId(input.u64()?);
    let limit_ms = input.u32()?;
    let count = input.count(MAX_FETCH, 18)?;
    let mut wanted = Vec::with_capacity(count);
    for _ in 0..count {
        let fp = Fingerprint(*input.take()?);
        let domain = input.u16()?;
        wanted.push(Wanted { fp, domain });
    }
    Ok(Message::Fetch {
        ticket,
        gang,
        limit_ms,
        wanted,
    })
}

fn decode_pages<'a>(input: &mut Input<'a>) -> Result<Message<'a>, WireError> {
    let ticket = input.u64()?;
    let count = input.u32()? as usize;
    // Pages without content are short: a whole fetch may come in one message.
    if count > MAX_FETCH {
        return Err(WireError::Count);
    }
    let mut pages = Vec::with_capacity(count.min(input.0.len() / 5));
    for _ in 0..count {
        let index = input.u32()?;
        let status = match input.u8()? {
            0 => PageStatus::Page(input.take()?),
            1 => PageStatus::NotInTime,
            2 => PageStatus::Gone,
            _ => return Err(WireError::Field("page status")),
        };
        pages.push((index, status));
    }
    Ok(Message::Pages { ticket, pages })
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take<const N: usize>(&mut self) -> Result<&'a [u8; N], WireError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(WireError::Length)?;
        self.0 = rest;
        Ok(head)
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        self.take::<1>().map(|b| b[0])
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        self.take().map(|b| u16::from_le_bytes(*b))
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.take().map(|b| u32::from_le_bytes(*b))
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.take().map(|b| u64::from_le_bytes(*b))
    }

    /// A count of items of `size` bytes that fill the rest exactly.
    fn count(&mut self, max: usize, size: usize) -> Result<usize, WireError> {
        let count = self.u32()? as usize;
        if count > max {
            return Err(WireError::Count);
        }
        if self.0.len() != count * size {
            return Err(WireError::Length);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn fps() -> impl Strategy<Value = Vec<Fingerprint>> {
        vec(any::<[u8; 16]>().prop_map(Fingerprint), 0..20)
    }

    fn roundtrips(message: &Message<'_>) -> Result<(), TestCaseError> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        prop_assert!(bytes.len() <= MAX_FRAME);
        prop_assert_eq!(&decode(&bytes).unwrap(), message);
        bytes.push(0);
        prop_assert!(!matches!(message, Message::Report(_)) == decode(&bytes).is_err());
        bytes.truncate(bytes.len() - 2);
        prop_assert!(!decode(&bytes).is_ok_and(|m| m == *message));
        Ok(())
    }

    proptest! {
        #[test]
        fn claims_roundtrip(ticket in any::<u64>(), gang in any::<u64>(), code in 0..5, fps in fps(), holder in any::<u16>()) {
            let (gang, holder) = (GangId(gang), HolderId(holder));
            let op = match code {
                0 => ClaimOp::Claim { fps, holder },
                1 => ClaimOp::Confirm { fps, holder },
                2 => ClaimOp::Reassign { fps, holder },
                3 => ClaimOp::Release { fps, holder },
                _ => ClaimOp::Forget { holder },
            };
            roundtrips(&Message::Claim { ticket, gang, op })?;
        }

        #[test]
        fn replies_roundtrip(ticket in any::<u64>(), answers in vec(any::<Option<(u16, bool)>>(), 0..20)) {
            let answers = answers.into_iter().map(|a| match a {
                None => ClaimAnswer::Yours,
                Some((holder, arrived)) => ClaimAnswer::Held { holder: HolderId(holder), arrived },
            });
            let reply = ClaimReply::Claims(answers.collect());
            roundtrips(&Message::ClaimReply { ticket, reply })?;
            roundtrips(&Message::ClaimReply { ticket, reply: ClaimReply::Done })?;
        }

        #[test]
        fn fetches_and_pages_roundtrip(ticket in any::<u64>(), limit_ms in any::<u32>(), fps in fps(), fill in any::<u8>(), report in vec(any::<u8>(), 1..50)) {
            let wanted: Vec<Wanted> = fps.iter().map(|fp| Wanted { fp: *fp, domain: u16::from(fp.0[0]) }).collect();
            let page = [fill; PAGE_SIZE];
            let pages = fps.iter().enumerate().map(|(i, fp)| (i as u32, match fp.0[0] % 3 {
                0 => PageStatus::Page(&page),
                1 => PageStatus::NotInTime,
                _ => PageStatus::Gone,
            }));
            roundtrips(&Message::Pages { ticket, pages: pages.collect() })?;
            roundtrips(&Message::Fetch { ticket, gang: GangId(1), limit_ms, wanted })?;
            roundtrips(&Message::Report(&report))?;
        }

        #[test]
        fn decoding_never_panics(mut bytes in vec(any::<u8>(), 0..300), kind in 0u8..7, count in 0u32..20, at in 9usize..40) {
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            if let Some(field) = bytes.get_mut(at..at + 4) {
                field.copy_from_slice(&count.to_le_bytes());
            }
            if let Ok(message) = decode(&bytes) {
                let mut again = Vec::new();
                message.encode(&mut again);
                prop_assert_eq!(again, bytes);
            }
        }
    }

    #[test]
    fn counts_beyond_the_caps_are_refused() {
        let fps = vec![Fingerprint::ZERO; MAX_CLAIM + 1];
        let holder = HolderId(0);
        let message = Message::Claim {
            ticket: 0,
            gang: GangId(0),
            op: ClaimOp::Claim { fps, holder },
        };
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        assert_eq!(decode(&bytes), Err(WireError::Count));
        let mut bytes = vec![4; 13];
        bytes[9..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode(&bytes), Err(WireError::Count));
        assert_eq!(decode(&vec![5; MAX_REPORT + 2]), Err(WireError::Count));
    }
}
