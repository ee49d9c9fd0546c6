//! Loads the eBPF meter, attaches it to the uplinks, and reads it.
//!
//! The meter counts bytes on the wire as a qdisc does: each segment of a GSO
//! or GRO frame with its own headers; `docs/pacing.md` has the details and the
//! cost per packet. It attaches in the network namespace of the thread that
//! calls [`Meter::attach`]. With tcx (Linux 6.6) the kernel detaches it when
//! the agent ends, however it ends. With clsact, on older kernels, filters of
//! an agent that was killed are removed when it starts again; an empty clsact
//! qdisc stays behind.
#![allow(unsafe_code)]

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, MapData, MapError, PerCpuArray};
use aya::programs::tc::{self, NlOptions, TcAttachOptions};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfError};
use drover_ebpf::{CELLS, Counter, Direction, EGRESS_PROGRAM, INGRESS_PROGRAM, MAX_PLACES};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

mod place;
mod privilege;

pub use place::{Place, PlaceError, Prefix, PrefixError, places};

/// The eBPF object, if this binary was built with one.
pub fn object() -> Option<&'static [u8]> {
    #[cfg(drover_meter)]
    return Some(aya::include_bytes_aligned!(env!("DROVER_METER_OBJECT")));
    #[cfg(not(drover_meter))]
    return None;
}

/// What to count where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeterConfig {
    /// Names of the Ethernet interfaces that lead out of this host.
    pub uplinks: Vec<String>,
    /// Addresses inside this rack. What goes elsewhere crosses the core.
    pub in_rack: Vec<Prefix>,
    /// Exceptions within `in_rack` that are across the core; the longest
    /// prefix decides.
    pub across_core: Vec<Prefix>,
    /// Addresses of all agents, in this rack and elsewhere.
    pub agents: Vec<IpAddr>,
    /// TCP ports of the agents' data connections. A connection to or from an
    /// agent's address with one of these ports at either end is migration.
    pub ports: Vec<u16>,
    /// Also migration: what leaves with this `SO_MARK`. 0: none.
    pub mark: u32,
    /// How to attach.
    pub attach: Attach,
}

/// How the meter attaches to an interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Attach {
    /// With tcx where the kernel has it, else with clsact.
    #[default]
    Auto,
    /// With tcx: Linux 6.6 or newer.
    Tcx,
    /// With filters of a clsact qdisc.
    Clsact,
}

