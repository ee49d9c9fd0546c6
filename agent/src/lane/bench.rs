//! `drover bench lane`: what a lane carries over loopback, encrypted and not,
//! beside a plain write/read loop over TCP in the same run.

use super::*;
use crate::bench::BenchRow;
use crate::types::{Class, GangId, Gfn, PAGE_SIZE, Round, VmIndex};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(30);
const PAGES: usize = pool::PAGES_PER_BUF;
/// Bytes one raw run carries.
const RAW_BYTES: usize = 1 << 30;
/// Bytes the compressed run carries at most.
const ZSTD_BYTES: usize = 96 << 20;
const RUNS: usize = 5;

/// Takes everything and keeps nothing.
struct Discard;

impl BatchSink for Discard {
    fn ram_pages(&self, _: GangId, _: VmIndex) -> Option<u32> {
        Some(u32::MAX)
    }
    fn batch(&self, _: &DecodedBatch<'_>) -> Result<Placement, SinkError> {
        Ok(Placement::Placed)
    }
}

/// What one run over a lane showed.
struct Run {
    seconds: f64,
    /// CPU time of the whole process meanwhile, in seconds.
    cpu: f64,
    sender: LaneStats,
    receiver: ReceiverStats,
}

/// Measures lanes and returns one row a figure. Takes a few seconds, needs no
/// privileges beyond io_uring and 20 MiB of lockable memory.
pub fn bench_lane() -> io::Result<Vec<BenchRow>> {
    let blank = vec![0x5a; PAGES * PAGE_SIZE];
    let raw_batches = RAW_BYTES / blank.len();
    let mut rows = Vec::new();

    // Alternately, so that a busy moment of the machine meets both.
    let mut lanes = Vec::new();
    let mut sealed = Vec::new();
    let mut plains = Vec::new();
    for _ in 0..RUNS {
        let batches = || (0..raw_batches).map(|_| &blank[..]);
        lanes.push(over_lane(Compress::Never, false, true, batches())?);
        sealed.push(over_lane(Compress::Never, true, true, batches())?);
        plains.push(over_std(raw_batches)?);
    }
    lanes.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    sealed.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    plains.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let (lane, plain) = (&lanes[RUNS / 2], &plains[RUNS / 2]);
    let tls = &sealed[RUNS / 2];
    let gb = RAW_BYTES as f64 / 1e9;
    rows.push(
        BenchRow::new("lane.raw", gb / lane.seconds, "GB/s")
            .against("std_tcp_loop", gb / plain.seconds),
    );
    let enters = lane.sender.ring_enters + lane.receiver.ring_enters;
    rows.push(
        BenchRow::new("lane.raw.syscalls", enters as f64 / gb, "calls/GB")
            .against("std_tcp_loop", plain.calls as f64 / gb),
    );
    rows.push(
        BenchRow::new("lane.raw.cpu", lane.cpu / gb, "core seconds/GB")
            .against("std_tcp_loop", plain.cpu / gb),
    );
    let zero_copied = lane.sender.sends_zero_copied as f64;
    rows.push(
        BenchRow::new("lane.raw.zero_copied", zero_copied, "sends")
            .against("copied", lane.sender.sends_copied as f64)
            .against("plain", lane.sender.sends_plain as f64),
    );

    rows.push(
        BenchRow::new("lane.tls", gb / tls.seconds, "GB/s")
            .against("plain", gb / lane.seconds)
            .against("tls/plain", lane.seconds / tls.seconds),
    );
    rows.push(
        BenchRow::new("lane.tls.cpu", tls.cpu / gb, "core seconds/GB")
            .against("plain", lane.cpu / gb)
            .against("encrypting", tls.sender.seal_us as f64 / 1e6 / gb)
            .against("decrypting", tls.receiver.open_us as f64 / 1e6 / gb),
    );
    let wire = |run: &Run| run.sender.wire_bytes as f64 / 1e9 / gb;
    rows.push(
        BenchRow::new("lane.tls.wire", wire(tls), "bytes/byte of pages")
            .against("plain", wire(lane)),
    );

    let content = own_pages()?;
    let batches = || content.chunks(PAGES * PAGE_SIZE);
    let zstd = over_lane(Compress::Always, false, false, batches())?;
    let raw = over_lane(Compress::Never, false, false, batches())?;
    let zstd_tls = over_lane(Compress::Always, true, false, batches())?;
    let mb = content.len() as f64 / 1e6;
    rows.push(
        BenchRow::new("lane.zstd", mb / zstd.seconds, "MB/s of pages")
            .against("raw", mb / raw.seconds)
            .against("tls", mb / zstd_tls.seconds)
            .against("encode_core_seconds", zstd.sender.encode_us as f64 / 1e6)
            .against("decode_core_seconds", zstd.receiver.decode_us as f64 / 1e6),
    );
    rows.push(
        BenchRow::new("lane.zstd.ratio", ratio(&zstd), "wire/plain")
            .against("raw", ratio(&raw))
            .against("zstd1_batches_of_64", alone(&content)),
    );
    Ok(rows)
}

