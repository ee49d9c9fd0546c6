//! Where `unsafe` may be, counted: the compiler refuses it elsewhere
//! (`unsafe_code = "deny"` in Cargo.toml), and the test here refuses a file that
//! allows it to itself, or a count that docs/security.md does not know.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// Folders of code that ships, with the files that may hold `unsafe` and how
/// many uses there are. A new use changes the count here and in
/// docs/security.md, so that somebody looks at it.
pub(crate) const ALLOWED: &[(&str, usize)] = &[
    // Of the tests, never in an agent.
    ("agent-ebpf/src/link_faults.rs", 4),
    ("agent-ebpf/src/meter.rs", 4),
    ("agent/src/api/peer.rs", 1),
    ("agent/src/dedup/nh.rs", 1),
    ("agent/src/dedup/table.rs", 6),
    ("agent/src/lane/aead.rs", 3),
    ("agent/src/lane/pool.rs", 3),
    ("agent/src/lane/provided.rs", 5),
    ("agent/src/lane/ring.rs", 7),
    ("agent/src/lane/setup.rs", 1),
    ("agent/src/lane/tcp.rs", 3),
    ("agent/src/pace/meter.rs", 2),
    ("agent/src/pace/tcp_info.rs", 1),
    ("agent/src/vmm/cloud_hypervisor/receive.rs", 1),
    ("agent/src/vmm/inject/mod.rs", 2),
    ("agent/src/vmm/inject/tracee.rs", 4),
    ("agent/src/vmm/pagemap.rs", 2),
    ("agent/src/vmm/process.rs", 4),
    ("agent/src/vmm/ram.rs", 1),
    ("agent/src/vmm/ram/huge.rs", 5),
    ("agent/src/vmm/uffd.rs", 2),
    // Inside VMMs that embed it, never in an agent but for `connection.rs`.
    ("vmm-link/src/connection.rs", 1),
    ("vmm-link/src/kvm.rs", 7),
    ("vmm-link/src/memory.rs", 1),
    ("vmm-link/src/ring.rs", 6),
];

/// Code that ships, in which only those files may.
const SHIPPED: &[&str] = &[
    "agent/src",
    "agent-ebpf/src",
    "vmm-link/src",
    "xtask/src",
    "fuzz",
];

/// Uses of `unsafe` in a text of Rust: blocks, functions, impls, externs and
/// attributes, not words of comments.
fn uses(text: &str) -> usize {
    let code = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or(""));
    code.map(|line| {
        line.match_indices("unsafe")
            .filter(|(at, word)| {
                let before = line[..*at].chars().next_back();
                let after = line[at + word.len()..].trim_start();
                let whole = !before.is_some_and(|c| c.is_alphanumeric() || "_\"".contains(c));
                let opens = ["{", "fn", "impl", "extern", "trait", "("];
                whole && opens.iter().any(|open| after.starts_with(open))
            })
            .count()
    })
    .sum()
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("target") {
            rust_files(&path, found)?;
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// Compares the repository at `root` with [`ALLOWED`]; how many uses there are.
pub(crate) fn check(root: &Path) -> Result<usize> {
    let mut files = Vec::new();
    for folder in SHIPPED {
        rust_files(&root.join(folder), &mut files)?;
    }
    let mut all = 0;
    // This file only talks of it; the compiler holds it to that.
    let others = files
        .iter()
        .filter(|f| !f.ends_with("xtask/src/unsafety.rs"));
    for file in others {
        let text = std::fs::read_to_string(file)?;
        let name = file.strip_prefix(root)?.display().to_string();
        let found = uses(&text);
        let may = ALLOWED.iter().find(|(allowed, _)| *allowed == name);
        match may {
            Some((_, count)) => ensure!(
                *count == found,
                "{name} has {found} uses of `unsafe`, {count} are known: look at each, then \
                 correct xtask/src/unsafety.rs and docs/security.md"
            ),
            None => {
                ensure!(
                    found == 0 && !text.contains("allow(unsafe_code)"),
                    "{name} is not among the files that may hold `unsafe`: move it to one of \
                     them, or add it in xtask/src/unsafety.rs and docs/security.md"
                );
            }
        }
        all += found;
    }
    for (name, _) in ALLOWED {
        ensure!(
            root.join(name).is_file(),
            "{name} is gone: correct xtask/src/unsafety.rs"
        );
    }
    let sentence = format!("{all} uses of `unsafe` in {} files", ALLOWED.len());
    let document = std::fs::read_to_string(root.join("docs/security.md"))?;
    ensure!(
        document.contains(&sentence),
        "docs/security.md should say: {sentence}"
    );
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_code_is_where_it_may_be_and_the_document_knows_how_much() {
        check(crate::shell::root()).unwrap();
    }

    #[test]
    fn words_of_comments_and_texts_are_not_uses() {
        assert_eq!(uses("// unsafe { }\nlet a = \"unsafe fn\";"), 0);
        assert_eq!(uses("unsafe_op_in_unsafe_fn = 1; forbid(unsafe_code)"), 0);
        assert_eq!(uses("let x = unsafe { f() };\nunsafe impl A for B {}"), 2);
        assert_eq!(
            uses("#[unsafe(no_mangle)]\npub unsafe extern \"C\" fn x()"),
            2
        );
    }
}
