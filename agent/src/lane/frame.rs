//! Frames: what travels on a lane, as pure functions from bytes to values.
//!
//! All numbers are little-endian. Every frame starts with a prologue:
//!
//! ```text
//!  0        4   5   6    7     8          12
//!  | magic  |ver|kind|flags|class| body length |  body …
//! ```
//!
//! | kind | direction | body |
//! |---|---|---|
//! | 1 Batch | forward | gang u64, batch u64, round u32, vm u16, pages u16, list length u32; then entry list and page contents, as flags say |
//! | 2 Bye | forward | nothing: the source ends the lane in order |
//! | 3 Ping | both | nothing: "I am here" |
//! | 16 Ack | reverse | batch ids, u64 each |
//! | 17 Need | reverse | gang u64, vm u16, then gfns, u32 each |
//! | 18 Error | reverse | UTF-8 text: why the target closes the lane |
//!
//! `flags` of a Batch: bit 0 = list and contents are a piece of the
//! connection's zstd stream, ended by a flush; bit 1 = that stream starts anew
//! with this piece; bit 2 = contents without their blocks of zeroes
//! ([`super::sparse`]), not together with the others. `class`: 0 pre-copy, 1 stop-and-copy. Unknown versions,
//! kinds, flags and classes are refused, and so is any length beyond the cap
//! of its kind, before a byte of the body is awaited.

use super::batch::BatchId;
use super::entries::{Entries, MAX_LIST_LEN};
use super::pool::{HEADER_ROOM, PAGE_AREA, PAGES_PER_BUF};
use crate::types::{Class, GangId, Gfn, PAGE_SIZE, Page, Round, VmIndex};

/// First four bytes of every frame: "DRVL".
pub const MAGIC: [u8; 4] = *b"DRVL";
/// Version of everything in this module and in [`super::entries`].
pub const VERSION: u8 = 1;
/// Bytes of the prologue.
pub const PROLOGUE_LEN: usize = 12;
/// Bytes of a batch's own header, the start of its body.
pub const BATCH_HEAD_LEN: usize = 28;
/// Bytes before the entry list of a batch frame.
pub const BATCH_PREFIX: usize = PROLOGUE_LEN + BATCH_HEAD_LEN;
/// Longest body of a batch: header, list and pages, with the allowance zstd
/// needs for content it cannot compress.
pub const MAX_BATCH_BODY: usize = HEADER_ROOM + PAGE_AREA - PROLOGUE_LEN;
/// Batch ids in one Ack.
pub const MAX_ACKS: usize = 1024;
/// Pages in one Need.
pub const MAX_NEEDS: usize = 4096;
/// Bytes of text in an Error.
pub const MAX_ERROR_TEXT: usize = 512;
/// Longest body of any reverse frame.
pub const MAX_REVERSE_BODY: usize = 10 + MAX_NEEDS * 4;

const FLAG_ZSTD: u8 = 1;
const FLAG_FRESH: u8 = 2;
const FLAG_SPARSE: u8 = 4;

const _: () = assert!(BATCH_PREFIX + MAX_LIST_LEN <= HEADER_ROOM);
const _: () = assert!(MAX_ACKS * 8 <= MAX_REVERSE_BODY && MAX_ERROR_TEXT <= MAX_REVERSE_BODY);

/// What is wrong with bytes that claim to be a frame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// The stream is not at the start of a frame.
    #[error("not a lane frame: magic is {0:02x?}")]
    BadMagic([u8; 4]),
    /// The peer speaks another version.
    #[error(
        "lane frame of version {0}, this agent speaks version {VERSION}: run the same release on both hosts"
    )]
    BadVersion(u8),
    /// Unknown kind, or one that does not travel in this direction.
    #[error("unexpected frame kind {0}")]
    BadKind(u8),
    /// Flags that mean nothing for this kind.
    #[error("unknown flags {0:#04x}")]
    BadFlags(u8),
    /// Not a class.
    #[error("unknown class {0}")]
    BadClass(u8),
    /// The body's length is not possible for its kind.
    #[error("a frame of kind {kind} cannot have {len} bytes of body")]
    BadLength {
        /// The frame's kind byte.
        kind: u8,
        /// The length it claims.
        len: usize,
    },
    /// The entry list is not well-formed.
    #[error("the entry list of a batch is malformed")]
    BadList,
    /// More entries than a batch may carry.
    #[error("a batch has more entries than are allowed")]
    TooManyEntries,
    /// Header and list disagree.
    #[error("the header counts {header} page contents, the list {list}")]
    PageCount {
        /// By the batch header.
        header: usize,
        /// By the entry list.
        list: usize,
    },
    /// One page, two entries: which one counts would depend on order.
    #[error("gfn {gfn:#x} occurs twice in a batch")]
    PageTwice {
        /// The page.
        gfn: u64,
    },
    /// A page the VM does not have.
    #[error("gfn {gfn:#x} is beyond the VM's {ram_pages} pages")]
    BeyondRam {
        /// The highest page named.
        gfn: u64,
        /// Pages the VM has.
        ram_pages: u32,
    },
    /// Maps and blocks of contents without zeroes do not go together.
    #[error("the maps of a batch without its zeroes do not fit its length")]
    BadSparse,
    /// The text of an Error frame is not UTF-8.
    #[error("an error frame holds no UTF-8 text")]
    BadText,
}

