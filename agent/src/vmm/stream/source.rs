//! A VM in stream mode on the host it is moved from.

use super::error::StreamVmError;
use super::feed::{Feed, Stand, StreamPages};
use super::loses_pages;
use super::preflight::{Found, check_source};
use super::ram::ProcessRam;
use super::reading::{Reading, hand_back};
use crate::vmm::launch::Vmm;
use crate::vmm::preflight::QemuFacts;
use crate::vmm::qmp::{Cursor, MigrationStatus, Qmp, QmpError, RunState};
use crate::vmm::relay::OfferedSocket;
use crate::vmm::setup::{self, Move};
use serde_json::json;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::task::AbortHandle;

/// How long QEMU may take to connect.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// `downtime-limit` while pages are to go on: QEMU stops the guest only when
/// next to nothing is left. Not 0: then 7.2 does not look at its dirty log.
const GO_ON_MS: u64 = 1;
/// `downtime-limit` with which QEMU stops the guest at its next look; the most
/// that it takes.
const STOP_NOW_MS: u64 = 2_000_000;
/// How long QEMU may then take: it looks every 100 ms, and drains block I/O.
const STOP_LIMIT: Duration = Duration::from_secs(15);
/// How often it is asked whether the guest runs.
const LOOK: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub struct SourceVm {
    vmm: Vmm,
    facts: QemuFacts,
    found: Found,
    ram: Arc<ProcessRam>,
    feed: Arc<Feed>,
    stream: Mutex<Option<Stream>>,
}

/// A migration of QEMU's that has been begun.
#[derive(Debug)]
struct Stream {
    /// Before the event of its end.
    cursor: Cursor,
    reading: Reading,
    watch: AbortHandle,
    /// Whether the guest ran when it was last looked at.
    ran: Arc<AtomicBool>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

impl SourceVm {
    /// Checks every precondition and opens guest RAM for reading. The VM is
    /// not touched.
    pub async fn open(vmm: Vmm) -> Result<SourceVm, StreamVmError> {
        let (facts, found) = check_source(&vmm).await?;
        let ram = found.open(&vmm, false);
        let ram = Arc::new(ram.map_err(|source| StreamVmError::Ram {
            vm: vmm.name.clone(),
            source,
        })?);
        let pages = crate::vmm::source::PageRead::pages(&*ram);
        let feed = Arc::new(Feed::new(&vmm.name, pages));
        Ok(SourceVm {
            vmm,
            facts,
            found,
            ram,
            feed,
            stream: Mutex::default(),
        })
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        &self.vmm
    }

    /// What the target has to know.
    pub fn facts(&self) -> &QemuFacts {
        &self.facts
    }

    /// Guest RAM as it is now.
    pub fn ram(&self) -> &Arc<ProcessRam> {
        &self.ram
    }

    /// For the scan thread.
    pub fn pages(&self) -> StreamPages {
        let distrust = loses_pages(self.facts.kvm, self.facts.ram_bytes);
        StreamPages::new(self.feed.clone(), self.ram.clone(), distrust)
    }

    /// Whether the guest runs.
    pub async fn is_running(&self) -> Result<bool, StreamVmError> {
        let state = self.vmm.qmp()?.status().await;
        let state = state.map_err(self.failed("asking for its state"))?;
        Ok(state == RunState::Running)
    }

