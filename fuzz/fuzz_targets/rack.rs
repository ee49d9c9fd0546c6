//! Claims, fetches and load reports.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::net::rack(bytes);
});
