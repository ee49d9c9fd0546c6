//! What a Cloud Hypervisor sends when it migrates.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::stream::cloud_hypervisor(bytes);
});
