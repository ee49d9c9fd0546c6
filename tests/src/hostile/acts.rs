//! Single acts: frames no honest agent sends, and floods.

use super::identity::{Identity, call};
use anyhow::{Context, Result, bail, ensure};
use drover::gang::message::GangRequest;
use drover::lane::assemble::Assembler;
use drover::lane::frame::{
    BatchPrefix, Direction, Kind as FrameKind, MAGIC, Prologue, ReverseFrame, VERSION,
};
use drover::lane::{BatchHead, BatchId, Encoding, Entries, FrameError, Reference};
use drover::net::rack::wire::Message;
use drover::net::rack::{MAX_FETCH, Wanted};
use drover::net::rpc::Envelope;
use drover::net::{Kind, Stream};
use drover::types::{Class, Fingerprint, GangId, Gfn, PAGE_SIZE, Round, VmIndex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How long an agent may take to hang up on a liar.
const HANG_UP: Duration = Duration::from_secs(10);
/// Requests of a flood, over [`CONNECTIONS`] connections.
pub const FLOOD: u64 = 1_000_000;
const CONNECTIONS: u64 = 6;
const FLOOD_LIMIT: Duration = Duration::from_secs(60);
/// Signs of life of a lane that has nothing to send.
const BEAT: Duration = Duration::from_millis(300);

/// Whom it is done to, and as part of what.
pub struct Target<'a> {
    /// Who does it.
    pub identity: &'a Identity,
    /// The agent.
    pub name: &'a str,
    /// The gang.
    pub gang: GangId,
    /// The liar's own VM.
    pub vm: VmIndex,
}

/// A lane that says what it likes.
pub struct RawLane {
    stream: Stream,
    assembler: Assembler,
}

impl RawLane {
    /// Sends bytes.
    ///
    /// # Errors
    /// When the other side has hung up.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await?;
        Ok(self.stream.flush().await?)
    }

    /// What comes back next; empty: nothing any more.
    async fn frames(&mut self) -> Result<Vec<ReverseFrame>> {
        let mut bytes = vec![0; 64 << 10];
        // An error: hung up on while it still sent.
        let n = self.stream.read(&mut bytes).await.unwrap_or_default();
        let mut frames = Vec::new();
        self.assembler
            .push::<FrameError>(&bytes[..n], |prologue, body| {
                frames.push(ReverseFrame::parse(prologue, body)?);
                Ok(())
            })?;
        if n > 0 && frames.is_empty() {
            frames.push(ReverseFrame::Ping);
        }
        Ok(frames)
    }

    /// Waits until so many pages were asked for.
    ///
    /// # Errors
    /// When they are not within `limit`.
    pub async fn needs(&mut self, count: usize, limit: Duration) -> Result<usize> {
        let mut needed = std::collections::BTreeSet::new();
        let all = async {
            let mut beat = tokio::time::interval(BEAT);
            while needed.len() < count {
                let frames = tokio::select! {
                    frames = self.frames() => frames?,
                    _ = beat.tick() => {
                        let ping = Prologue::control(FrameKind::Ping, 0);
                        self.send(&ping.encode()).await?;
                        continue;
                    }
                };
                ensure!(!frames.is_empty(), "hung up on");
                for frame in frames {
                    if let ReverseFrame::Need { gfns, .. } = frame {
                        needed.extend(gfns);
                    }
                }
            }
            Ok(())
        };
        match tokio::time::timeout(limit, all).await {
            Ok(done) => done?,
            Err(_) => bail!("only {} of {count} pages were asked for", needed.len()),
        }
        Ok(needed.len())
    }

    /// Waits for an acknowledgement.
    ///
    /// # Errors
    /// When none comes.
    pub async fn acknowledged(&mut self) -> Result<()> {
        let acked = async {
            loop {
                let frames = self.frames().await?;
                ensure!(!frames.is_empty(), "hung up on instead of acknowledged");
                if frames.iter().any(|f| matches!(f, ReverseFrame::Ack(_))) {
                    return Ok(());
                }
            }
        };
        tokio::time::timeout(HANG_UP, acked)
            .await
            .context("no acknowledgement")?
    }

    /// Waits to be hung up on; the other side's last words.
    async fn refusal(mut self) -> Result<String> {
        let ended = async {
            let mut words = String::new();
            loop {
                let frames = self.frames().await?;
                if frames.is_empty() {
                    return Ok(words);
                }
                for frame in frames {
                    if let ReverseFrame::Error(text) = frame {
                        words = text;
                    }
                }
            }
        };
        tokio::time::timeout(HANG_UP, ended)
            .await
            .context("the lane was not refused")?
    }
}

