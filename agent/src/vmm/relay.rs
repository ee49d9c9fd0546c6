//! Carrying the device state between two sockets, unread.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

/// Bytes carried each way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelayStats {
    /// From the first end to the second: the device state.
    pub forward: u64,
    /// From the second end to the first: the return path.
    pub back: u64,
}

/// The relay broke off. Both ends have been dropped, so neither side can take
/// what it got for the whole.
#[derive(Debug, Error)]
pub enum RelayError {
    /// An end failed.
    #[error("relay of the device state broke off after {} bytes there and {} back", done.forward, done.back)]
    Io {
        /// Carried until then.
        done: RelayStats,
        /// The failure.
        #[source]
        source: io::Error,
    },
    /// Nothing moved in either direction.
    #[error("relay of the device state stood still for {limit:?} after {} bytes there and {} back", done.forward, done.back)]
    Stalled {
        /// Carried until then.
        done: RelayStats,
        /// How long.
        limit: Duration,
    },
}

/// A socket that a VMM on this host is to connect to; its file goes with it.
#[derive(Debug)]
pub struct OfferedSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl OfferedSocket {
    /// Listens at `path`, in place of what an earlier run may have left there.
    pub fn bind(path: &Path) -> io::Result<OfferedSocket> {
        let _stale = fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        let path = path.to_owned();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(OfferedSocket { path, listener })
    }

    /// Waits for the VMM.
    pub async fn accept(&self, limit: Duration) -> Result<UnixStream, RelayError> {
        let done = RelayStats::default();
        match timeout(limit, self.listener.accept()).await {
            Ok(Ok((stream, _))) => Ok(stream),
            Ok(Err(source)) => Err(RelayError::Io { done, source }),
            Err(_) => Err(RelayError::Stalled { done, limit }),
        }
    }
}

impl Drop for OfferedSocket {
    fn drop(&mut self) {
        let _gone_already = fs::remove_file(&self.path);
    }
}

/// Carries bytes both ways between `a` and `b` until both have ended. The end
/// of one direction is passed on as the end of that direction only (half
/// close): QEMU's return path still talks when the state is through. Nothing
/// is ever added, above all not the return path's last message, by which the
/// source knows that the target has it all.
///
/// `idle_limit`: how long nothing may move in either direction.
pub async fn relay<A, B>(a: A, b: B, idle_limit: Duration) -> Result<RelayStats, RelayError>
where
    A: AsyncRead + AsyncWrite,
    B: AsyncRead + AsyncWrite,
{
    let (a_read, a_write) = tokio::io::split(a);
    let (b_read, b_write) = tokio::io::split(b);
    let forward = AtomicU64::new(0);
    let back = AtomicU64::new(0);
    let stats = || RelayStats {
        forward: forward.load(Relaxed),
        back: back.load(Relaxed),
    };
    let both = async {
        tokio::try_join!(
            one_way(a_read, b_write, &forward),
            one_way(b_read, a_write, &back)
        )
    };
    tokio::pin!(both);
    loop {
        let before = stats();
        match timeout(idle_limit, &mut both).await {
            Ok(Ok(_)) => return Ok(stats()),
            Ok(Err(source)) => {
                return Err(RelayError::Io {
                    done: stats(),
                    source,
                });
            }
            Err(_) if stats() == before => {
                return Err(RelayError::Stalled {
                    done: before,
                    limit: idle_limit,
                });
            }
            Err(_) => {}
        }
    }
}

async fn one_way(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    carried: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..n]).await?;
        to.flush().await?;
        carried.fetch_add(n as u64, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    fn run<T>(f: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(f)
    }

    #[test]
    fn half_close_goes_through_and_the_answer_comes_back() {
        run(async {
            let (mut source, a) = UnixStream::pair().unwrap();
            let (mut target, b) = UnixStream::pair().unwrap();
            let relaying = tokio::spawn(relay(a, b, LIMIT));
            let state = vec![7; 300_000];
            let sent = state.clone();
            let sending = tokio::spawn(async move {
                source.write_all(&sent).await.unwrap();
                source.shutdown().await.unwrap();
                let mut answer = Vec::new();
                source.read_to_end(&mut answer).await.unwrap();
                answer
            });
            let mut got = Vec::new();
            target.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, state);
            target.write_all(b"SHUT").await.unwrap();
            drop(target);
            assert_eq!(sending.await.unwrap(), b"SHUT");
            let stats = relaying.await.unwrap().unwrap();
            assert_eq!(
                stats,
                RelayStats {
                    forward: 300_000,
                    back: 4
                }
            );
        });
    }

    #[test]
    fn a_dead_target_is_no_answer() {
        run(async {
            let (mut source, a) = UnixStream::pair().unwrap();
            let (target, b) = UnixStream::pair().unwrap();
            let relaying = tokio::spawn(relay(a, b, LIMIT));
            drop(target);
            // The return path ends without a byte, whatever becomes of the state.
            let mut answer = Vec::new();
            source.read_to_end(&mut answer).await.unwrap();
            assert_eq!(answer, b"");
            let _ = source.write_all(&[1; 4096]).await;
            assert!(matches!(
                relaying.await.unwrap(),
                Err(RelayError::Io { .. })
            ));
        });
    }

    #[test]
    fn standing_still_has_a_limit() {
        run(async {
            let (_source, a) = UnixStream::pair().unwrap();
            let (_target, b) = UnixStream::pair().unwrap();
            let error = relay(a, b, Duration::from_millis(30)).await.unwrap_err();
            assert!(matches!(error, RelayError::Stalled { .. }), "{error}");
        });
    }
}
