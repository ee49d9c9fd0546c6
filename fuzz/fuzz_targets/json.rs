//! QMP lines, journal records, API requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::host::json(bytes);
});
