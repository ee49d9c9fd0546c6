//! Values of the meter's eBPF map.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::host::map_values(bytes);
});
