//! Two real QEMUs, one guest, a plain copy loop.

use crate::harness::*;
use drover::types::{Gfn, PAGE_SIZE};
use drover::vmm::direct::{DirectError, SourceVm, TargetVm};
use drover::vmm::launch::Vmm;
use drover::vmm::qmp::{MigrationStatus, RunState};
use drover::vmm::ram::GuestRam;
use drover::vmm::relay::{RelayError, RelayStats, relay};
use drover::vmm::{DirectSource, PageSource};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

fn copy(from: &DirectSource, to: &GuestRam, run: Range<Gfn>) {
    let mut page = [0; PAGE_SIZE];
    for gfn in run.start.0..run.end.0 {
        from.read_run(Gfn(gfn), &mut page).unwrap();
        if page == [0; PAGE_SIZE] {
            to.zero_page(Gfn(gfn)).unwrap();
        } else {
            to.write_page(Gfn(gfn), &page).unwrap();
        }
    }
}

fn round(from: &mut DirectSource, to: &GuestRam, first: bool) -> u64 {
    let mut runs = Vec::new();
    let mut take = |run| runs.push(run);
    let stats = if first {
        from.first_round(&mut take)
    } else {
        from.next_round(&mut take)
    };
    runs.into_iter().for_each(|run| copy(from, to, run));
    stats.unwrap().pages
}

/// Relays one connection made to `at` to the socket `to`.
pub(crate) fn relaying(at: &Path, to: PathBuf) -> JoinHandle<Result<RelayStats, RelayError>> {
    let listener = UnixListener::bind(at).unwrap();
    tokio::spawn(async move {
        let (source, _) = listener.accept().await.unwrap();
        let target = UnixStream::connect(to).await.unwrap();
        relay(source, target, LIMIT).await
    })
}

/// Left on, it would make the operator's own next migration lose all RAM.
async fn ignores_shared(vmm: &Vmm) -> bool {
    let all = vmm.qmp().unwrap().migration_capabilities().await.unwrap();
    all.contains(&("x-ignore-shared".to_owned(), true))
}

struct Move {
    a: Host,
    b: Host,
    vm: Vm,
    source: SourceVm,
    target: TargetVm,
    pages: DirectSource,
}

impl Move {
    /// Everything up to the last page: the guest is paused, RAM is equal.
    async fn up_to_the_switch(ram: &str, accel: Accel) -> Move {
        let (a, b) = (Host::new(), Host::new());
        let definition = define("vm", ram, accel, RAM, &[]);
        let vm = a.start(&definition).await;
        let noise: Vec<u8> = (0..2 << 20)
            .map(|i: u32| (i.wrapping_mul(2654435761) >> 13) as u8)
            .collect();
        vm.guest.write(0x180_0000, &noise);
        vm.guest.busy(Gfn(0x800), 512);
        let source = SourceVm::open(vm.launched.vmm().clone()).await.unwrap();
        let target = TargetVm::prepare(
            &definition,
            &b.paths("vm"),
            &b.placeholders(),
            source.facts(),
        )
        .await
        .unwrap();
        let (log, quiesced) = source.start_log().await.unwrap();
        println!(
            "{accel:?} {ram}: guest stood still {:?} for the first protect",
            quiesced.stopped
        );
        let mut pages = DirectSource::new(source.ram().clone(), log);
        let all = pages.pages();
        let first = round(&mut pages, target.ram(), true);
        assert!(
            first >= 1024 && first < u64::from(all) / 2,
            "{first} of {all} pages have data"
        );
        for _ in 0..3 {
            // Two ticks apart lies a whole pass over the 512 pages.
            vm.guest.wait_ticking();
            vm.guest.wait_ticking();
            let dirty = round(&mut pages, target.ram(), false);
            assert!(
                (512..1024).contains(&dirty),
                "{dirty} pages: 512 are written all the time"
            );
        }
        let mut this = Move {
            a,
            b,
            vm,
            source,
            target,
            pages,
        };
        this.pause_and_finish().await;
        this
    }

    async fn pause_and_finish(&mut self) {
        assert!(self.source.pause().await.unwrap());
        round(&mut self.pages, self.target.ram(), false);
        for run in self.pages.recheck().unwrap() {
            copy(&self.pages, self.target.ram(), run);
        }
        self.assert_ram_equal();
    }

