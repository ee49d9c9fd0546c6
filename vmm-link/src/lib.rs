//! For authors of VMMs: lets the agent of Drover move your VMs live, by KVM's
//! own dirty log.
//!
//! KVM answers for a VM only in the process that made it: asked from another,
//! `KVM_GET_DIRTY_LOG` fails with `EIO`. So the log is read inside the VMM, by
//! this library, for an agent on the same host. It
//!
//! * hands the descriptors of guest RAM to the agent, which maps or reads the
//!   memory itself: no page passes through the VMM;
//! * switches the log on and off, and answers each *round* with the pages
//!   written since the one before: from KVM's bitmaps (under
//!   `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` where the kernel has it: only what was
//!   taken is cleared) or from [dirty rings](DirtyRings);
//! * adds what the VMM's own devices wrote ([`Marks`]), which KVM does not see;
//! * pauses and resumes the VM and carries its state, through your code ([`Vmm`]).
//!
//! ```no_run
//! use drover_vmm::{CallError, Link, Region, Role, Vmm};
//! use std::io::{Read, Write};
//! use std::path::Path;
//! use std::sync::Arc;
//!
//! /// The VMM's own handle on its vCPU threads and devices.
//! struct Machine { /* … */ }
//!
//! impl Vmm for Machine {
//!     fn is_running(&mut self) -> bool { true }
//!     fn pause(&mut self) -> Result<bool, CallError> { /* stop vCPUs, drain devices */ Ok(true) }
//!     fn resume(&mut self) -> Result<(), CallError> { Ok(()) }
//!     fn save_state(&mut self, out: &mut dyn Write) -> Result<(), CallError> {
//!         Ok(out.write_all(b"registers, interrupt controllers, devices")?)
//!     }
//!     fn load_state(&mut self, state: &mut dyn Read) -> Result<(), CallError> {
//!         let mut bytes = Vec::new();
//!         state.read_to_end(&mut bytes)?;
//!         Ok(())
//!     }
//!     fn end(&mut self) { std::process::exit(0) }
//!     fn kick(&mut self) { /* signal each vCPU thread, wait until it has left KVM_RUN */ }
//! }
//!
//! # fn ram(_: &std::fs::File) -> *mut u8 { std::ptr::null_mut() }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vm = kvm_ioctls::Kvm::new()?.create_vm()?;
//! let ram_bytes = 1 << 30;
//! let file = Arc::new(std::fs::File::options().read(true).write(true).open("/dev/shm/web1.ram")?);
//! let host = ram(&file); // mapped with MAP_SHARED
//! // … KVM_SET_USER_MEMORY_REGION: slot 0, address 0, ram_bytes at `host` …
//!
//! // SAFETY: slot 0 was set up with just this, and stays so.
//! let region = unsafe { Region::new(0, 0, ram_bytes, host, file, 0) };
//! let link = Link::new(&vm, vec![region], None)?;
//! let marks = link.marks(); // for devices: marks.wrote(gpa, len), after each write
//! let server = link.serve(Path::new("/run/vmm/web1.sock"), Role::Run, Machine { /* … */ })?;
//! server.wait(); // until the agent has moved the VM away
//! # drop(marks);
//! # Ok(())
//! # }
//! ```
//! On the target the VMM is started with [`Role::Incoming`]: it makes the VM and its
//! RAM as always, but runs nothing. The agent places pages, has the state
//! loaded, and lets the guest run once the source can never run it again.
//!
//! # What has to hold
//! * RAM is shared memory (`MAP_SHARED` of a memfd or a file), of which a page that
//!   nobody has written is a hole.
//! * Whatever writes guest RAM is either a vCPU under KVM or marks it. vhost
//!   needs its own log (`VHOST_F_LOG_ALL`) read into marks at each pause;
//!   devices passed through (VFIO) write unseen: refuse to be moved with one.
//! * After [`Vmm::pause`] nothing writes any more.
//! * A paused VM goes on when the agent says so and never by itself, not even
//!   when the agent dies: it may have been moved by then. Agents that are
//!   started again settle that.
//!
//! # Compatibility
//! Versions follow semver. The protocol ([`wire`]) has a version of its own, and
//! other versions are refused: agent and library of one host are of one release.
//! A VM's state is yours, and so is telling your releases' states apart.

mod connection;
mod kvm;
mod log;
mod marks;
mod memory;
mod ring;
mod server;
mod state;
mod vmm;
pub mod wire;

pub use connection::{Connection, ConnectionError};
pub use marks::Marks;
pub use memory::{MemoryError, Region};
pub use ring::{DirtyRings, EXIT_RING_FULL};
pub use server::{Link, LinkError, Role, Server};
pub use vmm::{CallError, Vmm};
