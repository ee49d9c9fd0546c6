//! Streams as QEMU and Cloud Hypervisor make them: those of the parsers' own
//! tests. Drover has no encoder of QEMU's: its writer writes what was read.

#[path = "../../agent/src/vmm/cloud_hypervisor/samples.rs"]
mod cloud_hypervisor;
#[path = "../../agent/src/vmm/qemu_stream/samples.rs"]
mod samples;

use super::Add;

/// Adds them.
pub(crate) fn seeds(add: Add<'_>) {
    for (target, samples) in [
        ("stream_main", samples::streams()),
        ("stream_multifd", samples::multifd()),
        ("stream_reply", samples::replies()),
        ("cloud_hypervisor", cloud_hypervisor::migrations()),
    ] {
        for (name, bytes) in samples {
            add(target, name, bytes);
        }
    }
}