    fn target_guest(&self) -> Guest {
        Guest::of(&self.b.paths("vm").ram)
    }

    fn assert_ram_equal(&self) {
        let differ = differing(&self.vm.guest.all(), &self.target_guest().all());
        assert!(
            differ.is_empty(),
            "{} pages differ: {:x?}",
            differ.len(),
            &differ[..differ.len().min(20)]
        );
    }

    /// Device state across, guest on, source gone. The VM, now living on `b`.
    async fn switch(mut self) -> (Host, Host, Vmm) {
        let (near, far) = (self.a.dir.join("near.sock"), self.b.dir.join("far.sock"));
        self.target.listen(&far).await.unwrap();
        let carrying = relaying(&near, far.clone());
        self.source.prepare_state_out().await.unwrap();
        self.source.push_state(&near, LIMIT).await.unwrap();
        self.target.wait_arrived(LIMIT).await.unwrap();
        let carried = carrying.await.unwrap().unwrap();
        println!(
            "device state: {} bytes there, {} back",
            carried.forward, carried.back
        );
        assert!(
            carried.forward > 10_000 && carried.forward < 4 << 20,
            "no RAM goes this way"
        );
        assert!(carried.back > 0);
        self.pages
            .next_round(&mut |run| panic!("the source wrote {run:x?} after its last round"))
            .unwrap();
        // The target may write while it takes the state in: QEMU's kvmvapic ROM
        // patches itself. Anything else would be a page we lost.
        let mut differ = differing(&self.vm.guest.all(), &self.target_guest().all());
        differ.retain(|page| !(0xc0..0x100).contains(page));
        assert!(differ.is_empty(), "{differ:x?}");
        assert_eq!(
            self.source.vmm().qmp().unwrap().status().await.unwrap(),
            RunState::Postmigrate
        );
        let guest = self.target_guest();
        assert!(guest.is_still(), "the target waits for the word to go");
        self.target.resume().await.unwrap();
        guest.wait_ticking();
        assert_eq!(
            guest.torn_pages(),
            0,
            "the guest finds its data as it left it"
        );
        let process = self.source.vmm().process.clone();
        let paths = self.a.paths("vm");
        drop(self.pages);
        self.source.end(Some(&paths)).await.unwrap();
        assert!(!process.is_alive());
        drop(self.vm);
        self.b.mind(self.target.vmm());
        let vmm = self.target.keep();
        for socket in [near, far] {
            let _ = std::fs::remove_file(socket);
        }
        self.a.assert_empty();
        guest.wait_ticking();
        (self.a, self.b, vmm)
    }
}

async fn end(host: &Host, vmm: Vmm) {
    vmm.end().await.unwrap();
    drover::vmm::launch::remove_files(&host.paths("vm"));
    host.assert_empty();
}

fn moves(ram: &str, accel: Accel) {
    run(async {
        let (_a, b, vmm) = Move::up_to_the_switch(ram, accel).await.switch().await;
        end(&b, vmm).await;
    });
}

#[test]
fn a_busy_vm_moves_tcg() {
    moves("64M", Accel::Tcg);
}

/// QEMU's own dirty log under TCG depends on this size; ours must not.
#[test]
fn a_busy_vm_moves_tcg_odd_size() {
    moves("65528K", Accel::Tcg);
}

#[test]
fn a_busy_vm_moves_kvm() {
    moves("64M", Accel::Kvm);
}

/// Huge pages of the host, given back with the value.
struct HugePages(u64);

impl HugePages {
    const FILE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

    fn add(count: u64) -> HugePages {
        std::fs::write(Self::FILE, (Self::now() + count).to_string()).unwrap();
        HugePages(count)
    }

    fn now() -> u64 {
        std::fs::read_to_string(Self::FILE)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let rest = Self::now().saturating_sub(self.0);
        let _ = std::fs::write(Self::FILE, rest.to_string());
    }
}

