//! Streams as QEMU makes them. Drover has no encoder of them: its writer writes
//! what was read. They are those of the parser's own tests.

#[path = "../../agent/src/vmm/qemu_stream/samples.rs"]
mod samples;

use super::Add;

/// Adds them.
pub(crate) fn seeds(add: Add<'_>) {
    for (target, samples) in [
        ("stream_main", samples::streams()),
        ("stream_multifd", samples::multifd()),
        ("stream_reply", samples::replies()),
    ] {
        for (name, bytes) in samples {
            add(target, name, bytes);
        }
    }
}
