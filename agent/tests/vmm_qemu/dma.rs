//! The hazard of the dirty log: DMA that lands in a page after it was
//! protected again. A guest that reads its disk all the time, through O_DIRECT
//! into guest RAM, is moved, and finds every byte right.

use crate::harness::*;
use crate::migrate::relaying;
use drover::types::{Gfn, PAGE_SIZE};
use drover::vmm::direct::{SourceVm, TargetVm};
use drover::vmm::{DirectSource, PageSource};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::OnceLock;

fn disk_guest() -> PathBuf {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    let flags = "-m32 -O1 -ffreestanding -fno-pic -fno-stack-protector -mgeneral-regs-only -nostdlib -static -no-pie -Wall -Werror -Wl,-Ttext=0x100000,--build-id=none";
    compile(&GUEST, "disk.c", &flags.split(' ').collect::<Vec<_>>()).to_owned()
}

/// 32 MiB of sectors, each word telling its place.
fn disk_content() -> Vec<u8> {
    let word = |i: u32| (i / 128).wrapping_mul(0x9e37_79b1).wrapping_add(i % 128);
    (0..(32u32 << 20) / 4)
        .flat_map(|i| word(i).to_le_bytes())
        .collect()
}

const REQUESTS: u64 = DONE + 8;
const WRONG: u64 = DONE + 12;

fn moves_while_it_reads(aio: &str) {
    run(async {
        let (a, b) = (Host::new(), Host::new());
        let image = a.dir.with_extension("img");
        let _image = RemoveFile(image.clone());
        std::fs::write(&image, disk_content()).unwrap();
        // O_DIRECT reads past the page cache: what is read must be on the disk.
        std::fs::File::open(&image).unwrap().sync_all().unwrap();
        let drive =
            format!("file={{image}},if=none,id=d,format=raw,readonly=on,cache=none,aio={aio}");
        let device = "virtio-blk-pci,drive=d,disable-legacy=off,disable-modern=on";
        let definition = define(
            "vm",
            "64M",
            Accel::Tcg,
            RAM,
            &["-drive", &drive, "-device", device],
        );
        let here = BTreeMap::from([
            ("kernel".to_owned(), disk_guest().display().to_string()),
            ("image".to_owned(), image.display().to_string()),
        ]);
        let vm = a.start_with(&definition, &here).await;
        wait("the guest reads nothing", || vm.guest.word(REQUESTS) > 100);

        let source = SourceVm::open(vm.launched.vmm().clone()).await.unwrap();
        let paths = b.paths("vm");
        let mut target = TargetVm::prepare(&definition, &paths, &here, source.facts())
            .await
            .unwrap();
        let (log, _) = source.start_log().await.unwrap();
        let mut pages = DirectSource::new(source.ram().clone(), log);
        let ram = target.ram().clone();
        let copy = |pages: &DirectSource, run: std::ops::Range<Gfn>| {
            let mut differed = 0;
            let (mut new, mut old) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
            for gfn in (run.start.0..run.end.0).map(Gfn) {
                pages.read_run(gfn, &mut new).unwrap();
                ram.read_page(gfn, &mut old).unwrap();
                if new != old {
                    differed += 1;
                    ram.write_page(gfn, &new).unwrap();
                }
            }
            differed
        };
        let mut runs = Vec::new();
        pages.first_round(&mut |run| runs.push(run)).unwrap();
        for _ in 0..2 {
            runs.drain(..).for_each(|run| {
                copy(&pages, run);
            });
            pages.next_round(&mut |run| runs.push(run)).unwrap();
        }
        let before = vm.guest.word(REQUESTS);
        // Many short rounds: the more often pages are protected again, the more
        // DMA is under way just then. Fewer requests than there are buffers, so
        // that no later request into the same buffer makes up for it.
        let mut rounds = 0;
        while vm.guest.word(REQUESTS) < before + 400 {
            runs.drain(..).for_each(|run| {
                copy(&pages, run);
            });
            pages.next_round(&mut |run| runs.push(run)).unwrap();
            rounds += 1;
            assert!(rounds < 100_000, "the guest reads no more");
        }
        assert!(source.pause().await.unwrap());
        pages.next_round(&mut |run| runs.push(run)).unwrap();
        runs.drain(..).for_each(|run| {
            copy(&pages, run);
        });
        let again = pages.recheck().unwrap();
        let checked: u32 = again.iter().map(|r| r.end.0 - r.start.0).sum();
        let found: u32 = again.into_iter().map(|run| copy(&pages, run)).sum();
        println!(
            "aio={aio}, {rounds} rounds: re-check of {checked} pages found {found} that the log had missed"
        );
        let arrived = Guest::of(&paths.ram);
        let differ = differing(&vm.guest.all(), &arrived.all());
        assert!(differ.is_empty(), "{differ:x?}");

        let (near, far) = (a.dir.join("near.sock"), b.dir.join("far.sock"));
        target.listen(&far).await.unwrap();
        let carrying = relaying(&near, far);
        source.push_state(&near, LIMIT).await.unwrap();
        target.wait_arrived(LIMIT).await.unwrap();
        carrying.await.unwrap().unwrap();
        target.resume().await.unwrap();
        let then = arrived.word(REQUESTS);
        wait("the guest reads no more", || {
            arrived.word(REQUESTS) > then + 100
        });
        assert_eq!(arrived.word(WRONG), 0, "the guest found wrong data in RAM");
        target.abort().await;
    });
}

struct RemoveFile(PathBuf);

impl Drop for RemoveFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn native_aio_into_guest_ram() {
    moves_while_it_reads("native");
}

#[test]
fn io_uring_into_guest_ram() {
    moves_while_it_reads("io_uring");
}