fn ratio(run: &Run) -> f64 {
    run.sender.wire_bytes as f64 / run.sender.plain_bytes as f64
}

/// Sends batches of page contents over one lane and awaits the last
/// acknowledgement. `sealed`: encrypted; `same`: all batches have the same
/// content.
fn over_lane<'a>(
    compress: Compress,
    sealed: bool,
    same: bool,
    batches: impl Iterator<Item = &'a [u8]>,
) -> io::Result<Run> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let staging = BufferPool::new(8)?;
    let mut config = LaneSetConfig::new("loopback");
    config.lanes = 1;
    config.encode.compress = compress;
    config.patience = LIMIT;
    let (mine, theirs) = match sealed.then(LaneKeys::pair).transpose()? {
        Some((mine, theirs)) => (Some(mine), Some(theirs)),
        None => (None, None),
    };
    // There is one connection; if it broke, the figures would be of no use.
    let first = Mutex::new(Some(mine));
    let connect: Connector = Arc::new(move || {
        let keys = first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let keys = keys.ok_or_else(|| io::Error::other("the lane of a benchmark broke"))?;
        let tcp = TcpStream::connect(address)?;
        Ok(LaneStream { tcp, keys })
    });
    let set =
        LaneSet::start(config, &staging, Arc::new(Unpaced), connect).map_err(io::Error::other)?;
    let receiver = LaneReceiver::start(
        LaneStream {
            tcp: listener.accept()?.0,
            keys: theirs,
        },
        ReceiveConfig::new("loopback"),
        Arc::new(Discard),
    )
    .map_err(io::Error::other)?;
    let (start, cpu) = (Instant::now(), cpu_time()?);
    let mut sent = 0u64;
    let mut placed = 0;
    let take = |wait: Duration, placed: &mut u64| match set.events().recv_timeout(wait) {
        Ok(LaneEvent::Placed { batches, .. }) => {
            *placed += batches.len() as u64;
            Ok(true)
        }
        Ok(LaneEvent::LaneUp { .. }) => Ok(true),
        Ok(other) => Err(io::Error::other(format!("the lane broke: {other:?}"))),
        Err(_) => Ok(false),
    };
    let mut filled = std::collections::HashSet::new();
    for content in batches {
        let mut buf = staging.take(LIMIT).map_err(io::Error::other)?;
        // Each buffer is filled once and then sent again and again: what is
        // measured is the lane, not the copying of the caller.
        let known = buf.bytes().as_ptr();
        if !same || filled.insert(known) {
            buf.pages_mut()[..content.len()].copy_from_slice(content);
        }
        let pages = (content.len() / PAGE_SIZE) as u32;
        let first = sent as u32 * PAGES as u32;
        let batch = StagedBatch {
            gang: GangId(1),
            vm: VmIndex(0),
            batch: BatchId(sent),
            round: Round(1),
            class: Class::Precopy,
            domain: 0,
            entries: Entries {
                pages: (first..first + pages).map(Gfn).collect(),
                ..Entries::default()
            },
            content: Some(buf),
        };
        set.submit(batch, LIMIT).map_err(io::Error::other)?;
        sent += 1;
        while take(Duration::ZERO, &mut placed)? {}
    }
    while placed < sent {
        if !take(LIMIT, &mut placed)? {
            return Err(io::Error::other("the lane stalled"));
        }
    }
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_time()? - cpu);
    set.close(LIMIT);
    receiver.wait(LIMIT);
    Ok(Run {
        seconds,
        cpu,
        sender: set.stats()[0],
        receiver: receiver.stats(),
    })
}

