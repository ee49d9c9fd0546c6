//! Two hosts of one rack and one beyond a shaped core link, as network
//! namespaces, with senders of several kinds of traffic.
//!
//! ```text
//!   host ── up0 ─┬─ bridge ─┬─ shaped, core link ── far
//!   peer ────────┘  (tor)
//! ```
#![allow(unsafe_code)]
#![allow(
    dead_code,
    reason = "each test program uses its own part of this module"
)]

pub(crate) mod load;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Longest that any send or receive of a test may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The namespaces; dropping them removes everything in them.
pub(crate) struct Net {
    tag: String,
}

/// Who is who. Addresses are 10.77.R.H and fd77:R::H in rack R.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    /// The host with the meter, rack 1.
    Host,
    /// Another host of rack 1.
    Peer,
    /// A host of rack 2.
    Far,
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Who::Host => "host",
            Who::Peer => "peer",
            Who::Far => "far",
        }
    }

    fn numbers(self) -> (u8, u8) {
        match self {
            Who::Host => (1, 1),
            Who::Peer => (1, 2),
            Who::Far => (2, 1),
        }
    }

    /// Its IPv4 address.
    pub(crate) fn v4(self) -> IpAddr {
        let (rack, host) = self.numbers();
        IpAddr::from([10, 77, rack, host])
    }

    /// Its IPv6 address.
    pub(crate) fn v6(self) -> IpAddr {
        let (rack, host) = self.numbers();
        format!("fd77:{rack}::{host}").parse().unwrap()
    }

    fn mac(self) -> String {
        let (rack, host) = self.numbers();
        format!("02:77:00:00:{rack:02x}:{host:02x}")
    }
}

/// The interface of every host.
pub(crate) const UPLINK: &str = "up0";
const EVERYONE: [Who; 3] = [Who::Host, Who::Peer, Who::Far];

/// Runs a command to its end; it has to succeed.
pub(crate) fn sh(line: &str) -> String {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap();
    let out = Command::new(program)
        .args(words)
        .output()
        .unwrap_or_else(|error| {
            panic!("cannot start {program}: {error}; `cargo xtask setup` installs it")
        });
    assert!(
        out.status.success(),
        "`{line}` failed (this test needs root): {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

impl Net {
    /// Builds it. `core` is the qdisc at both ends of the core link, in tc's
    /// words.
    pub(crate) fn new(name: &str, core: &str) -> Net {
        let net = Net {
            tag: format!("dm{name}{}", std::process::id()),
        };
        let tor = net.ns("tor");
        sh(&format!("ip netns add {tor}"));
        sh(&format!("ip -n {tor} link add br0 type bridge"));
        sh(&format!("ip -n {tor} link set br0 addrgenmode none"));
        for who in EVERYONE {
            let (ns, port) = (net.ns(who.name()), who.name());
            sh(&format!("ip netns add {ns}"));
            sh(&format!(
                "ip -n {ns} link add {UPLINK} address {} type veth peer name {port} netns {tor}",
                who.mac()
            ));
            sh(&format!("ip -n {ns} link set {UPLINK} addrgenmode none"));
            sh(&format!("ip -n {tor} link set {port} addrgenmode none"));
            sh(&format!("ip -n {tor} link set {port} master br0 up"));
            sh(&format!("ip -n {ns} link set lo up"));
            sh(&format!("ip -n {ns} addr add {}/16 dev {UPLINK}", who.v4()));
            sh(&format!(
                "ip -n {ns} addr add {}/16 dev {UPLINK} nodad",
                who.v6()
            ));
            sh(&format!("ip -n {ns} link set {UPLINK} up"));
            for other in EVERYONE.into_iter().filter(|other| *other != who) {
                for address in [other.v4(), other.v6()] {
                    sh(&format!(
                        "ip -n {ns} neigh add {address} lladdr {} dev {UPLINK} nud permanent",
                        other.mac()
                    ));
                }
            }
        }
        sh(&format!("ip -n {tor} link set br0 up"));
        sh(&format!("tc -n {tor} qdisc add dev far root {core}"));
        sh(&format!(
            "tc -n {} qdisc add dev {UPLINK} root {core}",
            net.ns("far")
        ));
        sh(&format!(
            "tc -n {} qdisc add dev {UPLINK} root pfifo limit 10000",
            net.ns("host")
        ));
        net.settle();
        net
    }

    /// Waits until every port forwards.
    fn settle(&self) {
        let begun = Instant::now();
        for who in [Who::Peer, Who::Far] {
            while !self.reaches(who) {
                assert!(
                    begun.elapsed() < PATIENCE,
                    "{who:?} is not reached over the bridge"
                );
            }
        }
    }

    fn reaches(&self, who: Who) -> bool {
        let address = SocketAddr::new(who.v6(), 9);
        self.enter(who, move || {
            let socket = UdpSocket::bind(address).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_millis(50)))
                .unwrap();
            socket
        })
        .join()
        .map(|socket| {
            self.enter(Who::Host, move || {
                UdpSocket::bind("[::]:0").unwrap().send_to(&[1], address)
            })
            .join()
            .unwrap()
            .is_ok()
                && socket.recv(&mut [0; 1]).is_ok()
        })
        .unwrap()
    }

    fn ns(&self, who: &str) -> String {
        format!("{}{who}", self.tag)
    }

    /// Runs `job` in a thread inside a host's network namespace.
    pub(crate) fn enter<T: Send + 'static>(
        &self,
        who: Who,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let path = PathBuf::from("/run/netns").join(self.ns(who.name()));
        thread::spawn(move || {
            let ns = std::fs::File::open(&path).unwrap();
            nix::sched::setns(ns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            job()
        })
    }

    /// Bytes and packets that left through a qdisc: a host's uplink, or, for
    /// `None`, the core link towards `Far`.
    pub(crate) fn qdisc(&self, who: Option<Who>) -> (u64, u64) {
        let (ns, device) = match who {
            Some(who) => (self.ns(who.name()), UPLINK),
            None => (self.ns("tor"), "far"),
        };
        let text = sh(&format!("tc -n {ns} -s -j qdisc show dev {device} root"));
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let number = |key: &str| json[0][key].as_u64().unwrap();
        assert_eq!(number("drops"), 0, "the shaper dropped: {text}");
        (number("bytes"), number("packets"))
    }

    /// Bytes that left over the core link towards `Far`, drops or not.
    pub(crate) fn sent_to_core(&self) -> u64 {
        let tor = self.ns("tor");
        let text = sh(&format!("tc -n {tor} -s -j qdisc show dev far root"));
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json[0]["bytes"].as_u64().unwrap()
    }

    /// Names of programs attached to a host's uplink, and of its qdiscs.
    pub(crate) fn attached(&self, who: Who) -> String {
        let ns = self.ns(who.name());
        let mut text = sh(&format!("ip netns exec {ns} bpftool net show dev {UPLINK}"));
        text += &sh(&format!("tc -n {ns} filter show dev {UPLINK} egress"));
        text
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for who in ["host", "peer", "far", "tor"] {
            // Nothing can be done here about one that does not go.
            let _ = Command::new("ip")
                .args(["netns", "del", &self.ns(who)])
                .output();
        }
    }
}

