//! Certificates, bare and in PEM files.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::net::certificates(bytes);
});
