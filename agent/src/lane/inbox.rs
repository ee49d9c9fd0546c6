//! What a sending lane hears: completions of its ring, and frames from the
//! target.

use super::assemble::Assembler;
use super::frame::{Direction, ReverseFrame};
use super::open::Inflow;
use super::ring::Completion;
use super::send::LaneError;
use super::stats::LaneCounters;
use std::io;
use std::time::Instant;

/// What came in, gathered while completions are taken.
pub(super) struct Inbox {
    inflow: Inflow,
    assembler: Assembler,
    /// Frames not yet dealt with.
    pub(super) frames: Vec<ReverseFrame>,
    pub(super) last_heard: Instant,
    /// How the last send ended.
    pub(super) sent: Option<io::Result<usize>>,
    pub(super) copied_in_a_row: u32,
    pub(super) eof: bool,
}

impl Inbox {
    pub(super) fn new(now: Instant, inflow: Inflow) -> Inbox {
        Inbox {
            inflow,
            assembler: Assembler::new(Direction::Reverse),
            frames: Vec::new(),
            last_heard: now,
            sent: None,
            copied_in_a_row: 0,
            eof: false,
        }
    }

    /// Notes a completion.
    pub(super) fn take(
        &mut self,
        completion: Completion<'_>,
        counters: &LaneCounters,
    ) -> Result<(), LaneError> {
        match completion {
            Completion::Sent(result) => self.sent = Some(result),
            Completion::Released { copied: true } => {
                self.copied_in_a_row += 1;
                counters.sends_copied.add(1);
            }
            Completion::Released { copied: false } => {
                self.copied_in_a_row = 0;
                counters.sends_zero_copied.add(1);
            }
            Completion::Data(bytes) => {
                self.last_heard = Instant::now();
                counters.reverse_bytes.add(bytes.len() as u64);
                let (assembler, frames) = (&mut self.assembler, &mut self.frames);
                self.inflow.push(bytes, |plain| {
                    assembler.push(plain, |prologue, body| {
                        frames.push(ReverseFrame::parse(prologue, body)?);
                        Ok::<(), LaneError>(())
                    })
                })?;
            }
            Completion::Eof => self.eof = true,
            Completion::RecvFailed(error) => return Err(LaneError::Receive(error)),
            Completion::Woken => {}
        }
        Ok(())
    }
}
