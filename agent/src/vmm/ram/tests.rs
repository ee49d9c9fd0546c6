use super::layout::cover;
use super::*;
use crate::vmm::maps::MapsRow;
use proptest::prelude::*;
use std::fs::OpenOptions;
use std::sync::atomic::AtomicU32;

/// RAM of `pages` pages in a file of its own on tmpfs.
fn ram(pages: u32) -> (RamFile, GuestRam) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = format!("/dev/shm/drover-ramtest-{}-{n}", std::process::id());
    let len = u64::from(pages) * PAGE_SIZE as u64;
    let guard = RamFile::create(Path::new(&path), len).unwrap();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let ram = GuestRam::from_file(file, Path::new(&path), len, true).unwrap();
    (guard, ram)
}

fn extents(ram: &GuestRam) -> Vec<(u32, u32)> {
    ram.data_extents(Gfn(0))
        .map(|r| r.unwrap())
        .map(|r| (r.start.0, r.end.0))
        .collect()
}

#[test]
fn holes_are_seen_and_stay_holes_when_read() {
    let (_guard, ram) = ram(64);
    assert_eq!(extents(&ram), []);
    ram.write_page(Gfn(3), &[7; PAGE_SIZE]).unwrap();
    ram.write_run(Gfn(10), &[8; 2 * PAGE_SIZE]).unwrap();
    ram.write_page(Gfn(63), &[9; PAGE_SIZE]).unwrap();
    assert_eq!(extents(&ram), [(3, 4), (10, 12), (63, 64)]);
    let mut page = [1; PAGE_SIZE];
    ram.read_page(Gfn(5), &mut page).unwrap();
    assert_eq!(page, [0; PAGE_SIZE]);
    let mut all = vec![1; 64 * PAGE_SIZE];
    ram.read_run(Gfn(0), &mut all).unwrap();
    assert!(all[10 * PAGE_SIZE..12 * PAGE_SIZE].iter().all(|b| *b == 8));
    assert_eq!(
        extents(&ram),
        [(3, 4), (10, 12), (63, 64)],
        "reading made pages"
    );
    ram.zero_run(Gfn(0)..Gfn(11)).unwrap();
    assert_eq!(
        extents(&ram),
        [(11, 12), (63, 64)],
        "zeroing gives memory back"
    );
    assert_eq!(
        ram.data_extents(Gfn(12)).next().unwrap().unwrap(),
        Gfn(63)..Gfn(64)
    );
}

#[test]
fn nothing_outside_of_ram() {
    let (_guard, ram) = ram(4);
    let page = [1; PAGE_SIZE];
    for bad in [Gfn(4), Gfn(u32::MAX)] {
        assert_eq!(
            ram.write_page(bad, &page).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        assert!(ram.read_page(bad, &mut [0; PAGE_SIZE]).is_err());
        assert!(ram.zero_page(bad).is_err());
    }
    assert!(ram.write_run(Gfn(3), &[0; 2 * PAGE_SIZE]).is_err());
    assert!(ram.zero_run(Gfn(3)..Gfn(5)).is_err());
    assert_eq!(ram.file.metadata().unwrap().len(), 4 * PAGE_SIZE as u64);
}

#[test]
fn files_are_made_once_and_removed_unless_kept() {
    let (guard, _ram) = ram(2);
    let path = guard.path().to_owned();
    assert!(matches!(
        RamFile::create(&path, 8192),
        Err(RamError::Exists { .. })
    ));
    assert!(
        path.exists(),
        "the failed second creation must not remove the first"
    );
    drop(guard);
    assert!(!path.exists());
    let kept = RamFile::create(&path, 8192).unwrap().keep();
    assert!(kept.exists());
    drop(RamFile::adopt(kept));
    assert!(!path.exists());
}

#[test]
fn sizes_and_space_are_checked() {
    for bad in [0, 4095, 4097, 1 << 45] {
        assert!(
            matches!(check_len(bad), Err(RamError::BadSize { .. })),
            "{bad}"
        );
    }
    let error = check_space(Path::new("/dev/shm"), 1 << 50).unwrap_err();
    assert!(
        error.to_string().contains("needs 1073741824 MiB"),
        "{error}"
    );
    assert!(free_bytes(Path::new("/dev/shm")).unwrap() > 0);
}

fn row(start: u64, offset: u64, len: u64) -> MapsRow {
    MapsRow {
        start,
        end: start + len,
        perms: [true, true, false],
        shared: true,
        offset,
        dev: (0, 26),
        inode: 5,
        path: "/dev/shm/x".into(),
    }
}

#[test]
fn mappings_must_cover_the_file_once() {
    let id = (libc::makedev(0, 26), 5);
    let map = |va, offset, len| RamMapping { va, offset, len };
    // Split by the kernel, adjacent: joined. Elsewhere: kept apart.
    let rows = [
        row(0x2000, 0x1000, 0x1000),
        row(0x1000, 0, 0x1000),
        row(0x9000, 0x2000, 0x1000),
    ];
    assert_eq!(
        cover(&rows, id, 0x3000).unwrap(),
        [map(0x1000, 0, 0x2000), map(0x9000, 0x2000, 0x1000)]
    );
    assert!(cover(&rows, id, 0x3001).is_err(), "the end is missing");
    assert!(
        cover(&rows[..1], id, 0x2000).is_err(),
        "the start is missing"
    );
    assert!(cover(&[], id, 0x1000).is_err());
    let twice = [row(0x1000, 0, 0x2000), row(0x8000, 0x1000, 0x1000)];
    assert_eq!(
        cover(&twice, id, 0x2000),
        Err("it is mapped more than once")
    );
    let private = MapsRow {
        shared: false,
        ..row(0x1000, 0, 0x1000)
    };
    assert_eq!(
        cover(&[private], id, 0x1000),
        Err("it is mapped private (share=off)")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Whatever is placed and zeroed, RAM and its extents tell the same story.
    #[test]
    fn extents_cover_what_is_not_zero(ops in prop::collection::vec((0u32..32, 1u32..5, 0u8..3), 1..40)) {
        let (_guard, ram) = ram(36);
        let mut model = [0u8; 36];
        for (at, n, fill) in ops {
            let run = at..at + n;
            if fill == 0 {
                ram.zero_run(Gfn(run.start)..Gfn(run.end)).unwrap();
            } else {
                ram.write_run(Gfn(at), &vec![fill; n as usize * PAGE_SIZE]).unwrap();
            }
            model[run.start as usize..run.end as usize].fill(fill);
        }
        let mut data = [false; 36];
        for (start, end) in extents(&ram) {
            data[start as usize..end as usize].fill(true);
        }
        for gfn in 0..36 {
            let mut page = [0; PAGE_SIZE];
            ram.read_page(Gfn(gfn), &mut page).unwrap();
            prop_assert!(page.iter().all(|b| *b == model[gfn as usize]));
            prop_assert_eq!(data[gfn as usize], model[gfn as usize] != 0);
        }
    }
}