/// RAM on hugetlbfs: no holes, no `write`, 2 MiB at a time; the rest is the same.
#[test]
fn ram_of_huge_pages_moves_too() {
    let _pages = HugePages::add(2 * 32 + 4);
    run(async {
        let (a, b) = (Host::new(), Host::new());
        let _mounted = [&a, &b].map(|h| Mounted::new("hugetlbfs", "pagesize=2M", &h.ram_dir));
        let definition = tcg("vm");
        let vm = a.start(&definition).await;
        let source = SourceVm::open(vm.launched.vmm().clone()).await.unwrap();
        let (b_paths, placeholders) = (b.paths("vm"), b.placeholders());
        let target = TargetVm::prepare(&definition, &b_paths, &placeholders, source.facts());
        let target = target.await.unwrap();
        let (log, _) = source.start_log().await.unwrap();
        let mut pages = DirectSource::new(source.ram().clone(), log);
        round(&mut pages, target.ram(), true);
        vm.guest.busy(Gfn(0x1800), 16);
        vm.guest.wait_ticking();
        assert!(source.pause().await.unwrap());
        // The guest's own page and the set, each in a huge page; and what the
        // test wrote past the VMM, which is in the first of them.
        assert_eq!(round(&mut pages, target.ram(), false), 2 * 512);
        for run in pages.recheck().unwrap() {
            copy(&pages, target.ram(), run);
        }
        let arrived = Guest::of(&b_paths.ram);
        assert!(differing(&vm.guest.all(), &arrived.all()).is_empty());
        drop(pages);
        source.roll_back(true).await.unwrap();
        vm.guest.wait_ticking();
        let other = a.paths("other");
        let again = TargetVm::prepare(&definition, &other, &placeholders, source.facts());
        let error = full(&again.await.unwrap_err());
        assert!(error.contains("MiB free"), "{error}");
    });
}

/// Kept VMs are no children of whoever started them: adopt and go on.
#[test]
fn an_adopted_vm_can_be_watched_and_ended() {
    run(async {
        let host = Host::new();
        let vm = host.start(&tcg("vm")).await;
        let Vm {
            guest,
            launched,
            paths,
        } = vm;
        let vmm = launched.keep();
        host.mind(&vmm);
        let pid = vmm.process.pid();
        drop(vmm);
        let vmm = Vmm::adopt("vm", &paths.qmp(), None).await.unwrap();
        assert_eq!(vmm.process.pid(), pid);
        // The monitor takes one client at a time.
        let second = Vmm::adopt("vm", &paths.qmp(), None).await;
        assert!(full(&second.unwrap_err()).contains("another client"));
        let source = SourceVm::open(vmm).await.unwrap();
        assert_eq!(source.facts().ram_bytes, 64 << 20);
        let (log, _) = source.start_log().await.unwrap();
        guest.wait_ticking();
        drop(log);
        source.end(Some(&paths)).await.unwrap();
        host.assert_empty();
    });
}

#[test]
fn the_pid_must_be_the_vmms() {
    run(async {
        let host = Host::new();
        let vm = host.start(&tcg("vm")).await;
        let Vm {
            launched, paths, ..
        } = vm;
        let vmm = launched.keep();
        host.mind(&vmm);
        let process = vmm.process.clone();
        drop(vmm);
        let me = std::process::id() as i32;
        let wrong = Vmm::adopt("vm", &paths.qmp(), Some(me)).await;
        process.kill_and_wait(LIMIT).unwrap();
        drover::vmm::launch::remove_files(&paths);
        assert!(full(&wrong.unwrap_err()).contains("vCPU thread"));
    });
}

