//! Page contents without their blocks of zeroes.
//!
//! Much of a guest's memory that is not zero is nearly so: page tables, slabs,
//! the last page of every file. What is not worth a compressor's time, or must
//! not be compressed, still need not carry zeroes over the core:
//!
//! ```text
//! pages × u64 map: bit i = block i of 64 bytes is kept │ kept blocks, in order
//! ```
//!
//! A map costs 8 bytes a page, so a batch is written this way only if it gets
//! shorter by [`WORTH`] at least; otherwise it stays in place and is not copied.

use super::frame::FrameError;
use crate::types::PAGE_SIZE;

/// Bytes of one block: a cache line.
pub const BLOCK: usize = 64;
/// Bytes of one page's map.
pub const MAP: usize = 8;
/// A batch must lose one part in this many to be written without its zeroes:
/// less does not pay for copying it.
const WORTH: usize = 64;

const _: () = assert!(PAGE_SIZE / BLOCK == MAP * 8);

/// Which blocks of a page hold something.
fn map(page: &[u8; PAGE_SIZE]) -> u64 {
    let (blocks, _) = page.as_chunks::<BLOCK>();
    blocks.iter().enumerate().fold(0, |map, (i, block)| {
        // No early end: the compiler makes vector code of it.
        let any = block.iter().fold(0, |any, byte| any | byte);
        map | u64::from(any != 0) << i
    })
}

/// Maps of packed `pages`, if it pays to leave their zeroes out.
pub fn worthwhile(pages: &[u8]) -> Option<Vec<u64>> {
    let (pages, _) = pages.as_chunks::<PAGE_SIZE>();
    let maps: Vec<u64> = pages.iter().map(map).collect();
    let len = len(&maps);
    let plain = pages.len() * PAGE_SIZE;
    (len + plain / WORTH < plain).then_some(maps)
}

/// Bytes that pages with these maps take.
pub fn len(maps: &[u64]) -> usize {
    let kept: usize = maps.iter().map(|map| map.count_ones() as usize).sum();
    maps.len() * MAP + kept * BLOCK
}

/// Writes packed `pages` with their `maps` to the front of `out`, which holds
/// [`len`] bytes at least.
pub fn write(pages: &[u8], maps: &[u64], out: &mut [u8]) {
    let (head, mut rest) = out.split_at_mut(maps.len() * MAP);
    for (slot, map) in head.as_chunks_mut::<MAP>().0.iter_mut().zip(maps) {
        *slot = map.to_le_bytes();
    }
    let (pages, _) = pages.as_chunks::<PAGE_SIZE>();
    for (page, map) in pages.iter().zip(maps) {
        for block in page.as_chunks::<BLOCK>().0.iter().zip(kept(*map)) {
            if let (block, true) = block {
                let (slot, after) = rest.split_at_mut(BLOCK);
                slot.copy_from_slice(block);
                rest = after;
            }
        }
    }
}

/// Reads what [`write`] wrote, into `pages`, a whole number of pages.
///
/// # Errors
/// `bytes` has not exactly the length that its maps say.
pub fn read(bytes: &[u8], pages: &mut [u8]) -> Result<(), FrameError> {
    let (pages, _) = pages.as_chunks_mut::<PAGE_SIZE>();
    let (maps, blocks) = bytes
        .split_at_checked(pages.len() * MAP)
        .ok_or(FrameError::BadSparse)?;
    let (maps, _) = maps.as_chunks::<MAP>();
    let (blocks, odd) = blocks.as_chunks::<BLOCK>();
    let maps = || maps.iter().map(|map| u64::from_le_bytes(*map));
    let want: usize = maps().map(|map| map.count_ones() as usize).sum();
    if want != blocks.len() || !odd.is_empty() {
        return Err(FrameError::BadSparse);
    }
    let mut blocks = blocks.iter();
    for (page, map) in pages.iter_mut().zip(maps()) {
        for (slot, kept) in page.as_chunks_mut::<BLOCK>().0.iter_mut().zip(kept(map)) {
            match kept.then(|| blocks.next()).flatten() {
                Some(block) => *slot = *block,
                None => slot.fill(0),
            }
        }
    }
    Ok(())
}

/// The bits of a map, lowest first.
fn kept(map: u64) -> impl Iterator<Item = bool> {
    (0..u64::BITS).map(move |bit| map >> bit & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Pages of which only some blocks are written, some of these with zeroes.
    fn pages() -> impl Strategy<Value = Vec<u8>> {
        let block = (0usize..PAGE_SIZE / BLOCK, any::<[u8; 3]>());
        vec(vec(block, 0..70), 0..6).prop_map(|pages| {
            let mut bytes = vec![0; pages.len() * PAGE_SIZE];
            for (page, blocks) in bytes.chunks_exact_mut(PAGE_SIZE).zip(pages) {
                for (block, [first, middle, last]) in blocks {
                    let block = &mut page[block * BLOCK..][..BLOCK];
                    (block[0], block[31], block[63]) = (first, middle, last);
                }
            }
            bytes
        })
    }

    proptest! {
        #[test]
        fn pages_come_back_as_they_were(pages in pages(), dirt in any::<u8>()) {
            let (whole, _) = pages.as_chunks::<PAGE_SIZE>();
            let maps: Vec<u64> = whole.iter().map(map).collect();
            let mut bytes = vec![0; len(&maps)];
            write(&pages, &maps, &mut bytes);
            let mut back = vec![dirt; pages.len()];
            prop_assert_eq!(read(&bytes, &mut back), Ok(()));
            prop_assert_eq!(&back, &pages);
            // A byte too many or too few is noticed.
            bytes.push(0);
            prop_assert_eq!(read(&bytes, &mut back), Err(FrameError::BadSparse));
            bytes.truncate(bytes.len().saturating_sub(2));
            if !pages.is_empty() {
                prop_assert_eq!(read(&bytes, &mut back), Err(FrameError::BadSparse));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..300), pages in 0usize..4) {
            let _ = read(&bytes, &mut vec![0; pages * PAGE_SIZE]);
        }

        #[test]
        fn what_is_worthwhile_is_shorter(pages in pages()) {
            if let Some(maps) = worthwhile(&pages) {
                prop_assert!(len(&maps) < pages.len());
            }
        }
    }

    #[test]
    fn full_pages_stay_in_place() {
        assert_eq!(worthwhile(&[1; 4 * PAGE_SIZE]), None);
        assert_eq!(worthwhile(&[]), None);
        let half = [[1; PAGE_SIZE / 2], [0; PAGE_SIZE / 2]].concat();
        let maps = worthwhile(&half).unwrap();
        assert_eq!(maps, [0xffff_ffff]);
        assert_eq!(len(&maps), PAGE_SIZE / 2 + MAP);
    }
}
