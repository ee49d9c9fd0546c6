//! How fast migration may go, so that tenants do not feel it.
//!
//! [`meter`] counts what crosses the uplinks (eBPF), [`report`] shares those
//! counts among the agents of a rack, [`control`] turns them and the lanes'
//! [`tcp_info`] into a rate within the operator's [`policy`], and [`bucket`]
//! hands that rate out to the lane threads. [`pacer`] runs it all.
//!
//! The control law and how it was measured are described in `docs/pacing.md`.

pub mod bucket;
pub mod control;
pub mod meter;
pub mod pacer;
pub mod policy;
pub mod report;
pub mod tcp_info;

#[cfg(test)]
mod sim;

pub use meter::{Meter, MeterConfig};
pub use pacer::{LaneWatch, Pacer, PacerStatus};
pub use policy::{Policy, PolicyWatch, ProfileName};
pub use report::LoadReport;