    /// Starts QEMU's migration into a socket made at `socket`. From here on
    /// QEMU may stop the guest at any moment; it lets it run again when the
    /// migration has failed or was cancelled, but not when the agent dies while
    /// QEMU waits for the switch.
    pub async fn begin(&self, socket: &Path) -> Result<(), StreamVmError> {
        let qmp = self.vmm.qmp()?;
        let downtime_ms = GO_ON_MS;
        let set_up = setup::apply(qmp, Move::Stream { downtime_ms }).await;
        set_up.map_err(self.failed("setting up its migration"))?;
        let offered = OfferedSocket::bind(socket).map_err(|source| StreamVmError::Socket {
            vm: self.vmm.name.clone(),
            path: socket.to_owned(),
            source,
        })?;
        let cursor = qmp.cursor();
        let uri = format!("unix:{}", socket.display());
        let started = qmp.migrate(&uri).await;
        started.map_err(self.failed("starting its migration"))?;
        let not_connected = |source| StreamVmError::NotConnected {
            vm: self.vmm.name.clone(),
            path: socket.to_owned(),
            source,
        };
        let accepted = offered.accept(CONNECT_LIMIT).await.map_err(not_connected)?;
        let reading = accepted.into_std().and_then(|socket| {
            let block = self.found.block.clone();
            Reading::start(&self.vmm.name, socket, Vec::new(), self.feed.clone(), block)
        });
        let reading = reading.map_err(|source| StreamVmError::Thread {
            vm: self.vmm.name.clone(),
            source,
        })?;
        let ran = Arc::new(AtomicBool::new(true));
        let watching = watch(qmp.clone(), cursor, self.feed.clone(), ran.clone());
        *self.stream() = Some(Stream {
            cursor,
            reading,
            watch: tokio::spawn(watching).abort_handle(),
            ran,
        });
        Ok(())
    }

    /// Lets QEMU stop the guest, if it has not by itself. Returns whether the guest was running: one that its operator
    /// has paused must not run on the target either.
    pub async fn pause(&self) -> Result<bool, StreamVmError> {
        let mut stand = self.feed.stand();
        if *stand.borrow() == Stand::Runs {
            let parameters = json!({ "downtime-limit": STOP_NOW_MS });
            let set = self.vmm.qmp()?.set_migration_parameters(parameters).await;
            set.map_err(self.failed("letting QEMU stop it"))?;
        }
        let still = stand.wait_for(|stand| *stand != Stand::Runs);
        let still = tokio::time::timeout(STOP_LIMIT, still).await;
        match still.map(|found| found.map(|found| found.clone())) {
            Ok(Ok(Stand::Still(_))) => {}
            Ok(Ok(Stand::Over(why))) => return Err(self.broken(why)),
            Ok(_) | Err(_) => {
                return Err(StreamVmError::NotStopped {
                    vm: self.vmm.name.clone(),
                    limit_s: STOP_LIMIT.as_secs(),
                });
            }
        }
        let stream = self.stream();
        let stream = stream.as_ref().ok_or_else(|| self.not_begun())?;
        Ok(stream.ran.load(Relaxed))
    }

    /// Lets QEMU go on from the guest's standstill to its last section.
    pub async fn report_rest(&self) -> Result<(), StreamVmError> {
        let qmp = self.vmm.qmp()?;
        let cursor = qmp.cursor();
        let begun = self.stream().as_mut().map(|stream| stream.cursor = cursor);
        begun.ok_or_else(|| self.not_begun())?;
        let go_on = qmp.migrate_continue().await;
        go_on.map_err(self.failed("letting QEMU go on to the switch"))
    }

    /// Since when the guest has stood still, if it does.
    pub fn stopped_at(&self) -> Option<Instant> {
        match *self.feed.stand().borrow() {
            Stand::Still(since) => Some(since),
            _ => None,
        }
    }

