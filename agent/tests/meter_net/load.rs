//! Traffic that goes on for a while: tenants, and a migration under a pacer.
#![allow(unsafe_code)]

use super::{Net, Who};
use drover::pace::Pacer;
use drover::types::Class;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A running TCP flow, counted where it arrives.
pub(crate) struct Bulk {
    received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// How a flow sends.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    /// TCP congestion control.
    pub(crate) control: &'static str,
    /// Payload bytes a second, or as much as TCP lets through.
    pub(crate) rate: Option<f64>,
}

impl Bulk {
    /// Starts a flow.
    pub(crate) fn start(net: &Net, from: Who, at: Who, to: SocketAddr, kind: Kind) -> Bulk {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        Bulk::with(net, from, at, to, stop, move |mut stream| {
            set_control(&stream, kind.control);
            let buf = vec![1; 64 << 10];
            let begun = Instant::now();
            let mut sent = 0.0;
            while !stopped.load(Ordering::Relaxed) {
                if let Some(rate) = kind.rate {
                    // Like a stream of media: a burst every few milliseconds.
                    let due = begun + Duration::from_secs_f64(sent / rate);
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                }
                if stream.write_all(&buf).is_err() {
                    return;
                }
                sent += buf.len() as f64;
            }
        })
    }

    /// Starts a lane: what it sends, a pacer allows.
    pub(crate) fn lane(
        net: &Net,
        from: Who,
        at: Who,
        to: SocketAddr,
        pacer: &Pacer,
        class: Class,
    ) -> Bulk {
        let pacer = pacer.clone();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        Bulk::with(net, from, at, to, stop, move |mut stream| {
            let watch = pacer.watch_lane(stream.as_fd()).unwrap();
            set_max_rate(&stream, pacer.max_rate());
            let buf = vec![1; 256 << 10];
            while !stopped.load(Ordering::Relaxed) {
                let chunk = pacer.chunk(class);
                pacer.acquire(chunk, class);
                if stream.write_all(&buf[..chunk]).is_err() {
                    break;
                }
            }
            drop(watch);
        })
    }

    fn with(
        net: &Net,
        from: Who,
        at: Who,
        to: SocketAddr,
        stop: Arc<AtomicBool>,
        send: impl FnOnce(TcpStream) + Send + 'static,
    ) -> Bulk {
        let listener = net
            .enter(at, move || TcpListener::bind(to).unwrap())
            .join()
            .unwrap();
        let received = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&received);
        let sender = net.enter(from, move || {
            let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap();
            stream.set_nodelay(true).unwrap();
            stream
                .set_write_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            send(stream);
        });
        let (mut stream, _) = listener.accept().unwrap();
        let receiver = thread::spawn(move || {
            stream
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            let mut buf = vec![0; 1 << 20];
            while let Ok(n @ 1..) = stream.read(&mut buf) {
                counted.fetch_add(n as u64, Ordering::Relaxed);
            }
        });
        Bulk {
            received,
            stop,
            threads: vec![sender, receiver],
        }
    }

    /// Payload bytes a second that arrive in each of `count` intervals.
    pub(crate) fn watch(&self, interval: Duration, count: usize) -> Vec<f64> {
        let mut rates = Vec::new();
        let mut last = (Instant::now(), self.received.load(Ordering::Relaxed));
        for _ in 0..count {
            thread::sleep(interval);
            let now = (Instant::now(), self.received.load(Ordering::Relaxed));
            rates.push((now.1 - last.1) as f64 / (now.0 - last.0).as_secs_f64());
            last = now;
        }
        rates
    }

    /// Ends the flow and waits for it.
    pub(crate) fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn set_control(stream: &TcpStream, name: &str) {
    // SAFETY: the kernel reads `name.len()` bytes of `name`.
    let status = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_CONGESTION,
            name.as_ptr().cast(),
            name.len() as libc::socklen_t,
        )
    };
    let error = std::io::Error::last_os_error();
    assert_eq!(status, 0, "congestion control {name}: {error}");
}

fn set_max_rate(stream: &TcpStream, rate: u64) {
    // SAFETY: the kernel reads the eight bytes of `rate`.
    let status = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const rate).cast(),
            size_of_val(&rate) as libc::socklen_t,
        )
    };
    let error = std::io::Error::last_os_error();
    assert_eq!(status, 0, "SO_MAX_PACING_RATE: {error}");
}
