//! The authority that names a cluster's agents.

use super::certificate::Certificate;
use super::{AGENT_URI, AUTHORITY_DAYS, BACKDATE, PkiError};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use std::path::Path;
use std::time::{Duration, SystemTime};
use zeroize::{Zeroize, Zeroizing};

/// A certificate and its key, as PEM.
pub struct Issued {
    /// The certificate.
    pub cert_pem: String,
    /// Its key: PKCS #8.
    pub key_pem: Zeroizing<String>,
}

/// A key that can be wiped: the maker of certificates does not do it itself.
struct Key(KeyPair);

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Makes certificates for the agents of one cluster.
pub struct Authority {
    cert_pem: String,
    key: Key,
    not_after: SystemTime,
}

impl Authority {
    /// Makes an authority for the cluster called `cluster`, and its files'
    /// contents.
    pub fn generate(cluster: &str) -> Result<(Authority, Issued), PkiError> {
        let key = Key(KeyPair::generate()?);
        let mut params = params(days(AUTHORITY_DAYS));
        params
            .distinguished_name
            .push(DnType::CommonName, format!("Drover authority of {cluster}"));
        // It signs agents and nothing else.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let cert_pem = params.self_signed(&key.0)?.pem();
        let files = Issued {
            cert_pem: cert_pem.clone(),
            key_pem: Zeroizing::new(key.0.serialize_pem()),
        };
        let authority = Authority {
            cert_pem,
            not_after: params.not_after.into(),
            key,
        };
        Ok((authority, files))
    }

    /// The authority of these files' contents; `path` is where the
    /// certificate comes from, for errors.
    pub fn from_pem(path: &Path, cert_pem: &str, key_pem: &str) -> Result<Authority, PkiError> {
        let (_, parsed) =
            super::CertificateFile::parse_pem(cert_pem.as_bytes()).map_err(|why| {
                PkiError::NotACertificate {
                    path: path.to_owned(),
                    why,
                }
            })?;
        let cert: &Certificate = &parsed[0];
        if !cert.authority {
            return Err(PkiError::NotAnAuthority {
                path: path.to_owned(),
            });
        }
        let key = Key(KeyPair::from_pem(key_pem)?);
        if key.0.subject_public_key_info() != cert.public_key {
            return Err(PkiError::Mismatch {
                cert: path.to_owned(),
                key: path.with_file_name(super::CA_KEY_FILE),
            });
        }
        if cert.not_after <= SystemTime::now() {
            return Err(PkiError::AuthorityExpired {
                path: path.to_owned(),
                at: cert.not_after,
            });
        }
        Ok(Authority {
            cert_pem: cert_pem.to_owned(),
            not_after: cert.not_after,
            key,
        })
    }

    /// Its certificate, as PEM.
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Makes a key and a certificate for the agent `name`, valid for
    /// `lifetime`, but no longer than the authority's own.
    pub fn issue(&self, name: &str, lifetime: Duration) -> Result<Issued, PkiError> {
        let now = SystemTime::now();
        self.issue_between(name, now - BACKDATE, now + lifetime)
    }

    /// The same, valid between two points in time.
    pub fn issue_between(
        &self,
        name: &str,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<Issued, PkiError> {
        let key = Key(KeyPair::generate()?);
        let mut params = params(Duration::ZERO);
        params.not_before = not_before.into();
        params.not_after = not_after.min(self.not_after).into();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("Drover agent {name}"));
        params.subject_alt_names = vec![SanType::URI(format!("{AGENT_URI}{name}").try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Agents call each other both ways.
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::from_ca_cert_pem(&self.cert_pem, &self.key.0)?;
        Ok(Issued {
            cert_pem: params.signed_by(&key.0, &issuer)?.pem(),
            key_pem: Zeroizing::new(key.0.serialize_pem()),
        })
    }
}

/// Of a certificate without a name that is valid from now on.
fn params(lifetime: Duration) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + lifetime).into();
    params
}

/// So many days.
pub(super) fn days(days: u32) -> Duration {
    Duration::from_secs(u64::from(days) * 24 * 3600)
}
