//! A whole connection, as a lane receiver reads it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::lane::lane_stream(bytes);
});