/// Listens in `to`, then sends `bytes` from `from`, and returns once all have
/// been read.
pub(crate) fn tcp_bulk(net: &Net, from: Who, to: SocketAddr, at: Who, bytes: usize) {
    let listener = net
        .enter(at, move || TcpListener::bind(to).unwrap())
        .join()
        .unwrap();
    let reader = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (mut buf, mut read) = (vec![0; 1 << 18], 0);
        while read < bytes {
            match stream.read(&mut buf).unwrap() {
                0 => panic!("closed after {read} of {bytes} bytes"),
                n => read += n,
            }
        }
        stream.write_all(b"!").unwrap();
        stream
    });
    net.enter(from, move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let buf = vec![7; 1 << 18];
        let mut left = bytes;
        while left > 0 {
            left -= stream.write(&buf[..left.min(buf.len())]).unwrap();
        }
        stream.read_exact(&mut [0]).unwrap();
    })
    .join()
    .unwrap();
    reader.join().unwrap();
}

/// Small requests and answers, one after the other; the times they took.
pub(crate) fn request_response(
    net: &Net,
    from: Who,
    to: SocketAddr,
    at: Who,
    until: Instant,
    most: usize,
) -> JoinHandle<Vec<Duration>> {
    let listener = net
        .enter(at, move || TcpListener::bind(to).unwrap())
        .join()
        .unwrap();
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut buf = [0; 64];
        while stream.read_exact(&mut buf).is_ok() {
            stream.write_all(&buf).unwrap();
        }
    });
    net.enter(from, move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut times = Vec::new();
        let mut buf = [1; 64];
        while Instant::now() < until && times.len() < most {
            let begun = Instant::now();
            stream.write_all(&buf).unwrap();
            stream.read_exact(&mut buf).unwrap();
            times.push(begun.elapsed());
            thread::sleep(Duration::from_micros(500));
        }
        drop(stream);
        echo.join().unwrap();
        times
    })
}

/// Sends datagrams of `len` bytes; with `segment`, many at a time for the
/// kernel to cut (UDP GSO). Returns once the last has arrived.
pub(crate) fn udp(
    net: &Net,
    from: Who,
    to: SocketAddr,
    at: Who,
    len: usize,
    count: usize,
    gso: bool,
) {
    let sink = net
        .enter(at, move || UdpSocket::bind(to).unwrap())
        .join()
        .unwrap();
    sink.set_read_timeout(Some(PATIENCE)).unwrap();
    let reader = thread::spawn(move || {
        let mut buf = vec![0; 1 << 16];
        while sink.recv(&mut buf).unwrap() != 1 {}
    });
    net.enter(from, move || {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect(to).unwrap();
        let (size, sends) = if gso {
            let segment = len as libc::c_int;
            // SAFETY: the kernel reads the four bytes of `segment`.
            let status = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_UDP,
                    libc::UDP_SEGMENT,
                    (&raw const segment).cast(),
                    size_of_val(&segment) as libc::socklen_t,
                )
            };
            assert_eq!(status, 0, "UDP GSO: {}", std::io::Error::last_os_error());
            // The last segment of each is a short one.
            (len * 30 + len / 2, count / 30)
        } else {
            (len, count)
        };
        let buf = vec![3; size];
        for i in 0..sends {
            socket.send(&buf).unwrap();
            // Slower than the shaper, whose queue must not overflow.
            if i % 16 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
        // The receiver's buffer may be full: say so until it is heard.
        let last = UdpSocket::bind(any).unwrap();
        while !reader.is_finished() {
            last.send_to(&[0], to).unwrap();
            thread::sleep(Duration::from_millis(20));
        }
        reader.join().unwrap();
    })
    .join()
    .unwrap();
}
