//! From staged batch to frame: in place, without its blocks of zeroes, or
//! through the connection's zstd stream.
//!
//! One zstd stream lasts as long as its connection: each frame is the next
//! piece of it, ended by a flush, so that the pages of earlier frames are the
//! dictionary of later ones (window and long-distance matching; the figures
//! are in `docs/lanes.md`). Frames must therefore be sent in the order they
//! are encoded. Work is done in steps of a few hundred microseconds, so that
//! the lane's thread can keep sending in between.
//!
//! Whatever comes out lies in one [`PoolBuf`]: the place where encryption will
//! go from one registered buffer into another.

use super::batch::{BatchId, StagedBatch};
use super::entries::{Entries, MAX_LIST_LEN};
use super::frame::{BATCH_PREFIX, BatchHead, BatchPrefix, Encoding, FrameError};
use super::pool::{HEADER_ROOM, PoolBuf};
use super::sparse;
use crate::types::{PAGE_SIZE, Round};
use serde::{Deserialize, Serialize};
use zstd::zstd_safe::{self, CCtx, CParameter, InBuffer, OutBuffer, ResetDirective};

/// Plain bytes compressed in one step.
const STEP: usize = 64 * 1024;

/// When page contents are compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compress {
    /// Never.
    Never,
    /// While the link, not the CPU, is the limit.
    #[default]
    Auto,
    /// Always, at the configured level.
    Always,
}

/// How a lane compresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeConfig {
    /// When.
    pub compress: Compress,
    /// zstd level at best ([`Compress::Auto`] may go below): 1 to 19.
    pub level: i32,
    /// Base-2 logarithm of the history, in bytes: 17 to 27. The receiver must
    /// allow as much.
    pub window_log: u32,
}

impl Default for EncodeConfig {
    fn default() -> Self {
        EncodeConfig {
            compress: Compress::Auto,
            level: DEFAULT_LEVEL,
            window_log: DEFAULT_WINDOW_LOG,
        }
    }
}

/// zstd level by default. With a long history, level 3 saves under 2 % of the
/// bytes of guests' RAM and takes half as much CPU again (`docs/lanes.md`).
pub const DEFAULT_LEVEL: i32 = 1;
/// Base-2 logarithm of the history by default: 64 MiB. Two VMs of a host
/// that are alike are then inside one history (`docs/lanes.md`).
pub const DEFAULT_WINDOW_LOG: u32 = 26;

/// One of 2^this places is remembered for matches over a long distance. These
/// are alike pages: a fourth of zstd's own choice finds them as well, within
/// 0.5 %, and takes less time (`docs/lanes.md`).
const LDM_HASH_RATE_LOG: u32 = 9;
/// Shortest match at level 1, bytes; zstd's own choice is 7. Guests' RAM is
/// full of pointers, whose upper bytes repeat.
const LEVEL_1_MIN_MATCH: u32 = 6;

/// Memory a context takes at most under `config`, in bytes; 0 if it never
/// compresses.
pub fn context_bytes_bound(config: &EncodeConfig) -> usize {
    if config.compress == Compress::Never {
        return 0;
    }
    // History and one block, twice the long-distance table's share, and the
    // tables of the levels.
    (1 << config.window_log) + (1 << (config.window_log - 3)) + (8 << 20)
}