/// Which way frames of a connection's half travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Source to target.
    Forward,
    /// Target to source.
    Reverse,
}

/// The kinds of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Pages, forward.
    Batch = 1,
    /// Orderly end, forward.
    Bye = 2,
    /// Keepalive, both ways.
    Ping = 3,
    /// Batches placed, reverse.
    Ack = 16,
    /// Pages wanted in full, reverse.
    Need = 17,
    /// The target gives the lane up, reverse.
    Error = 18,
}

/// How list and contents of a batch are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// As they are.
    Raw,
    /// The list as it is, contents without their blocks of zeroes.
    Sparse,
    /// As the next piece of the connection's zstd stream.
    Zstd {
        /// The stream starts anew with this piece.
        fresh: bool,
    },
}

impl Encoding {
    /// Whether contents went through the compressor.
    pub fn is_compressed(self) -> bool {
        matches!(self, Encoding::Zstd { .. })
    }
}

/// The start of every frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prologue {
    /// What follows.
    pub kind: Kind,
    /// Encoding of a batch; [`Encoding::Raw`] for the rest.
    pub encoding: Encoding,
    /// Class of a batch; [`Class::Precopy`] for the rest.
    pub class: Class,
    /// Bytes that follow, within the cap of `kind`.
    pub body_len: usize,
}

impl Prologue {
    /// The prologue of a frame that is not a batch.
    pub fn control(kind: Kind, body_len: usize) -> Prologue {
        Prologue {
            kind,
            encoding: Encoding::Raw,
            class: Class::Precopy,
            body_len,
        }
    }

    /// The bytes.
    pub fn encode(&self) -> [u8; PROLOGUE_LEN] {
        let mut out = [0; PROLOGUE_LEN];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = VERSION;
        out[5] = self.kind as u8;
        out[6] = match self.encoding {
            Encoding::Raw => 0,
            Encoding::Sparse => FLAG_SPARSE,
            Encoding::Zstd { fresh: false } => FLAG_ZSTD,
            Encoding::Zstd { fresh: true } => FLAG_ZSTD | FLAG_FRESH,
        };
        out[7] = match self.class {
            Class::Precopy => 0,
            Class::StopCopy => 1,
        };
        out[8..].copy_from_slice(&(self.body_len as u32).to_le_bytes());
        out
    }

