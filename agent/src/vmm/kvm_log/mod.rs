//! VMs whose VMM embeds `drover-vmm` and answers KVM's own dirty log: the
//! agent's side of that. The protocol is [`drover_vmm::wire`]; guest RAM is read and
//! placed by the descriptors that the VMM hands out.
//!
//! ```text
//! source                                   target
//! SourceVm::open        its phase, RAM
//! start                 the log is on      TargetVm::prepare   it waits, and runs nothing
//!   rounds …                                 pages placed in its RAM file
//! pause                                    listen(socket)
//!   last round
//! state_out ── chunks ── relay ──────────▶ wait_arrived        loaded, and stands
//!                                          ── point of no return: journal, not here ──
//! Vmm::end                                 resume_arrived, keep
//! ```
//! [`LinkClient`] asks, one request at a time, and [`KvmLogSource`] makes rounds
//! of pages of its answers.

mod client;
mod error;
mod greeting;
mod pages;
mod rounds;
mod session;
mod source;
mod state;
mod target;

pub use client::{LinkClient, run_state};
pub use error::{KvmLogVmError, LinkClientError};
pub use pages::{KvmLogSource, KvmLogSourceError};
pub use source::{LinkedFacts, RamPart, SourceVm, resume_arrived, roll_back};
pub use target::TargetVm;
