//! The userfaultfd interface, as far as the asynchronous write-protect log
//! needs it: structures and ioctls, nothing of QEMU.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use thiserror::Error;

const UFFD_API: u64 = 0xAA;
const UFFDIO_API: u64 = 0xC018_AA3F; // _IOWR(0xAA, 0x3F, struct uffdio_api)
const UFFDIO_REGISTER: u64 = 0xC020_AA00; // _IOWR(0xAA, 0x00, struct uffdio_register)
const UFFDIO_UNREGISTER: u64 = 0x8010_AA01; // _IOR(0xAA, 0x01, struct uffdio_range)
const UFFDIO_WRITEPROTECT: u64 = 0xC018_AA06; // _IOWR(0xAA, 0x06, struct uffdio_writeprotect)
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`: write-protect works on tmpfs and hugetlbfs.
pub const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// `UFFD_FEATURE_WP_UNPOPULATED`: pages without an entry can be protected.
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// `UFFD_FEATURE_WP_ASYNC`: the kernel resolves the fault itself; nobody waits.
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// All that the dirty log needs.
pub const FEATURES: u64 = FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC;

/// Each needed feature with its name and the kernel that brought it.
pub const FEATURE_NAMES: [(u64, &str, &str); 3] = [
    (
        FEATURE_WP_HUGETLBFS_SHMEM,
        "UFFD_FEATURE_WP_HUGETLBFS_SHMEM",
        "5.19",
    ),
    (FEATURE_WP_UNPOPULATED, "UFFD_FEATURE_WP_UNPOPULATED", "6.4"),
    (FEATURE_WP_ASYNC, "UFFD_FEATURE_WP_ASYNC", "6.7"),
];

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// A userfaultfd ioctl failed.
#[derive(Debug, Error)]
pub enum UffdError {
    /// The kernel lacks a feature the dirty log needs.
    #[error(
        "this kernel's userfaultfd lacks {names}; direct mode needs Linux 6.7 or newer with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP"
    )]
    Features {
        /// Names of what is missing, comma separated.
        names: String,
    },
    /// One ioctl was refused.
    #[error("{ioctl} on guest RAM at {start:#x}+{len:#x} failed")]
    Ioctl {
        /// Name of the ioctl.
        ioctl: &'static str,
        /// First address in the VMM (0 when it has none).
        start: u64,
        /// Bytes.
        len: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A userfaultfd of *some* process (it acts on the address space of the
/// process that created it, whoever holds it) whose API handshake is done.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Takes a fresh userfaultfd and agrees on [`FEATURES`].
    pub fn handshake(fd: OwnedFd) -> Result<Uffd, UffdError> {
        let mut api = UffdioApi {
            api: UFFD_API,
            features: FEATURES,
            ioctls: 0,
        };
        match ioctl(&fd, UFFDIO_API, &mut api) {
            Ok(()) => Ok(Uffd(fd)),
            // On EINVAL the kernel reports nothing: ask a second descriptor what there is.
            Err(source) => match offered_features() {
                Ok(have) if FEATURES & !have != 0 => Err(UffdError::Features {
                    names: missing_names(have),
                }),
                _ => Err(UffdError::Ioctl {
                    ioctl: "UFFDIO_API",
                    start: 0,
                    len: 0,
                    source,
                }),
            },
        }
    }

    /// Registers a range (page-aligned, whole mappings or parts) for write-protect.
    pub fn register_wp(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let mut arg = UffdioRegister {
            range: UffdioRange { start, len },
            mode: UFFDIO_REGISTER_MODE_WP,
            ioctls: 0,
        };
        ioctl(&self.0, UFFDIO_REGISTER, &mut arg).map_err(|source| UffdError::Ioctl {
            ioctl: "UFFDIO_REGISTER",
            start,
            len,
            source,
        })
    }

    /// Write-protects all of a registered range, pages without an entry
    /// included, so that later only real writes show up as written.
    pub fn write_protect(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let mut arg = UffdioWriteprotect {
            range: UffdioRange { start, len },
            mode: UFFDIO_WRITEPROTECT_MODE_WP,
        };
        ioctl(&self.0, UFFDIO_WRITEPROTECT, &mut arg).map_err(|source| UffdError::Ioctl {
            ioctl: "UFFDIO_WRITEPROTECT",
            start,
            len,
            source,
        })
    }

    /// Undoes [`Self::register_wp`]: the range is plain memory again.
    pub fn unregister(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let mut arg = UffdioRange { start, len };
        ioctl(&self.0, UFFDIO_UNREGISTER, &mut arg).map_err(|source| UffdError::Ioctl {
            ioctl: "UFFDIO_UNREGISTER",
            start,
            len,
            source,
        })
    }
}

/// The features this kernel's userfaultfd offers, as a bit set.
pub fn offered_features() -> io::Result<u64> {
    // SAFETY: the call takes flags only; a result ≥ 0 is a descriptor nobody else owns.
    let fd = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd as i32)
    };
    let mut api = UffdioApi {
        api: UFFD_API,
        features: 0,
        ioctls: 0,
    };
    ioctl(&fd, UFFDIO_API, &mut api)?;
    Ok(api.features)
}

/// Names of the needed features that are not in `have`, with the kernel that has them.
pub fn missing_names(have: u64) -> String {
    let names: Vec<String> = FEATURE_NAMES
        .iter()
        .filter(|(bit, ..)| have & bit == 0)
        .map(|(_, name, since)| format!("{name} (Linux {since})"))
        .collect();
    names.join(", ")
}

fn ioctl<T>(fd: &OwnedFd, request: u64, arg: &mut T) -> io::Result<()> {
    // SAFETY: each caller in this file pairs a request with its own `repr(C)`
    // argument, whose size is part of the request number; it outlives the call.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::c_ulong, arg as *mut T) };
    if rc < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_carry_the_sizes_of_their_arguments() {
        let size = |request: u64| (request >> 16 & 0x3fff) as usize;
        assert_eq!(size(UFFDIO_API), size_of::<UffdioApi>());
        assert_eq!(size(UFFDIO_REGISTER), size_of::<UffdioRegister>());
        assert_eq!(size(UFFDIO_UNREGISTER), size_of::<UffdioRange>());
        assert_eq!(size(UFFDIO_WRITEPROTECT), size_of::<UffdioWriteprotect>());
    }

    #[test]
    fn missing_features_are_named() {
        assert_eq!(missing_names(FEATURES), "");
        assert_eq!(
            missing_names(FEATURES & !FEATURE_WP_ASYNC),
            "UFFD_FEATURE_WP_ASYNC (Linux 6.7)"
        );
    }
}
