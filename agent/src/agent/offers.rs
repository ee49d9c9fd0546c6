//! Sockets offered to VMs whose manager (libvirt) drives their migration, and
//! the VMs that have come to them.
//!
//! A VM is offered `NAME.sock` in `transport_dir`; its manager is told to migrate
//! there. Once its QEMU has connected, a gang can take the VM along like any
//! other of this host. Until then, and until it is its turn, QEMU waits for its
//! stream to be read and the guest runs. An offer that nobody asks after is
//! withdrawn: its connection is closed, and the manager lets the guest run on.

use super::Agent;
use super::departures::data_bytes;
use crate::api::types::{KindInfo, OfferInfo, OfferRequest, OfferState, VmInfo};
use crate::api::{ApiError, ApiResult, ErrorKind};
use crate::config::{AgentConfig, HostGroup, NAME_RULE, is_name};
use crate::gang::handover::chain;
use crate::gang::message::SourceFacts;
use crate::gang::plan::MAX_VMS;
use crate::types::GangId;
use crate::vmm::definition::Kind;
use crate::vmm::kinds::VmFacts;
use crate::vmm::managed::SourceVm;
use crate::vmm::relay::OfferedSocket;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::AbortHandle;

/// An offer that nobody has asked after for so long is withdrawn.
const KEPT: Duration = Duration::from_secs(30);
/// For as long as it takes.
const ANY_TIME: Duration = Duration::from_secs(1 << 30);

/// The offers of this host, by the name of the VM.
#[derive(Debug, Default)]
pub(super) struct Offers(RefCell<BTreeMap<String, Rc<Offer>>>);

/// One socket, and what has come to it.
#[derive(Debug)]
struct Offer {
    /// What the operator calls the gang.
    gang: String,
    domain: String,
    path: PathBuf,
    state: RefCell<State>,
    heard: Cell<Instant>,
    waits: RefCell<Option<AbortHandle>>,
}

#[derive(Debug)]
enum State {
    /// Nobody has connected.
    Offered,
    /// Its VMM has, and waits.
    Connected(Arc<SourceVm>),
    /// A gang has it.
    Moving(GangId),
    /// What has connected cannot be moved.
    Refused(String),
}

impl Drop for Offer {
    fn drop(&mut self) {
        if let Some(waits) = self.waits.get_mut().take() {
            waits.abort();
        }
    }
}

impl Offer {
    fn info(&self, name: &str) -> OfferInfo {
        let (state, error) = match &*self.state.borrow() {
            State::Offered => (OfferState::Offered, None),
            State::Connected(vm) => match vm.check() {
                Ok(()) => (OfferState::Connected, None),
                Err(why) => (OfferState::Refused, Some(chain(&why))),
            },
            State::Moving(_) => (OfferState::Moving, None),
            State::Refused(why) => (OfferState::Refused, Some(why.clone())),
        };
        OfferInfo {
            vm: name.to_owned(),
            uri: format!("unix://{}", self.path.display()),
            socket: self.path.clone(),
            state,
            error,
        }
    }
}

/// Makes the directory for the sockets of VMs and their targets, if it is not
/// there: for root alone, or for a group, whose members cannot remove each
/// other's sockets.
pub(super) fn make_transport_dir(config: &AgentConfig) -> io::Result<()> {
    let dir = &config.transport_dir;
    if dir.is_dir() {
        return Ok(());
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)?;
    if let Some(group) = &config.transport_group {
        let group = HostGroup::find(group).map_err(io::Error::other)?;
        std::os::unix::fs::chown(dir, None, Some(group.gid))?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o1770))?;
    }
    Ok(())
}

/// Where a VM's manager connects, or has its target listen.
pub(super) fn socket_of(dir: &Path, vm: &str) -> Result<PathBuf, String> {
    match is_name(vm) {
        true => Ok(dir.join(format!("{vm}.sock"))),
        false => Err(format!("`{vm}` is not a name: {NAME_RULE}")),
    }
}

impl Offers {
    fn get(&self, vm: &str) -> Option<Rc<Offer>> {
        self.0.borrow().get(vm).cloned()
    }

