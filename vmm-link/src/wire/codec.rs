//! The messages of [`wire`](super) as bytes, and back.

use super::*;

const HELLO: u16 = 0x01;
const STATUS: u16 = 0x02;
const START_LOG: u16 = 0x03;
const ROUND: u16 = 0x04;
const STOP_LOG: u16 = 0x05;
const PAUSE: u16 = 0x06;
const RESUME: u16 = 0x07;
const SAVE_STATE: u16 = 0x08;
const LOAD_STATE: u16 = 0x09;
const END: u16 = 0x0a;
const CHUNK: u16 = 0x20;
const CHUNKS_END: u16 = 0x21;
const WELCOME: u16 = 0x81;
const STATUS_IS: u16 = 0x82;
const DONE: u16 = 0x83;
const BITS: u16 = 0x84;
const ROUND_END: u16 = 0x85;
const PAUSED: u16 = 0x86;
const REFUSED: u16 = 0xff;

impl Header {
    /// Reads one; the length is within [`MAX_BODY`] then.
    ///
    /// # Errors
    /// Too long a body, or bytes that must be zero and are not.
    pub fn decode(bytes: [u8; HEADER]) -> Result<Header, WireError> {
        let mut at = Reader::new("header", &bytes);
        let (len, kind, zero) = (at.u32()? as usize, at.u16()?, at.u16()?);
        if len > MAX_BODY {
            return Err(WireError::TooLong {
                len,
                most: MAX_BODY,
            });
        }
        if zero != 0 {
            return Err(WireError::Reserved(zero));
        }
        Ok(Header { len, kind })
    }
}

impl<'a> Request<'a> {
    /// Reads the body of a frame of this kind.
    ///
    /// # Errors
    /// Bytes that are no request.
    pub fn decode(kind: u16, body: &'a [u8]) -> Result<Request<'a>, WireError> {
        let mut at = Reader::new("request", body);
        let request = match kind {
            HELLO => {
                if at.take(MAGIC.len())? != MAGIC {
                    return Err(WireError::Magic);
                }
                match at.u16()? {
                    VERSION => Request::Hello,
                    got => return Err(WireError::Version { got }),
                }
            }
            STATUS => Request::Status,
            START_LOG => Request::StartLog,
            ROUND => Request::Round,
            STOP_LOG => Request::StopLog,
            PAUSE => Request::Pause,
            RESUME => Request::Resume,
            SAVE_STATE => Request::SaveState,
            LOAD_STATE => Request::LoadState,
            END => Request::End,
            CHUNK => Request::Chunk(at.chunk()?),
            CHUNKS_END => Request::ChunksEnd(at.state_len()?),
            kind => return Err(WireError::Kind(kind)),
        };
        at.end()?;
        Ok(request)
    }

    /// Appends the whole frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let total;
        let (kind, body): (u16, &[&[u8]]) = match self {
            Request::Hello => (HELLO, &[&MAGIC, &VERSION.to_le_bytes()]),
            Request::Status => (STATUS, &[]),
            Request::StartLog => (START_LOG, &[]),
            Request::Round => (ROUND, &[]),
            Request::StopLog => (STOP_LOG, &[]),
            Request::Pause => (PAUSE, &[]),
            Request::Resume => (RESUME, &[]),
            Request::SaveState => (SAVE_STATE, &[]),
            Request::LoadState => (LOAD_STATE, &[]),
            Request::End => (END, &[]),
            Request::Chunk(bytes) => (CHUNK, &[bytes]),
            Request::ChunksEnd(bytes) => {
                total = bytes.to_le_bytes();
                (CHUNKS_END, &[&total])
            }
        };
        frame(out, kind, |out| {
            body.iter().for_each(|part| out.extend_from_slice(part))
        });
    }
}

impl<'a> Answer<'a> {
    /// Pages of `region` from page `first` (a multiple of 64) on.
    pub fn encode_bits(out: &mut Vec<u8>, region: u16, first: u32, words: &[u64]) {
        frame(out, BITS, |out| {
            out.extend_from_slice(&region.to_le_bytes());
            out.extend_from_slice(&0u16.to_le_bytes());
            out.extend_from_slice(&first.to_le_bytes());
            for word in words {
                out.extend_from_slice(&word.to_le_bytes());
            }
        });
    }

