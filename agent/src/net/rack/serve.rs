//! The answering side of a rack connection.

use super::park::Parking;
use super::wire::{self, MAX_FRAME, MAX_PAGES, Message, PageStatus};
use super::{ClaimServer, Fetched, PageServer, RackLimits, ReportSink, Served, Wanted};
use crate::net::frame::{FrameReader, FrameWriter};
use crate::net::{Offences, Stream};
use crate::types::{GangId, PAGE_SIZE, Page};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// A peer that takes nothing for this long is given up.
const STALL: Duration = Duration::from_secs(10);

/// What this host offers to its rack.
#[derive(Clone)]
pub(super) struct Offer {
    pub(super) claims: Arc<dyn ClaimServer>,
    pub(super) pages: Arc<dyn PageServer>,
    pub(super) reports: Arc<ReportSink>,
    pub(super) limits: RackLimits,
    pub(super) offences: Arc<Offences>,
}

/// Serves one connection until it ends; returns why it ended.
pub(super) async fn run(
    stream: Stream,
    peer: String,
    offer: Offer,
    mut wakes: watch::Receiver<u64>,
) -> String {
    let (read, write) = tokio::io::split(stream);
    let mut reader = FrameReader::new(read, MAX_FRAME);
    let mut session = Session {
        peer,
        writer: FrameWriter::new(write, MAX_FRAME),
        parking: Parking::new(),
        page: Box::new([0; PAGE_SIZE]),
        offer,
    };
    let mut progress = Instant::now();
    loop {
        let mut empty = false;
        while session.has_room() && !empty {
            empty = match reader.next_frame() {
                Ok(None) => true,
                Ok(Some(frame)) => match session.receive(frame) {
                    Ok(()) => false,
                    Err(why) => return session.offence(why),
                },
                Err(error) => return session.offence(error.to_string()),
            };
        }
        let next_poll = session.parking.next_poll().filter(|_| session.has_room());
        let poll_at = next_poll.unwrap_or_else(Instant::now);
        let writing = session.writer.pending() > 0;
        if !writing {
            progress = Instant::now();
        }
        tokio::select! {
            biased;
            filled = reader.fill(), if empty => {
                if let Err(error) = filled {
                    return error.to_string();
                }
            }
            drained = session.writer.drain(), if writing => {
                if let Err(error) = drained {
                    return error.to_string();
                }
                progress = Instant::now();
            }
            () = tokio::time::sleep_until(poll_at.into()), if next_poll.is_some() => session.poll(),
            Ok(()) = wakes.changed() => session.parking.woken(),
            () = tokio::time::sleep_until((progress + STALL).into()), if writing => {
                return format!("it took nothing for {STALL:?}");
            }
        }
    }
}

struct Session {
    peer: String,
    writer: FrameWriter<tokio::io::WriteHalf<Stream>>,
    /// Where the answer goes: ticket and index.
    parking: Parking<(u64, u32)>,
    page: Box<Page>,
    offer: Offer,
}

impl Session {
    fn has_room(&self) -> bool {
        self.writer.pending() < self.offer.limits.write_ahead
    }

    fn receive(&mut self, frame: &[u8]) -> Result<(), String> {
        match wire::decode(frame).map_err(|e| e.to_string())? {
            Message::Claim { ticket, gang, op } => {
                let reply = self.offer.claims.handle(gang, &self.peer, op);
                let reply = reply.map_err(|e| e.to_string())?;
                self.send(&Message::ClaimReply { ticket, reply })
            }
            Message::Fetch {
                ticket,
                gang,
                limit_ms,
                wanted,
            } => {
                let admitted = self.offer.pages.admit(gang, &self.peer);
                admitted.map_err(|e| e.to_string())?;
                let limit = Duration::from_millis(limit_ms.into());
                let limit = limit.min(self.offer.limits.longest_fetch);
                self.fetch(ticket, gang, Instant::now() + limit, &wanted)
            }
            Message::Report(report) => {
                (self.offer.reports)(&self.peer, report);
                Ok(())
            }
            Message::ClaimReply { .. } | Message::Pages { .. } => {
                Err("it answered what was not asked".to_owned())
            }
        }
    }

    /// Names who did what no honest agent does. Asking for what is not theirs
    /// is among it: parts in a gang are fixed when it is opened.
    fn offence(&self, why: String) -> String {
        self.offer.offences.note(&self.peer, &why);
        why
    }

    fn fetch(
        &mut self,
        ticket: u64,
        gang: GangId,
        deadline: Instant,
        wanted: &[Wanted],
    ) -> Result<(), String> {
        let mut batch = Batch::new(ticket);
        for (index, page) in wanted.iter().enumerate() {
            let index = index as u32;
            let status = match self.offer.pages.serve(gang, page, &mut self.page) {
                Served::Page => PageStatus::Page(&self.page),
                Served::Gone => PageStatus::Gone,
                Served::NotYet if self.parking.len() < self.offer.limits.parked => {
                    self.parking.park(gang, *page, deadline, (ticket, index));
                    continue;
                }
                Served::NotYet => PageStatus::NotInTime,
            };
            batch.add(index, status);
            if batch.is_full() {
                batch.send(&mut self.writer)?;
            }
        }
        batch.send(&mut self.writer)
    }

    fn poll(&mut self) {
        let Session {
            parking,
            writer,
            offer,
            ..
        } = self;
        let mut batch = Batch::new(0);
        parking.poll(&*offer.pages, |(ticket, index), fetched| {
            let status = match fetched {
                Fetched::Page(page) => PageStatus::Page(page),
                Fetched::Gone => PageStatus::Gone,
                Fetched::NotInTime => PageStatus::NotInTime,
            };
            // A batch is never over the frame's limit, so sending cannot fail.
            if batch.ticket != *ticket || batch.is_full() {
                let _ = batch.send(writer);
                batch.ticket = *ticket;
            }
            batch.add(*index, status);
            writer.pending() < offer.limits.write_ahead
        });
        let _ = batch.send(writer);
    }

    fn send(&mut self, message: &Message<'_>) -> Result<(), String> {
        let pushed = self.writer.push(|out| message.encode(out));
        pushed.map_err(|e| e.to_string())
    }
}

/// A `pages` message being put together, encoded as it grows.
struct Batch {
    ticket: u64,
    count: u32,
    entries: Vec<u8>,
}

impl Batch {
    fn new(ticket: u64) -> Self {
        Batch {
            ticket,
            count: 0,
            entries: Vec::new(),
        }
    }

    fn add(&mut self, index: u32, status: PageStatus<'_>) {
        self.count += 1;
        wire::encode_page(index, status, &mut self.entries);
    }

    fn is_full(&self) -> bool {
        self.entries.len() >= MAX_PAGES * (5 + PAGE_SIZE) - (4 + PAGE_SIZE)
    }

    /// Sends what was added, if anything, and starts again.
    fn send(
        &mut self,
        writer: &mut FrameWriter<tokio::io::WriteHalf<Stream>>,
    ) -> Result<(), String> {
        if self.count == 0 {
            return Ok(());
        }
        let pushed = writer.push(|out| {
            wire::encode_pages_head(self.ticket, self.count, out);
            out.extend_from_slice(&self.entries);
        });
        self.count = 0;
        self.entries.clear();
        pushed.map_err(|e| e.to_string())
    }
}