/// Why a batch could not be encoded. The connection must be given up: its
/// stream is out of step.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The entries do not make a list.
    #[error("a batch cannot be written")]
    Entries(#[from] FrameError),
    /// The compressor.
    #[error("zstd cannot compress: {0}")]
    Zstd(&'static str),
    /// Not enough memory for the compressor.
    #[error("no memory for a zstd context with a window of 2^{0} bytes")]
    Memory(u32),
    /// Cannot happen while the bounds of [`super::pool`] hold.
    #[error("a compressed batch does not fit its buffer")]
    Room,
}

/// A frame ready for the wire: `buf.bytes()[from..to]`.
#[derive(Debug)]
pub struct EncodedFrame {
    /// Where it lies.
    pub buf: PoolBuf,
    /// Its first byte.
    pub from: usize,
    /// One past its last byte.
    pub to: usize,
    /// What it is about.
    pub head: BatchHead,
    /// How it is written.
    pub encoding: Encoding,
    /// Page contents in it.
    pub pages: usize,
    /// Bytes of list and contents before compression.
    pub plain_len: usize,
}

/// A batch part of the way into the zstd stream.
#[derive(Debug)]
pub struct Job {
    prefix: BatchPrefix,
    encoding: Encoding,
    /// The entry list.
    list: Vec<u8>,
    content: Option<PoolBuf>,
    out: PoolBuf,
    /// Plain bytes consumed so far, list first.
    consumed: usize,
    written: usize,
}

impl Job {
    /// The batch it is.
    pub fn batch(&self) -> BatchId {
        self.prefix.head.batch
    }
}

/// How far a batch has got.
#[derive(Debug)]
pub enum Progress {
    /// Call [`Encoder::step`] again.
    More(Box<Job>),
    /// Send it.
    Done(EncodedFrame),
}

/// The encoder of one connection.
pub struct Encoder {
    config: EncodeConfig,
    level: i32,
    stream: Option<Stream>,
}

struct Stream {
    ctx: CCtx<'static>,
    level: i32,
    /// Whose contents are in the history.
    domain: u64,
    /// The next piece is the first of a stream.
    fresh: bool,
}

impl Encoder {
    /// A new connection's encoder; memory for zstd is taken when first needed.
    pub fn new(config: EncodeConfig) -> Encoder {
        let level = if config.compress == Compress::Never {
            0
        } else {
            config.level
        };
        Encoder {
            config,
            level,
            stream: None,
        }
    }

    /// The zstd level in use; 0 is raw.
    pub fn level(&self) -> i32 {
        self.level
    }

    /// Sets the level for batches started from now on; 0 is raw. Going raw and
    /// back keeps the history, another level begins a new one, and so does
    /// another dedup domain.
    pub fn set_level(&mut self, level: i32) {
        self.level = level;
    }

    /// Memory of the zstd context, in bytes.
    pub fn context_bytes(&self) -> usize {
        self.stream.as_ref().map_or(0, |stream| stream.ctx.sizeof())
    }

    /// Whether the batch would be compressed.
    fn compresses(&self, batch: &StagedBatch) -> bool {
        let Some(content) = &batch.content else {
            return false;
        };
        let pages = batch.entries.pages.len();
        if self.level == 0 || pages == 0 {
            return false;
        }
        // A page of round 1 has no earlier version, so what does not compress
        // by itself does not compress at all. Later rounds do have one, maybe
        // inside the window.
        batch.round > Round(1) || !looks_random(&content.pages()[..pages * PAGE_SIZE])
    }

    /// Begins to encode `batch`. A frame that is not written in place goes to
    /// `spare`, which is dropped if not needed.
    pub fn start(&mut self, batch: StagedBatch, spare: PoolBuf) -> Result<Progress, EncodeError> {
        let compress = self.compresses(&batch);
        let head = batch.head();
        let pages = batch.entries.pages.len();
        if !compress {
            let content = batch.content.filter(|_| pages > 0);
            let maps = content
                .as_ref()
                .and_then(|buf| sparse::worthwhile(&buf.pages()[..pages * PAGE_SIZE]));
            let frame = match (content, maps) {
                (Some(content), Some(maps)) => {
                    without_zeroes(head, &batch.entries, &content, &maps, spare)
                }
                (content, _) => raw(head, &batch.entries, content.unwrap_or(spare)),
            };
            return frame.map(Progress::Done);
        }
        let mut list = vec![0; MAX_LIST_LEN];
        let list_len = batch.entries.encode(&mut list)?;
        list.truncate(list_len);
        let stream = self.stream(batch.domain)?;
        let encoding = Encoding::Zstd {
            fresh: std::mem::take(&mut stream.fresh),
        };
        Ok(Progress::More(Box::new(Job {
            prefix: BatchPrefix {
                head,
                pages,
                list_len,
            },
            encoding,
            list,
            content: batch.content,
            out: spare,
            consumed: 0,
            written: BATCH_PREFIX,
        })))
    }

    /// Compresses another piece of a batch.
    pub fn step(&mut self, mut job: Box<Job>) -> Result<Progress, EncodeError> {
        use zstd_safe::zstd_sys::ZSTD_EndDirective::{ZSTD_e_continue, ZSTD_e_flush};
        let stream = self.stream.as_mut().ok_or(EncodeError::Room)?;
        let plain_len = job.prefix.plain_len();
        let content = job.content.as_ref().map_or(&[][..], |buf| buf.pages());
        let (plain, upto) = match job.consumed.checked_sub(job.list.len()) {
            None => (&job.list[job.consumed..], job.list.len()),
            Some(at) => {
                let end = (at + STEP).min(job.prefix.pages * PAGE_SIZE);
                (&content[at..end], job.list.len() + end)
            }
        };
        let last = upto == plain_len;
        let mut input = InBuffer::around(plain);
        let mut output = OutBuffer::around_pos(job.out.bytes_mut(), job.written);
        let directive = if last { ZSTD_e_flush } else { ZSTD_e_continue };
        loop {
            let left = stream
                .ctx
                .compress_stream2(&mut output, &mut input, directive)
                .map_err(|code| EncodeError::Zstd(zstd_safe::get_error_name(code)))?;
            let eaten = input.pos() == plain.len();
            if eaten && (!last || left == 0) {
                break;
            }
            if output.pos() == output.capacity() {
                return Err(EncodeError::Room);
            }
        }
        job.written = output.pos();
        job.consumed = upto;
        if !last {
            return Ok(Progress::More(job));
        }
        let Job {
            prefix,
            encoding,
            mut out,
            written,
            ..
        } = *job;
        let header = prefix.encode(encoding, written - BATCH_PREFIX);
        out.bytes_mut()[..BATCH_PREFIX].copy_from_slice(&header);
        Ok(Progress::Done(EncodedFrame {
            buf: out,
            from: 0,
            to: written,
            head: prefix.head,
            encoding,
            pages: prefix.pages,
            plain_len,
        }))
    }

    /// The stream at the wanted level, with a history of this domain alone.
    fn stream(&mut self, domain: u64) -> Result<&mut Stream, EncodeError> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => Stream::new(self.config.window_log)?,
        };
        if stream.level != self.level || stream.domain != domain {
            stream.restart(self.level)?;
            stream.domain = domain;
        }
        Ok(self.stream.insert(stream))
    }
}

