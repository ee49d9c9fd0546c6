//! What a target sends back on a lane, however it is cut.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::lane::lane_reverse(bytes);
});
