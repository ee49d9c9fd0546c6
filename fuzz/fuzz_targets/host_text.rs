//! Text of `/proc` and of QEMU's human monitor.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::host::host_text(bytes);
});
