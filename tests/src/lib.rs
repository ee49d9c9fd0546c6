//! The lab: racks as network namespaces, real VMMs with real guests, and what
//! it takes to check and to measure a migration between them.
//!
//! - [`guest`] builds the guests; [`save`] boots them once and keeps them.
//! - [`topology`] lays out racks, hosts and the shaped core link from
//!   [`netns`] namespaces; [`registry`] takes everything down again.
//! - [`qemu`] runs VMMs, [`qmp`] talks to them, [`agentcfg`] and [`drover`]
//!   run agents and the `drover` command.
//! - [`kvmm`] runs the small VMM of this package that has KVM's own dirty log.
//! - [`chplay`] plays a Cloud Hypervisor; [`opened`] is `drover gang open`.
//! - [`libvirt`] runs Debian's libvirt on the hosts.
//! - [`limit`] keeps waits from being endless.
//! - [`stage`] and [`play`] are what end-to-end tests stand on.
//! - [`check`] compares guest RAM and watches guests; [`tenant`] is the
//!   traffic that a migration should not hurt.
//! - [`bench`] measures; [`demo`] tells; [`chaos`] breaks things; [`hostile`] lies.
pub mod agentcfg;
pub mod bench;
pub mod cache;
pub mod capture;
pub mod chaos;
pub mod check;
pub mod chplay;
pub mod cpu;
pub mod demo;
pub mod drover;
pub mod gang;
pub mod guest;
pub mod hostile;
pub mod kvmm;
pub mod libvirt;
pub mod limit;
pub mod netns;
pub mod opened;
pub mod pattern;
pub mod play;
pub mod qemu;
pub mod qmp;
pub mod registry;
pub mod sandbox;
pub mod save;
pub mod serial;
pub mod slowdisk;
pub mod stage;
mod stopwatch;
pub mod tenant;
pub mod topology;