/// What a run of plain reads and writes showed.
struct PlainRun {
    seconds: f64,
    cpu: f64,
    calls: u64,
}

/// User and system time of this process so far, in seconds.
fn cpu_time() -> io::Result<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// The same bytes by `write` and `read`, in pieces as large as a lane's.
fn over_std(batches: usize) -> io::Result<PlainRun> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut sender = TcpStream::connect(listener.local_addr()?)?;
    let (mut receiver, _) = listener.accept()?;
    sender.set_nodelay(true)?;
    receiver.set_read_timeout(Some(LIMIT))?;
    sender.set_write_timeout(Some(LIMIT))?;
    let (start, cpu) = (Instant::now(), cpu_time()?);
    let writer = std::thread::spawn(move || -> io::Result<u64> {
        let content = vec![0x5a; PAGES * PAGE_SIZE];
        let mut calls = 0;
        for _ in 0..batches {
            let mut at = 0;
            while at < content.len() {
                at += sender.write(&content[at..])?;
                calls += 1;
            }
        }
        Ok(calls)
    });
    let mut buf = vec![0; 256 * 1024];
    let mut calls = 0;
    while receiver.read(&mut buf)? > 0 {
        calls += 1;
    }
    let written = writer
        .join()
        .map_err(|_| io::Error::other("the writer died"))??;
    Ok(PlainRun {
        seconds: start.elapsed().as_secs_f64(),
        cpu: cpu_time()? - cpu,
        calls: calls + written,
    })
}

/// Content to compress: the pages of this program's own file, each once.
fn own_pages() -> io::Result<Vec<u8>> {
    let mut file = std::fs::File::open("/proc/self/exe")?.take(ZSTD_BYTES as u64);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let mut seen = std::collections::HashSet::new();
    let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
    Ok(pages
        .iter()
        .filter(|page| seen.insert(**page))
        .flatten()
        .copied()
        .collect())
}

/// Compressed size by content size, as level 1 does it in batches of 64 pages
/// that know nothing of each other.
fn alone(content: &[u8]) -> f64 {
    let compressed: usize = content
        .chunks(64 * PAGE_SIZE)
        .map(|batch| zstd::bulk::compress(batch, 1).map_or(batch.len(), |out| out.len()))
        .sum();
    compressed as f64 / content.len() as f64
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_figure_is_there_and_beside_a_reference() {
        let rows = super::bench_lane().unwrap();
        for row in &rows {
            println!(
                "{}: {:.3} {} {:?}",
                row.name, row.value, row.unit, row.reference
            );
            assert!(row.value.is_finite() && !row.reference.is_empty());
        }
        let names: Vec<_> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "lane.raw",
                "lane.raw.syscalls",
                "lane.raw.cpu",
                "lane.raw.zero_copied",
                "lane.tls",
                "lane.tls.cpu",
                "lane.tls.wire",
                "lane.zstd",
                "lane.zstd.ratio"
            ]
        );
        // About four a frame of half a megabyte, for both ends together.
        assert!(rows[1].value < 20_000.0);
    }
}
