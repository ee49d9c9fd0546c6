//! The thread of a receiving lane: one loop over its ring.

use super::assemble::Assembler;
use super::batch::{BatchId, BatchSink, Placement, SinkError};
use super::decode::Decoder;
use super::frame::{DecodedBatch, Direction, FrameError, Kind, MAX_ACKS, Prologue, ReverseFrame};
use super::open::Inflow;
use super::record::LaneKeys;
use super::recv::{LaneEnd, MAX_OUTBOX, ReceiveConfig, ReceiveError, Shared};
use super::ring::{Completion, Ring, SendMem};
use super::seal::Sealer;
use super::send::chain;
use crate::types::Gfn;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the lane looks at the clock.
const TICK: Duration = Duration::from_millis(50);
/// In the middle of a frame more is sure to come: let this much time's worth
/// gather before waking up for it.
const GATHER: Duration = Duration::from_micros(100);
/// Silence after which a sign of life is sent.
const PING_AFTER: Duration = Duration::from_millis(400);
/// How long the last words to a source are waited for.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The thread's state beside the ring.
pub(super) struct Intake {
    shared: Arc<Shared>,
    config: ReceiveConfig,
    sink: Arc<dyn BatchSink>,
    inflow: Inflow,
    /// Seals what is sent back, unless that goes as it is.
    sealer: Option<Sealer>,
    assembler: Assembler,
    decoder: Decoder,
    /// Batches to acknowledge with the next Ack.
    acks: Vec<BatchId>,
    /// Time spent decrypting that is not counted yet.
    open_ns: u64,
    last_heard: Instant,
    bye: bool,
    eof: bool,
    sent: Option<usize>,
    /// Reverse frames not yet given to the ring.
    outbox: Vec<u8>,
    /// Reverse frames being sent, from this offset.
    sending: Option<(Arc<SendMem>, usize)>,
    last_sent: Instant,
}

impl Intake {
    pub(super) fn new(
        shared: Arc<Shared>,
        config: ReceiveConfig,
        sink: Arc<dyn BatchSink>,
        keys: Option<LaneKeys>,
    ) -> Intake {
        let now = Instant::now();
        let (seal, open) = keys.map(|keys| (keys.seal, keys.open)).unzip();
        Intake {
            inflow: Inflow::new(open),
            sealer: seal.map(Sealer::new),
            assembler: Assembler::new(Direction::Forward),
            decoder: Decoder::new(config.window_log),
            shared,
            config,
            sink,
            acks: Vec::new(),
            open_ns: 0,
            last_heard: now,
            bye: false,
            eof: false,
            sent: None,
            outbox: Vec::new(),
            sending: None,
            last_sent: now,
        }
    }

    /// Runs until the lane ends, and says how it did.
    pub(super) fn run(mut self, mut ring: Ring) {
        let outcome = self.drive(&mut ring);
        self.shared.waiting().ended = true;
        let end = match outcome {
            Ok(()) => LaneEnd::Orderly,
            Err(error) => {
                tracing::warn!("lane from {}: {}", self.config.peer, chain(&error));
                self.last_words(&mut ring, &error);
                LaneEnd::Broken(error)
            }
        };
        self.tell_counters(&ring);
        drop(ring);
        let _ = self.shared.end.set(end);
    }

    fn drive(&mut self, ring: &mut Ring) -> Result<(), ReceiveError> {
        let mut last_tick = Instant::now();
        loop {
            let mid_frame = self.assembler.mid_frame();
            let gather = if mid_frame { GATHER } else { Duration::ZERO };
            ring.wait_gathering(TICK, gather)
                .map_err(ReceiveError::Ring)?;
            ring.reap(|completion| self.completed(completion))?;
            self.collect_waiting()?;
            self.send_back(ring)?;
            if self.bye && self.outbox.is_empty() && self.sending.is_none() {
                return Ok(());
            }
            if self.eof {
                return if self.bye {
                    Ok(())
                } else {
                    Err(ReceiveError::Ended)
                };
            }
            let now = Instant::now();
            if now.duration_since(last_tick) >= TICK {
                last_tick = now;
                self.tick(now, ring)?;
            }
        }
    }