/// A target that dies before it has all state: the source fails, runs on as if
/// nothing had been, its log is whole, and the next try arrives.
#[test]
fn a_target_that_dies_leaves_the_source_running() {
    run(async {
        let mut this = Move::up_to_the_switch("64M", Accel::Tcg).await;
        let (near, far) = (this.a.dir.join("near.sock"), this.b.dir.join("far.sock"));
        this.target.listen(&far).await.unwrap();
        let listener = UnixListener::bind(&near).unwrap();
        let target = this.target.vmm().process.clone();
        let carrying = tokio::spawn(async move {
            let (mut source, _) = listener.accept().await.unwrap();
            let mut target_stream = UnixStream::connect(far).await.unwrap();
            // Part of the state arrives, then the target dies; what is left in
            // the relay looks to the source like a target that reads on.
            let mut part = vec![0; 5000];
            tokio::io::AsyncReadExt::read_exact(&mut source, &mut part)
                .await
                .unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut target_stream, &part)
                .await
                .unwrap();
            target.kill_and_wait(LIMIT).unwrap();
            let mut swallowed = 0;
            let mut buffer = vec![0; 1 << 16];
            // Swallow all there is, then close.
            while let Ok(Ok(n @ 1..)) = tokio::time::timeout(
                Duration::from_millis(300),
                tokio::io::AsyncReadExt::read(&mut source, &mut buffer),
            )
            .await
            {
                swallowed += n;
            }
            swallowed
        });
        this.source.prepare_state_out().await.unwrap();
        let error = this.source.push_state(&near, LIMIT).await.unwrap_err();
        assert!(
            matches!(
                &error,
                DirectError::State {
                    status: MigrationStatus::Failed,
                    ..
                }
            ),
            "{}",
            full(&error)
        );
        assert!(carrying.await.unwrap() > 0);
        let gone = this.target.wait_arrived(LIMIT).await.unwrap_err();
        assert!(full(&gone).contains("closed"), "{}", full(&gone));

        this.source.roll_back(true).await.unwrap();
        this.vm.guest.wait_ticking();
        assert_eq!(this.vm.guest.torn_pages(), 0);
        assert!(!ignores_shared(this.source.vmm()).await);
        let definition = tcg("vm");
        let Move {
            a,
            b,
            vm,
            source,
            target,
            mut pages,
        } = this;
        target.abort().await;
        std::fs::remove_file(a.dir.join("near.sock")).unwrap();
        std::fs::remove_file(b.dir.join("far.sock")).unwrap();
        b.assert_empty();

        let target = TargetVm::prepare(
            &definition,
            &b.paths("vm"),
            &b.placeholders(),
            source.facts(),
        )
        .await
        .unwrap();
        round(&mut pages, target.ram(), true);
        let mut again = Move {
            a,
            b,
            vm,
            source,
            target,
            pages,
        };
        again.pause_and_finish().await;
        let (_a, b, vmm) = again.switch().await;
        end(&b, vmm).await;
    });
}

/// After `completed`, too, the source can go on as long as nobody let the
/// target run.
#[test]
fn even_a_completed_source_can_be_rolled_back() {
    run(async {
        let mut this = Move::up_to_the_switch("64M", Accel::Tcg).await;
        let (near, far) = (this.a.dir.join("near.sock"), this.b.dir.join("far.sock"));
        this.target.listen(&far).await.unwrap();
        let carrying = relaying(&near, far);
        this.source.prepare_state_out().await.unwrap();
        this.source.push_state(&near, LIMIT).await.unwrap();
        this.target.wait_arrived(LIMIT).await.unwrap();
        carrying.await.unwrap().unwrap();
        this.target.abort().await;
        this.source.roll_back(true).await.unwrap();
        this.vm.guest.wait_ticking();
        assert_eq!(this.vm.guest.torn_pages(), 0);
        this.pages.next_round(&mut |_| ()).unwrap();
    });
}

/// There and back, and there: a VM that arrived can leave again.
#[test]
fn a_vm_that_arrived_can_leave_again() {
    run(async {
        let (a, b, vmm) = Move::up_to_the_switch("64M", Accel::Tcg)
            .await
            .switch()
            .await;
        let guest = Guest::of(&b.paths("vm").ram);
        let source = SourceVm::open(vmm).await.unwrap();
        let definition = tcg("vm");
        let mut target = TargetVm::prepare(
            &definition,
            &a.paths("vm"),
            &a.placeholders(),
            source.facts(),
        )
        .await
        .unwrap();
        let (log, _) = source.start_log().await.unwrap();
        let mut pages = DirectSource::new(Arc::clone(source.ram()), log);
        round(&mut pages, target.ram(), true);
        source.pause().await.unwrap();
        round(&mut pages, target.ram(), false);
        let back = Guest::of(&a.paths("vm").ram);
        assert!(differing(&guest.all(), &back.all()).is_empty());
        let (near, far) = (b.dir.join("near.sock"), a.dir.join("far.sock"));
        target.listen(&far).await.unwrap();
        let carrying = relaying(&near, far.clone());
        source.prepare_state_out().await.unwrap();
        source.push_state(&near, LIMIT).await.unwrap();
        target.wait_arrived(LIMIT).await.unwrap();
        carrying.await.unwrap().unwrap();
        target.resume().await.unwrap();
        back.wait_ticking();
        assert_eq!(back.torn_pages(), 0);
        drop(pages);
        source.end(Some(&b.paths("vm"))).await.unwrap();
        for socket in [near, far] {
            let _ = std::fs::remove_file(socket);
        }
        b.assert_empty();
        target.abort().await;
        a.assert_empty();
    });
}
