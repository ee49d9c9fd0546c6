//! A VM of this kind on the host it is moved to.

use super::client::LinkClient;
use super::error::KvmLogVmError;
use super::source::{LinkedFacts, link, parts};
use super::state;
use crate::vmm::definition::{Definition, VmPaths};
use crate::vmm::launch::{Launched, Role, Vmm, blocking};
use crate::vmm::ram::GuestRam;
use crate::vmm::relay::OfferedSocket;
use drover_vmm::wire::Phase;
use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;

/// How long device state may stand still on its way.
const IDLE: Duration = Duration::from_secs(30);
/// Its connection is made while the guest still runs, and ends with the move.
const SOME_DAY: Duration = Duration::from_secs(24 * 3600);

/// Dropped before [`TargetVm::keep`], its VMM is killed and its files are
/// removed.
#[derive(Debug)]
pub struct TargetVm {
    loading: tokio::sync::Mutex<Option<Loading>>,
    launched: Launched,
    link: Arc<LinkClient>,
    ram: Arc<GuestRam>,
}

/// The task by which device state comes in. Dropping it ends that.
#[derive(Debug)]
struct Loading {
    task: JoinHandle<Result<(), KvmLogVmError>>,
    stream: Arc<Mutex<Option<UnixStream>>>,
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.task.abort();
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = &*stream {
            // Wakes the thread that reads; fails only if it is through.
            let _over = stream.shutdown(Shutdown::Both);
        }
    }
}

impl TargetVm {
    /// Starts a VMM that waits for the VM, checks it against the source's facts
    /// and opens its RAM for placing pages.
    ///
    /// # Errors
    /// Nothing is left of it then.
    pub async fn prepare(
        definition: &Definition,
        paths: &VmPaths,
        host: &BTreeMap<String, String>,
        facts: &LinkedFacts,
    ) -> Result<TargetVm, KvmLogVmError> {
        let same = |what, have: String, wanted: String, whose| match have == wanted {
            true => Ok(()),
            false => Err(KvmLogVmError::Differs {
                vm: facts.name.clone(),
                what,
                have,
                wanted,
                whose,
            }),
        };
        let (ram, defined) = (
            facts.ram_bytes.to_string(),
            definition.ram_bytes.to_string(),
        );
        same("RAM size", ram.clone(), defined, "definition")?;
        let launched = Launched::start(definition, paths, host, Role::Incoming).await?;
        let link = link(launched.vmm())?.clone();
        let asked = link.clone();
        let looked = blocking(move || Ok::<_, KvmLogVmError>((asked.status()?, asked.ram(true)?)));
        let (status, ram) = looked.await?;
        if status.phase != Phase::Waiting || status.running {
            return Err(KvmLogVmError::Phase {
                vm: facts.name.clone(),
                is: "was started and has a VM of its own (see incoming_args in its definition)",
                wanted: "waits for one",
            });
        }
        let bytes = ram.len().to_string();
        same("RAM size", bytes, facts.ram_bytes.to_string(), "source")?;
        let (have, wanted) = (parts(link.regions()), &facts.parts);
        let (have, wanted) = (format!("{have:x?}"), format!("{wanted:x?}"));
        same("layout of its RAM", have, wanted, "source")?;
        Ok(TargetVm {
            loading: tokio::sync::Mutex::default(),
            launched,
            link,
            ram,
        })
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        self.launched.vmm()
    }

    /// Guest RAM, for placing pages. They are where the guest will find them.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Listens for device state on the Unix socket `socket`, and has the VMM
    /// take in what comes.
    ///
    /// # Errors
    /// There can be no such socket.
    pub async fn listen(&mut self, socket: &Path) -> Result<(), KvmLogVmError> {
        let vm = self.vmm().name.clone();
        let offered = OfferedSocket::bind(socket).map_err(|source| KvmLogVmError::Socket {
            vm: vm.clone(),
            source,
        })?;
        let held = Arc::<Mutex<Option<UnixStream>>>::default();
        let (link, stream) = (self.link.clone(), held.clone());
        let task = tokio::spawn(async move {
            let accepted = offered.accept(SOME_DAY).await;
            let accepted = accepted.map_err(|source| KvmLogVmError::Carried {
                vm: vm.clone(),
                source,
            })?;
            let ours = || -> io::Result<UnixStream> {
                let ours = accepted.into_std()?;
                ours.set_nonblocking(false)?;
                let handle = ours.try_clone()?;
                *stream.lock().unwrap_or_else(PoisonError::into_inner) = Some(handle);
                Ok(ours)
            };
            let ours = ours().map_err(|source| KvmLogVmError::Socket { vm, source })?;
            let taken = blocking(move || state::take(&link, ours, IDLE)).await;
            // The last handle: the source's agent waits for its end.
            *stream.lock().unwrap_or_else(PoisonError::into_inner) = None;
            taken.map(drop)
        });
        *self.loading.get_mut() = Some(Loading { task, stream: held });
        Ok(())
    }

    /// Waits until all device state has arrived; the guest then stands.
    ///
    /// # Errors
    /// It has not, and will not unless there is time left.
    pub async fn wait_arrived(&self, limit: Duration) -> Result<(), KvmLogVmError> {
        let vm = || self.vmm().name.clone();
        let mut loading = self.loading.lock().await;
        let Some(Loading { task, .. }) = &mut *loading else {
            return Err(KvmLogVmError::State {
                vm: vm(),
                why: "nobody listens for it".to_owned(),
            });
        };
        let Ok(ended) = tokio::time::timeout(limit, task).await else {
            return Err(KvmLogVmError::Limit {
                vm: vm(),
                what: "the arrival of its device state",
                limit,
            });
        };
        *loading = None;
        match ended {
            Ok(loaded) => loaded?,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
        let link = self.link.clone();
        let status = blocking(move || link.status()).await?;
        match (status.phase, status.running) {
            (Phase::Arrived, false) => Ok(()),
            (_, running) => Err(KvmLogVmError::RunState {
                vm: vm(),
                is: if running { "runs" } else { "is not there" },
                doing: "the arrival of its device state",
            }),
        }
    }

    /// The VM lives here from now on: its VMM and files stay when we go.
    pub fn keep(self) -> Vmm {
        self.launched.keep()
    }

    /// Ends the half-made VM and removes its files.
    pub async fn abort(self) {
        blocking(move || drop(self)).await;
    }
}
