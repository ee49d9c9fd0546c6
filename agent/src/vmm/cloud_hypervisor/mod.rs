//! Cloud Hypervisor's migration protocol, version [`wire::VERSION`]: the agent
//! as the destination of `send-migration` ([`receive`]) and as the source of
//! `receive-migration` ([`Sender`]), over Unix sockets.
//!
//! Bottom up: [`wire`] has the messages of fixed size, [`layout`] finds the
//! VM's RAM in its configuration, [`requests`] reads what a source sends. None
//! of these does I/O. A source's VM runs on after an error or a closed
//! connection, until the answer to *Complete* has gone out.
//!
//! Gangs move such VMs by [`super::managed`]; see `docs/vmm-cloud-hypervisor.md`.

mod error;
pub mod fuzz;
pub mod layout;
mod receive;
pub mod requests;
mod send;
pub mod wire;

#[cfg(test)]
mod samples;
#[cfg(test)]
mod tests;

pub use error::Fault;
pub(in crate::vmm) use receive::Input;
pub use receive::{ReceiveError, Received, Receiver, receive};
pub use send::{SendError, Sender};