impl Target<'_> {
    /// A lane for the liar's VM.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn lane(&self) -> Result<RawLane> {
        let stream = self.identity.call(self.name, Kind::Lane, self.gang).await?;
        Ok(RawLane {
            stream,
            assembler: Assembler::new(Direction::Reverse),
        })
    }

    /// Sends `frame` on a lane, and demands to be hung up on.
    ///
    /// # Errors
    /// When it is not.
    pub async fn lane_refused(&self, frame: &[u8]) -> Result<String> {
        let mut lane = self.lane().await?;
        lane.send(frame).await?;
        lane.refusal().await
    }

    /// Sends `bytes` on a control connection, and demands to be hung up on.
    ///
    /// # Errors
    /// When it is not.
    pub async fn control_refused(&self, bytes: &[u8]) -> Result<String> {
        hung_up_on(self.identity, self.name, Kind::Control, bytes).await
    }

    /// Opens a million requests that would each wait for ever.
    ///
    /// # Errors
    /// When an answer does not come.
    pub async fn flood(&self) -> Result<String> {
        let seal = GangRequest::Seal {
            gang: self.gang,
            vm: self.vm,
            digest: [0; 16],
            full: true,
            wait_ms: u64::MAX,
        };
        let body = postcard::to_stdvec(&seal)?;
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..CONNECTIONS {
            let (roster, to) = (self.identity.roster.clone(), self.name.to_owned());
            let body = body.clone();
            tasks.spawn_local(async move {
                let stream = call(&roster, &to, Kind::Control, GangId(0)).await?;
                flood_one(stream, &body).await
            });
        }
        let mut refused = 0;
        while let Some(flooded) = tasks.join_next().await {
            refused += flooded??;
        }
        Ok(format!("{refused} of {FLOOD} refused at once"))
    }
}

/// Sends its share of the flood while it reads answers; how many were faults.
async fn flood_one(stream: Stream, body: &[u8]) -> Result<u64> {
    let (mut read, mut write) = tokio::io::split(stream);
    let share = FLOOD.div_ceil(CONNECTIONS);
    let sending = async {
        let mut bytes = Vec::new();
        for id in 0..share {
            frame(&mut bytes, |out| Envelope::Request { id, body }.encode(out));
            if bytes.len() > 64 << 10 || id + 1 == share {
                write.write_all(&bytes).await?;
                bytes.clear();
            }
        }
        // It stays open and gives signs of life while answers are read.
        loop {
            let mut ping = Vec::new();
            frame(&mut ping, |out| Envelope::Ping.encode(out));
            write.write_all(&ping).await?;
            write.flush().await?;
            tokio::time::sleep(BEAT).await;
        }
    };
    let reading = async {
        let (mut bytes, mut faults, mut at) = (Vec::new(), 0, 0);
        // All but those that are under way are answered.
        while faults + 256 < share {
            bytes.drain(..std::mem::take(&mut at));
            ensure!(read.read_buf(&mut bytes).await? > 0, "hung up on");
            while let Some(len) = bytes[at..].first_chunk() {
                let end = at + 4 + u32::from_le_bytes(*len) as usize;
                let Some(payload) = bytes.get(at + 4..end) else {
                    break;
                };
                faults += u64::from(matches!(Envelope::decode(payload)?, Envelope::Fault { .. }));
                at = end;
            }
        }
        Ok::<u64, anyhow::Error>(faults)
    };
    first_of(sending, reading)
        .await
        .context("the flood of requests")
}

/// Floods: sends and reads side by side until one of them has its result.
///
/// # Errors
/// Its error, or that neither has one in time.
async fn first_of<T>(
    sending: impl Future<Output = Result<T>>,
    reading: impl Future<Output = Result<T>>,
) -> Result<T> {
    let first = async {
        tokio::select! {
            sent = sending => sent,
            read = reading => read,
        }
    };
    tokio::time::timeout(FLOOD_LIMIT, first)
        .await
        .context("was not taken and answered in time")?
}

/// Sends `bytes` on a connection of this kind, and demands to be hung up on.
///
/// # Errors
/// When it is not.
pub async fn hung_up_on(who: &Identity, to: &str, kind: Kind, bytes: &[u8]) -> Result<String> {
    let mut stream = who.call(to, kind, GangId(0)).await?;
    stream.write_all(bytes).await?;
    stream.flush().await?;
    let mut said = Vec::new();
    let end = tokio::time::timeout(HANG_UP, stream.read_to_end(&mut said));
    // However it ends.
    let _broken = end.await.context("nobody hung up")?;
    Ok("hung up on".into())
}

/// Asks for a million pages that have not arrived, while it takes the answers;
/// how many there were.
///
/// # Errors
/// When they do not come.
pub async fn fetch_flood(
    who: &Identity,
    to: &str,
    gang: GangId,
    fps: &[Fingerprint],
) -> Result<u64> {
    let stream = who.call(to, Kind::Rack, GangId(0)).await?;
    let (mut read, mut write) = tokio::io::split(stream);
    let wanted: Vec<Wanted> = fps
        .iter()
        .take(MAX_FETCH)
        .map(|&fp| Wanted { fp, domain: 0 })
        .collect();
    let requests = FLOOD / wanted.len() as u64;
    let sending = async {
        for ticket in 0..requests {
            let message = Message::Fetch {
                ticket,
                gang,
                limit_ms: u32::MAX,
                wanted: wanted.clone(),
            };
            let mut bytes = Vec::new();
            frame(&mut bytes, |out| message.encode(out));
            write.write_all(&bytes).await?;
        }
        write.flush().await?;
        Ok::<(), anyhow::Error>(())
    };
    let mut answered = 0;
    let reading = async {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let n = read.read(&mut bytes).await?;
            ensure!(n > 0, "hung up on");
            answered += n as u64;
        }
    };
    first_of(sending, reading)
        .await
        .context("the flood of fetches")?;
    Ok(answered)
}

