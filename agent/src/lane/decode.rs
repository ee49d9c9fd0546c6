//! From frame to batch: the other end of [`super::encode`].

use super::assemble::Assembler;
use super::entries::Entries;
use super::frame::{
    BatchPrefix, DecodedBatch, Direction, Encoding, FrameError, Kind, PROLOGUE_LEN, Prologue,
};
use super::sparse;
use zstd::zstd_safe::{self, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

/// Why a batch frame could not be decoded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Header or entry list.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The compressed stream is damaged, or needs a window beyond the limit.
    #[error("a compressed batch cannot be read: {0}")]
    Zstd(&'static str),
    /// The compressed piece does not hold what the header says.
    #[error("a compressed batch does not hold the {want} bytes its header says")]
    Length {
        /// Bytes of list and contents by the header.
        want: usize,
    },
    /// No memory.
    #[error("no memory for a zstd context")]
    Memory,
}

/// The decoder of one connection. Memory: a decoded batch (≤ 540 KiB) and,
/// once a compressed frame has come, a window of `2^window_log` bytes and
/// about 0.3 MiB.
pub struct Decoder {
    window_log: u32,
    ctx: Option<DCtx<'static>>,
    plain: Vec<u8>,
}

impl Decoder {
    /// A decoder that allows histories up to `2^window_log` bytes.
    pub fn new(window_log: u32) -> Decoder {
        Decoder {
            window_log,
            ctx: None,
            plain: Vec::new(),
        }
    }

    /// Memory held, in bytes.
    pub fn bytes(&self) -> usize {
        self.plain.capacity() + self.ctx.as_ref().map_or(0, |ctx| ctx.sizeof())
    }

    /// Decodes the body of a batch frame and hands the batch to `take`. The
    /// entries are well-formed, but not yet checked against the VM's RAM:
    /// [`Entries::check`].
    pub fn decode<R>(
        &mut self,
        prologue: &Prologue,
        body: &[u8],
        take: impl FnOnce(&DecodedBatch<'_>) -> R,
    ) -> Result<R, DecodeError> {
        let (prefix, payload) = BatchPrefix::parse(prologue, body)?;
        let plain = match prologue.encoding {
            Encoding::Raw => payload,
            Encoding::Sparse => self.fill_in(&prefix, payload)?,
            Encoding::Zstd { fresh } => self.inflate(&prefix, payload, fresh)?,
        };
        let (list, content) =
            plain
                .split_at_checked(prefix.list_len)
                .ok_or(DecodeError::Length {
                    want: prefix.plain_len(),
                })?;
        let entries = Entries::decode(list, prefix.pages)?;
        Ok(take(&DecodedBatch {
            head: prefix.head,
            encoding: prologue.encoding,
            wire_len: PROLOGUE_LEN + body.len(),
            entries: &entries,
            content,
        }))
    }

    /// Puts the zeroes back that were left out.
    fn fill_in(&mut self, prefix: &BatchPrefix, payload: &[u8]) -> Result<&[u8], DecodeError> {
        let (list, contents) = payload
            .split_at_checked(prefix.list_len)
            .ok_or(FrameError::BadSparse)?;
        self.plain.resize(prefix.plain_len(), 0);
        let (list_room, pages) = self.plain.split_at_mut(prefix.list_len);
        list_room.copy_from_slice(list);
        sparse::read(contents, pages)?;
        Ok(&self.plain)
    }

    fn inflate(
        &mut self,
        prefix: &BatchPrefix,
        payload: &[u8],
        fresh: bool,
    ) -> Result<&[u8], DecodeError> {
        let zstd = |code| DecodeError::Zstd(zstd_safe::get_error_name(code));
        let mut ctx = match self.ctx.take() {
            Some(ctx) => ctx,
            None => {
                let mut ctx = DCtx::try_create().ok_or(DecodeError::Memory)?;
                ctx.set_parameter(DParameter::WindowLogMax(self.window_log))
                    .map_err(zstd)?;
                ctx
            }
        };
        if fresh {
            ctx.reset(ResetDirective::SessionOnly).map_err(zstd)?;
        }
        let want = prefix.plain_len();
        // One byte more than may come, to see if more would.
        self.plain.resize(want + 1, 0);
        let mut input = InBuffer::around(payload);
        let mut output = OutBuffer::around(&mut self.plain[..]);
        loop {
            let before = (input.pos(), output.pos());
            ctx.decompress_stream(&mut output, &mut input)
                .map_err(zstd)?;
            if output.pos() > want || (input.pos(), output.pos()) == before {
                break;
            }
        }
        if output.pos() != want || input.pos() != payload.len() {
            return Err(DecodeError::Length { want });
        }
        self.ctx = Some(ctx);
        Ok(&self.plain[..want])
    }
}

/// Reads everything a hostile source could send on a lane of a VM with
/// `ram_pages` pages, and returns how many batches it held. The entry for
/// fuzzing: it must neither panic nor take more memory than a lane may.
pub fn read_stream(bytes: &[u8], ram_pages: u32) -> Result<usize, DecodeError> {
    let mut assembler = Assembler::new(Direction::Forward);
    let mut decoder = Decoder::new(20);
    let mut batches = 0;
    assembler.push(bytes, |prologue, body| {
        if prologue.kind == Kind::Batch {
            decoder.decode(prologue, body, |batch| batch.entries.check(ram_pages))??;
            batches += 1;
        }
        Ok::<(), DecodeError>(())
    })?;
    Ok(batches)
}
