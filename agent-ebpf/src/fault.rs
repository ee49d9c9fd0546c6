//! What a bad link does to frames: shared by the programs in
//! `link_faults.rs` and the tests that load them. Nothing of it is in the
//! agent.
//!
//! Whether a frame is hit follows from the seed and the frame's number on this
//! hook alone, so a seed gives the same link again.

/// Name of the classifier; it goes on either hook of an interface.
pub const LINK_PROGRAM: &str = "drover_link_fault";
/// Name of its settings: one [`Fault`].
pub const FAULT_MAP: &str = "FAULT";
/// Name of its counts: one [`Hits`].
pub const HITS_MAP: &str = "HITS";

/// What is done to frames.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fault {
    /// Decides which frames are hit.
    pub seed: u64,
    /// Frames in a million that are dropped.
    pub drop_ppm: u32,
    /// Frames in a million in which one byte is changed, checksums left alone.
    pub corrupt_ppm: u32,
}

/// What was done so far.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hits {
    /// Frames seen.
    pub seen: u64,
    /// Of these, dropped.
    pub dropped: u64,
    /// Of these, changed.
    pub corrupted: u64,
}

/// What happens to one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It passes.
    Pass,
    /// It is dropped.
    Drop,
    /// The byte at `offset` is changed by an exclusive or with `flip`, which
    /// is not 0.
    Corrupt {
        /// Where.
        offset: u32,
        /// How.
        flip: u8,
    },
}

/// The first byte that may be changed. The addresses of the Ethernet header
/// before it are the switch's business: what they can do to a frame, loss does.
pub const SPARED: u32 = 14;

/// Mixes a number well (splitmix64).
#[inline(always)]
const fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The fate of the frame with this number, which has `len` bytes.
#[inline(always)]
pub const fn fate(fault: &Fault, number: u64, len: u32) -> Fate {
    let random = mix(fault.seed ^ mix(number));
    // High and low half are independent; a million fits each many times.
    let (a, b) = ((random >> 32) as u32, random as u32);
    if a % 1_000_000 < fault.drop_ppm {
        return Fate::Drop;
    }
    if b % 1_000_000 < fault.corrupt_ppm && len > SPARED {
        let again = mix(random);
        let flip = (again >> 56) as u8;
        return Fate::Corrupt {
            offset: SPARED + again as u32 % (len - SPARED),
            flip: if flip == 0 { 1 } else { flip },
        };
    }
    Fate::Pass
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    fn fates(fault: &Fault) -> Vec<Fate> {
        (0..100_000).map(|n| fate(fault, n, 1514)).collect()
    }

    #[test]
    fn frames_are_hit_as_often_as_asked_and_alike_for_a_seed() {
        let fault = Fault {
            seed: 7,
            drop_ppm: 100_000,
            corrupt_ppm: 10_000,
        };
        let all = fates(&fault);
        let dropped = all.iter().filter(|f| **f == Fate::Drop).count();
        let changed = all
            .iter()
            .filter(|f| matches!(f, Fate::Corrupt { .. }))
            .count();
        assert!((9_500..10_500).contains(&dropped), "{dropped}");
        assert!((750..1_050).contains(&changed), "{changed}");
        assert_eq!(all, fates(&fault));
        assert_ne!(all, fates(&Fault { seed: 8, ..fault }));
    }

    #[test]
    fn everything_or_nothing_can_be_dropped() {
        let none = Fault::default();
        let every = Fault {
            drop_ppm: 1_000_000,
            ..none
        };
        assert!(fates(&none).iter().all(|f| *f == Fate::Pass));
        assert!(fates(&every).iter().all(|f| *f == Fate::Drop));
    }

    #[test]
    fn a_changed_byte_is_in_the_frame_and_changes() {
        let fault = Fault {
            corrupt_ppm: 1_000_000,
            ..Fault::default()
        };
        for len in [0, 14, 15, 60, 1514, 65_000] {
            for number in 0..1_000 {
                match fate(&fault, number, len) {
                    Fate::Corrupt { offset, flip } => {
                        assert!((SPARED..len).contains(&offset) && flip != 0);
                    }
                    other => assert!(len <= SPARED && other == Fate::Pass),
                }
            }
        }
    }
}
