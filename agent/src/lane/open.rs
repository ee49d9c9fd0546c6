//! From socket to frames: as it comes, or out of TLS records.

use super::record::{
    Content, HEADER, LaneKeys, MAX_BODY, MAX_PLAIN, OVERHEAD, RecordError, RecordKey, body_len,
};

/// Empty records in a row that are put up with.
const MAX_EMPTY: u32 = 32;

/// Opens one direction of a connection, from whatever pieces a socket
/// delivers. Holds at most one record.
pub(super) struct Opener {
    key: RecordKey,
    /// Bytes of the unfinished record, header included.
    partial: Vec<u8>,
    ended: bool,
    empty: u32,
}

impl Opener {
    pub(super) fn new(key: RecordKey) -> Opener {
        Opener {
            key,
            partial: Vec::with_capacity(HEADER + MAX_BODY),
            ended: false,
            empty: 0,
        }
    }

    /// Takes `data`, which it overwrites, calling `plain` with the content of
    /// each record that it completes. After an error nothing more can be
    /// opened: close the connection.
    pub(super) fn push<E: From<RecordError>>(
        &mut self,
        mut data: &mut [u8],
        mut plain: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while !data.is_empty() {
            if self.partial.is_empty()
                && let Some(&header) = data.first_chunk::<HEADER>()
            {
                let whole = HEADER + body_len(&header)?;
                if data.len() >= whole {
                    // The common case: opened where the kernel put it.
                    let (record, rest) = std::mem::take(&mut data).split_at_mut(whole);
                    let content = self.key.open(&header, &mut record[HEADER..])?;
                    if let Some(content) = admit(content, &mut self.ended, &mut self.empty)? {
                        plain(content)?;
                    }
                    data = rest;
                    continue;
                }
            }
            let want = match self.partial.first_chunk::<HEADER>() {
                Some(header) => HEADER + body_len(header)?,
                None => HEADER,
            };
            let n = (want - self.partial.len()).min(data.len());
            let (now, rest) = std::mem::take(&mut data).split_at_mut(n);
            self.partial.extend_from_slice(now);
            data = rest;
            let Some((header, body)) = self.partial.split_first_chunk_mut::<HEADER>() else {
                continue;
            };
            if body.len() < body_len(header)? {
                continue;
            }
            let content = self.key.open(header, body)?;
            if let Some(content) = admit(content, &mut self.ended, &mut self.empty)? {
                plain(content)?;
            }
            self.partial.clear();
        }
        Ok(())
    }
}

/// What to pass on of a record's content.
fn admit<'c>(
    (kind, content): (u8, &'c [u8]),
    ended: &mut bool,
    empty: &mut u32,
) -> Result<Option<&'c [u8]>, RecordError> {
    if *ended {
        return Err(RecordError::AfterEnd);
    }
    if kind == Content::Data as u8 {
        if !content.is_empty() {
            *empty = 0;
            return Ok(Some(content));
        }
        *empty += 1;
        return match *empty {
            0..=MAX_EMPTY => Ok(None),
            _ => Err(RecordError::Empty),
        };
    }
    if kind == Content::Alert as u8 {
        return match content {
            // Close notification.
            [_, 0] => {
                *ended = true;
                Ok(None)
            }
            [_, alert] => Err(RecordError::Alert(*alert)),
            _ => Err(RecordError::Malformed("an alert of a strange length")),
        };
    }
    if kind == Content::Handshake as u8 {
        return Err(RecordError::Handshake);
    }
    Err(RecordError::Malformed("unknown content"))
}

/// What a connection does to the bytes it receives.
pub(super) enum Inflow {
    /// Nothing.
    Plain,
    /// Opens them.
    Sealed(Opener),
}

impl Inflow {
    pub(super) fn new(key: Option<RecordKey>) -> Inflow {
        match key {
            None => Inflow::Plain,
            Some(key) => Inflow::Sealed(Opener::new(key)),
        }
    }

    /// See [`Opener::push`].
    pub(super) fn push<E: From<RecordError>>(
        &mut self,
        data: &mut [u8],
        mut plain: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            Inflow::Plain => plain(data),
            Inflow::Sealed(opener) => opener.push(data, plain),
        }
    }
}

/// For fuzzing: feeds an opener with bytes from outside, either as they are, or
/// sealed (as `[kind, length, content …]` each) so that they get past the tag.
/// The first two bytes say which, and into what pieces they are cut. Returns
/// whether all of it could be opened.
pub fn fuzz_records(data: &[u8]) -> bool {
    let Some((&[mode, cut], mut data)) = data.split_first_chunk::<2>() else {
        return false;
    };
    let Ok((mut there, here)) = LaneKeys::pair() else {
        return false;
    };
    let mut bytes = Vec::new();
    if mode & 1 == 0 {
        bytes.extend_from_slice(data);
    }
    while mode & 1 == 1
        && let Some((&[kind, len], rest)) = data.split_first_chunk::<2>()
    {
        let (content, rest) = rest.split_at(usize::from(len).min(rest.len()));
        let at = bytes.len();
        bytes.resize(at + content.len() + OVERHEAD, 0);
        assert_eq!(there.seal.seal(kind, content, &mut bytes[at..]), Ok(()));
        data = rest;
    }
    let mut opener = Opener::new(here.open);
    for piece in bytes.chunks_mut(usize::from(cut) + 1) {
        let opened = opener.push(piece, |content| {
            assert!(!content.is_empty() && content.len() <= MAX_PLAIN);
            Ok::<(), RecordError>(())
        });
        assert!(opener.partial.len() <= HEADER + MAX_BODY);
        if opened.is_err() {
            return false;
        }
    }
    true
}
