//! TLS records of a lane.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::lane::lane_records(bytes);
});