    /// Sends what is left of the stream to `target` and its answers back, until
    /// both QEMUs are through. All pages must be in place.
    ///
    /// On success the VMM stands still for good: the target owns the VM as
    /// soon as the journal says so.
    pub async fn state_out(
        &self,
        target: impl AsyncRead + AsyncWrite,
        limit: Duration,
    ) -> Result<(), StreamVmError> {
        let qmp = self.vmm.qmp()?;
        let (cursor, socket, residue) = {
            let mut stream = self.stream();
            let stream = stream.as_mut().ok_or_else(|| self.not_begun())?;
            let residue = stream.reading.take_residue();
            let residue = residue.ok_or_else(|| self.not_begun())?;
            (stream.cursor, stream.reading.socket(), residue)
        };
        let (from_target, to_target) = tokio::io::split(target);
        let forwarding = async {
            match residue.send(to_target).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(self.broken(
                    self.feed
                        .failure()
                        .unwrap_or_else(|| "it has no end".to_owned()),
                )),
                Err(source) => Err(self.not_forwarded(source)),
            }
        };
        let answering = async {
            let answered = answer(from_target, &socket).await;
            answered.map_err(|source| self.not_forwarded(source))
        };
        let completing = async {
            let over = qmp.wait_migration_over(cursor, limit).await;
            match over.map_err(self.failed("sending its device state"))? {
                MigrationStatus::Completed => Ok(()),
                status => {
                    let info = qmp.migration().await;
                    let info = info.map_err(self.failed("asking why its state stayed"))?;
                    Err(StreamVmError::State {
                        vm: self.vmm.name.clone(),
                        status,
                        why: info
                            .error_desc
                            .unwrap_or_else(|| "QEMU gives no reason".into()),
                    })
                }
            }
        };
        let all = async { tokio::try_join!(forwarding, answering, completing) };
        match tokio::time::timeout(limit, all).await {
            Ok(done) => done.map(drop),
            Err(_) => Err(self.not_forwarded(io::ErrorKind::TimedOut.into())),
        }
    }

    /// Ends the stream, so that QEMU gives its migration up.
    pub fn break_off(&self) {
        self.feed.fail("the move was given up");
        drop(self.stream().take());
    }

    fn stream(&self) -> MutexGuard<'_, Option<Stream>> {
        // Nothing panics while it holds the lock; the state is whole in any case.
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, doing: &'static str) -> impl FnOnce(QmpError) -> StreamVmError {
        let vm = self.vmm.name.clone();
        move |source| StreamVmError::Qmp { vm, doing, source }
    }

    fn broken(&self, why: String) -> StreamVmError {
        StreamVmError::Broken {
            vm: self.vmm.name.clone(),
            why,
        }
    }

    fn not_forwarded(&self, source: io::Error) -> StreamVmError {
        StreamVmError::Forward {
            vm: self.vmm.name.clone(),
            source,
        }
    }

    fn not_begun(&self) -> StreamVmError {
        StreamVmError::NotBegun {
            vm: self.vmm.name.clone(),
        }
    }
}

impl Drop for SourceVm {
    fn drop(&mut self) {
        self.break_off();
    }
}

/// Tells the feed when QEMU has stopped the guest, or has given up.
async fn watch(qmp: Qmp, mut cursor: Cursor, feed: Arc<Feed>, ran: Arc<AtomicBool>) {
    let told =
        |status: &MigrationStatus| *status == MigrationStatus::PreSwitchover || status.is_over();
    loop {
        let next = qmp.cursor();
        let waited = qmp.wait_migration(cursor, "the switch", LOOK, told).await;
        match waited {
            Ok(MigrationStatus::PreSwitchover) => return feed.stands_still(Instant::now()),
            Ok(status) => {
                let info = qmp.migration().await.ok();
                let why = info.and_then(|info| info.error_desc).unwrap_or_default();
                return feed.fail(&format!("QEMU's migration ended as {status:?} {why}"));
            }
            // An operator may pause it meanwhile.
            Err(QmpError::Timeout { .. }) => match qmp.status().await {
                Ok(RunState::Running) => ran.store(true, Relaxed),
                Ok(RunState::Paused) => ran.store(false, Relaxed),
                Ok(_) | Err(QmpError::Timeout { .. }) => {}
                Err(error) => return feed.fail(&error.to_string()),
            },
            Err(error) => return feed.fail(&error.to_string()),
        }
        cursor = next;
    }
}

/// The return path. Nothing is ever added to it, above all not its last
/// message, by which the source knows that the target has it all.
async fn answer(mut from: impl AsyncRead + Unpin, to: &UnixStream) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let read = from.read(&mut buffer).await?;
        hand_back(to, &buffer[..read])?;
        if read == 0 {
            // QEMU may have gone, having heard it all.
            let _ = to.shutdown(Shutdown::Write);
            return Ok(());
        }
    }
}
