//! Fencing: a command of the operator's whose success proves that another host
//! is down, and so that nothing runs there.

use crate::config::FencingConfig;
use std::path::PathBuf;
use std::process::Stdio;

/// How much of a failed command's words is kept.
const WORDS: usize = 512;

/// Proves that `host` is down, where `vm` may run. An error is no proof, and
/// says why.
pub async fn prove_down(fencing: &FencingConfig, host: &str, vm: &str) -> Result<(), String> {
    let Some((program, args)) = fencing.command.split_first() else {
        return Err("no fencing command is configured".into());
    };
    let program = PathBuf::from(program);
    let mut command = tokio::process::Command::new(&program);
    command
        .args(args)
        .args([host, vm])
        .env("DROVER_FENCE_HOST", host)
        .env("DROVER_FENCE_VM", vm)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let name = program.display();
    match tokio::time::timeout(fencing.limit, command.output()).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said: String = said.trim().chars().take(WORDS).collect();
            Err(format!(
                "{name} did not fence {host} ({}): {said}",
                output.status
            ))
        }
        Ok(Err(error)) => Err(format!("{name} cannot be run: {error}")),
        Err(_) => Err(format!(
            "{name} did not fence {host} within {} s",
            fencing.limit.as_secs()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn fence(script: &str, limit: Duration) -> FencingConfig {
        let command = ["/bin/sh", "-c", script, "fence"].map(str::to_owned);
        FencingConfig {
            command: command.to_vec(),
            limit,
        }
    }

    #[tokio::test]
    async fn only_success_is_a_proof() {
        let long = Duration::from_secs(10);
        let good = fence(
            "test $1 = b1 && test $2 = web1 && test $DROVER_FENCE_HOST = b1",
            long,
        );
        prove_down(&good, "b1", "web1").await.unwrap();
        let why = prove_down(&good, "b2", "web1").await.unwrap_err();
        assert!(why.contains("did not fence b2"), "{why}");
        let why = prove_down(
            &fence("echo no power switch >&2; exit 3", long),
            "b1",
            "web1",
        )
        .await
        .unwrap_err();
        assert!(why.contains("no power switch"), "{why}");
        let why = prove_down(&fence("sleep 60", Duration::from_millis(50)), "b1", "web1")
            .await
            .unwrap_err();
        assert!(why.contains("within"), "{why}");
    }
}
