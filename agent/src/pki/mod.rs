//! The cluster's own certificates: who is which agent.
//!
//! One directory, kept by the operator away from the hosts, holds the
//! [`Authority`] and the cluster secret. From it each agent gets a *bundle*:
//! its certificate and key, the authority's certificate, the cluster secret.
//!
//! An agent is named by one URI in its certificate, `drover://agent/NAME`:
//! names of agents are not always DNS names (`rack_1.host-2`), and as a URI a
//! name is compared byte by byte, with no wildcards and no case folding.
//! Addresses are not in the certificate: those are the roster's to say.

mod authority;
mod certificate;
mod credentials;
mod directory;
mod error;

pub use authority::{Authority, Issued};
pub use certificate::{Certificate, CertificateFile, date};
pub use credentials::{Credentials, TlsFiles, Validity};
pub use directory::{
    AGENTS_DIR, CA_FILE, CA_KEY_FILE, CERT_FILE, KEY_FILE, SECRET_FILE, init, issue, issued, renew,
};
pub use error::PkiError;

/// What precedes an agent's name in its certificate.
pub const AGENT_URI: &str = "drover://agent/";
/// Days an agent's certificate is valid for by default.
pub const AGENT_DAYS: u32 = 365;
/// Days an authority's certificate is valid for.
pub const AUTHORITY_DAYS: u32 = 10 * 365;
/// Certificates are valid from this long before they are made: clocks of
/// hosts differ.
pub const BACKDATE: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

#[cfg(test)]
mod tests;
