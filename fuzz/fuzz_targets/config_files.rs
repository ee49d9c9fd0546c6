//! `agent.toml` and `policy.toml`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    drover_fuzz::files::config_files(bytes);
});
