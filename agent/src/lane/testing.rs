//! What the tests of lanes share: a target that keeps what it is given, and
//! sources of pages.

use super::*;
use crate::types::{Class, Fingerprint, GangId, Gfn, HolderId, PAGE_SIZE, Round, VmIndex};
use std::collections::HashMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub(super) const GANG: GangId = GangId(0x1122_3344_5566_7788);
pub(super) const VM: VmIndex = VmIndex(3);
pub(super) const RAM_PAGES: u32 = 1 << 20;

/// A guest's RAM as a sink: what came last for each gfn.
#[derive(Default)]
pub(super) struct Ram {
    pub(super) pages: Mutex<HashMap<u32, Box<[u8; PAGE_SIZE]>>>,
    pub(super) refs: Mutex<Vec<Reference>>,
    pub(super) order: Mutex<Vec<(BatchId, Class)>>,
    pub(super) compressed: AtomicUsize,
    pub(super) delay: Mutex<Duration>,
}

impl BatchSink for Ram {
    fn ram_pages(&self, gang: GangId, vm: VmIndex) -> Option<u32> {
        (gang == GANG && vm == VM).then_some(RAM_PAGES)
    }

    fn batch(&self, batch: &DecodedBatch<'_>) -> Result<Placement, SinkError> {
        std::thread::sleep(*self.delay.lock().unwrap());
        let mut pages = self.pages.lock().unwrap();
        for gfn in batch
            .entries
            .zeros
            .iter()
            .flat_map(|r| (r.first.0..).take(r.count as usize))
        {
            pages.insert(gfn, Box::new([0; PAGE_SIZE]));
        }
        for (gfn, page) in batch.pages() {
            pages.insert(gfn.0, Box::new(*page));
        }
        self.refs
            .lock()
            .unwrap()
            .extend_from_slice(&batch.entries.refs);
        self.order
            .lock()
            .unwrap()
            .push((batch.head.batch, batch.head.class));
        if batch.encoding.is_compressed() {
            self.compressed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(Placement::Placed)
    }
}

/// Page `n` of a guest that has text, code-like and random pages.
pub(super) fn page(n: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    let mut x = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for (at, chunk) in page.chunks_mut(8).enumerate() {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let word = match n % 3 {
            0 => x,
            1 => (x & 0x0f0f_0000) | (at as u64 / 4),
            _ => u64::from_le_bytes(*b"drover \n") ^ (x & 3),
        };
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
    page
}

/// A batch of `count` pages from `first` on, contents by `page`, with a zero
/// run and references behind them.
pub(super) fn batch(
    pool: &BufferPool,
    id: u64,
    first: u32,
    count: u32,
    class: Class,
) -> StagedBatch {
    let mut content = pool.take(Duration::from_secs(10)).unwrap();
    let mut entries = Entries::default();
    for n in 0..count {
        entries.pages.push(Gfn(first + n));
        *content.page_mut(n as usize) = page(u64::from(first + n));
    }
    entries.zeros.push(ZeroRun {
        first: Gfn(first + count),
        count: 5,
    });
    for n in 0..3 {
        entries.refs.push(Reference {
            gfn: Gfn(first + count + 10 + n),
            holder: HolderId(n as u16 % 2),
            fingerprint: Fingerprint([n as u8 + 1; 16]),
        });
    }
    StagedBatch {
        gang: GANG,
        vm: VM,
        batch: BatchId(id),
        round: Round(1),
        class,
        domain: 0,
        entries,
        content: Some(content),
    }
}

/// A target agent with lanes that end in `ram`.
pub(super) struct Target {
    pub(super) address: std::net::SocketAddr,
    pub(super) receivers: Arc<Mutex<Vec<LaneReceiver>>>,
}

impl Target {
    /// Takes lanes as [`connector`](Self::connector) makes them: encrypted.
    pub(super) fn start(ram: Arc<dyn BatchSink>) -> Target {
        Self::accepting(ram, |tcp| LaneStream {
            tcp,
            keys: Some(LaneKeys::testing(false)),
        })
    }

    /// Takes lanes that are not encrypted: from sources that write frames by
    /// hand.
    pub(super) fn start_plain(ram: Arc<dyn BatchSink>) -> Target {
        Self::accepting(ram, LaneStream::plain)
    }

    fn accepting(ram: Arc<dyn BatchSink>, wrap: fn(TcpStream) -> LaneStream) -> Target {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let receivers = Arc::new(Mutex::new(Vec::new()));
        let accepted = Arc::clone(&receivers);
        // Ends with the test process; holds nothing but the listener.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let config = ReceiveConfig::new("test source");
                let stream = wrap(stream.unwrap());
                let receiver = LaneReceiver::start(stream, config, ram.clone()).unwrap();
                accepted.lock().unwrap().push(receiver);
            }
        });
        Target { address, receivers }
    }

    /// Waits until `count` lanes have been accepted.
    pub(super) fn await_receivers(&self, count: usize) {
        for _ in 0..2000 {
            if self.receivers.lock().unwrap().len() >= count {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{count} lanes were not accepted in time");
    }

    pub(super) fn connector(&self) -> Connector {
        sealed_to(self.address)
    }
}

/// Opens encrypted lanes to `address`, maybe over something in between.
pub(super) fn sealed_to(address: std::net::SocketAddr) -> Connector {
    Arc::new(move || {
        Ok(LaneStream {
            tcp: connect(address)?,
            keys: Some(LaneKeys::testing(true)),
        })
    })
}

/// Opens lanes to `address` that are not encrypted.
pub(super) fn plain_to(address: std::net::SocketAddr) -> Connector {
    Arc::new(move || connect(address).map(LaneStream::plain))
}

pub(super) fn connect(address: std::net::SocketAddr) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&address, Duration::from_secs(2))
}

pub(super) fn config(compress: Compress) -> LaneSetConfig {
    let mut config = LaneSetConfig::new("test target");
    config.encode.compress = compress;
    config
}
