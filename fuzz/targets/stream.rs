//! What a QEMU sends and answers when it migrates, and what a Cloud Hypervisor
//! sends. What has to hold is with the parsers, where the property tests use it too.

use super::step;
use drover::vmm::cloud_hypervisor::fuzz::fuzz_requests;
use drover::vmm::qemu_stream::fuzz::{fuzz_main, fuzz_multifd, fuzz_reply};

/// A main connection: written again it is the same, however it was cut.
pub fn stream_main(bytes: &[u8]) -> bool {
    fuzz_main(bytes, step(bytes))
}

/// A multifd connection, as well.
pub fn stream_multifd(bytes: &[u8]) -> bool {
    fuzz_multifd(bytes, step(bytes))
}

/// A return path, as well; and it is whole only with SHUT at its end.
pub fn stream_reply(bytes: &[u8]) -> bool {
    fuzz_reply(bytes, step(bytes))
}

/// The requests of a Cloud Hypervisor: the same comes of them however they are cut.
pub fn cloud_hypervisor(bytes: &[u8]) -> bool {
    fuzz_requests(bytes, step(bytes))
}
