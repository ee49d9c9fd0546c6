//! Moving a gang of VMs.
//!
//! * [`plan`], [`message`], [`coordinator`]: what is to be moved, what agents
//!   say to each other about it, and the agent that drives it.
//! * A VM's pages on the source host: [`scan`] (rounds, one thread a VM) →
//!   [`stage`] (read, fingerprint, decide) → [`claims`] (ask the rack) → lanes;
//!   [`source`] holds what they share and carries the lanes' news back through
//!   the [`inbox`]. [`rounds`] decides when to go round again.
//! * On the target host: [`target`].
//! * [`handover`] moves the VM itself, once; [`journal`] is its durable record;
//!   [`moments`] lets tests stop it anywhere, [`plant`] lets it fail on purpose.

pub mod claims;
pub mod coordinator;
pub mod flight;
pub mod handover;
pub mod inbox;
pub mod journal;
pub mod message;
pub mod moments;
pub mod plan;
pub mod plant;
pub mod progress;
pub mod rounds;
pub mod scan;
pub mod slots;
pub mod source;
pub mod stage;
pub mod target;
pub mod verify;

#[cfg(test)]
mod domain_tests;
#[cfg(test)]
pub(crate) mod testing;
