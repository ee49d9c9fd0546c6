//! The files by which agents tell how far a handover is, and wait: `[debug]
//! moments` and `[debug] hold_at_switch`.

use super::cell::moment_stem;
use crate::check::{self, DifferingPage};
use crate::drover::Migration;
use anyhow::{Context, Result, bail};
use drover::gang::moments::Moment;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a gang may take to come to a moment.
const COMES: Duration = Duration::from_secs(30);

/// The folder of moments.
#[derive(Debug, Clone)]
pub struct Marks(PathBuf);

impl Marks {
    /// In this folder.
    pub fn new(dir: PathBuf) -> Marks {
        Marks(dir)
    }

    /// Forgets what earlier gangs left.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn clear(&self) -> Result<()> {
        fs::create_dir_all(&self.0)?;
        for entry in fs::read_dir(&self.0)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(())
    }

    /// Has the gang wait at a moment.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn hold(&self, moment: Moment, focus: &str) -> Result<()> {
        let path = self.0.join(moment_stem(moment, focus) + ".hold");
        fs::write(&path, b"").with_context(|| path.display().to_string())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn release(&self, moment: Moment, focus: &str) -> Result<()> {
        let path = self.0.join(moment_stem(moment, focus) + ".hold");
        fs::remove_file(&path).with_context(|| path.display().to_string())
    }

    /// Waits until the gang has come to a moment.
    ///
    /// # Errors
    /// When it ends before, or takes too long.
    pub fn wait(&self, moment: Moment, focus: &str, gang: &mut Migration) -> Result<()> {
        let reached = self.0.join(moment_stem(moment, focus) + ".reached");
        let until = Instant::now() + COMES;
        loop {
            let over = !gang.running()?;
            if reached.exists() {
                return Ok(());
            }
            if over {
                bail!("the gang ended without having come to {}", moment.name());
            }
            if Instant::now() > until {
                bail!(
                    "the gang did not come to {} within {COMES:?}",
                    moment.name()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What both sides' RAM was like at the switch of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AtSwitch {
    /// The same, byte for byte.
    Equal,
    /// These pages differed.
    Differs(Vec<DifferingPage>),
    /// A side was gone before it could be looked at.
    Gone(String),
}

#[derive(Debug, Deserialize)]
struct Ready {
    source_ram: PathBuf,
    target_ram: PathBuf,
}

/// What was found, by VM.
pub type Found = BTreeMap<String, AtSwitch>;

/// Compares both sides' RAM whenever an agent waits at a VM's switch. Unlike
/// [`check::HoldWatcher`] it goes on when a side dies under its hands.
#[derive(Debug)]
pub struct Switches {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Found>>>,
}

impl Switches {
    /// Watches this folder, which is emptied first.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn watch(dir: &Path) -> Result<Switches> {
        Marks::new(dir.to_owned()).clear()?;
        let over = Arc::new(AtomicBool::new(false));
        let (dir, ended) = (dir.to_owned(), Arc::clone(&over));
        let thread = std::thread::spawn(move || {
            let mut found = Found::new();
            while !ended.load(Ordering::Relaxed) {
                look(&dir, &mut found)?;
                std::thread::sleep(Duration::from_millis(3));
            }
            Ok(found)
        });
        Ok(Switches {
            over,
            thread: Some(thread),
        })
    }

    /// Everything that was compared.
    ///
    /// # Errors
    /// When the folder could not be read.
    pub fn finish(mut self) -> Result<Found> {
        self.over.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("watched already")?;
        thread
            .join()
            .unwrap_or_else(|p| std::panic::resume_unwind(p))
    }
}

impl Drop for Switches {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn look(dir: &Path, found: &mut Found) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let go = path.with_extension("go");
        if path.extension().is_none_or(|e| e != "ready") || go.exists() {
            continue;
        }
        let vm = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        // A file that is being written is read again a moment later.
        let Some(ready) = fs::read(&path)
            .ok()
            .and_then(|text| serde_json::from_slice::<Ready>(&text).ok())
        else {
            continue;
        };
        let at_switch = match check::differing_pages(&ready.source_ram, &ready.target_ram) {
            Ok(pages) if pages.is_empty() => AtSwitch::Equal,
            Ok(pages) => AtSwitch::Differs(pages),
            Err(error) => AtSwitch::Gone(format!("{error:#}")),
        };
        fs::write(&go, b"")?;
        found.insert(vm, at_switch);
    }
    Ok(())
}
