//! Control connections: frame, envelope, message.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::net::rpc(bytes);
});
