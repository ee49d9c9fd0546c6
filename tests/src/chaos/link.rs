//! Links that are down, deaf, lossy, or spoil what they carry.
//!
//! A link is down by `ip link`; for the rest eBPF classifiers sit on the
//! switches' interfaces, where frames arrive: this kernel may have no netem.
//! See `agent-ebpf/src/link_faults.rs`.
#![allow(unsafe_code)]

use crate::cache;
use crate::netns::Netns;
use crate::topology::{Lab, rack_prefix};
use anyhow::{Context, Result};
use aya::maps::Array;
use aya::programs::tc::{NlOptions, TcAttachOptions};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use aya::{Ebpf, Pod};
use drover_ebpf::fault::{FAULT_MAP, Fault, HITS_MAP, Hits, LINK_PROGRAM};
use std::fs;
use std::process::Command;

/// A frame in a million of them.
const ALL: u32 = 1_000_000;

/// A link of a lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Between the racks; its first side is the rack with this number.
    Core(u8),
    /// A host's uplink; the first side is the host.
    Uplink {
        /// The rack.
        rack: u8,
        /// The host's index in it.
        host: u8,
    },
}

impl Link {
    /// The switch that takes in what the first side sends, and through which
    /// interface; where it is sent out to the first side is the same.
    fn switch<'l>(&self, lab: &'l Lab) -> (&'l Netns, String) {
        match *self {
            // The other rack's switch: there this side's frames arrive.
            Link::Core(rack) => (lab.tor(3 - rack), "core".to_owned()),
            Link::Uplink { rack, host } => (lab.tor(rack), format!("h{host}")),
        }
    }
}

/// A link that is down until this is dropped.
#[derive(Debug)]
pub struct Down {
    switch: Netns,
    /// What brings it up again.
    up: String,
}

impl Down {
    /// Takes a link down.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn new(lab: &Lab, link: Link) -> Result<Down> {
        let (switch, interface) = link.switch(lab);
        // The kernel forgets the routes through an interface that is down.
        let route = match link {
            Link::Core(rack) => format!("route add {} via 10.255.0.{rack}", rack_prefix(rack)),
            Link::Uplink { .. } => String::new(),
        };
        switch.ip(&format!("link set {interface} down"))?;
        Ok(Down {
            switch: switch.clone(),
            up: format!("link set {interface} up\n{route}"),
        })
    }
}

impl Drop for Down {
    fn drop(&mut self) {
        if let Err(error) = self.switch.ip(&self.up) {
            eprintln!("a link of {} stays down: {error:#}", self.switch.name());
        }
    }
}

/// Which way frames are hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// What the first side of the link sends.
    Out,
    /// What is sent to the first side.
    In,
}

/// Frames of a link are lost or changed until this is dropped.
pub struct Bad {
    ebpf: Ebpf,
}

impl std::fmt::Debug for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bad")
            .field("hits", &self.hits().ok())
            .finish()
    }
}

/// A plain struct of the eBPF side, as aya's maps want it.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Cell<T>(T);

// SAFETY: `repr(C)` structs of integers, without padding that anybody reads:
// two of u64, and one of u64 and two u32.
unsafe impl Pod for Cell<Fault> {}
// SAFETY: as above.
unsafe impl Pod for Cell<Hits> {}

impl Bad {
    /// Drops all frames that go one way.
    ///
    /// # Errors
    /// When the kernel does not take the program.
    pub fn deaf(lab: &Lab, link: Link, way: Way) -> Result<Bad> {
        let fault = Fault {
            drop_ppm: ALL,
            ..Fault::default()
        };
        let (switch, interface) = link.switch(lab);
        Bad::attach(switch, &interface, way, fault)
    }

    /// Hits frames of the core link both ways, with this share each.
    ///
    /// # Errors
    /// As [`Bad::deaf`].
    pub fn both_ways(lab: &Lab, fault: Fault) -> Result<[Bad; 2]> {
        let side = |rack| {
            let (switch, interface) = Link::Core(rack).switch(lab);
            let seed = fault.seed ^ u64::from(rack);
            Bad::attach(switch, &interface, Way::Out, Fault { seed, ..fault })
        };
        Ok([side(1)?, side(2)?])
    }

    fn attach(switch: &Netns, interface: &str, way: Way, fault: Fault) -> Result<Bad> {
        let path = cache::target_dir().join("bpf/drover-link-faults.o");
        let object = fs::read(&path)
            .with_context(|| format!("{}: run `cargo xtask build-ebpf`", path.display()))?;
        let mut ebpf = Ebpf::load(&object)?;
        let map = ebpf
            .map_mut(FAULT_MAP)
            .context("the object has no settings")?;
        Array::<_, Cell<Fault>>::try_from(map)?.set(0, Cell(fault), 0)?;
        let program = ebpf.program_mut(LINK_PROGRAM).context("no classifier")?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load()?;
        // What the first side sends arrives at the switch.
        let hook = match way {
            Way::Out => TcAttachType::Ingress,
            Way::In => TcAttachType::Egress,
        };
        switch.inside(|| {
            let options = match KernelVersion::current()? >= KernelVersion::new(6, 6, 0) {
                true => TcAttachOptions::TcxOrder(LinkOrder::first()),
                false => {
                    let _there = aya::programs::tc::qdisc_add_clsact(interface);
                    TcAttachOptions::Netlink(NlOptions::default())
                }
            };
            program.attach_with_options(interface, hook, options)?;
            Ok(())
        })?;
        Ok(Bad { ebpf })
    }

    /// What was done to frames so far.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn hits(&self) -> Result<Hits> {
        let map = self
            .ebpf
            .map(HITS_MAP)
            .context("the object has no counts")?;
        Ok(Array::<_, Cell<Hits>>::try_from(map)?.get(&0, 0)?.0)
    }
}

/// Aborts all TCP connections of a host, as a firewall that lost its state does.
///
/// # Errors
/// When `ss` fails.
pub fn reset(host: &Netns) -> Result<()> {
    cache::run(Command::new("ss").args(["-N", host.name(), "-K", "-t", "state", "established"]))
        .map(drop)
}

/// Has a host compute TCP checksums before frames leave it, and cut them to the
/// wire's size. With offload a veth carries frames whose checksums nobody ever
/// computed or looks at: a byte that changes below TCP would reach the agent.
///
/// # Errors
/// When the kernel refuses.
pub fn checksum_in_software(host: &Netns) -> Result<()> {
    for (name, request) in [
        ("tx-checksum", ETHTOOL_STXCSUM),
        ("tso", ETHTOOL_STSO),
        ("gso", ETHTOOL_SGSO),
        ("gro", ETHTOOL_SGRO),
    ] {
        host.inside(|| switch_off("eth0", request).with_context(|| format!("{name} off")))?;
    }
    Ok(())
}

// <linux/sockios.h> and <linux/ethtool.h>; libc has them not for all targets.
const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_STSO: u32 = 0x1f;
const ETHTOOL_SGSO: u32 = 0x24;
const ETHTOOL_SGRO: u32 = 0x2c;

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    cmd: u32,
    data: u32,
}

fn switch_off(interface: &str, request: u32) -> Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let mut value = EthtoolValue {
        cmd: request,
        data: 0,
    };
    // SAFETY: all zeros is a valid ifreq.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in ifreq.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    ifreq.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: an open socket, an ifreq with a name that ends with a zero byte
    // and a pointer to a value that outlives the call.
    let done = unsafe {
        use std::os::fd::AsRawFd;
        libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &mut ifreq)
    };
    if done != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}
