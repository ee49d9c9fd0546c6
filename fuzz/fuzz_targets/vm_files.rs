//! Plans and VM definitions.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::files::vm_files(bytes);
});