/// Why the uplinks cannot be counted.
#[derive(Debug, thiserror::Error)]
pub enum MeterError {
    /// This binary was built without the eBPF object.
    #[error("this drover was built without the eBPF meter: build it with `cargo xtask build`")]
    NoObject,
    /// The process may not load or attach eBPF.
    #[error(
        "the meter needs {missing}: run the agent as root, or give it these capabilities \
         (systemd: AmbientCapabilities=)"
    )]
    Privilege {
        /// Names of the capabilities.
        missing: String,
    },
    /// No uplink is configured.
    #[error("no uplink is named: name the interfaces that lead out of this host")]
    NoUplink,
    /// An uplink is not there.
    #[error("there is no uplink {name:?} in this network namespace; there are: {present}")]
    NoInterface {
        /// As configured.
        name: String,
        /// Names of the interfaces that are there.
        present: String,
    },
    /// An uplink is not Ethernet, so its frames begin with something else.
    #[error(
        "the uplink {name:?} is no Ethernet interface: name the interface below the tunnel or bridge"
    )]
    NotEthernet {
        /// As configured.
        name: String,
    },
    /// The interfaces cannot be listed.
    #[error("cannot list the network interfaces")]
    List(#[source] nix::Error),
    /// Addresses contradict each other, or are too many.
    #[error("the meter's addresses cannot be used")]
    Place(#[from] PlaceError),
    /// The kernel does not take the object.
    #[error(
        "the kernel does not load the eBPF meter (Linux 5.10 or newer with BPF and its JIT is needed)"
    )]
    Load(#[source] Box<EbpfError>),
    /// The kernel does not take a program.
    #[error("the kernel does not take the eBPF program {name}")]
    Program {
        /// Its name.
        name: &'static str,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
    /// The clsact qdisc cannot be added.
    #[error("cannot add a clsact qdisc to {interface} (needs CAP_NET_ADMIN and sch_ingress)")]
    Clsact {
        /// The uplink.
        interface: String,
        /// Why.
        #[source]
        source: tc::TcError,
    },
    /// A program cannot be attached.
    #[error("cannot attach the eBPF meter to {interface} ({direction:?})")]
    Attach {
        /// The uplink.
        interface: String,
        /// Which of the two.
        direction: Direction,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
    /// A map cannot be read or written.
    #[error("cannot use the meter's map {name}")]
    Map {
        /// Its name.
        name: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
    /// The kernel does not time programs.
    #[error("the kernel does not time eBPF programs (Linux 5.8 or newer and root are needed)")]
    Cost(#[source] aya::sys::SyscallError),
    /// The object is not the one this agent was built for.
    #[error("the eBPF object has no {name}: build it and the agent from the same sources")]
    Foreign {
        /// Name of the map or program.
        name: &'static str,
    },
}

/// What a program of the meter has cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Frames it ran for; one frame may carry many segments.
    pub runs: u64,
    /// CPU time of all runs.
    pub time: Duration,
}

/// Something that counts what crosses the uplinks.
pub trait Measure: Send {
    /// Everything counted since the beginning.
    ///
    /// # Errors
    /// The kernel does not answer: nothing is known of the load any more.
    fn counters(&mut self) -> Result<Counters, MeterError>;
}

/// Everything the meter counted, all CPUs and uplinks added up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    cells: [Counter; CELLS as usize],
}

impl Counters {
    /// One cell.
    pub fn get(&self, direction: Direction, in_rack: bool, migration: bool) -> Counter {
        self.cells[drover_ebpf::cell(direction, in_rack, migration) as usize]
    }

    /// Adds what the map holds of one cell: a counter a CPU. `false` if there is
    /// no such cell. The map is the kernel's memory: whatever is in it, sums
    /// wrap, as the counters themselves would.
    pub fn add_cpus(&mut self, cell: u32, cpus: impl IntoIterator<Item = Counter>) -> bool {
        let Some(cell) = self.cells.get_mut(cell as usize) else {
            return false;
        };
        for cpu in cpus {
            cell.bytes = cell.bytes.wrapping_add(cpu.bytes);
            cell.packets = cell.packets.wrapping_add(cpu.packets);
        }
        true
    }

    /// Bytes of one cell since `before`; none if it has gone backwards.
    pub fn bytes_since(
        &self,
        before: &Counters,
        direction: Direction,
        in_rack: bool,
        migration: bool,
    ) -> u64 {
        let bytes = |counters: &Counters| counters.get(direction, in_rack, migration).bytes;
        bytes(self).saturating_sub(bytes(before))
    }

    /// Adds to one cell; for sources of counters other than the meter.
    pub fn add(&mut self, direction: Direction, in_rack: bool, migration: bool, more: Counter) {
        let cell = &mut self.cells[drover_ebpf::cell(direction, in_rack, migration) as usize];
        cell.bytes += more.bytes;
        cell.packets += more.packets;
    }
}

/// The shared layout, as aya wants it said.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Cell(Counter);
// SAFETY: two u64, without padding; every bit pattern is a value.
unsafe impl aya::Pod for Cell {}

/// The shared layout, as aya wants it said.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Settings(drover_ebpf::Settings);
// SAFETY: one u32; every bit pattern is a value.
unsafe impl aya::Pod for Settings {}

/// The attached meter. Dropping it detaches it; with clsact that has to happen
/// in the network namespace it was attached in.
pub struct Meter {
    ebpf: Ebpf,
    counters: PerCpuArray<MapData, Cell>,
    places_v4: LpmTrie<MapData, [u8; 4], u32>,
    places_v6: LpmTrie<MapData, [u8; 16], u32>,
    ports: Array<MapData, u64>,
    installed: BTreeMap<Prefix, Place>,
}

impl Meter {
    /// Loads the meter and attaches it to the uplinks. Counting begins with
    /// prefixes and ports in place, at zero.
    ///
    /// # Errors
    /// Nothing stays attached; see [`MeterError`].
    pub fn attach(config: &MeterConfig) -> Result<Meter, MeterError> {
        let object = object().ok_or(MeterError::NoObject)?;
        privilege::check()?;
        check_uplinks(&config.uplinks)?;

        let mut ebpf = Ebpf::load(object).map_err(|error| MeterError::Load(Box::new(error)))?;
        let mut settings: Array<_, Settings> = map(&mut ebpf, "SETTINGS")?;
        let settings_value = Settings(drover_ebpf::Settings { mark: config.mark });
        settings
            .set(0, settings_value, 0)
            .map_err(|source| MeterError::Map {
                name: "SETTINGS",
                source,
            })?;
        let mut meter = Meter {
            counters: map(&mut ebpf, "COUNTERS")?,
            places_v4: map(&mut ebpf, "PLACES_V4")?,
            places_v6: map(&mut ebpf, "PLACES_V6")?,
            ports: map(&mut ebpf, "PORTS")?,
            installed: BTreeMap::new(),
            ebpf,
        };
        meter.set_places(config)?;
        meter.set_ports(&config.ports)?;
        meter.attach_programs(config)?;
        Ok(meter)
    }

    /// Follows a changed list of prefixes and agents. The uplinks and the way
    /// of attaching stay as they are.
    ///
    /// # Errors
    /// [`MeterError::Place`] before anything changed, or [`MeterError::Map`].
    pub fn set_places(&mut self, config: &MeterConfig) -> Result<(), MeterError> {
        let wanted = places(config)?;
        debug_assert!(wanted.len() <= MAX_PLACES as usize);
        let old = std::mem::take(&mut self.installed);
        for (prefix, place) in &wanted {
            if old.get(prefix) != Some(place) {
                self.set_place(prefix, Some(*place))?;
            }
        }
        for prefix in old.keys().filter(|prefix| !wanted.contains_key(prefix)) {
            self.set_place(prefix, None)?;
        }
        self.installed = wanted;
        Ok(())
    }

    /// Replaces the list of the agents' data ports.
    ///
    /// # Errors
    /// [`MeterError::Map`].
    pub fn set_ports(&mut self, ports: &[u16]) -> Result<(), MeterError> {
        let mut words = vec![0u64; drover_ebpf::PORT_WORDS as usize];
        for port in ports {
            let (word, bit) = drover_ebpf::port_bit(*port);
            words[word as usize] |= bit;
        }
        for (index, word) in words.into_iter().enumerate() {
            self.ports
                .set(index as u32, word, 0)
                .map_err(|source| MeterError::Map {
                    name: "PORTS",
                    source,
                })?;
        }
        Ok(())
    }

    /// Has the kernel time every run of an eBPF program, for as long as the
    /// returned descriptor is open. This itself costs about as much as the meter.
    ///
    /// # Errors
    /// [`MeterError::Cost`]: Linux before 5.8, or not root.
    pub fn measure_cost() -> Result<OwnedFd, MeterError> {
        aya::sys::enable_stats(aya::sys::Stats::RunTime).map_err(MeterError::Cost)
    }

    /// What the programs (egress, ingress) have cost while the kernel timed
    /// them, see [`Meter::measure_cost`].
    ///
    /// # Errors
    /// [`MeterError::Program`] if the kernel does not tell.
    pub fn cost(&self) -> Result<[Cost; 2], MeterError> {
        let cost = |name: &'static str| {
            let program = self
                .ebpf
                .program(name)
                .ok_or(MeterError::Foreign { name })?;
            match program.info() {
                Ok(info) => Ok(Cost {
                    runs: info.run_count(),
                    time: info.run_time(),
                }),
                Err(source) => Err(MeterError::Program {
                    name,
                    source: Box::new(source),
                }),
            }
        };
        Ok([cost(EGRESS_PROGRAM)?, cost(INGRESS_PROGRAM)?])
    }

    fn set_place(&mut self, prefix: &Prefix, place: Option<Place>) -> Result<(), MeterError> {
        let bits = u32::from(prefix.len());
        let (name, done) = match prefix.address() {
            IpAddr::V4(address) => {
                let key = Key::new(bits, address.octets());
                let done = match place {
                    Some(place) => self.places_v4.insert(&key, place.value(), 0),
                    None => self.places_v4.remove(&key),
                };
                ("PLACES_V4", done)
            }
            IpAddr::V6(address) => {
                let key = Key::new(bits, address.octets());
                let done = match place {
                    Some(place) => self.places_v6.insert(&key, place.value(), 0),
                    None => self.places_v6.remove(&key),
                };
                ("PLACES_V6", done)
            }
        };
        done.map_err(|source| MeterError::Map { name, source })
    }

    fn attach_programs(&mut self, config: &MeterConfig) -> Result<(), MeterError> {
        let tcx = match config.attach {
            Attach::Auto => has_tcx(),
            Attach::Tcx => true,
            Attach::Clsact => false,
        };
        for (name, direction, hook) in [
            (EGRESS_PROGRAM, Direction::Egress, TcAttachType::Egress),
            (INGRESS_PROGRAM, Direction::Ingress, TcAttachType::Ingress),
        ] {
            let refused = |source| MeterError::Program {
                name,
                source: Box::new(source),
            };
            let program = self
                .ebpf
                .program_mut(name)
                .ok_or(MeterError::Foreign { name })?;
            let program: &mut SchedClassifier = program.try_into().map_err(refused)?;
            program.load().map_err(refused)?;
            for interface in &config.uplinks {
                let options = if tcx {
                    // First, so that what other programs drop, redirect or
                    // accept for good is still counted.
                    TcAttachOptions::TcxOrder(LinkOrder::first())
                } else {
                    prepare_clsact(interface, name, hook)?;
                    TcAttachOptions::Netlink(NlOptions::default())
                };
                program
                    .attach_with_options(interface, hook, options)
                    .map_err(|source| MeterError::Attach {
                        interface: interface.clone(),
                        direction,
                        source: Box::new(source),
                    })?;
            }
        }
        Ok(())
    }
}

impl Measure for Meter {
    fn counters(&mut self) -> Result<Counters, MeterError> {
        let mut counters = Counters::default();
        for index in 0..CELLS {
            let cpus = self
                .counters
                .get(&index, 0)
                .map_err(|source| MeterError::Map {
                    name: "COUNTERS",
                    source,
                })?;
            counters.add_cpus(index, cpus.iter().map(|Cell(cpu)| *cpu));
        }
        Ok(counters)
    }
}

/// Takes a map out of the object, as the type it has to be.
fn map<T>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, MeterError>
where
    T: TryFrom<aya::maps::Map, Error = MapError>,
{
    let map = ebpf.take_map(name).ok_or(MeterError::Foreign { name })?;
    T::try_from(map).map_err(|source| MeterError::Map { name, source })
}

/// A clsact qdisc, without what an earlier agent left there.
fn prepare_clsact(
    interface: &str,
    program: &'static str,
    hook: TcAttachType,
) -> Result<(), MeterError> {
    let clsact = |source| MeterError::Clsact {
        interface: interface.to_owned(),
        source,
    };
    match tc::qdisc_add_clsact(interface) {
        Ok(()) => {}
        // It is there already, an earlier agent's or another program's.
        Err(tc::TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
        Err(error) => return Err(clsact(error)),
    }
    match tc::qdisc_detach_program(interface, hook, program) {
        Ok(()) => {
            tracing::warn!(
                interface,
                program,
                "removed the meter of an agent that was killed"
            );
            Ok(())
        }
        Err(tc::TcError::IoError(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(clsact(error)),
    }
}

fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

fn check_uplinks(uplinks: &[String]) -> Result<(), MeterError> {
    if uplinks.is_empty() {
        return Err(MeterError::NoUplink);
    }
    let mut present = BTreeMap::new();
    for interface in nix::ifaddrs::getifaddrs().map_err(MeterError::List)? {
        let link = interface.address.as_ref();
        if let Some(link) = link.and_then(|address| address.as_link_addr()) {
            present.insert(interface.interface_name, link.hatype());
        }
    }
    for name in uplinks {
        match present.get(name) {
            Some(&libc::ARPHRD_ETHER) => {}
            Some(_) => return Err(MeterError::NotEthernet { name: name.clone() }),
            None => {
                let names: Vec<&str> = present.keys().map(String::as_str).collect();
                return Err(MeterError::NoInterface {
                    name: name.clone(),
                    present: names.join(", "),
                });
            }
        }
    }
    Ok(())
}
