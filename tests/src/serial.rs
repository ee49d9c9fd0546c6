//! What guests say on their first serial port.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Reads a guest's serial file as it grows.
#[derive(Debug, Clone)]
pub struct Serial {
    path: PathBuf,
}

impl Serial {
    /// Of this file, which need not be there yet.
    pub fn new(path: impl Into<PathBuf>) -> Serial {
        Serial { path: path.into() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything said so far.
    ///
    /// # Errors
    /// When the guest found wrong data or its kernel gave up.
    pub fn text(&self) -> Result<String> {
        let bytes = match fs::read(&self.path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            read => read.with_context(|| self.path.display().to_string())?,
        };
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let bad =
            |l: &&str| l.contains("CORRUPT") || l.contains("Kernel panic") || l.contains("Oops");
        match text.lines().find(bad) {
            Some(line) => bail!("the guest of {} says: {line}", self.path.display()),
            None => Ok(text),
        }
    }

    /// The number of the last tick, 0 before the first.
    ///
    /// # Errors
    /// As [`Serial::text`].
    pub fn ticks(&self) -> Result<u64> {
        Ok(last_number(&self.text()?, "TICK "))
    }

    /// How often the guest has checked all of its data.
    ///
    /// # Errors
    /// As [`Serial::text`].
    pub fn verified(&self) -> Result<u64> {
        Ok(last_number(&self.text()?, "VERIFIED "))
    }

    /// A value of the last tick, `w` (pages written) for one.
    ///
    /// # Errors
    /// As [`Serial::text`].
    pub fn value(&self, key: &str) -> Result<Option<u64>> {
        let text = self.text()?;
        let tick = whole_lines(&text).rev().find(|l| l.starts_with("TICK "));
        let find = |t: &str| {
            t.split(' ')
                .find_map(|w| w.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
        };
        Ok(tick.and_then(find))
    }

    /// Waits until `met` holds for what was said.
    ///
    /// # Errors
    /// As [`Serial::text`], or when it does not come to hold within `patience`.
    pub fn wait(&self, what: &str, patience: Duration, met: impl Fn(&str) -> bool) -> Result<()> {
        let until = Instant::now() + patience;
        loop {
            let text = self.text()?;
            if met(&text) {
                return Ok(());
            }
            if Instant::now() > until {
                let last = text.lines().last().unwrap_or("nothing at all").to_string();
                bail!(
                    "{}: no {what} within {patience:?}; the guest last said: {last}",
                    self.path.display()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for `more` ticks from now on.
    ///
    /// # Errors
    /// As [`Serial::wait`].
    pub fn ticks_on(&self, more: u64, patience: Duration) -> Result<()> {
        let from = self.ticks()?;
        self.wait(&format!("{more} more ticks"), patience, |t| {
            last_number(t, "TICK ") >= from + more
        })
    }
}

/// The lines that are complete. A Linux guest ends them with CR LF.
fn whole_lines(text: &str) -> impl DoubleEndedIterator<Item = &str> {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().map(str::trim_end)
}

fn last_number(text: &str, prefix: &str) -> u64 {
    let line = whole_lines(text).rev().find_map(|l| l.strip_prefix(prefix));
    line.and_then(|l| l.split(' ').next()?.parse().ok())
        .unwrap_or(0)
}

/// The serial file's path of a VM for messages.
impl AsRef<Path> for Serial {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_line_is_not_yet_a_tick() {
        assert_eq!(last_number("READY\nTICK 4 ok\nTICK 50", "TICK "), 4);
        assert_eq!(last_number("TICK 50", "TICK "), 0);
    }

    #[test]
    fn corrupt_is_never_overlooked() -> Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), "READY\r\nTICK 1 ok w=3\r\n")?;
        let serial = Serial::new(file.path());
        assert_eq!((serial.ticks()?, serial.value("w")?), (1, Some(3)));
        fs::write(file.path(), "READY\nCORRUPT 1 places\nTICK 2 ok\n")?;
        assert!(serial.ticks().is_err());
        Ok(())
    }
}
