//! The corpus of the fuzz targets (`fuzz/`), fed to the same code without
//! libFuzzer and without nightly: what fuzzing has found once stays found.
//! Needs no root.

#[path = "../../fuzz/seeds/mod.rs"]
pub mod seeds;
#[path = "../../fuzz/targets/mod.rs"]
pub mod targets;

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use targets::TARGETS;

/// Set to write the seeds instead of comparing the corpus with them.
const WRITE: &str = "DROVER_WRITE_FUZZ_SEEDS";

/// Most bytes of the corpus: it is for reading by people, too.
const MOST: u64 = 200 << 10;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the agent has its own folder")
}

fn corpus() -> PathBuf {
    repository().join("fuzz/corpus")
}

fn files_of(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap_or_else(|e| panic!("{}: {e}; it belongs to the repository", directory.display()))
        .map(|entry| entry.expect("a readable directory").path())
        .collect();
    assert!(!files.is_empty(), "{} is empty", directory.display());
    files.sort();
    files
}

#[test]
fn every_file_of_the_corpus_keeps_to_what_its_target_asserts() {
    let mut bytes_read = 0;
    let mut failed = Vec::new();
    for (name, target) in TARGETS {
        for file in files_of(&corpus().join(name)) {
            let bytes = fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            bytes_read += bytes.len() as u64;
            let valid = file
                .file_name()
                .is_some_and(|file| file.to_string_lossy().starts_with("ok-"));
            match catch_unwind(AssertUnwindSafe(|| target(&bytes))) {
                Ok(accepted) if accepted || !valid => {}
                Ok(_) => failed.push(format!(
                    "{} is a valid encoding no longer: run the test of the seeds with {WRITE}=1",
                    file.display()
                )),
                Err(_) => failed.push(format!("{} panics", file.display())),
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    assert!(bytes_read <= MOST, "the corpus has {bytes_read} bytes");
}

#[test]
fn there_is_a_corpus_for_every_target_and_a_program_for_every_corpus() {
    let names: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let stems = |directory: &Path| -> BTreeSet<String> {
        let stem = |file: &PathBuf| file.file_stem().map(|s| s.to_string_lossy().into_owned());
        files_of(directory).iter().filter_map(stem).collect()
    };
    assert_eq!(stems(&repository().join("fuzz/fuzz_targets")), names);
    assert_eq!(stems(&corpus()), names);
    let manifest = fs::read_to_string(repository().join("fuzz/Cargo.toml")).expect("a manifest");
    for name in &names {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
    }
}

#[test]
fn the_seeds_of_today_are_in_the_corpus_and_accepted() {
    let write = std::env::var_os(WRITE).is_some();
    for seed in seeds::seeds(repository()) {
        let (name, target) = TARGETS
            .iter()
            .find(|(name, _)| *name == seed.target)
            .unwrap_or_else(|| panic!("no target {}", seed.target));
        assert!(target(&seed.bytes), "{name}: {} is not accepted", seed.file);
        let directory = corpus().join(name);
        let file = directory.join(&seed.file);
        if write {
            fs::create_dir_all(&directory).expect("a writable repository");
            fs::write(&file, &seed.bytes).expect("a writable repository");
        }
        // Not compared byte by byte: another zstd may compress otherwise.
        assert!(
            file.is_file(),
            "{} is missing: run the test of the seeds with {WRITE}=1",
            file.display()
        );
    }
}
