//! What goes wrong with certificates, and what to do about it.

use super::certificate::date;
use crate::private_file::PrivateFileError;
use std::io;
use std::path::PathBuf;
use std::time::SystemTime;
use thiserror::Error;

/// A certificate, key or authority cannot be made or used.
#[derive(Debug, Error)]
pub enum PkiError {
    /// A key or secret that is readable for others, missing, not readable.
    #[error(transparent)]
    Private(#[from] PrivateFileError),
    /// A certificate file that is not there or cannot be read.
    #[error(
        "cannot read {path}: {source}; make the agent's files with `drover pki issue` and copy them here"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No certificate in it.
    #[error("{path} is no PEM file with a certificate ({why}); copy it again from `drover pki`")]
    NotACertificate {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No key in it.
    #[error("{path} is no PEM file with a private key ({why}); copy it again from `drover pki`")]
    NotAKey {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A certificate without, or with several, agent names.
    #[error("the certificate names {found} agents, not one; it was not made by `drover pki issue`")]
    Nameless {
        /// Agent names in it.
        found: usize,
    },
    /// Certificate and key do not belong together.
    #[error("{key} is not the key of {cert}; copy both again, from the same bundle")]
    Mismatch {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
    },
    /// A certificate for some other agent.
    #[error(
        "{cert} is the certificate of agent {found}, but this is agent {name}; copy the bundle of {name} here"
    )]
    OtherAgent {
        /// The certificate.
        cert: PathBuf,
        /// Whose it is.
        found: String,
        /// Whose it should be.
        name: String,
    },
    /// A certificate of another authority.
    #[error(
        "{cert} was not issued by the authority in {ca} ({why}); copy both again, from the same bundle"
    )]
    OtherAuthority {
        /// The certificate.
        cert: PathBuf,
        /// The authority's certificate.
        ca: PathBuf,
        /// What the check said.
        why: String,
    },
    /// The authority's certificate cannot issue.
    #[error("{path} is not an authority's certificate; name the directory of `drover pki init`")]
    NotAnAuthority {
        /// The file.
        path: PathBuf,
    },
    /// The authority's time is over.
    #[error(
        "the authority in {path} has expired ({}); make a new one with `drover pki init` and issue every agent's certificate anew",
        date(*at)
    )]
    AuthorityExpired {
        /// The file.
        path: PathBuf,
        /// When.
        at: SystemTime,
    },
    /// Not issued twice by mistake.
    #[error("agent {name} has a certificate already ({path}); `drover pki renew` makes a new one")]
    Issued {
        /// The agent.
        name: String,
        /// Its bundle.
        path: PathBuf,
    },
    /// Nothing to renew.
    #[error("agent {name} has no certificate yet ({path}); `drover pki issue` makes one")]
    NotIssued {
        /// The agent.
        name: String,
        /// Where its bundle would be.
        path: PathBuf,
    },
    /// A directory that cannot be made.
    #[error("cannot make {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The certificate's maker.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    /// TLS would not take what was loaded.
    #[error("TLS cannot use these certificates")]
    Tls(#[from] rustls::Error),
}
