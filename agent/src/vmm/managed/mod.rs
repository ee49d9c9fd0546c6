//! QEMU VMs whose *manager* (libvirt) drives their migration; kind
//! `qemu-managed`.
//!
//! ```text
//! libvirt A ─ virsh migrate --migrateuri unix:///DIR/g1.sock ─ libvirt B
//!    │ connects, hands the descriptor to                          │ has it listen
//!    ▼                                                            ▼
//! QEMU ─▶ DIR/g1.sock: source agent ── lanes ── target agent ─▶ DIR/g1.sock: QEMU
//!           RAM out of /proc/PID/mem               into /proc/PID/mem
//! ```
//!
//! The agents are the wire between the two QEMUs, and nothing else: they have no
//! monitor, start no VMM and end none. QEMU decides alone when to stop the guest,
//! and the manager which side runs it. As in [stream mode](super::stream), the
//! stream tells which pages to send and its residue makes the target's; what is
//! here is how to get at QEMU's memory without asking it ([`peer`], [`memory`])
//! and what each end does ([`SourceVm`], [`TargetVm`]).
//!
//! The move is decided by one message, SHUT, by which the target's QEMU says that
//! it has everything. Until [`SourceVm::complete`] hands it on, closing the
//! socket lets the guest run on at its source.
//!
//! See `docs/libvirt.md`.

mod cloud_hypervisor;
mod error;
mod head;
mod memory;
mod peer;
mod source;
mod target;

pub use error::{ManagedError, PeerError};
pub use source::SourceVm;
pub use target::{Link, TargetVm};

use super::definition::Kind;
use super::launch::blocking;
use super::process::VmProcess;
use super::stream::ProcessRam;
use serde::{Deserialize, Serialize};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};

/// How long it may take until one process alone holds the other end of a
/// connection: libvirt has it before QEMU, and a QEMU has to accept it.
const HOLDER_LIMIT: Duration = Duration::from_secs(5);

/// A connection to the target agent.
pub trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

/// What a source knows of its VM; travels to the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManagedFacts {
    /// Its name: that of its sockets.
    pub name: String,
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// What its VMM speaks.
    pub dialect: Dialect,
    /// Dedup domain, as the operator gave it.
    pub domain: String,
}

impl ManagedFacts {
    /// How the VM is moved.
    pub fn kind(&self) -> Kind {
        match self.dialect {
            Dialect::Qemu { .. } => Kind::QemuManaged,
            Dialect::CloudHypervisor { .. } => Kind::CloudHypervisor,
        }
    }
}

/// How a VM's VMM migrates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dialect {
    /// QEMU's stream.
    Qemu {
        /// The RAM block of the machine, as the stream lists it.
        block: String,
    },
    /// Cloud Hypervisor's requests.
    CloudHypervisor {
        /// The VM's configuration, JSON, which goes to the target unchanged.
        config: Vec<u8>,
    },
}

/// Finds the VMM at the other end of `socket` and opens its guest RAM; whether
/// it runs the guest by KVM.
async fn look(
    facts: &ManagedFacts,
    socket: UnixStream,
    binaries: Vec<PathBuf>,
    writable: bool,
) -> Result<(Arc<VmProcess>, Arc<ProcessRam>, bool), ManagedError> {
    let facts = facts.clone();
    let looking = move || {
        let vm = || facts.name.clone();
        let process = peer::holder(&socket, HOLDER_LIMIT);
        let process = process.map_err(|source| ManagedError::Peer { vm: vm(), source })?;
        let exe = process.exe();
        let exe = exe.map_err(|source| ManagedError::Process { vm: vm(), source })?;
        if !binaries.contains(&exe) {
            let pid = process.pid();
            return Err(ManagedError::Stranger { vm: vm(), pid, exe });
        }
        let ram = memory::open(&facts.name, &process, facts.ram_bytes, writable)?;
        let kvm = peer::has_kvm(&process);
        Ok((Arc::new(process), Arc::new(ram), kvm))
    };
    blocking(looking).await
}
