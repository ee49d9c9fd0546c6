//! Racks of hosts, joined by a shaped core link.
//!
//! ```text
//!  rack 1                                            rack 2
//!  r1h1 10.1.0.1 ─┐                                ┌─ 10.2.0.1 r2h1
//!                 ├ br0 ToR ══ core (tbf, tbf) ══ ToR br0 ┤
//!  r1h2 10.1.0.2 ─┘                                └─ 10.2.0.2 r2h2
//! ```
//! Every host is a network namespace, every top-of-rack switch another one
//! with a bridge. Traffic inside a rack stays on its bridge; traffic between
//! racks is routed over the core link, which is shaped at both ends. With
//! more than two racks each has its shaped link to a spine.

use crate::cache;
use crate::netns::Netns;
use crate::registry::{self, LabId};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;

const ALLOWED_CONGESTION: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";

/// What a lab looks like.
#[derive(Debug, Clone, Serialize)]
pub struct Shape {
    /// Number of racks, from 2 to 200.
    pub racks: u8,
    /// Hosts in each rack, from 1 to 200.
    pub hosts: u8,
    /// Rate of the core link, each way, in Mbit/s (10^6).
    pub rate_mbit: u32,
    /// What the shaper queues at most, in milliseconds at that rate.
    pub queue_ms: u32,
    /// TCP congestion control of all hosts: figures depend on it.
    pub congestion: String,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape {
            racks: 2,
            hosts: 2,
            rate_mbit: 400,
            queue_ms: 20,
            congestion: "cubic".into(),
        }
    }
}

/// One hypervisor.
#[derive(Debug, Clone)]
pub struct Host {
    /// `r<rack>h<index>`, both from 1.
    pub name: String,
    /// From 1.
    pub rack: u8,
    /// From 1.
    pub index: u8,
    /// Its address on the rack's network.
    pub addr: Ipv4Addr,
    /// Its network namespace.
    pub ns: Netns,
    /// Sockets, logs, configuration.
    pub run_dir: PathBuf,
    /// Guest RAM.
    pub shm_dir: PathBuf,
}

impl Host {
    /// The rack's name in configurations.
    pub fn rack_name(&self) -> String {
        rack_name(self.rack)
    }
}

/// The rack's name in configurations.
pub fn rack_name(rack: u8) -> String {
    format!("rack{rack}")
}

/// The prefix of a rack's addresses.
pub fn rack_prefix(rack: u8) -> String {
    format!("10.{rack}.0.0/16")
}

/// A lab that stands. Dropping it takes everything down.
#[derive(Debug)]
pub struct Lab {
    /// What it looks like.
    pub shape: Shape,
    /// Rack by rack.
    pub hosts: Vec<Host>,
    tors: Vec<Netns>,
    id: LabId,
}

/// Counters of the core link, read at the shapers of all racks: every byte
/// between racks leaves exactly one of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CoreCounters {
    /// Bytes sent by each rack into the core, headers of every segment
    /// included, rack 1 first.
    pub sent: Vec<u64>,
    /// Packets that the shapers dropped.
    pub drops: u64,
}

impl CoreCounters {
    /// Bytes of all racks together: both directions of the link.
    pub fn total(&self) -> u64 {
        self.sent.iter().sum()
    }

    /// What has come since `before`.
    pub fn since(&self, before: &CoreCounters) -> CoreCounters {
        let sent = self
            .sent
            .iter()
            .zip(&before.sent)
            .map(|(now, then)| now - then)
            .collect();
        CoreCounters {
            sent,
            drops: self.drops - before.drops,
        }
    }
}

impl Lab {
    /// Lays the network out.
    ///
    /// # Errors
    /// Without root, without iproute2, or when a kernel feature is missing.
    /// What was made so far is removed.
    pub fn up(shape: Shape) -> Result<Lab> {
        if !(2..=200).contains(&shape.racks)
            || !(1..=200).contains(&shape.hosts)
            || shape.rate_mbit == 0
        {
            bail!("a lab has 2 to 200 racks of 1 to 200 hosts and a core rate, not {shape:?}");
        }
        let id = LabId::create()?;
        let mut lab = Lab {
            shape,
            hosts: Vec::new(),
            tors: Vec::new(),
            id,
        };
        for rack in 1..=lab.shape.racks {
            lab.add_rack(rack)?;
        }
        lab.join_racks()?;
        lab.set_congestion_control()?;
        Ok(lab)
    }

    /// Sets the TCP congestion control of all hosts. Namespaces may only choose
    /// from a list that is global to the machine, so that is widened while
    /// they choose, one lab at a time, and then put back.
    fn set_congestion_control(&self) -> Result<()> {
        let wanted = &self.shape.congestion;
        let lock = fs::File::create(cache::dir()?.join("congestion.lock"))?;
        lock.lock()?;
        let allowed = fs::read_to_string(ALLOWED_CONGESTION)?;
        if !allowed.split_whitespace().any(|a| a == wanted) {
            fs::write(ALLOWED_CONGESTION, format!("{} {wanted}", allowed.trim()))
                .with_context(|| format!("this kernel has no TCP congestion control {wanted}"))?;
        }
        let set = self
            .hosts
            .iter()
            .try_for_each(|h| h.ns.sysctl("net.ipv4.tcp_congestion_control", wanted));
        fs::write(ALLOWED_CONGESTION, allowed.trim())?;
        set
    }

    fn netns(&self, what: &str) -> Result<Netns> {
        let ns = Netns::create(&self.id.netns_name(what))?;
        // Nothing but what the lab sends may be counted.
        ns.sysctl("net.ipv6.conf.all.disable_ipv6", "1")?;
        ns.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        Ok(ns)
    }

