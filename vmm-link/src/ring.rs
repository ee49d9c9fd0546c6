//! KVM's dirty ring: each vCPU writes down which pages it dirtied, in a ring
//! that it shares with the VMM.
#![allow(unsafe_code)]

use crate::kvm::Vm;
use crate::marks::Marks;
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET,
    kvm_dirty_gfn,
};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The vCPU dirtied this page.
const DIRTY: u32 = 1;
/// We have read the entry.
const RESET: u32 = 2;

/// `exit_reason` of a vCPU that stopped because its ring is full
/// (`KVM_EXIT_DIRTY_RING_FULL`): call [`DirtyRings::drain`] and run it again.
pub const EXIT_RING_FULL: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;

/// The dirty rings of all vCPUs of a VM. Cheap to clone, one for each vCPU thread.
#[derive(Debug, Clone)]
pub struct DirtyRings(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    vm: Vm,
    entries: usize,
    /// Held from reading an entry until KVM has protected its page again, so
    /// that no round can be answered in between.
    rings: Mutex<Vec<Ring>>,
    /// Where entries go; set when the link is made, before any log is on.
    marks: OnceLock<Marks>,
    /// A ring has overflowed since the log was started.
    lost: AtomicBool,
}

impl DirtyRings {
    /// Lets the VM log into rings of `entries` (a power of two) a vCPU, instead of
    /// into bitmaps. Before the first vCPU is made.
    ///
    /// # Errors
    /// The kernel has no dirty rings (Linux 5.11), or not as large ones.
    pub fn enable(vm: &impl AsRawFd, entries: usize) -> io::Result<DirtyRings> {
        let vm = Vm::copy_of(vm)?;
        let bytes = entries.saturating_mul(size_of::<kvm_dirty_gfn>());
        let caps = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        for cap in caps {
            if usize::try_from(vm.extension(cap)?).is_ok_and(|most| bytes <= most) {
                vm.enable(cap, bytes as u64)?;
                return Ok(DirtyRings(Arc::new(Inner {
                    vm,
                    entries,
                    rings: Mutex::new(Vec::new()),
                    marks: OnceLock::new(),
                    lost: AtomicBool::new(false),
                })));
            }
        }
        let text = format!("this kernel's KVM has no dirty rings of {entries} entries");
        Err(io::Error::new(io::ErrorKind::Unsupported, text))
    }

    /// Maps the ring of a vCPU. Once for each, before it first runs.
    ///
    /// # Errors
    /// It is no vCPU of this VM, or there is no memory.
    pub fn add_vcpu(&self, vcpu: &impl AsRawFd) -> io::Result<()> {
        let ring = Ring::map(vcpu, self.0.entries)?;
        self.lock().push(ring);
        Ok(())
    }

    /// Takes all entries out and lets KVM protect their pages again; returns how
    /// many there were. For vCPUs whose ring is full.
    ///
    /// # Errors
    /// KVM failed, or a ring has overflowed. Writes may be lost to the log then, so
    /// every round fails until the log is started anew; the guest can run on.
    pub fn drain(&self) -> io::Result<u64> {
        let mut rings = self.lock();
        let mut taken = 0;
        for ring in rings.iter_mut() {
            let lost = self.0.lost.load(Ordering::Relaxed);
            let from_ring = ring.drain(lost, |slot, page| {
                if let Some(marks) = self.0.marks.get() {
                    marks.wrote_in_slot(slot, page);
                }
            });
            // KVM stops a vCPU some entries before its ring is full. One without
            // a free entry may have been written over: seen where KVM emulates
            // a guest, many instructions at a time.
            if from_ring >= self.0.entries as u64 {
                self.0.lost.store(true, Ordering::Relaxed);
            }
            taken += from_ring;
        }
        if taken > 0 {
            let reset = self.0.vm.reset_dirty_rings();
            reset.inspect_err(|_| self.0.lost.store(true, Ordering::Relaxed))?;
        }
        if self.0.lost.load(Ordering::Relaxed) {
            return Err(io::Error::other(
                "a dirty ring has overflowed, and writes were lost: make rings larger, or use bitmaps",
            ));
        }
        Ok(taken)
    }

