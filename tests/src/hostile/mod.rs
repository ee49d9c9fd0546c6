//! Agents that lie: programs with a host's real certificate and the cluster's
//! real secret, which speak the real protocol to real agents over real sockets.
//!
//! [`identity`] is who such a program is; [`member`] has a part in a gang, as a
//! source, as a holder and as a claim shard, and lies in each; [`acts`] is what
//! it does to single agents, [`outsider`] is one that has no part in the gang; [`memory`] watches what all that
//! costs the agents that it is done to.
pub mod acts;
pub mod identity;
pub mod member;
pub mod memory;
pub mod outsider;
pub mod source;
