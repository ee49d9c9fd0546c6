//! Tenants' traffic across the core link, and what a migration does to it.
//!
//! Flows go from a source host to a target host, the direction of the
//! migration. They sample all the time; figures are taken for a window.
#![allow(unsafe_code)]

use crate::topology::Host;
use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Length of a throughput interval.
const INTERVAL: Duration = Duration::from_millis(100);
const MESSAGE: usize = 64;
/// Between two requests: often enough to see a queue, seldom enough to leave
/// the processors to the migration.
const PAUSE: Duration = Duration::from_millis(1);

/// What kind of traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 64-byte requests, each answered with 64 bytes.
    RequestResponse,
    /// One TCP connection, as fast as it goes.
    Bulk,
    /// One TCP connection that offers this many Mbit/s.
    Paced(u32),
}

/// What the threads of a flow share.
#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    ends: Instant,
    /// Samples and when they were taken.
    samples: Mutex<Vec<(Instant, f64)>>,
}

impl Shared {
    fn over(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || Instant::now() >= self.ends
    }

    fn take(&self, at: Instant, value: f64) {
        self.samples
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .push((at, value));
    }
}

/// A flow that runs until it is dropped or stopped, or its time is over.
#[derive(Debug)]
pub struct Flow {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Flow {
    /// Connects `from` to `to` and starts; it ends by itself after `lasts`,
    /// because a migration that gives way to it might not end before.
    ///
    /// # Errors
    /// When the connection cannot be made.
    pub fn start(kind: Kind, from: &Host, to: &Host, lasts: Duration) -> Result<Flow> {
        let listener = to.ns.inside(|| Ok(TcpListener::bind((to.addr, 0))?))?;
        let at = listener.local_addr()?;
        let client = from
            .ns
            .inside(|| Ok(TcpStream::connect(at)?))
            .context("tenant flow")?;
        let (server, _) = listener.accept()?;
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            stream.set_write_timeout(Some(Duration::from_secs(1)))?;
        }
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            ends: Instant::now() + lasts,
            samples: Mutex::default(),
        });
        let end = |work: fn(TcpStream, &Shared, Kind) -> Result<()>, stream| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                run_first()?;
                work(stream, &shared, kind)
            })
        };
        let threads = match kind {
            Kind::RequestResponse => vec![end(answer, server), end(ask, client)],
            Kind::Bulk | Kind::Paced(_) => vec![end(count, server), end(send, client)],
        };
        Ok(Flow { shared, threads })
    }

    /// The samples taken in a window: milliseconds a request for
    /// [`Kind::RequestResponse`], Mbit/s an interval for the others.
    pub fn window(&self, from: Instant, to: Instant) -> Samples {
        let to = to.min(self.shared.ends);
        let samples = self
            .shared
            .samples
            .lock()
            .unwrap_or_else(|e| e.into_inner());
        let mut values: Vec<f64> = samples
            .iter()
            .filter(|(t, _)| (from..=to).contains(t))
            .map(|s| s.1)
            .collect();
        values.sort_by(f64::total_cmp);
        Samples(values)
    }

    /// Ends the flow.
    ///
    /// # Errors
    /// When it broke before.
    pub fn stop(mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(ended) => ended.context("a tenant's flow broke")?,
                Err(_) => bail!("a tenant's thread panicked"),
            }
        }
        Ok(())
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// Samples of one window, sorted.
#[derive(Debug, Clone)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// The value below which this share of the samples lies, or `None`
    /// without samples.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let at = ((self.0.len() as f64 * share) as usize).min(self.0.len().checked_sub(1)?);
        Some(self.0[at])
    }

    /// Their mean.
    pub fn mean(&self) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.iter().sum::<f64>() / self.0.len() as f64)
    }

    /// The mean of the slowest tenth of the intervals, at least one.
    pub fn slowest_tenth(&self) -> Option<f64> {
        let n = self.0.len().div_ceil(10);
        (n > 0).then(|| self.0[..n].iter().sum::<f64>() / n as f64)
    }
}

/// Gives the calling thread the processor before everything else here. A
/// tenant's two ends are programs on other machines; on this one they share
/// its few processors with every VMM and agent of the lab, and would measure
/// the scheduler where the network is meant.
fn run_first() -> Result<()> {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: `param` is live; 0 is the calling thread.
    let done = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param) };
    if done != 0 {
        return Err(std::io::Error::last_os_error()).context("real-time priority for a tenant");
    }
    Ok(())
}

fn ask(mut stream: TcpStream, shared: &Shared, _: Kind) -> Result<()> {
    let mut message = [1; MESSAGE];
    while !shared.over() {
        let asked = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        let took = asked.elapsed().as_secs_f64() * 1000.0;
        shared.take(asked, took);
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

fn answer(mut stream: TcpStream, _: &Shared, _: Kind) -> Result<()> {
    let mut message = [0; MESSAGE];
    while stream.read_exact(&mut message).is_ok() {
        stream.write_all(&message)?;
    }
    Ok(())
}

fn send(mut stream: TcpStream, shared: &Shared, kind: Kind) -> Result<()> {
    let content = vec![0x5a; 1 << 17];
    let (start, mut sent) = (Instant::now(), 0u64);
    while !shared.over() {
        let piece = match kind {
            Kind::Paced(mbit) => {
                let due = (start.elapsed().as_secs_f64() * f64::from(mbit) * 125_000.0) as u64;
                // What a slow network kept back is not made up for in a burst.
                if due > sent + content.len() as u64 {
                    sent = due - content.len() as u64;
                }
                (due - sent) as usize
            }
            _ => content.len(),
        };
        if piece < 10_000 {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        stream.write_all(&content[..piece])?;
        sent += piece as u64;
    }
    Ok(())
}

fn count(mut stream: TcpStream, shared: &Shared, _: Kind) -> Result<()> {
    let mut buf = vec![0; 1 << 17];
    let mut interval = Instant::now();
    let mut bytes = 0;
    stream.set_read_timeout(Some(Duration::from_millis(5)))?;
    loop {
        match stream.read(&mut buf) {
            Ok(0) => return Ok(()),
            Ok(n) => bytes += n,
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) => {}
            Err(e) => return Err(e.into()),
        }
        let long = interval.elapsed();
        if long >= INTERVAL {
            let mbit = bytes as f64 / 125_000.0 / long.as_secs_f64();
            shared.take(interval, mbit);
            (interval, bytes) = (Instant::now(), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_slowest_tenth() {
        let samples = Samples((1..=100).map(f64::from).collect());
        assert_eq!(samples.quantile(0.5), Some(51.0));
        assert_eq!(samples.quantile(1.0), Some(100.0));
        assert_eq!(samples.slowest_tenth(), Some(5.5));
        assert_eq!(Samples(Vec::new()).quantile(0.5), None);
    }
}
