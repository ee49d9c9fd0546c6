//! What a connection sends next: batches from the lane's queues, encoded one
//! ahead of the frame on its way.

use super::super::batch::{LostBatch, StagedBatch};
use super::super::encode::Progress;
use super::super::outgoing::Outgoing;
use super::super::send::LaneError;
use super::{Ahead, Connection};
use crate::types::Class;
use std::time::Instant;

impl Connection<'_> {
    /// The frame to be sent next, if there is one.
    pub(super) fn next_frame(&mut self) -> Option<Outgoing> {
        let frame = match std::mem::replace(&mut self.ahead, Ahead::Nothing) {
            Ahead::Ready(frame) => frame,
            other => {
                self.ahead = other;
                return None;
            }
        };
        let counters = self.counters();
        counters.batches.add(1);
        counters.pages.add(frame.pages as u64);
        counters.plain_bytes.add(frame.plain_len as u64);
        self.window.plain_bytes += frame.plain_len as u64;
        if frame.encoding.is_compressed() {
            counters.batches_compressed.add(1);
            counters.pages_compressed.add(frame.pages as u64);
            self.compressed.insert(frame.head.batch);
        }
        Some(Outgoing::new(frame))
    }

    pub(super) fn stop_copy_waits(&self) -> bool {
        if matches!(&self.ahead, Ahead::Ready(frame) if frame.head.class == Class::StopCopy) {
            return true;
        }
        !self.lane.shared.state().queues[self.lane.index]
            .stop_copy
            .is_empty()
    }

    /// Does one step of encoding the frame after the current one. Returns
    /// whether it got further.
    pub(super) fn encode_ahead(&mut self) -> Result<bool, LaneError> {
        let progress = match std::mem::replace(&mut self.ahead, Ahead::Nothing) {
            Ahead::Ready(frame) => {
                self.ahead = Ahead::Ready(frame);
                return Ok(false);
            }
            Ahead::Encoding(job) => {
                let start = Instant::now();
                let progress = self.encoder.step(job)?;
                let spent = start.elapsed();
                self.window.encoding += spent;
                self.counters().encode_us.add(spent.as_micros() as u64);
                progress
            }
            Ahead::Nothing => {
                // All output buffers may still be held by the kernel.
                let Some(spare) = self.lane.out.try_take() else {
                    return Ok(false);
                };
                let Some(batch) = self.take_batch() else {
                    return Ok(false);
                };
                self.counters()
                    .references
                    .add(batch.entries.refs.len() as u64);
                let lost = LostBatch {
                    head: batch.head(),
                    entries: batch.entries.clone(),
                };
                if self.unacked.insert(batch.batch, lost).is_some() {
                    return Err(LaneError::BatchTwice(batch.batch));
                }
                self.encoder.start(batch, spare)?
            }
        };
        self.ahead = match progress {
            Progress::More(job) => Ahead::Encoding(job),
            Progress::Done(frame) => Ahead::Ready(frame),
        };
        Ok(true)
    }

    /// The next batch of the queue, stop-and-copy first.
    fn take_batch(&mut self) -> Option<StagedBatch> {
        if self.unacked.len() >= self.lane.shared.config.max_unacked {
            return None;
        }
        let mut state = self.lane.shared.state();
        let queue = &mut state.queues[self.lane.index];
        let batch = queue
            .stop_copy
            .pop_front()
            .or_else(|| queue.precopy.pop_front());
        queue.hungry = batch.is_none();
        let batch = batch?;
        drop(state);
        self.lane.shared.changed.notify_all();
        Some(batch)
    }
}
