//! One connection of a sending lane, driven by one loop: take what completed,
//! send the next chunk if the pacer permits, compress a step ahead, wait.

mod feed;

use super::adapt::{Adapter, Saturation, Window};
use super::batch::{BatchId, LaneEvent};
use super::encode::{Compress, EncodedFrame, Encoder, Job};
use super::frame::{BatchHead, Kind, Prologue, ReverseFrame};
use super::inbox::Inbox;
use super::open::Inflow;
use super::outgoing::Outgoing;
use super::pool::BufferPool;
use super::record::LaneStream;
use super::ring::{Ring, RingConfig, SendMem};
use super::seal::Outflow;
use super::send::{LaneError, LaneThread, RECV_BUFFERS, Unacked};
use super::setup::RingError;
use super::stats::LaneCounters;
use super::tcp;
use crate::types::Class;
use nix::time::{ClockId, clock_gettime};
use socket2::SockRef;
use std::collections::HashSet;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How often the lane looks at the clock, its rate limit and `TCP_INFO`.
const TICK: Duration = Duration::from_millis(50);
/// Silence after which a sign of life is sent.
const PING_AFTER: Duration = Duration::from_millis(500);
/// A frame that has begun goes on after this long without permission.
const OVERDRAW_AFTER: Duration = Duration::from_secs(1);
/// Below this, zero copy costs more than copying.
const MIN_ZERO_COPY: usize = 10 * 1024;
/// Copied sends in a row after which zero copy is given up.
const MAX_COPIED: u32 = 8;
/// A chunk is what the link carries in this time, within bounds.
const CHUNK_TIME: f64 = 0.002;
const MIN_CHUNK: usize = 16 * 1024;

/// The frame after it.
enum Ahead {
    Nothing,
    Encoding(Box<Job>),
    Ready(EncodedFrame),
}

/// What a send is of.
enum Sending {
    /// The next bytes of the current frame.
    Chunk,
    /// A sign of life, this long.
    Ping(usize),
}

/// How a connection ended in order.
pub(super) enum Finish {
    /// With the set.
    Closed,
    /// Its keys have encrypted enough: the next one has fresh ones.
    Worn,
}

/// What keeps the current frame from going on.
enum Gate {
    /// There is no frame.
    NoFrame,
    /// A send is under way.
    Socket,
    /// The pacer said to come back after this long.
    Pacer(Duration),
}

pub(super) struct Connection<'a> {
    lane: &'a LaneThread,
    ring: Ring,
    encoder: Encoder,
    adapter: Adapter,
    saturation: Saturation,
    window: Window,
    outflow: Outflow,
    /// No new batches are taken: the connection is to end when what it has is
    /// acknowledged.
    worn: bool,
    unacked: &'a mut Unacked,
    /// Batches of `unacked` whose contents went compressed.
    compressed: HashSet<BatchId>,
    inbox: Inbox,
    current: Option<Outgoing>,
    /// The send under way.
    sending: Option<Sending>,
    ahead: Ahead,
    zero_copy: bool,
    max_rate: Option<u64>,
    last_tick: Instant,
    /// CPU time of this thread at the last tick.
    cpu_before: Duration,
    last_sent: Instant,
    enters_before: u64,
}

