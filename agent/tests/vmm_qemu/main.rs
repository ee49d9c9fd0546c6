//! QEMU on real VMMs, in direct mode and by its own stream: needs root, `/usr/bin/qemu-system-x86_64`
//! and `cc`; `/dev/kvm` for those that say so.

mod dirty;
mod dma;
mod harness;
mod inject;
mod migrate;
mod private;
mod rate;
mod refuse;
mod stream;
