//! The main connection of a migration of QEMU.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::stream::stream_main(bytes);
});