    fn tick(&mut self, now: Instant, ring: &Ring) -> Result<(), ReceiveError> {
        self.tell_counters(ring);
        let patience = self.config.patience;
        if now.duration_since(self.last_heard) > patience {
            return Err(ReceiveError::Silent(patience));
        }
        if self.sending.is_some() && now.duration_since(self.last_sent) > patience {
            return Err(ReceiveError::NotReading(self.outbox.len()));
        }
        if self.sending.is_none() && now.duration_since(self.last_sent) > PING_AFTER {
            ReverseFrame::Ping.encode(&mut self.outbox);
        }
        Ok(())
    }

    /// Publishes what is counted elsewhere.
    fn tell_counters(&self, ring: &Ring) {
        let counters = &self.shared.counters;
        counters.ring_enters.set(ring.enters());
        counters.multishot.set(u64::from(ring.multishot()));
        let memory = ring.recv_bytes() + self.assembler.bytes() + self.decoder.bytes();
        counters
            .memory_bytes
            .set((memory + self.outbox.capacity()) as u64);
    }

    fn completed(&mut self, completion: Completion<'_>) -> Result<(), ReceiveError> {
        match completion {
            Completion::Data(bytes) => self.received(bytes)?,
            Completion::Sent(result) => self.sent = Some(result.map_err(ReceiveError::Socket)?),
            Completion::Eof => self.eof = true,
            Completion::RecvFailed(error) => return Err(ReceiveError::Socket(error)),
            Completion::Released { .. } | Completion::Woken => {}
        }
        Ok(())
    }

    fn received(&mut self, bytes: &mut [u8]) -> Result<(), ReceiveError> {
        self.shared.counters.wire_bytes.add(bytes.len() as u64);
        // Split from self, which the frames' handler borrows.
        let mut inflow = std::mem::replace(&mut self.inflow, Inflow::Plain);
        let mut assembler =
            std::mem::replace(&mut self.assembler, Assembler::new(Direction::Forward));
        let start = Instant::now();
        let mut elsewhere = Duration::ZERO;
        let outcome = inflow.push(bytes, |plain| {
            let start = Instant::now();
            let outcome = assembler.push(plain, |prologue, body| self.frame(prologue, body));
            elsewhere += start.elapsed();
            outcome
        });
        self.assembler = assembler;
        self.inflow = inflow;
        self.last_heard = Instant::now();
        let opening = self.last_heard - start - elsewhere;
        let opening = opening.as_nanos() as u64 + self.open_ns;
        self.shared.counters.open_us.add(opening / 1000);
        self.open_ns = opening % 1000;
        outcome
    }

    fn frame(&mut self, prologue: &Prologue, body: &[u8]) -> Result<(), ReceiveError> {
        if self.bye {
            return Err(FrameError::BadKind(prologue.kind as u8).into());
        }
        match prologue.kind {
            Kind::Batch => {}
            Kind::Bye => {
                self.bye = true;
                return Ok(());
            }
            _ => return Ok(()),
        }
        let counters = &self.shared.counters;
        let start = Instant::now();
        let sink = &self.sink;
        let mut sink_time = Duration::ZERO;
        let (batch, placement) = self.decoder.decode(prologue, body, |batch| {
            let start = Instant::now();
            let placement = deliver(&**sink, batch);
            sink_time = start.elapsed();
            counters.batches.add(1);
            counters.pages.add(batch.entries.pages.len() as u64);
            (batch.head.batch, placement)
        })?;
        counters.sink_us.add(sink_time.as_micros() as u64);
        counters
            .decode_us
            .add((start.elapsed() - sink_time).as_micros() as u64);
        if placement? == Placement::Placed {
            self.acks.push(batch);
        }
        Ok(())
    }