    /// The VM, if it has come and no gang has it.
    fn connected(&self, vm: &str) -> Result<Option<Arc<SourceVm>>, String> {
        let Some(offer) = self.get(vm) else {
            return Ok(None);
        };
        offer.heard.set(Instant::now());
        match &*offer.state.borrow() {
            State::Connected(source) => {
                source.check().map_err(|e| chain(&e))?;
                Ok(Some(source.clone()))
            }
            State::Offered => Err(format!(
                "VM {vm} has not come to {} yet: start its migration there",
                offer.path.display()
            )),
            State::Moving(gang) => Err(format!("VM {vm} is being moved by gang {gang} already")),
            State::Refused(why) => Err(why.clone()),
        }
    }

    /// Takes the VM for a gang.
    pub(super) fn take(&self, vm: &str, gang: GangId) -> Result<Option<Arc<SourceVm>>, String> {
        let Some(source) = self.connected(vm)? else {
            return Ok(None);
        };
        if let Some(offer) = self.get(vm) {
            offer.state.replace(State::Moving(gang));
        }
        Ok(Some(source))
    }

    /// Nothing of it is left here: its socket goes, and with it the connection,
    /// unless a gang has it.
    pub(super) fn remove(&self, vm: &str) {
        self.0.borrow_mut().remove(vm);
    }

    /// For `drover vm list`.
    pub(super) fn vms(&self) -> Vec<VmInfo> {
        let offers = self.0.borrow();
        let info = |(name, offer): (&String, &Rc<Offer>)| {
            let (ram_bytes, pid, kind) = match &*offer.state.borrow() {
                State::Connected(vm) => {
                    let pid = vm.process().pid() as u32;
                    (vm.facts().ram_bytes, pid, vm.facts().kind())
                }
                _ => (0, 0, Kind::QemuManaged),
            };
            let told = offer.info(name);
            let refused = told.error.map(|why| KindInfo {
                kind: kind.to_string(),
                why_not: Some(why),
            });
            VmInfo {
                name: name.clone(),
                kind: match refused {
                    None => kind.to_string(),
                    Some(_) => "none".to_owned(),
                },
                kinds: refused.into_iter().collect(),
                status: told.state.as_str().to_owned(),
                ram_bytes,
                pages_scanned: 0,
                dirty_bytes_per_s: None,
                pid,
                qmp: offer.path.clone(),
                domain: offer.domain.clone(),
            }
        };
        offers.iter().map(info).collect()
    }

    /// Withdraws what nobody asks after.
    pub(super) fn reap(&self) {
        self.0.borrow_mut().retain(|vm, offer| {
            let moving = matches!(*offer.state.borrow(), State::Moving(_));
            let kept = moving || offer.heard.get().elapsed() < KEPT;
            if !kept {
                tracing::warn!(%vm, gang = %offer.gang,
                    "nobody has asked after its socket for {} s: withdrawn", KEPT.as_secs());
            }
            kept
        });
    }
}

impl Agent {
    /// What the target of an offered VM must know; `None` if it is not offered.
    pub(super) fn check_offered(&self, name: &str) -> Result<Option<SourceFacts>, String> {
        let Some(source) = self.offers.connected(name)? else {
            return Ok(None);
        };
        let data_bytes =
            data_bytes(&**source.ram()).map_err(|e| format!("RAM of VM {name}: {e}"))?;
        Ok(Some(SourceFacts {
            vmm: VmFacts::Managed(source.facts().clone()),
            unfit: Vec::new(),
            data_bytes,
            definition: String::new(),
        }))
    }

    /// Offers sockets to the VMs of a gang. Either all are offered or none.
    pub(super) async fn offer(self: &Rc<Self>, request: OfferRequest) -> ApiResult<Vec<OfferInfo>> {
        let invalid =
            |error: String, remedy: &str| ApiError::new(ErrorKind::Invalid, error, remedy);
        if request.vms.is_empty() || request.vms.len() > MAX_VMS {
            let error = format!("{} VMs are to be offered a socket", request.vms.len());
            return Err(invalid(
                error,
                "name between 1 and as many as a plan may have",
            ));
        }
        for name in [&request.gang, &request.domain] {
            if !is_name(name) {
                return Err(invalid(format!("`{name}` is not a name"), NAME_RULE));
            }
        }
        let mut made = Vec::new();
        for vm in &request.vms {
            match self.offer_one(vm, &request).await {
                Ok(()) => made.push(vm),
                Err(error) => {
                    made.into_iter().for_each(|vm| self.offers.remove(vm));
                    return Err(error);
                }
            }
        }
        self.offered(&request.gang)
    }

