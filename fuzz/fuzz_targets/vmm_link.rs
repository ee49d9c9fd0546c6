//! What agents and VMMs that embed `drover-vmm` say to each other.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::vmm::vmm_link(bytes);
});