    fn add_rack(&mut self, rack: u8) -> Result<()> {
        let tor = self.netns(&format!("tor{rack}"))?;
        tor.sysctl("net.ipv4.ip_forward", "1")?;
        tor.ip(&format!(
            "link add br0 type bridge mcast_snooping 0 forward_delay 0
             addr add 10.{rack}.255.254/16 dev br0
             link set br0 up"
        ))?;
        for index in 1..=self.shape.hosts {
            let name = format!("r{rack}h{index}");
            let ns = self.netns(&name)?;
            // A flow must not start with what an earlier one learned.
            ns.sysctl("net.ipv4.tcp_no_metrics_save", "1")?;
            let addr = Ipv4Addr::new(10, rack, 0, index);
            ns.ip(&format!(
                "link add eth0 type veth peer name h{index} netns {tor}
                 addr add {addr}/16 dev eth0
                 link set eth0 up
                 route add default via 10.{rack}.255.254",
                tor = tor.name()
            ))?;
            tor.ip(&format!("link set h{index} master br0 up"))?;
            let run_dir = self.id.run_dir().join(&name);
            let shm_dir = self.id.shm_dir().join(&name);
            fs::create_dir_all(&run_dir)?;
            fs::create_dir_all(&shm_dir)?;
            self.hosts.push(Host {
                name,
                rack,
                index,
                addr,
                ns,
                run_dir,
                shm_dir,
            });
        }
        self.tors.push(tor);
        Ok(())
    }

    fn join_racks(&self) -> Result<()> {
        let Shape {
            racks,
            rate_mbit,
            queue_ms,
            ..
        } = self.shape;
        let shaper = |dev: &str| {
            format!(
                "qdisc add dev {dev} root tbf rate {rate_mbit}mbit burst 64kb latency {queue_ms}ms"
            )
        };
        if racks == 2 {
            let (one, two) = (&self.tors[0], &self.tors[1]);
            one.ip(&format!(
                "link add core type veth peer name core netns {}",
                two.name()
            ))?;
            for (tor, own, other) in [(one, 1, 2), (two, 2, 1)] {
                tor.ip(&format!(
                    "addr add 10.255.0.{own}/30 dev core
                     link set core up
                     route add {} via 10.255.0.{other}",
                    rack_prefix(other)
                ))?;
                tor.tc(&shaper("core"))?;
            }
            return Ok(());
        }
        let spine = self.netns("spine")?;
        spine.sysctl("net.ipv4.ip_forward", "1")?;
        for (rack, tor) in (1..=racks).zip(&self.tors) {
            tor.ip(&format!(
                "link add core type veth peer name c{rack} netns {}
                 addr add 10.255.{rack}.1/30 dev core
                 link set core up
                 route add default via 10.255.{rack}.2",
                spine.name()
            ))?;
            spine.ip(&format!(
                "addr add 10.255.{rack}.2/30 dev c{rack}
                 link set c{rack} up
                 route add {} via 10.255.{rack}.1",
                rack_prefix(rack)
            ))?;
            tor.tc(&shaper("core"))?;
            spine.tc(&shaper(&format!("c{rack}")))?;
        }
        Ok(())
    }

    /// The lab's id, part of every name it uses on this machine.
    pub fn id(&self) -> &str {
        self.id.as_str()
    }

    /// The lab's folder for sockets, logs and configurations.
    pub fn run_dir(&self) -> PathBuf {
        self.id.run_dir()
    }

    /// The lab's folder for guest RAM.
    pub fn shm_dir(&self) -> PathBuf {
        self.id.shm_dir()
    }

    /// The host `index` of `rack`, both from 1.
    ///
    /// # Panics
    /// When the lab has no such host.
    pub fn host(&self, rack: u8, index: u8) -> &Host {
        let found = self
            .hosts
            .iter()
            .find(|h| h.rack == rack && h.index == index);
        found.unwrap_or_else(|| panic!("the lab has no host {index} in rack {rack}"))
    }

    /// The namespace of a rack's switch.
    ///
    /// # Panics
    /// When the lab has no such rack.
    pub fn tor(&self, rack: u8) -> &Netns {
        &self.tors[usize::from(rack) - 1]
    }

    /// Reads the shapers of the core link.
    ///
    /// # Errors
    /// When `tc` fails or prints something else than expected.
    pub fn core(&self) -> Result<CoreCounters> {
        let mut core = CoreCounters::default();
        for tor in &self.tors {
            let out = cache::run(Command::new("tc").args([
                "-n",
                tor.name(),
                "-s",
                "-j",
                "qdisc",
                "show",
                "dev",
                "core",
                "root",
            ]))?;
            let json: serde_json::Value = serde_json::from_slice(&out.stdout)?;
            let number = |key: &str| json[0][key].as_u64();
            match (json[0]["kind"].as_str(), number("bytes"), number("drops")) {
                (Some("tbf"), Some(bytes), Some(drops)) => {
                    core.sent.push(bytes);
                    core.drops += drops;
                }
                _ => bail!("no tbf counters at the core link of {}: {json}", tor.name()),
            }
        }
        Ok(core)
    }

    /// Ends every process on the hosts and removes their files; the network
    /// stays.
    ///
    /// # Errors
    /// When a process does not end or a file cannot be removed.
    pub fn clear_hosts(&self) -> Result<()> {
        for host in &self.hosts {
            registry::end_processes(&host.ns)?;
            for folder in [&host.run_dir, &host.shm_dir] {
                fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
                fs::create_dir_all(folder)?;
            }
        }
        Ok(())
    }

    /// Leaves the lab standing; `lab down` ends it.
    pub fn keep(self) {
        self.id.keep();
    }
}
