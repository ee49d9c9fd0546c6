//! The seeds of the corpus: valid encodings of everything the targets read,
//! made by the project's own encoders. `agent/tests/fuzz_corpus.rs` checks
//! that they are in the corpus and still accepted, and writes them when asked.

mod host;
mod lane;
mod net;
mod stream;
mod texts;
mod vmm;

use drover::types::{GangId, Page, VmIndex};
use std::path::Path;

/// One seed.
#[derive(Debug)]
pub struct Seed {
    /// Its target.
    pub target: &'static str,
    /// Its file in the target's corpus directory.
    pub file: String,
    /// Its content.
    pub bytes: Vec<u8>,
}

const GANG: GangId = GangId(0x1122_3344_5566_7788);
const VM: VmIndex = VmIndex(3);

/// All seeds. `repository` is where `configs/` lies.
pub fn seeds(repository: &Path) -> Vec<Seed> {
    let mut seeds = Vec::new();
    let mut add = |target: &'static str, name: &str, bytes: Vec<u8>| {
        let file = format!("ok-{name}");
        seeds.push(Seed {
            target,
            file,
            bytes,
        });
    };
    lane::seeds(&mut add);
    net::seeds(&mut add);
    for (target, file) in [
        ("config_files", "agent.toml"),
        ("config_files", "policy.toml"),
        ("vm_files", "plans/web.toml"),
        ("vm_files", "vms/web1.toml"),
        ("vm_files", "vms/k1.toml"),
    ] {
        let path = repository.join("configs").join(file);
        let name = path.file_name().expect("a file").to_string_lossy();
        let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        add(target, &name, text);
    }
    texts::seeds(&mut add);
    host::seeds(&mut add);
    stream::seeds(&mut add);
    vmm::seeds(&mut add);
    seeds
}

type Add<'a> = &'a mut dyn FnMut(&'static str, &str, Vec<u8>);

/// Page `n`: words that compress, each page another one.
fn page(n: usize) -> Page {
    std::array::from_fn(|at| b"drover \n"[at % 8] ^ (n * (at / 512)) as u8)
}
