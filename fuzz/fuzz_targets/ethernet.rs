//! Frames as the eBPF meter reads them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::host::ethernet(bytes);
});