    /// Moves what other threads left into the outbox.
    fn collect_waiting(&mut self) -> Result<(), ReceiveError> {
        let (needs, close) = {
            let mut waiting = self.shared.waiting();
            self.acks.append(&mut waiting.placed);
            let mut needs = Vec::new();
            // The rest waits where it is counted.
            let mut room = (MAX_OUTBOX / 2).saturating_sub(self.outbox.len());
            while room > 0
                && let Some(need) = waiting.needs.pop_front()
            {
                room = room.saturating_sub(need.2.len() * size_of::<Gfn>());
                waiting.need_count -= need.2.len();
                needs.push(need);
            }
            (needs, waiting.close)
        };
        for acks in self.acks.chunks(MAX_ACKS) {
            ReverseFrame::Ack(acks.to_vec()).encode(&mut self.outbox);
        }
        self.acks.clear();
        for (gang, vm, gfns) in needs {
            ReverseFrame::Need { gang, vm, gfns }.encode(&mut self.outbox);
        }
        if close {
            Err(ReceiveError::Closed)
        } else {
            Ok(())
        }
    }

    fn send_back(&mut self, ring: &mut Ring) -> Result<(), ReceiveError> {
        if let Some(bytes) = self.sent.take()
            && let Some((mem, at)) = self.sending.take()
        {
            self.last_sent = Instant::now();
            if at + bytes < mem.bytes().len() {
                self.start_send(ring, mem, at + bytes)?;
            }
        }
        if self.sending.is_none() && !self.outbox.is_empty() {
            let mut bytes = std::mem::take(&mut self.outbox);
            if let Some(sealer) = &mut self.sealer {
                bytes = sealer.small(&bytes)?;
            }
            let mem = Arc::new(SendMem::Small(bytes));
            self.last_sent = Instant::now();
            self.start_send(ring, mem, 0)?;
        }
        if self.outbox.len() > MAX_OUTBOX {
            return Err(ReceiveError::NotReading(self.outbox.len()));
        }
        Ok(())
    }

    fn start_send(
        &mut self,
        ring: &mut Ring,
        mem: Arc<SendMem>,
        from: usize,
    ) -> Result<(), ReceiveError> {
        ring.send(&mem, from, mem.bytes().len(), false)
            .map_err(ReceiveError::Socket)?;
        self.sending = Some((mem, from));
        Ok(())
    }

    /// Tells the source why, as far as it still listens.
    fn last_words(&mut self, ring: &mut Ring, error: &ReceiveError) {
        if matches!(
            error,
            ReceiveError::Ended
                | ReceiveError::Socket(_)
                | ReceiveError::Ring(_)
                | ReceiveError::NotReading(_)
        ) {
            return;
        }
        ReverseFrame::Error(chain(error)).encode(&mut self.outbox);
        let end = Instant::now() + LAST_WORDS;
        let mut said = false;
        // Read and ignore what still comes: closing with unread data would
        // reset the connection, and the words would be lost.
        while Instant::now() < end && !self.eof {
            self.sent = None;
            let ignored = ring.reap(|completion| match completion {
                Completion::Sent(Ok(bytes)) => {
                    self.sent = Some(bytes);
                    Ok(())
                }
                Completion::Eof => {
                    self.eof = true;
                    Ok(())
                }
                Completion::Sent(Err(_)) | Completion::RecvFailed(_) => Err(()),
                _ => Ok(()),
            });
            if ignored.is_err() || self.send_back(ring).is_err() {
                return;
            }
            if !said && self.sending.is_none() && self.outbox.is_empty() {
                said = true;
                let _ = ring.stream().shutdown(Shutdown::Write);
            }
            if ring.wait(Duration::from_millis(10)).is_err() {
                return;
            }
        }
    }
}

/// Checks the batch against its VM and gives it to the sink.
fn deliver(sink: &dyn BatchSink, batch: &DecodedBatch<'_>) -> Result<Placement, ReceiveError> {
    let head = batch.head;
    let refused = |source| ReceiveError::Sink {
        batch: head.batch,
        source,
    };
    let ram_pages = sink
        .ram_pages(head.gang, head.vm)
        .ok_or(SinkError::UnknownVm {
            gang: head.gang,
            vm: head.vm,
        })
        .map_err(refused)?;
    batch.entries.check(ram_pages)?;
    sink.batch(batch).map_err(refused)
}