    async fn offer_one(self: &Rc<Self>, vm: &str, request: &OfferRequest) -> ApiResult<()> {
        let path = socket_of(&self.config.transport_dir, vm)
            .map_err(|why| ApiError::new(ErrorKind::Invalid, why, NAME_RULE))?;
        let taken = match (self.offers.get(vm), self.vms.get(vm)) {
            (Some(offer), _) => Some(format!("gang {} has one already", offer.gang)),
            (_, Some(_)) => Some("this agent has the VM in its own charge".to_owned()),
            _ => None,
        };
        if let Some(why) = taken {
            let error = format!("VM {vm} cannot be offered a socket: {why}");
            let remedy = "wait for that gang's end, or choose another VM: see `drover vm list`";
            return Err(ApiError::new(ErrorKind::Conflict, error, remedy));
        }
        // What was withdrawn just now removes its socket first.
        tokio::task::yield_now().await;
        let socket = make_transport_dir(&self.config).and_then(|()| OfferedSocket::bind(&path));
        let socket = socket.map_err(|error| {
            ApiError::new(
                ErrorKind::Failed,
                format!("no socket can be made at {}: {error}", path.display()),
                "see `transport_dir` in agent.toml",
            )
        })?;
        let offer = Rc::new(Offer {
            gang: request.gang.clone(),
            domain: request.domain.clone(),
            path,
            state: RefCell::new(State::Offered),
            heard: Cell::new(Instant::now()),
            waits: RefCell::default(),
        });
        let (agent, name, domain) = (self.clone(), vm.to_owned(), request.domain.clone());
        let waiting = tokio::task::spawn_local(async move {
            agent.await_vmm(&name, &domain, socket).await;
        });
        offer.waits.replace(Some(waiting.abort_handle()));
        self.offers.0.borrow_mut().insert(vm.to_owned(), offer);
        Ok(())
    }

    /// Waits for the VM's VMM, and for a second connection, which none may open.
    async fn await_vmm(&self, name: &str, domain: &str, socket: OfferedSocket) {
        let enter = |state| {
            if let Some(offer) = self.offers.get(name) {
                offer.state.replace(state);
            }
        };
        let Ok(connection) = socket.accept(ANY_TIME).await else {
            return enter(State::Refused(format!("VM {name}: its socket has failed")));
        };
        match SourceVm::open(name, domain, connection, &self.config.vmms()).await {
            Ok(vm) => {
                tracing::info!(vm = %name, pid = vm.process().pid(), "its manager has brought it");
                enter(State::Connected(Arc::new(vm)));
            }
            Err(error) => {
                let why = chain(&error);
                tracing::warn!(vm = %name, %why, "its manager's migration is refused");
                return enter(State::Refused(why));
            }
        }
        // Closed at once: QEMU's migration fails.
        while let Ok(second) = socket.accept(ANY_TIME).await {
            drop(second);
            let why = format!(
                "VM {name}: its migration opens more than one connection: leave out --parallel"
            );
            tracing::warn!(%why);
            if let Some(offer) = self.offers.get(name)
                && let State::Connected(_) = *offer.state.borrow()
            {
                enter(State::Refused(why));
            }
        }
    }

    /// The offers to a gang.
    pub(super) fn offered(&self, gang: &str) -> ApiResult<Vec<OfferInfo>> {
        let offers = self.offers.0.borrow();
        let of_gang = offers.iter().filter(|(_, offer)| offer.gang == gang);
        let infos: Vec<_> = of_gang
            .map(|(vm, offer)| {
                offer.heard.set(Instant::now());
                offer.info(vm)
            })
            .collect();
        match infos.is_empty() {
            false => Ok(infos),
            true => Err(ApiError::new(
                ErrorKind::NotFound,
                format!("no sockets are offered to gang {gang} here"),
                "`drover gang open` offers some; it may have been withdrawn meanwhile",
            )),
        }
    }

    /// Withdraws the offers to a gang's VMs, all of them if none is named. What
    /// the gang moves already goes on moving.
    pub(super) fn withdraw(&self, gang: &str, vms: &[String]) {
        self.offers.0.borrow_mut().retain(|vm, offer| {
            let meant = offer.gang == gang && (vms.is_empty() || vms.contains(vm));
            !meant || matches!(*offer.state.borrow(), State::Moving(_))
        });
    }
}
