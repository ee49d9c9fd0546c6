//! Drover moves gangs of running VMs between racks, live, and sends each
//! distinct memory page across the core link once per target rack.
//!
//! Follow a page through the modules:
//! [`vmm`] reads it from guest RAM → [`dedup`] fingerprints and claims it →
//! [`lane`] carries it, at the speed [`pace`] allows → [`dedup`] places it on
//! the target. [`gang`] drives it all; [`net`] joins agents; [`api`] and
//! [`cli`] face the operator.
pub mod agent;
pub mod api;
pub mod bench;
pub mod cli;
pub mod config;
pub mod dedup;
pub mod gang;
pub mod lane;
pub mod net;
pub mod pace;
pub mod pki;
pub mod private_file;
pub mod types;
pub mod vmm;
