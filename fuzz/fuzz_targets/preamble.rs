//! The first bytes of a connection, of both sides.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::net::preamble(bytes);
});
