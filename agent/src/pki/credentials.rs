//! What an agent proves itself with: loaded and checked.

use super::certificate::{Certificate, CertificateFile, date};
use super::{KEY_FILE, PkiError};
use crate::private_file;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivateKeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, RootCertStore};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use zeroize::Zeroize;

/// Longest key file, bytes.
const MAX_KEY: usize = 16 << 10;
/// An agent warns when its certificate has less than this left.
const WARN_BEFORE: Duration = Duration::from_secs(30 * 24 * 3600);

/// The files of an agent's bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authorities that are trusted.
    pub ca: PathBuf,
    /// The agent's certificate.
    pub cert: PathBuf,
    /// Its key, mode 0600.
    pub key: PathBuf,
}

impl TlsFiles {
    /// The files of a bundle in `dir`.
    pub fn in_dir(dir: &Path) -> TlsFiles {
        TlsFiles {
            ca: dir.join(super::CA_FILE),
            cert: dir.join(super::CERT_FILE),
            key: dir.join(KEY_FILE),
        }
    }
}

/// Whether a certificate is good now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Validity {
    /// It is, for a while.
    Good,
    /// Only until soon.
    ExpiresSoon(SystemTime),
    /// No longer.
    Expired(SystemTime),
    /// Not yet: a clock is wrong.
    NotYet(SystemTime),
}

/// An agent's certificate and key, and whom it trusts.
#[derive(Clone)]
pub struct Credentials {
    files: TlsFiles,
    certificate: Certificate,
    roots: Arc<RootCertStore>,
    key: Arc<CertifiedKey>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("files", &self.files)
            .field("certificate", &self.certificate.fingerprint_hex())
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Loads the bundle of agent `name`. A certificate that has expired is
    /// loaded: peers will refuse it, but the agent still has its VMs to see to
    /// (see [`validity`](Self::validity)).
    pub fn load(files: &TlsFiles, name: &str) -> Result<Self, PkiError> {
        let ca = CertificateFile::read(&files.ca)?;
        if let Some(no) = ca.parsed.iter().position(|cert| !cert.authority) {
            return Err(PkiError::NotACertificate {
                path: files.ca.clone(),
                why: format!("certificate {} in it is not an authority's", no + 1),
            });
        }
        let chain = CertificateFile::read(&files.cert)?;
        let certificate = chain.first().clone();
        let found = certificate.agent()?;
        if found != name {
            return Err(PkiError::OtherAgent {
                cert: files.cert.clone(),
                found: found.to_owned(),
                name: name.to_owned(),
            });
        }
        let mut roots = RootCertStore::empty();
        for der in ca.der {
            roots.add(der)?;
        }
        let other = |error: rustls::Error| PkiError::OtherAuthority {
            cert: files.cert.clone(),
            ca: files.ca.clone(),
            why: error.to_string(),
        };
        // As of its first second: expiry is not looked at here.
        let then = certificate.not_before.max(ca.parsed[0].not_before);
        let then = then.duration_since(UNIX_EPOCH).unwrap_or_default();
        let chained = verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(&chain.der[0]).map_err(other)?,
            &roots,
            &chain.der[1..],
            UnixTime::since_unix_epoch(then),
            aws_lc_rs::default_provider()
                .signature_verification_algorithms
                .all,
        );
        match chained {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYetContext { .. },
            )) => {}
            other_outcome => other_outcome.map_err(other)?,
        }
        let key = load_key(&files.key)?;
        let key = CertifiedKey::new(chain.der, key);
        if key.keys_match().is_err() {
            return Err(PkiError::Mismatch {
                cert: files.cert.clone(),
                key: files.key.clone(),
            });
        }
        Ok(Credentials {
            files: files.clone(),
            certificate,
            roots: Arc::new(roots),
            key: Arc::new(key),
        })
    }

    /// The files these came from.
    pub fn files(&self) -> &TlsFiles {
        &self.files
    }

    /// What the agent's certificate says.
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// The authorities trusted.
    pub fn roots(&self) -> &Arc<RootCertStore> {
        &self.roots
    }

    /// Certificate and key, for TLS.
    pub fn key(&self) -> &Arc<CertifiedKey> {
        &self.key
    }

    /// Whether the certificate is good at `now`.
    pub fn validity(&self, now: SystemTime) -> Validity {
        let (from, until) = (self.certificate.not_before, self.certificate.not_after);
        let lifetime = until.duration_since(from).unwrap_or_default();
        if now < from {
            Validity::NotYet(from)
        } else if now > until {
            Validity::Expired(until)
        } else if now + WARN_BEFORE.min(lifetime / 10) > until {
            Validity::ExpiresSoon(until)
        } else {
            Validity::Good
        }
    }

    /// What the operator should know about the certificate now, if anything.
    pub fn warning(&self, now: SystemTime) -> Option<String> {
        let cert = self.files.cert.display();
        let renew = "renew it with `drover pki renew` and copy the bundle here";
        match self.validity(now) {
            Validity::Good => None,
            Validity::ExpiresSoon(at) => Some(format!("{cert} expires on {}: {renew}", date(at))),
            Validity::Expired(at) => Some(format!(
                "{cert} expired on {}, so peers refuse this agent: {renew}",
                date(at)
            )),
            Validity::NotYet(at) => Some(format!(
                "{cert} is valid only from {} on: set this host's clock",
                date(at)
            )),
        }
    }
}

/// Reads a private key; its bytes do not outlive this.
fn load_key(path: &Path) -> Result<Arc<dyn rustls::sign::SigningKey>, PkiError> {
    let bad = |why: String| PkiError::NotAKey {
        path: path.to_owned(),
        why,
    };
    let pem = private_file::read(path, MAX_KEY)?;
    let mut der = PrivateKeyDer::from_pem_slice(&pem).map_err(|e| bad(e.to_string()))?;
    let key = aws_lc_rs::sign::any_supported_type(&der);
    der.zeroize();
    key.map_err(|e| bad(e.to_string()))
}