impl<'a> Connection<'a> {
    /// Sets socket and ring up.
    pub(super) fn open(
        lane: &'a LaneThread,
        stream: LaneStream,
        unacked: &'a mut Unacked,
    ) -> Result<Connection<'a>, LaneError> {
        let LaneStream { tcp: stream, keys } = stream;
        let config = &lane.shared.config;
        let max_rate = lane.shared.pacing.max_rate();
        tcp::prepare(&stream, config.patience)
            .and_then(|()| {
                let socket = SockRef::from(&stream);
                // Little is queued in the kernel: the queue of the core link
                // stays empty, and stop-and-copy does not wait behind megabytes.
                socket.set_send_buffer_size(config.send_buffer)?;
                socket.set_tcp_notsent_lowat(config.notsent_lowat)?;
                if let Some(name) = &config.congestion {
                    socket.set_tcp_congestion(name.as_bytes())?;
                }
                tcp::set_max_pacing_rate(&stream, max_rate)
            })
            .map_err(LaneError::Socket)?;
        let (seal, open) = keys.map(|keys| (keys.seal, keys.open)).unzip();
        let outflow = Outflow::new(seal).map_err(RingError::Resources)?;
        // What the network card reads: frames where they lie, or sealed.
        let pools: Vec<&BufferPool> = match &outflow {
            Outflow::Plain => vec![&lane.shared.staging, &lane.out],
            Outflow::Sealed { bufs, .. } => vec![bufs],
        };
        let ring = Ring::new(
            stream,
            &config.peer,
            lane.waker.clone(),
            &RingConfig {
                pools: &pools,
                recv_buffers: RECV_BUFFERS,
                deferred: false,
            },
        )?;
        let now = Instant::now();
        let encoder = Encoder::new(config.encode);
        lane.counters.level.set(encoder.level() as u64);
        lane.counters.fell_back.set(0);
        Ok(Connection {
            lane,
            ring,
            adapter: Adapter::new(config.encode.level),
            saturation: Saturation::default(),
            encoder,
            window: Window::default(),
            outflow,
            worn: false,
            unacked,
            compressed: HashSet::new(),
            inbox: Inbox::new(now, Inflow::new(open)),
            current: None,
            sending: None,
            ahead: Ahead::Nothing,
            zero_copy: true,
            max_rate,
            last_tick: now,
            cpu_before: thread_cpu_time(),
            last_sent: now,
            enters_before: 0,
        })
    }

    fn counters(&self) -> &'a LaneCounters {
        &self.lane.counters
    }

    /// Carries batches until the set closes, the keys are worn, or something
    /// breaks.
    pub(super) fn run(&mut self) -> Result<Finish, LaneError> {
        loop {
            self.take_completions()?;
            // First what the target said: it may be why sending failed.
            self.handle_frames()?;
            let now = Instant::now();
            if let Some(result) = self.inbox.sent.take() {
                self.sent(result.map_err(LaneError::Send)?, now)?;
            }
            if now.duration_since(self.last_tick) >= TICK {
                self.tick(now)?;
            }
            if let Some(limit) = self.closing() {
                if self.all_done() {
                    return self.goodbye(limit).map(|()| Finish::Closed);
                }
                if now >= limit {
                    return Err(LaneError::CloseTimeout);
                }
            }
            if self.worn() && self.all_done() {
                return self.goodbye(now).map(|()| Finish::Worn);
            }
            let gate = self.send_on(now)?;
            let further = self.encode_ahead()?;
            match (&self.ahead, &gate) {
                // More to compress: let the kernel work on, do not wait.
                (Ahead::Encoding(_), _) => self.ring.kick().map_err(LaneError::Wait)?,
                // Something to send has just come about.
                (Ahead::Ready(_), Gate::NoFrame) if further => {}
                _ => self.wait(gate)?,
            }
        }
    }

    fn closing(&self) -> Option<Instant> {
        self.lane.shared.state().closing
    }

    /// Whether nothing waits to be sent or acknowledged.
    fn all_done(&self) -> bool {
        self.current.is_none()
            && self.sending.is_none()
            && matches!(self.ahead, Ahead::Nothing)
            && self.unacked.is_empty()
            && self.queue_empty()
    }

    /// Whether the keys have encrypted enough; from then on other lanes, or
    /// this one's next connection, get the batches.
    fn worn(&mut self) -> bool {
        if !self.worn && self.outflow.records() >= self.lane.shared.config.key_records {
            self.worn = true;
            let mut state = self.lane.shared.state();
            state.queues[self.lane.index].up = false;
            state.last_up = Instant::now();
        }
        self.worn
    }

    fn queue_empty(&self) -> bool {
        let state = self.lane.shared.state();
        let queue = &state.queues[self.lane.index];
        queue.stop_copy.is_empty() && queue.precopy.is_empty()
    }

    fn wait(&mut self, gate: Gate) -> Result<(), LaneError> {
        let limit = match gate {
            Gate::Pacer(wait) => wait.clamp(Duration::from_micros(50), TICK),
            Gate::Socket | Gate::NoFrame => TICK,
        };
        let start = Instant::now();
        self.ring.wait(limit).map_err(LaneError::Wait)?;
        let waited = start.elapsed();
        match gate {
            Gate::Pacer(_) => {
                self.window.pacer += waited;
                self.window.blocked += waited;
                self.counters().pacer_wait_us.add(waited.as_micros() as u64);
            }
            Gate::Socket => {
                self.window.blocked += waited;
                self.counters()
                    .socket_wait_us
                    .add(waited.as_micros() as u64);
            }
            Gate::NoFrame => self.window.idle += waited,
        }
        Ok(())
    }

    fn take_completions(&mut self) -> Result<(), LaneError> {
        let (inbox, counters) = (&mut self.inbox, &*self.lane.counters);
        self.ring
            .reap(|completion| inbox.take(completion, counters))?;
        if self.zero_copy && self.inbox.copied_in_a_row >= MAX_COPIED {
            self.zero_copy = false;
            self.counters().fell_back.set(1);
            tracing::info!(
                peer = %self.lane.shared.config.peer,
                lane = self.lane.index,
                "the kernel copies zero-copy sends on this path: going on with plain sends"
            );
        }
        Ok(())
    }

    fn handle_frames(&mut self) -> Result<(), LaneError> {
        let mut placed: Vec<(BatchHead, bool)> = Vec::new();
        let outcome = std::mem::take(&mut self.inbox.frames)
            .into_iter()
            .try_for_each(|frame| self.handle_frame(frame, &mut placed));
        // What was acknowledged before something went wrong stays so: it is
        // among the unacknowledged, and so among the lost, no longer.
        self.lane.placed(&placed)?;
        outcome?;
        if self.inbox.eof {
            Err(LaneError::Closed)
        } else {
            Ok(())
        }
    }

    /// Adds to `placed` what the frame acknowledges, and whether it had gone
    /// compressed.
    fn handle_frame(
        &mut self,
        frame: ReverseFrame,
        placed: &mut Vec<(BatchHead, bool)>,
    ) -> Result<(), LaneError> {
        match frame {
            ReverseFrame::Ack(ids) => {
                for id in ids {
                    if self.not_sent(id) {
                        return Err(LaneError::UnknownAck(id));
                    }
                    let lost = self.unacked.remove(&id).ok_or(LaneError::UnknownAck(id))?;
                    placed.push((lost.head, self.compressed.remove(&id)));
                }
                Ok(())
            }
            ReverseFrame::Need { gang, vm, gfns } => {
                self.lane.event(LaneEvent::Need { gang, vm, gfns })
            }
            ReverseFrame::Error(text) => Err(LaneError::Refused(text)),
            ReverseFrame::Ping => Ok(()),
        }
    }

    /// Whether some of the batch has not left yet: then it cannot be placed.
    fn not_sent(&self, id: BatchId) -> bool {
        let ahead = match &self.ahead {
            Ahead::Nothing => None,
            Ahead::Encoding(job) => Some(job.batch()),
            Ahead::Ready(frame) => Some(frame.head.batch),
        };
        let current = self.current.as_ref();
        ahead == Some(id) || current.is_some_and(|f| f.batch == id && !f.submitted())
    }

    /// Everything that is looked at now and then.
    fn tick(&mut self, now: Instant) -> Result<(), LaneError> {
        let elapsed = now.duration_since(self.last_tick);
        self.last_tick = now;
        let patience = self.lane.shared.config.patience;
        if now.duration_since(self.inbox.last_heard) > patience {
            return Err(LaneError::Silent(patience));
        }
        let max_rate = self.lane.shared.pacing.max_rate();
        if max_rate != self.max_rate {
            self.max_rate = max_rate;
            tcp::set_max_pacing_rate(self.ring.stream(), max_rate).map_err(LaneError::Socket)?;
        }
        let mut window = std::mem::take(&mut self.window);
        window.elapsed = elapsed;
        let cpu = thread_cpu_time();
        window.on_cpu = cpu.saturating_sub(self.cpu_before);
        self.cpu_before = cpu;
        if self.lane.shared.config.encode.compress == Compress::Auto {
            self.encoder
                .set_level(self.adapter.observe(window, max_rate));
        }
        let link_bound = self.saturation.observe(&window, max_rate);
        self.lane.shared.state().queues[self.lane.index].link_bound = link_bound;
        self.tell_counters();
        if let Ok(reading) = tcp::reading(self.ring.stream()) {
            *self
                .counters()
                .tcp
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = reading;
        }
        Ok(())
    }

    /// Publishes what is counted elsewhere.
    pub(super) fn tell_counters(&mut self) {
        let enters = self.ring.enters();
        self.counters().ring_enters.add(enters - self.enters_before);
        self.enters_before = enters;
        self.counters().level.set(self.encoder.level() as u64);
        self.counters()
            .context_bytes
            .set(self.encoder.context_bytes() as u64);
    }

    /// Starts the next chunk if nothing is in its way.
    fn send_on(&mut self, now: Instant) -> Result<Gate, LaneError> {
        if self.sending.is_some() {
            return Ok(Gate::Socket);
        }
        if self.current.is_none() {
            self.current = self.next_frame();
        }
        // Between frames, also if the pacer holds the next one back.
        let between = self
            .current
            .as_ref()
            .is_none_or(|frame| frame.begun.is_none());
        if between && now.duration_since(self.last_sent) >= PING_AFTER {
            let ping = Prologue::control(Kind::Ping, 0).encode().to_vec();
            let ping = self.outflow.small(ping)?;
            self.sending = Some(Sending::Ping(ping.len()));
            self.send_small(ping)?;
            return Ok(Gate::Socket);
        }
        let stop_copy_waits = self.stop_copy_waits();
        let max_chunk = self.chunk_len().min(self.outflow.room());
        let Some(frame) = &mut self.current else {
            return Ok(Gate::NoFrame);
        };
        // The rest of a chunk that was only partly taken is paid for.
        if frame.chunk().is_none() {
            let len = frame.left().min(max_chunk);
            if len == 0 {
                // The network card still has every buffer.
                return Ok(Gate::Socket);
            }
            // A pre-copy frame that stop-and-copy waits behind is urgent, too.
            let class = if stop_copy_waits {
                Class::StopCopy
            } else {
                frame.class
            };
            let wire = self.outflow.wire_len(len);
            let pacing = &self.lane.shared.pacing;
            if let Err(wait) = pacing.try_acquire(wire, class) {
                if frame
                    .begun
                    .is_none_or(|last| now.duration_since(last) < OVERDRAW_AFTER)
                {
                    return Ok(Gate::Pacer(wait));
                }
                pacing.overdraw(wire, class);
                self.lane.counters.overdrafts.add(1);
            }
            let start = Instant::now();
            frame.cut(len, &mut self.outflow)?;
            if let Outflow::Sealed { .. } = self.outflow {
                let spent = start.elapsed().as_micros() as u64;
                self.lane.counters.seal_us.add(spent);
            }
        }
        let Some((mem, from, to)) = frame.chunk() else {
            return Ok(Gate::Socket);
        };
        let zero_copy = self.zero_copy && to - from >= MIN_ZERO_COPY;
        let zero_copied = self
            .ring
            .send(mem, from, to, zero_copy)
            .map_err(LaneError::Send)?;
        if !zero_copied {
            self.lane.counters.sends_plain.add(1);
        }
        self.sending = Some(Sending::Chunk);
        Ok(Gate::Socket)
    }

    fn chunk_len(&self) -> usize {
        let max = self.lane.shared.config.max_chunk;
        match self.max_rate {
            Some(rate) => ((rate as f64 * CHUNK_TIME) as usize).clamp(MIN_CHUNK.min(max), max),
            None => usize::MAX,
        }
    }

    fn send_small(&mut self, bytes: Vec<u8>) -> Result<(), LaneError> {
        let len = bytes.len();
        let mem = Arc::new(SendMem::Small(bytes));
        self.ring
            .send(&mem, 0, len, false)
            .map(drop)
            .map_err(LaneError::Send)
    }

    /// A send has taken `bytes`.
    fn sent(&mut self, bytes: usize, now: Instant) -> Result<(), LaneError> {
        let sending = self.sending.take();
        self.last_sent = now;
        self.lane.counters.wire_bytes.add(bytes as u64);
        self.window.wire_bytes += bytes as u64;
        match sending {
            Some(Sending::Ping(len)) if bytes < len => return Err(LaneError::Closed),
            Some(Sending::Ping(_)) | None => return Ok(()),
            Some(Sending::Chunk) => {}
        }
        if bytes == 0 {
            return Err(LaneError::Closed);
        }
        if let Some(frame) = &mut self.current
            && frame.taken(bytes, now)
        {
            self.current = None;
        }
        Ok(())
    }

    /// Ends the connection in order: the target has placed everything.
    fn goodbye(&mut self, limit: Instant) -> Result<(), LaneError> {
        let bye = Prologue::control(Kind::Bye, 0).encode().to_vec();
        let bye = self.outflow.last(bye)?;
        self.send_small(bye)?;
        // The target closes its side when it has read it.
        let end = limit.max(Instant::now() + Duration::from_millis(200));
        while !self.inbox.eof && Instant::now() < end {
            self.ring
                .wait(Duration::from_millis(10))
                .map_err(LaneError::Wait)?;
            match self.take_completions() {
                // It may close so fast that a reset overtakes its end.
                Err(LaneError::Receive(_)) => break,
                other => other?,
            }
        }
        Ok(())
    }
}

/// CPU time this thread has used.
fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    time.expect("Linux has had this clock since 2.6.12").into()
}