    /// Reads the body of a frame of this kind.
    ///
    /// # Errors
    /// Bytes that are no answer.
    pub fn decode(kind: u16, body: &'a [u8]) -> Result<Answer<'a>, WireError> {
        let mut at = Reader::new("answer", body);
        let answer = match kind {
            WELCOME => at.welcome()?,
            STATUS_IS => Answer::Status(at.status()?),
            DONE => Answer::Done,
            BITS => Answer::Bits(at.bits()?),
            ROUND_END => Answer::RoundEnd(at.u64()?),
            PAUSED => Answer::Paused(at.flag("was running")?),
            CHUNK => Answer::Chunk(at.chunk()?),
            CHUNKS_END => Answer::ChunksEnd(at.state_len()?),
            REFUSED => Answer::Refused {
                why: match at.u16()? {
                    0 => Refusal::State,
                    1 => Refusal::Log,
                    2 => Refusal::Vmm,
                    other => return Err(out_of_range("reason of a refusal", other)),
                },
                text: at.text()?,
            },
            kind => return Err(WireError::Kind(kind)),
        };
        at.end()?;
        Ok(answer)
    }

    /// Appends the whole frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Answer::Welcome {
                log,
                status,
                fds,
                regions,
            } => frame(out, WELCOME, |out| {
                out.extend_from_slice(&VERSION.to_le_bytes());
                out.extend_from_slice(&fds.to_le_bytes());
                out.push(match log {
                    LogKind::Bitmap => 0,
                    LogKind::ManualBitmap => 1,
                    LogKind::Ring => 2,
                });
                put_status(out, status);
                for r in regions {
                    for word in [r.gpa, r.len, r.offset] {
                        out.extend_from_slice(&word.to_le_bytes());
                    }
                    out.extend_from_slice(&r.fd.to_le_bytes());
                }
            }),
            Answer::Status(status) => frame(out, STATUS_IS, |out| put_status(out, status)),
            Answer::Done => frame(out, DONE, |_| ()),
            Answer::Bits(bits) => frame(out, BITS, |out| {
                out.extend_from_slice(&bits.region.to_le_bytes());
                out.extend_from_slice(&0u16.to_le_bytes());
                out.extend_from_slice(&bits.first.to_le_bytes());
                out.extend_from_slice(bits.bytes);
            }),
            Answer::RoundEnd(pages) => frame(out, ROUND_END, |out| {
                out.extend_from_slice(&pages.to_le_bytes());
            }),
            Answer::Paused(was) => frame(out, PAUSED, |out| out.push(u8::from(*was))),
            Answer::Chunk(bytes) => frame(out, CHUNK, |out| out.extend_from_slice(bytes)),
            Answer::ChunksEnd(total) => frame(out, CHUNKS_END, |out| {
                out.extend_from_slice(&total.to_le_bytes());
            }),
            Answer::Refused { why, text } => frame(out, REFUSED, |out| {
                let code = match why {
                    Refusal::State => 0u16,
                    Refusal::Log => 1,
                    Refusal::Vmm => 2,
                };
                out.extend_from_slice(&code.to_le_bytes());
                out.extend_from_slice(cut(text).as_bytes());
            }),
        }
    }
}

/// As much of a text as a refusal takes.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn put_status(out: &mut Vec<u8>, status: &Status) {
    let phase = match status.phase {
        Phase::Live => 0,
        Phase::Waiting => 1,
        Phase::Arrived => 2,
    };
    out.extend_from_slice(&[phase, u8::from(status.running), u8::from(status.logging)]);
}

fn frame(out: &mut Vec<u8>, kind: u16, body: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    body(out);
    let len = out.len() - at - HEADER;
    debug_assert!(len <= MAX_BODY, "a message of {len} bytes");
    out[at..at + 4].copy_from_slice(&(len as u32).to_le_bytes());
}