/// A payload with its length before it.
pub fn frame(out: &mut Vec<u8>, fill: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    fill(out);
    let len = (out.len() - at - 4) as u32;
    out[at..at + 4].copy_from_slice(&len.to_le_bytes());
}

fn head(gang: GangId, vm: VmIndex, batch: u64) -> BatchHead {
    BatchHead {
        gang,
        vm,
        batch: BatchId(batch),
        round: Round(1),
        class: Class::Precopy,
    }
}

fn batch_frame(head: BatchHead, pages: usize, list: &[u8], content: &[u8]) -> Vec<u8> {
    let prefix = BatchPrefix {
        head,
        pages,
        list_len: list.len(),
    };
    let start = prefix.encode(Encoding::Raw, list.len() + content.len());
    [&start, list, content].concat()
}

fn encoded(mut entries: Entries) -> Vec<u8> {
    entries.normalize();
    let mut list = vec![0; drover::lane::entries::MAX_LIST_LEN];
    let len = entries.encode(&mut list).expect("within the caps");
    list.truncate(len);
    list
}

/// A batch with the content of one page.
pub fn page_frame(gang: GangId, vm: VmIndex, gfn: Gfn) -> Vec<u8> {
    let list = encoded(Entries {
        pages: vec![gfn],
        ..Entries::default()
    });
    batch_frame(head(gang, vm, 1), 1, &list, &[0x66; PAGE_SIZE])
}

/// A batch of references.
pub fn refs_frame(gang: GangId, vm: VmIndex, batch: u64, refs: Vec<Reference>) -> Vec<u8> {
    let list = encoded(Entries {
        refs,
        ..Entries::default()
    });
    batch_frame(head(gang, vm, batch), 0, &list, &[])
}

/// 2^64 - 1, as lists and messages write it.
const HUGE: [u8; 10] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];

/// Frames of a lane whose lengths and counts are as large as can be written.
pub fn huge_lane_frames(gang: GangId, vm: VmIndex) -> Vec<(&'static str, Vec<u8>)> {
    let list = |parts: &[&[u8]]| batch_frame(head(gang, vm, 1), 0, &parts.concat(), &[]);
    let body = [&MAGIC[..], &[VERSION, 1, 0, 0], &[0xff; 4]].concat();
    vec![
        ("a lane frame of 2^32 - 1 bytes", body),
        ("2^64 - 1 zero runs", list(&[&HUGE, &[0, 0]])),
        (
            "a run of 2^64 zero pages from 2^63 on",
            list(&[&[1], &HUGE, &HUGE, &[0, 0]]),
        ),
        (
            "2^64 references to one holder",
            list(&[&[0, 0, 1, 0], &HUGE]),
        ),
    ]
}

/// The same for control connections.
pub fn huge_control_messages(gang: GangId, vm: VmIndex) -> Vec<(&'static str, Vec<u8>)> {
    // A request for the VM whose name has 2^64 - 1 bytes; see `GangRequest`.
    let mut name = Vec::new();
    let body = [&[0], &HUGE[..]].concat();
    frame(&mut name, |out| {
        Envelope::Request { id: 1, body: &body }.encode(out);
    });
    // A message that is right, with more behind it.
    let mut longer = Vec::new();
    let request = GangRequest::StartSource { gang, vm };
    let mut body = postcard::to_stdvec(&request).expect("a request encodes");
    body.extend_from_slice(&HUGE);
    frame(&mut longer, |out| {
        Envelope::Request { id: 1, body: &body }.encode(out);
    });
    vec![
        ("a control frame of 2^32 - 1 bytes", vec![0xff; 64]),
        ("a name of 2^64 - 1 bytes", name),
        ("a message with bytes behind its end", longer),
    ]
}

/// The same for rack connections.
pub fn huge_rack_messages(gang: GangId) -> Vec<(&'static str, Vec<u8>)> {
    let mut counted = Vec::new();
    frame(&mut counted, |out| {
        out.push(1);
        out.extend_from_slice(&7u64.to_le_bytes());
        out.extend_from_slice(&gang.0.to_le_bytes());
        out.extend_from_slice(&[0, 0, 0]);
        out.extend_from_slice(&[0xff; 4]);
    });
    vec![
        ("a rack frame of 2^32 - 1 bytes", vec![0xff; 64]),
        ("2^32 - 1 claims in one message", counted),
    ]
}
