//! Why a TLS handshake failed, in words an operator can act on.

use crate::pki::date;
use rustls::{AlertDescription, CertificateError, Error};
use std::io;
use std::time::{Duration, UNIX_EPOCH};
use thiserror::Error;

/// TLS with a peer did not come about.
#[derive(Debug, Error)]
pub enum TlsFailure {
    /// It sends something else, or hangs up at the first TLS bytes.
    #[error(
        "it does not speak TLS; is it an agent, with [tls] in its agent.toml and not `plaintext = true`?"
    )]
    NotTls,
    /// Its certificate is not of this agent's authority.
    #[error(
        "its certificate is not of this cluster's authority; issue both hosts' with the same `drover pki` directory"
    )]
    OtherAuthority,
    /// Its certificate's time is over.
    #[error(
        "its certificate expired{0}; renew it with `drover pki renew` and copy the bundle there"
    )]
    Expired(String),
    /// Its certificate's time has not come.
    #[error("its certificate is valid only{0}; compare the clocks of both hosts")]
    NotYet(String),
    /// Its certificate is good but names no agent, or another one.
    #[error(
        "its certificate is of {found}, not of agent {wanted}; give each host its own bundle of `drover pki issue`"
    )]
    OtherAgent {
        /// Whom it names.
        found: String,
        /// Whom the roster has at this address.
        wanted: String,
    },
    /// The peer does not like this agent's certificate.
    #[error("it refuses this agent's certificate: {0}")]
    RefusesUs(&'static str),
    /// Anything else.
    #[error("TLS failed: {0}")]
    Other(String),
}

impl TlsFailure {
    /// What `error`, from a TLS stream that is `handshaking` or is past that,
    /// comes from. Errors of the connection itself come back.
    pub(super) fn of(error: io::Error, handshaking: bool) -> Result<TlsFailure, io::Error> {
        let Some(tls) = error.get_ref().and_then(|e| e.downcast_ref::<Error>()) else {
            return match error.kind() {
                io::ErrorKind::UnexpectedEof if handshaking => Ok(TlsFailure::NotTls),
                _ => Err(error),
            };
        };
        Ok(match tls {
            Error::AlertReceived(alert) => match refusal(*alert) {
                Some(why) => TlsFailure::RefusesUs(why),
                None => TlsFailure::Other(format!("it sent the alert {alert:?}")),
            },
            Error::InvalidCertificate(error) => of_certificate(error),
            Error::InvalidMessage(_) => TlsFailure::NotTls,
            other => TlsFailure::Other(other.to_string()),
        })
    }
}

fn of_certificate(error: &CertificateError) -> TlsFailure {
    let at = |seconds: u64| date(UNIX_EPOCH + Duration::from_secs(seconds.min(1 << 37)));
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            TlsFailure::OtherAuthority
        }
        CertificateError::Expired => TlsFailure::Expired(String::new()),
        CertificateError::ExpiredContext { not_after, .. } => {
            TlsFailure::Expired(format!(" on {}", at(not_after.as_secs())))
        }
        CertificateError::NotValidYet => TlsFailure::NotYet(" later".into()),
        CertificateError::NotValidYetContext { not_before, .. } => {
            TlsFailure::NotYet(format!(" from {}", at(not_before.as_secs())))
        }
        other => TlsFailure::Other(format!("its certificate is refused: {other:?}")),
    }
}

/// What an alert says about this agent's certificate.
fn refusal(alert: AlertDescription) -> Option<&'static str> {
    match alert {
        AlertDescription::UnknownCA | AlertDescription::DecryptError => Some(
            "it is not of that host's authority; issue both hosts' with the same `drover pki` directory",
        ),
        AlertDescription::CertificateExpired => Some(
            "it has expired (or a clock is wrong); renew it with `drover pki renew` and copy the bundle here",
        ),
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::CertificateRequired => {
            Some("it cannot be used there; copy the bundle of `drover pki issue` here again")
        }
        _ => None,
    }
}