impl Stream {
    fn new(window_log: u32) -> Result<Stream, EncodeError> {
        let mut ctx = CCtx::try_create().ok_or(EncodeError::Memory(window_log))?;
        for parameter in [
            CParameter::WindowLog(window_log),
            CParameter::EnableLongDistanceMatching(true),
            CParameter::LdmHashRateLog(LDM_HASH_RATE_LOG),
            CParameter::ContentSizeFlag(false),
            CParameter::ChecksumFlag(false),
        ] {
            ctx.set_parameter(parameter)
                .map_err(|code| EncodeError::Zstd(zstd_safe::get_error_name(code)))?;
        }
        Ok(Stream {
            ctx,
            level: 0,
            domain: 0,
            fresh: true,
        })
    }

    fn restart(&mut self, level: i32) -> Result<(), EncodeError> {
        // 0: zstd's own choice.
        let min_match = if level == 1 { LEVEL_1_MIN_MATCH } else { 0 };
        self.ctx
            .reset(ResetDirective::SessionOnly)
            .and_then(|_| self.ctx.set_parameter(CParameter::CompressionLevel(level)))
            .and_then(|_| self.ctx.set_parameter(CParameter::MinMatch(min_match)))
            .map_err(|code| EncodeError::Zstd(zstd_safe::get_error_name(code)))?;
        self.level = level;
        self.fresh = true;
        Ok(())
    }
}

/// Writes header and list right before the pages.
fn raw(head: BatchHead, entries: &Entries, mut buf: PoolBuf) -> Result<EncodedFrame, EncodeError> {
    let mut list = [0; MAX_LIST_LEN];
    let list_len = entries.encode(&mut list)?;
    let pages = entries.pages.len();
    let prefix = BatchPrefix {
        head,
        pages,
        list_len,
    };
    let from = HEADER_ROOM - list_len - BATCH_PREFIX;
    let plain_len = prefix.plain_len();
    let header = &mut buf.bytes_mut()[from..HEADER_ROOM];
    header[..BATCH_PREFIX].copy_from_slice(&prefix.encode(Encoding::Raw, plain_len));
    header[BATCH_PREFIX..].copy_from_slice(&list[..list_len]);
    Ok(EncodedFrame {
        buf,
        from,
        to: HEADER_ROOM + pages * PAGE_SIZE,
        head,
        encoding: Encoding::Raw,
        pages,
        plain_len,
    })
}

/// Writes header, list and what is not zero of `content` to `out`.
fn without_zeroes(
    head: BatchHead,
    entries: &Entries,
    content: &PoolBuf,
    maps: &[u64],
    mut out: PoolBuf,
) -> Result<EncodedFrame, EncodeError> {
    let pages = entries.pages.len();
    let bytes = out.bytes_mut();
    let list_len = entries.encode(&mut bytes[BATCH_PREFIX..HEADER_ROOM])?;
    let prefix = BatchPrefix {
        head,
        pages,
        list_len,
    };
    let to = BATCH_PREFIX + list_len + sparse::len(maps);
    let room = bytes
        .get_mut(BATCH_PREFIX + list_len..to)
        .ok_or(EncodeError::Room)?;
    sparse::write(&content.pages()[..pages * PAGE_SIZE], maps, room);
    let header = prefix.encode(Encoding::Sparse, to - BATCH_PREFIX);
    bytes[..BATCH_PREFIX].copy_from_slice(&header);
    Ok(EncodedFrame {
        buf: out,
        from: 0,
        to,
        head,
        encoding: Encoding::Sparse,
        pages,
        plain_len: prefix.plain_len(),
    })
}

/// Whether page contents look like random or already compressed bytes, judged
/// by a sample of at least 4096 bytes spread over the pages: how often two
/// sampled bytes are equal (1/256 for random bytes, 1/80 and more for code).
pub fn looks_random(content: &[u8]) -> bool {
    let (pages, _) = content.as_chunks::<PAGE_SIZE>();
    if pages.is_empty() {
        return false;
    }
    let piece = (PAGE_SIZE / pages.len()).max(32);
    let mut counts = [0u32; 256];
    let mut total = 0u64;
    for (n, page) in pages.iter().enumerate() {
        // Another place in each page, so that no page layout fools all.
        let at = n * 613 % (PAGE_SIZE - piece + 1);
        for &byte in &page[at..at + piece] {
            counts[usize::from(byte)] += 1;
        }
        total += piece as u64;
    }
    let equal: u64 = counts
        .iter()
        .map(|&c| u64::from(c) * u64::from(c.saturating_sub(1)))
        .sum();
    // equal / (total (total - 1)) ≤ 1.15 / 256
    equal * 256 * 100 <= total * (total - 1) * 115
}
