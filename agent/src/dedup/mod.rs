//! Sends each distinct page once per target rack.
//!
//! A page's way through this module, on the source host: [`fingerprint`] names
//! its content, [`source`] decides (unchanged, zero, known, or ask), [`claim`]
//! is what a rack's agents answer when asked. On the target host: [`resolve`]
//! places content, settles references and serves other hosts of its rack, with
//! [`sidecache`] keeping what is overwritten while still wanted. [`table`] holds
//! the lean tables both sides are made of.
//!
//! **Nothing here is needed for correctness.** Every index, claim, cache and
//! peer may be wrong, slow or dead; the worst that follows is that a page is
//! sent in full. What makes the target right is: the dirty log (which pages to
//! read), the round of each page (which version wins), and the fingerprint
//! check of every byte that came by reference. The simulation (`sim/`) drives this
//! code through thousands of hostile schedules to keep that true; see
//! `docs/dedup.md`.
//!
//! There are no sockets, timers or VMMs here: callers carry messages and keep
//! the deadlines.
pub mod bench;
pub mod claim;
pub mod fingerprint;
pub mod resolve;
pub mod sidecache;
pub mod source;
pub mod table;
pub mod target_vm;

mod arrival;
mod multilinear;
mod nh;
mod place;
mod plan;
mod source_vm;
mod wanted;

#[cfg(test)]
mod sim;