    /// Reads and checks a prologue that came in `direction`.
    pub fn parse(bytes: &[u8; PROLOGUE_LEN], direction: Direction) -> Result<Self, FrameError> {
        let [
            m0,
            m1,
            m2,
            m3,
            version,
            kind_byte,
            flags,
            class,
            l0,
            l1,
            l2,
            l3,
        ] = *bytes;
        let magic = [m0, m1, m2, m3];
        if magic != MAGIC {
            return Err(FrameError::BadMagic(magic));
        }
        if version != VERSION {
            return Err(FrameError::BadVersion(version));
        }
        let kind = match (kind_byte, direction) {
            (1, Direction::Forward) => Kind::Batch,
            (2, Direction::Forward) => Kind::Bye,
            (3, _) => Kind::Ping,
            (16, Direction::Reverse) => Kind::Ack,
            (17, Direction::Reverse) => Kind::Need,
            (18, Direction::Reverse) => Kind::Error,
            _ => return Err(FrameError::BadKind(kind_byte)),
        };
        let encoding = match (kind, flags) {
            (_, 0) => Encoding::Raw,
            (Kind::Batch, FLAG_ZSTD) => Encoding::Zstd { fresh: false },
            (Kind::Batch, 3) => Encoding::Zstd { fresh: true },
            (Kind::Batch, FLAG_SPARSE) => Encoding::Sparse,
            _ => return Err(FrameError::BadFlags(flags)),
        };
        let class = match (kind, class) {
            (_, 0) => Class::Precopy,
            (Kind::Batch, 1) => Class::StopCopy,
            _ => return Err(FrameError::BadClass(class)),
        };
        let body_len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let possible = match kind {
            Kind::Batch => (BATCH_HEAD_LEN..=MAX_BATCH_BODY).contains(&body_len),
            Kind::Bye | Kind::Ping => body_len == 0,
            Kind::Ack => body_len > 0 && body_len <= MAX_ACKS * 8 && body_len.is_multiple_of(8),
            Kind::Need => {
                (14..=10 + MAX_NEEDS * 4).contains(&body_len) && (body_len - 10).is_multiple_of(4)
            }
            Kind::Error => body_len <= MAX_ERROR_TEXT,
        };
        if !possible {
            return Err(FrameError::BadLength {
                kind: kind_byte,
                len: body_len,
            });
        }
        Ok(Prologue {
            kind,
            encoding,
            class,
            body_len,
        })
    }
}

/// What a batch is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHead {
    /// The gang the VM belongs to.
    pub gang: GangId,
    /// The VM the pages are of.
    pub vm: VmIndex,
    /// The sender's number for the batch, which the Ack repeats.
    pub batch: BatchId,
    /// The pre-copy round that read the pages.
    pub round: Round,
    /// What the batch is for.
    pub class: Class,
}

/// The numbers of a batch's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPrefix {
    /// What the batch is about.
    pub head: BatchHead,
    /// Page contents, at most [`PAGES_PER_BUF`].
    pub pages: usize,
    /// Bytes of the entry list before compression, at most [`MAX_LIST_LEN`].
    pub list_len: usize,
}

impl BatchPrefix {
    /// Bytes of list and contents before compression.
    pub fn plain_len(&self) -> usize {
        self.list_len + self.pages * PAGE_SIZE
    }

    /// Prologue and batch header, for a frame that carries `payload` bytes
    /// after them.
    pub fn encode(&self, encoding: Encoding, payload: usize) -> [u8; BATCH_PREFIX] {
        let mut out = [0; BATCH_PREFIX];
        let prologue = Prologue {
            kind: Kind::Batch,
            encoding,
            class: self.head.class,
            body_len: BATCH_HEAD_LEN + payload,
        };
        out[..PROLOGUE_LEN].copy_from_slice(&prologue.encode());
        let body = &mut out[PROLOGUE_LEN..];
        body[0..8].copy_from_slice(&self.head.gang.0.to_le_bytes());
        body[8..16].copy_from_slice(&self.head.batch.0.to_le_bytes());
        body[16..20].copy_from_slice(&self.head.round.0.to_le_bytes());
        body[20..22].copy_from_slice(&self.head.vm.0.to_le_bytes());
        body[22..24].copy_from_slice(&(self.pages as u16).to_le_bytes());
        body[24..28].copy_from_slice(&(self.list_len as u32).to_le_bytes());
        out
    }

    /// Reads the header at the start of a batch's body; the payload follows.
    pub fn parse<'a>(
        prologue: &Prologue,
        body: &'a [u8],
    ) -> Result<(BatchPrefix, &'a [u8]), FrameError> {
        let bad_length = || FrameError::BadLength {
            kind: Kind::Batch as u8,
            len: body.len(),
        };
        let (head, payload) = body
            .split_first_chunk::<BATCH_HEAD_LEN>()
            .ok_or_else(bad_length)?;
        let pages = usize::from(u16_at(head, 22));
        let list_len = u32_at(head, 24) as usize;
        if pages > PAGES_PER_BUF || list_len > MAX_LIST_LEN {
            return Err(FrameError::TooManyEntries);
        }
        let prefix = BatchPrefix {
            head: BatchHead {
                gang: GangId(u64_at(head, 0)),
                batch: BatchId(u64_at(head, 8)),
                round: Round(u32_at(head, 16)),
                vm: VmIndex(u16_at(head, 20)),
                class: prologue.class,
            },
            pages,
            list_len,
        };
        if prologue.encoding == Encoding::Raw && payload.len() != prefix.plain_len() {
            return Err(bad_length());
        }
        Ok((prefix, payload))
    }
}

