//! How long a VM stood still, as both its QEMUs tell it.

use crate::qmp::Qmp;
use anyhow::{Context, Result};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Extension of the monitor by which the stops of an adopted VM are timed.
pub(crate) const WATCH: &str = "watch.qmp";

/// Times a VM's stop by the events of both VMMs: from the last STOP at the
/// source to RESUME at the target.
#[derive(Debug)]
pub(crate) struct StopWatch {
    source: Option<Qmp>,
    target: Option<JoinHandle<Result<u64>>>,
    over: Arc<AtomicBool>,
}

impl StopWatch {
    /// `adopted`: the lab's own connection to the source is held elsewhere, so
    /// a further monitor of it is used.
    pub(crate) fn start(source: &Path, adopted: bool, target: &Path) -> Result<StopWatch> {
        let source = if adopted {
            source.with_extension(WATCH)
        } else {
            source.to_path_buf()
        };
        let source = Some(Qmp::connect(&source)?);
        let over = Arc::new(AtomicBool::new(false));
        let (socket, ended) = (target.to_path_buf(), Arc::clone(&over));
        let target = std::thread::spawn(move || {
            let mut qmp = loop {
                match Qmp::connect(&socket) {
                    Ok(qmp) => break qmp,
                    Err(_) if !ended.load(Ordering::Relaxed) => {
                        std::thread::sleep(Duration::from_millis(5))
                    }
                    Err(e) => return Err(e.context("the target's VMM never came up")),
                }
            };
            loop {
                // Short waits, so that a migration that fails ends this as well.
                match qmp.wait_event(Duration::from_millis(200), |e| e.name == "RESUME") {
                    Ok(event) => return Ok(event.at_us),
                    Err(e) if ended.load(Ordering::Relaxed) => return Err(e),
                    Err(_) => {}
                }
            }
        });
        Ok(StopWatch {
            source,
            target: Some(target),
            over,
        })
    }

    /// Milliseconds from STOP to RESUME.
    pub(crate) fn finish(mut self) -> Result<f64> {
        self.over.store(true, Ordering::Relaxed);
        let target = self.target.take().context("finished already")?;
        let resumed = target
            .join()
            .unwrap_or_else(|p| std::panic::resume_unwind(p))?;
        let mut source = self.source.take().context("finished already")?;
        source.drain();
        let stopped = source
            .last_at("STOP")
            .context("the source never stopped its guest")?;
        Ok(resumed.saturating_sub(stopped) as f64 / 1000.0)
    }
}

impl Drop for StopWatch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
