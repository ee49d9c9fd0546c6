//! Processes are waited for, but not for ever.

use crate::registry;
use anyhow::{Result, bail};
use std::process::{Child, Output};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// Longest that a command of the lab may run. None takes a tenth of it on a
/// machine with nothing else to do.
pub const COMMAND: Duration = Duration::from_secs(300);

/// Waits for a process, and takes what it prints. One that does not end within
/// `limit` is killed.
///
/// # Errors
/// When it was killed, with what it had printed until then, or cannot be
/// waited for.
pub fn output(mut child: Child, limit: Duration) -> Result<Output> {
    // One that has ended and was waited for has no handle any more.
    if child.try_wait()?.is_some() {
        return Ok(child.wait_with_output()?);
    }
    let pidfd = registry::pidfd(child.id() as i32)?;
    let (running, ended) = channel::<()>();
    let guard = std::thread::spawn(move || {
        let late = ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
        if late {
            registry::kill(&pidfd);
        }
        late
    });
    let out = child.wait_with_output();
    drop(running);
    let late = guard
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let out = out?;
    if late {
        bail!(
            "did not end within {limit:?} and was killed; it said: {}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn shell(script: &str) -> Child {
        Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .expect("there is a shell")
    }

    #[test]
    fn a_process_that_does_not_end_is_killed_and_quoted() {
        let error = output(
            shell("echo so far; exec sleep 1000"),
            Duration::from_secs(1),
        )
        .expect_err("it sleeps longer");
        assert!(error.to_string().contains("so far"), "{error}");
    }

    #[test]
    fn what_a_process_said_that_was_waited_for_is_still_there() -> Result<()> {
        let mut child = shell("echo all");
        child.wait()?;
        assert_eq!(output(child, COMMAND)?.stdout, b"all\n");
        Ok(())
    }

    #[test]
    fn a_process_that_ends_is_not() -> Result<()> {
        let out = output(shell("echo all; exit 3"), COMMAND)?;
        assert_eq!(
            (out.status.code(), &out.stdout[..]),
            (Some(3), &b"all\n"[..])
        );
        Ok(())
    }
}
