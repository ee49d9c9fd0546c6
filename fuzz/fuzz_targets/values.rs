//! Sizes, network prefixes and names.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::files::values(bytes);
});