/// A batch as the target's pipeline sees it.
#[derive(Debug, Clone, Copy)]
pub struct DecodedBatch<'a> {
    /// What it is about.
    pub head: BatchHead,
    /// How it travelled.
    pub encoding: Encoding,
    /// Bytes of its frame on the wire.
    pub wire_len: usize,
    /// Its entries, each page at most once and inside the VM's RAM.
    pub entries: &'a Entries,
    /// Contents of `entries.pages`, packed in that order.
    pub content: &'a [u8],
}

impl<'a> DecodedBatch<'a> {
    /// The pages that came with their content.
    pub fn pages(&self) -> impl ExactSizeIterator<Item = (Gfn, &'a Page)> + use<'a> {
        let (pages, _) = self.content.as_chunks::<PAGE_SIZE>();
        self.entries.pages.iter().copied().zip(pages)
    }
}

/// A frame on its way from target to source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReverseFrame {
    /// These batches are placed.
    Ack(Vec<BatchId>),
    /// These pages must be sent with their content.
    Need {
        /// The gang of the VM.
        gang: GangId,
        /// The VM.
        vm: VmIndex,
        /// The pages, at most [`MAX_NEEDS`].
        gfns: Vec<Gfn>,
    },
    /// The target closes the lane.
    Error(String),
    /// The target is there.
    Ping,
}

impl ReverseFrame {
    /// Appends the frame's bytes to `out`. Ids and pages beyond the caps are
    /// the caller's to split off; text is cut.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; PROLOGUE_LEN]);
        let kind = match self {
            ReverseFrame::Ack(ids) => {
                ids.iter()
                    .for_each(|id| out.extend_from_slice(&id.0.to_le_bytes()));
                Kind::Ack
            }
            ReverseFrame::Need { gang, vm, gfns } => {
                out.extend_from_slice(&gang.0.to_le_bytes());
                out.extend_from_slice(&vm.0.to_le_bytes());
                gfns.iter()
                    .for_each(|gfn| out.extend_from_slice(&gfn.0.to_le_bytes()));
                Kind::Need
            }
            ReverseFrame::Error(text) => {
                let cut = text.floor_char_boundary(MAX_ERROR_TEXT);
                out.extend_from_slice(&text.as_bytes()[..cut]);
                Kind::Error
            }
            ReverseFrame::Ping => Kind::Ping,
        };
        let body_len = out.len() - start - PROLOGUE_LEN;
        out[start..start + PROLOGUE_LEN]
            .copy_from_slice(&Prologue::control(kind, body_len).encode());
    }

    /// Reads the body of a reverse frame.
    pub fn parse(prologue: &Prologue, body: &[u8]) -> Result<ReverseFrame, FrameError> {
        let bad_length = || FrameError::BadLength {
            kind: prologue.kind as u8,
            len: body.len(),
        };
        match prologue.kind {
            Kind::Ping => Ok(ReverseFrame::Ping),
            Kind::Ack => {
                let (ids, _) = body.as_chunks::<8>();
                Ok(ReverseFrame::Ack(
                    ids.iter()
                        .map(|id| BatchId(u64::from_le_bytes(*id)))
                        .collect(),
                ))
            }
            Kind::Need => {
                let (head, gfns) = body.split_first_chunk::<10>().ok_or_else(bad_length)?;
                let (gfns, _) = gfns.as_chunks::<4>();
                Ok(ReverseFrame::Need {
                    gang: GangId(u64_at(head, 0)),
                    vm: VmIndex(u16_at(head, 8)),
                    gfns: gfns
                        .iter()
                        .map(|gfn| Gfn(u32::from_le_bytes(*gfn)))
                        .collect(),
                })
            }
            Kind::Error => {
                let text = std::str::from_utf8(body).map_err(|_| FrameError::BadText)?;
                // It will be logged: one line, nothing a terminal obeys.
                Ok(ReverseFrame::Error(
                    text.chars()
                        .map(|c| if c.is_control() { ' ' } else { c })
                        .collect(),
                ))
            }
            Kind::Batch | Kind::Bye => Err(FrameError::BadKind(prologue.kind as u8)),
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
