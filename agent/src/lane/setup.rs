//! Setting a lane's ring up, with what older kernels lack left out.
#![allow(unsafe_code)]

use super::pool::{BUF_LEN, BufferPool};
use io_uring::IoUring;
use std::io;

/// Submission queue entries; a lane has one send, one receive and one poll.
const SQ_ENTRIES: u32 = 16;
/// Buffers one registration entry covers: an entry may not pass 1 GiB.
pub(super) const BUFS_PER_REGISTRATION: usize = 1024;

/// Why a ring could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// io_uring itself.
    #[error(
        "cannot set up io_uring for a lane (is kernel.io_uring_disabled set? Linux 6.1 or newer is needed)"
    )]
    Setup(#[source] io::Error),
    /// Pinning the buffers.
    #[error(
        "cannot register {bytes} bytes of lane buffers with io_uring: raise the memlock limit (LimitMEMLOCK=infinity) or give the agent CAP_IPC_LOCK"
    )]
    Register {
        /// Size of the pools.
        bytes: usize,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Memory for receiving, or the wake-up event.
    #[error("cannot allocate what a lane's ring needs")]
    Resources(#[source] io::Error),
}

/// A ring; with `deferred`, completions run only when its thread asks.
pub(super) fn build(deferred: bool) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_single_issuer().setup_cqsize(256);
    if deferred {
        builder.setup_defer_taskrun().setup_taskrun_flag();
    }
    builder.build(SQ_ENTRIES).or_else(|error| {
        if error.raw_os_error() == Some(libc::EINVAL) {
            // Before 6.1: no deferred completions. It works, only slower.
            tracing::warn!(
                "no single-issuer io_uring (before Linux 6.1): lanes run on a plain ring"
            );
            IoUring::builder().setup_cqsize(256).build(SQ_ENTRIES)
        } else {
            Err(error)
        }
    })
}

/// Registers the pools' memory; returns them with the index of each one's
/// first entry. They must be kept as long as the ring.
pub(super) fn register(
    uring: &IoUring,
    pools: &[&BufferPool],
) -> Result<Vec<(BufferPool, u16)>, RingError> {
    let mut entries = Vec::new();
    let mut registered = Vec::new();
    for &pool in pools {
        registered.push((pool.clone(), entries.len() as u16));
        let (start, len) = pool.region();
        let step = BUFS_PER_REGISTRATION * BUF_LEN;
        entries.extend((0..len).step_by(step).map(|offset| libc::iovec {
            iov_base: start.wrapping_add(offset).cast(),
            iov_len: step.min(len - offset),
        }));
    }
    if entries.is_empty() {
        return Ok(registered);
    }
    // SAFETY: the entries lie in the pools' mappings, which the handles in
    // `registered` keep as long as the ring (or forever, see Drop).
    unsafe { uring.submitter().register_buffers(&entries) }.map_err(|source| {
        RingError::Register {
            bytes: pools.iter().map(|pool| pool.bytes()).sum(),
            source,
        }
    })?;
    Ok(registered)
}
