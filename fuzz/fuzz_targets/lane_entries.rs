//! The entry list of a batch.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::lane::lane_entries(bytes);
});
