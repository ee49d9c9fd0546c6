//! Puts frames together from whatever pieces a socket delivers.

use super::frame::{Direction, FrameError, PROLOGUE_LEN, Prologue};

/// Collects the bytes of one direction of a lane into whole frames. Holds at
/// most one frame, whose size the prologue's caps bound; a frame that arrives
/// whole is handed on without a copy.
#[derive(Debug)]
pub struct Assembler {
    direction: Direction,
    /// Bytes of the unfinished frame, prologue included.
    partial: Vec<u8>,
    /// The prologue of `partial`, once complete.
    prologue: Option<Prologue>,
}

impl Assembler {
    /// For the frames that travel in `direction`.
    pub fn new(direction: Direction) -> Assembler {
        Assembler {
            direction,
            partial: Vec::new(),
            prologue: None,
        }
    }

    /// Whether a frame has begun and is not complete.
    pub fn mid_frame(&self) -> bool {
        !self.partial.is_empty()
    }

    /// Memory held, in bytes.
    pub fn bytes(&self) -> usize {
        self.partial.capacity()
    }

    /// Takes `data`, calling `frame` for each frame that it completes. After
    /// an error the stream has no frame boundaries any more: close it.
    pub fn push<E: From<FrameError>>(
        &mut self,
        mut data: &[u8],
        mut frame: impl FnMut(&Prologue, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            if self.partial.is_empty() {
                // The common case on the target: whole frames in one piece.
                while let Some((prologue, rest)) = data.split_first_chunk::<PROLOGUE_LEN>() {
                    let prologue = Prologue::parse(prologue, self.direction)?;
                    let Some((body, rest)) = rest.split_at_checked(prologue.body_len) else {
                        break;
                    };
                    frame(&prologue, body)?;
                    data = rest;
                }
            }
            if data.is_empty() {
                return Ok(());
            }
            let prologue = match self.prologue {
                Some(prologue) => prologue,
                None => {
                    self.take(&mut data, PROLOGUE_LEN);
                    let Some(bytes) = self.partial.first_chunk::<PROLOGUE_LEN>() else {
                        return Ok(());
                    };
                    *self
                        .prologue
                        .insert(Prologue::parse(bytes, self.direction)?)
                }
            };
            let whole = PROLOGUE_LEN + prologue.body_len;
            self.take(&mut data, whole);
            if self.partial.len() < whole {
                return Ok(());
            }
            frame(&prologue, &self.partial[PROLOGUE_LEN..])?;
            self.partial.clear();
            self.prologue = None;
        }
    }

    /// Moves bytes from `data` until `partial` has `want`.
    fn take(&mut self, data: &mut &[u8], want: usize) {
        let n = want.saturating_sub(self.partial.len()).min(data.len());
        self.partial
            .reserve_exact(want.saturating_sub(self.partial.len()));
        let (now, later) = data.split_at(n);
        self.partial.extend_from_slice(now);
        *data = later;
    }
}
