//! The ioctls of KVM that concern a VM's dirty log. The bindings that VMMs use
//! (kvm-ioctls) have no `KVM_CLEAR_DIRTY_LOG` and no dirty ring.
#![allow(unsafe_code)]

use crate::memory::Region;
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const KVMIO: u8 = 0xAE;

mod request {
    use super::*;
    nix::ioctl_write_int_bad!(check_extension, nix::request_code_none!(KVMIO, 0x03));
    nix::ioctl_write_ptr!(get_dirty_log, KVMIO, 0x42, kvm_dirty_log);
    nix::ioctl_write_ptr!(set_region, KVMIO, 0x46, kvm_userspace_memory_region);
    nix::ioctl_write_ptr!(enable_cap, KVMIO, 0xa3, kvm_enable_cap);
    nix::ioctl_readwrite!(clear_dirty_log, KVMIO, 0xc0, kvm_clear_dirty_log);
    nix::ioctl_none!(reset_dirty_rings, KVMIO, 0xc7);
}

/// A VM's descriptor, our own copy of it.
#[derive(Debug)]
pub(crate) struct Vm(OwnedFd);

impl Vm {
    /// Copies the VMM's descriptor.
    pub(crate) fn copy_of(vm: &impl AsRawFd) -> io::Result<Vm> {
        // SAFETY: integers only; a result ≥ 0 is a descriptor nobody else owns.
        let fd = unsafe {
            let fd = libc::fcntl(vm.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Vm(fd))
    }

    /// What this kernel has of a capability; 0: nothing.
    pub(crate) fn extension(&self, cap: u32) -> io::Result<i32> {
        // SAFETY: takes a number.
        Ok(unsafe { request::check_extension(self.0.as_raw_fd(), cap as i32) }?)
    }

    pub(crate) fn enable(&self, cap: u32, arg: u64) -> io::Result<()> {
        let cap = kvm_enable_cap {
            cap,
            args: [arg, 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        // SAFETY: the request's own structure, which outlives the call.
        unsafe { request::enable_cap(self.0.as_raw_fd(), &cap) }?;
        Ok(())
    }

    /// Whether the log is cleared by us only; older kernels than Linux 5.1
    /// clear it as it is read.
    pub(crate) fn manual_protect(&self) -> io::Result<bool> {
        let enable = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
        if self.extension(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)? as u32 & enable == 0 {
            return Ok(false);
        }
        self.enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, enable.into())?;
        Ok(true)
    }

    /// Switches the log of one slot. KVM refuses if the slot has another size
    /// or place than `region` says.
    pub(crate) fn log_region(&self, region: &Region, on: bool) -> io::Result<()> {
        let arg = kvm_userspace_memory_region {
            slot: region.slot,
            flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: region.gpa,
            memory_size: region.len,
            userspace_addr: region.host,
        };
        // SAFETY: the request's own structure. That the slot exists with this
        // memory is what `Region::new` demands of its caller, so this changes
        // flags and maps nothing.
        unsafe { request::set_region(self.0.as_raw_fd(), &arg) }?;
        Ok(())
    }

    /// The log of a slot; `bits` has a bit for each of its pages.
    pub(crate) fn dirty_log(&self, region: &Region, bits: &mut [u64]) -> io::Result<()> {
        assert_eq!(bits.len() as u64, region.pages().div_ceil(64));
        let arg = kvm_dirty_log {
            slot: region.slot,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bits.as_mut_ptr().cast(),
            },
        };
        // SAFETY: KVM writes a bit for each page of the slot, in whole 64-bit
        // words, and `bits` is as long: `Region::new` demands the slot's size.
        unsafe { request::get_dirty_log(self.0.as_raw_fd(), &arg) }?;
        Ok(())
    }

    /// Clears what is set in `bits`, which begin with page `first` of the
    /// slot, and protects those pages again.
    pub(crate) fn clear_dirty_log(
        &self,
        region: &Region,
        first: u64,
        bits: &mut [u64],
    ) -> io::Result<()> {
        let pages = (bits.len() as u64 * 64).min(region.pages() - first);
        let mut arg = kvm_clear_dirty_log {
            slot: region.slot,
            num_pages: pages as u32,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bits.as_mut_ptr().cast(),
            },
        };
        // SAFETY: KVM reads `num_pages` bits, which `bits` has.
        unsafe { request::clear_dirty_log(self.0.as_raw_fd(), &mut arg) }?;
        Ok(())
    }

    /// Protects the pages again whose ring entries were marked as read.
    pub(crate) fn reset_dirty_rings(&self) -> io::Result<()> {
        // SAFETY: no argument.
        unsafe { request::reset_dirty_rings(self.0.as_raw_fd()) }?;
        Ok(())
    }
}