fn out_of_range(what: &'static str, value: impl Into<u64>) -> WireError {
    let value = value.into();
    WireError::Value { what, value }
}

/// A body that is read from its start.
struct Reader<'a> {
    what: &'static str,
    whole: usize,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn new(what: &'static str, bytes: &'a [u8]) -> Reader<'a> {
        Reader {
            what,
            whole: bytes.len(),
            rest: bytes,
        }
    }

    fn length(&self) -> WireError {
        WireError::Length {
            what: self.what,
            len: self.whole,
        }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or(self.length())?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        Ok(self.take(N)?.try_into().expect("as many were taken"))
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    fn flag(&mut self, what: &'static str) -> Result<bool, WireError> {
        match self.array::<1>()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(out_of_range(what, other)),
        }
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    fn end(&self) -> Result<(), WireError> {
        match self.rest {
            [] => Ok(()),
            _ => Err(self.length()),
        }
    }

    fn status(&mut self) -> Result<Status, WireError> {
        let phase = match self.array::<1>()? {
            [0] => Phase::Live,
            [1] => Phase::Waiting,
            [2] => Phase::Arrived,
            [other] => return Err(out_of_range("phase", other)),
        };
        Ok(Status {
            phase,
            running: self.flag("running")?,
            logging: self.flag("logging")?,
        })
    }

    fn welcome(&mut self) -> Result<Answer<'a>, WireError> {
        match self.u16()? {
            VERSION => {}
            got => return Err(WireError::Version { got }),
        }
        let fds = self.u16()?;
        if fds == 0 || usize::from(fds) > MAX_FDS {
            return Err(out_of_range("number of descriptors", fds));
        }
        let log = match self.array::<1>()? {
            [0] => LogKind::Bitmap,
            [1] => LogKind::ManualBitmap,
            [2] => LogKind::Ring,
            [other] => return Err(out_of_range("kind of log", other)),
        };
        let status = self.status()?;
        let mut regions = Vec::new();
        let mut pages = 0;
        while !self.rest.is_empty() {
            let region = RegionInfo {
                gpa: self.u64()?,
                len: self.u64()?,
                offset: self.u64()?,
                fd: self.u16()?,
            };
            regions.push(region.check(fds)?);
            pages += region.pages();
            if regions.len() > MAX_REGIONS || pages > MAX_PAGES {
                return Err(out_of_range("guest RAM", regions.len() as u64));
            }
        }
        if regions.is_empty() {
            return Err(self.length());
        }
        Ok(Answer::Welcome {
            log,
            status,
            fds,
            regions,
        })
    }

    fn bits(&mut self) -> Result<Bits<'a>, WireError> {
        let (region, zero, first) = (self.u16()?, self.u16()?, self.u32()?);
        if zero != 0 {
            return Err(WireError::Reserved(zero));
        }
        if !first.is_multiple_of(64) {
            return Err(out_of_range("first page of bits", first));
        }
        let bytes = self.rest();
        if bytes.is_empty() || bytes.len() > MAX_CHUNK || !bytes.len().is_multiple_of(8) {
            return Err(self.length());
        }
        Ok(Bits {
            region,
            first,
            bytes,
        })
    }

    fn chunk(&mut self) -> Result<&'a [u8], WireError> {
        match self.rest() {
            bytes if bytes.is_empty() || bytes.len() > MAX_CHUNK => Err(self.length()),
            bytes => Ok(bytes),
        }
    }

    fn state_len(&mut self) -> Result<u64, WireError> {
        match self.u64()? {
            len if len <= MAX_STATE => Ok(len),
            len => Err(out_of_range("length of the state", len)),
        }
    }

    /// Text for people: no control characters reach their terminals.
    fn text(&mut self) -> Result<String, WireError> {
        let bytes = self.rest();
        if bytes.len() > MAX_TEXT {
            return Err(WireError::TooLong {
                len: bytes.len(),
                most: MAX_TEXT,
            });
        }
        let clean = |c: char| if c.is_control() { ' ' } else { c };
        let text: String = String::from_utf8_lossy(bytes).chars().map(clean).collect();
        Ok(cut(&text).to_owned())
    }
}
