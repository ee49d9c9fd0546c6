//! Embeds the eBPF meter if it has been built (`cargo xtask build-ebpf`), so
//! that plain `cargo check` and `cargo clippy` need no BPF toolchain.
//! `DROVER_EBPF_OBJECT` names another object to embed.
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo::rustc-check-cfg=cfg(drover_meter)");
    println!("cargo::rerun-if-env-changed=DROVER_EBPF_OBJECT");
    println!("cargo::rerun-if-env-changed=CARGO_TARGET_DIR");
    println!("cargo::rerun-if-changed=build.rs");

    let object = match env::var_os("DROVER_EBPF_OBJECT") {
        Some(path) => {
            let path = PathBuf::from(path);
            assert!(
                path.is_file(),
                "DROVER_EBPF_OBJECT names {}, which is no file",
                path.display()
            );
            path
        }
        None => built_by_xtask(),
    };
    if object.is_file() {
        println!("cargo::rerun-if-changed={}", object.display());
        let embedded =
            Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("drover-meter.o");
        fs::copy(&object, &embedded)
            .unwrap_or_else(|error| panic!("cannot copy {}: {error}", object.display()));
        println!("cargo::rustc-cfg=drover_meter");
        println!(
            "cargo::rustc-env=DROVER_METER_OBJECT={}",
            embedded.display()
        );
        return;
    }
    // Cargo takes a path that is not there for one that changed, and would
    // build the agent anew each time. So watch the directory it will appear in.
    if let Some(dir) = object.parent()
        && fs::create_dir_all(dir).is_ok()
    {
        println!("cargo::rerun-if-changed={}", dir.display());
    }
}

fn built_by_xtask() -> PathBuf {
    let repository = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let repository = repository.parent().expect("the agent has its own folder");
    let target = match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => repository.join(dir),
        None => repository.join("target"),
    };
    target.join("bpf/drover-meter.o")
}
