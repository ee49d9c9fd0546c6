//! What can be wrong with a migration of Cloud Hypervisor.

use super::wire::{Command, VERSION};
use thiserror::Error;

/// What a peer said that cannot be gone on with.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Fault {
    /// Not a command of the protocol.
    #[error("command {number} is none of Cloud Hypervisor's migration protocol")]
    Command {
        /// What stood there.
        number: u16,
    },
    /// Not a status of the protocol.
    #[error("response {number} is none of Cloud Hypervisor's migration protocol")]
    Status {
        /// What stood there.
        number: u16,
    },
    /// A response with a payload.
    #[error("a response with {length} bytes of payload, where none has any")]
    Payload {
        /// How many.
        length: u64,
    },
    /// Another version.
    #[error(
        "version {found} of Cloud Hypervisor's migration protocol: this drover speaks version {VERSION}; move the VM with one that speaks {found}"
    )]
    Version {
        /// The source's.
        found: u16,
    },
    /// A command that may not come now.
    #[error("command {command:?} {when}")]
    Order {
        /// Which.
        command: Command,
        /// Why it may not.
        when: &'static str,
    },
    /// Post-copy.
    #[error(
        "post-copy (a page is asked for by fault): drover moves VMs by pre-copy only; start the migration without it"
    )]
    Postcopy,
    /// A length beyond what is taken.
    #[error("{what} of {found} bytes; at most {most} are taken")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// The peer's figure.
        found: u64,
        /// The cap.
        most: u64,
    },
    /// A length that does not fit the command.
    #[error("{what} of {found} bytes, where {wanted} are expected")]
    Length {
        /// Of what.
        what: &'static str,
        /// The peer's figure.
        found: u64,
        /// What it should be.
        wanted: &'static str,
    },
    /// The configuration cannot be understood.
    #[error("the VM's configuration: {what}")]
    Config {
        /// What is wrong.
        what: String,
    },
    /// Memory outside of the VM's RAM.
    #[error("memory at {gpa:#x}, {bytes:#x} bytes: {what}")]
    Range {
        /// Guest-physical address.
        gpa: u64,
        /// Length.
        bytes: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// A descriptor that does not belong to the command it came with.
    #[error("{found} descriptors came with {command:?}, where {wanted} belongs to it")]
    Descriptors {
        /// With which command.
        command: Command,
        /// How many.
        found: usize,
        /// How many should.
        wanted: usize,
    },
    /// A slot named twice.
    #[error("a second descriptor for RAM slot {slot}")]
    SlotTwice {
        /// Which.
        slot: u32,
    },
}
