//! VMs whose VMM embeds `drover-vmm` and answers KVM's own dirty log: the
//! agent's side of that. The protocol is [`drover_vmm::wire`]; guest RAM is read and
//! placed by the descriptors that the VMM hands out.
//!
//! [`LinkClient`] asks, one request at a time, and [`KvmLogSource`] makes rounds
//! of pages of its answers.

mod client;
mod error;
mod rounds;
mod source;

pub use client::{LinkClient, run_state};
pub use error::LinkClientError;
pub use source::{KvmLogSource, KvmLogSourceError};
