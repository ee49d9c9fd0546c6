//! Access to one VM, from outside its VMM: the layout of its RAM, rounds of
//! changed pages, pause and resume, device state out and in, and a place for
//! pages on the target.
//!
//! Here is QEMU in *direct mode* ([`direct`]), bottom up: [`process`] holds the
//! VMM, [`inject`] gets a userfaultfd out of it, [`uffd`] and [`pagemap`] speak to
//! the kernel, [`dirty`] makes the dirty log of them; [`ram`] reads and places
//! pages; [`definition`] and [`launch`] start VMMs, [`qmp`] drives them,
//! [`preflight`] refuses what cannot work, [`relay`] carries device state.
//! Other kinds of VM implement [`PageSource`] and [`PageSink`] as well; [`kinds`]
//! is where they differ.
//!
//! QEMU in *stream mode* is in [`stream`]: RAM in the VMM's own memory, QEMU's
//! migration stream, read by [`qemu_stream`], as the dirty log. The QEMU of a VM
//! whose manager drives its migration is in [`managed`]: the same, without a
//! monitor.
//!
//! VMMs that embed `drover-vmm` and answer KVM's own dirty log are in [`kvm_log`].
//!
//! No gang uses [`cloud_hypervisor`] yet, the migration protocol of that VMM.

pub mod cloud_hypervisor;
pub mod definition;
pub mod direct;
pub mod dirty;
pub mod inject;
pub mod kinds;
pub mod kvm_log;
pub mod launch;
pub mod managed;
pub mod maps;
pub mod pagemap;
pub mod pageset;
pub mod preflight;
pub mod process;
pub mod qemu_stream;
pub mod qmp;
pub mod ram;
pub mod relay;
pub mod stream;
pub mod uffd;

mod setup;
mod source;

pub use pageset::PageSet;
pub use source::{DirectSource, DirectSourceError, PageRead, PageSink, PageSource};