    /// A log begins: what was lost before is no concern of it. Call with the
    /// log off.
    pub(crate) fn begin(&self) {
        // Empties the rings; that it fails is what is forgotten here.
        let _earlier = self.drain();
        self.0.lost.store(false, Ordering::Relaxed);
    }

    /// Where entries go from now on.
    pub(crate) fn collect_into(&self, marks: Marks) {
        // A second link of one VM finds the first one's marks: refused there.
        self.0.marks.get_or_init(|| marks);
    }

    pub(crate) fn is_linked(&self) -> bool {
        self.0.marks.get().is_some()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Ring>> {
        self.0.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    count: usize,
    /// Index of the entry to be read next; KVM's counts on as well.
    next: usize,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &impl AsRawFd, count: usize) -> io::Result<Ring> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap};
        let bytes = NonZeroUsize::new(count * size_of::<kvm_dirty_gfn>())
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        // SAFETY: a new mapping, owned by the value made of it; the descriptor
        // is open for the call.
        let at = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                std::os::fd::BorrowedFd::borrow_raw(vcpu.as_raw_fd()),
                offset,
            )
        }?;
        Ok(Ring {
            entries: at.cast(),
            count,
            next: 0,
        })
    }

    /// `lost`: entries were written over, and KVM may be ahead of us by some that
    /// will never be marked as dirty.
    fn drain(&mut self, lost: bool, mut f: impl FnMut(u32, u64)) -> u64 {
        let mut taken = 0;
        let skip = if lost { self.ahead() } else { 0 };
        for _ in 0..skip {
            // SAFETY: within the mapping; KVM has passed this entry already.
            unsafe {
                let entry = self.entries.add(self.next % self.count).as_ptr();
                let flags = AtomicU32::from_ptr(&raw mut (*entry).flags);
                flags.store(RESET, Ordering::Release);
            }
            self.next = self.next.wrapping_add(1);
            taken += 1;
        }
        // No more than the ring holds, however fast the vCPU writes.
        while taken < self.count as u64 {
            // SAFETY: the index is within the mapping. KVM writes `slot` and
            // `offset` before it sets DIRTY, and not again before we set RESET.
            unsafe {
                let entry = self.entries.add(self.next % self.count).as_ptr();
                let flags = AtomicU32::from_ptr(&raw mut (*entry).flags);
                if flags.load(Ordering::Acquire) & DIRTY == 0 {
                    break;
                }
                // The upper half of `slot` is the address space, 0 for RAM as
                // the guest normally sees it; SMM's has the same memory.
                let slot = (&raw const (*entry).slot).read_volatile() & 0xffff;
                f(slot, (&raw const (*entry).offset).read_volatile());
                flags.store(RESET, Ordering::Release);
            }
            self.next = self.next.wrapping_add(1);
            taken += 1;
        }
        taken
    }
}

impl Ring {
    /// How many entries that are not dirty lie before one that is.
    fn ahead(&self) -> usize {
        let dirty = |i: &usize| {
            // SAFETY: within the mapping.
            unsafe {
                let entry = self.entries.add((self.next + i) % self.count).as_ptr();
                let flags = AtomicU32::from_ptr(&raw mut (*entry).flags);
                flags.load(Ordering::Acquire) & DIRTY != 0
            }
        };
        (0..self.count).find(dirty).unwrap_or(0)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let bytes = self.count * size_of::<kvm_dirty_gfn>();
        // SAFETY: our own mapping, which nobody can reach any more.
        if let Err(error) = unsafe { nix::sys::mman::munmap(self.entries.cast(), bytes) } {
            debug_assert!(false, "munmap of a ring: {error}");
        }
    }
}
