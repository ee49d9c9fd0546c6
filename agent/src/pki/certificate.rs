//! What a certificate says.

use super::{AGENT_URI, PkiError};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use x509_parser::prelude::*;

/// Largest file of certificates that is read, bytes.
const MAX_FILE: u64 = 1 << 20;

/// The parts of a certificate that Drover looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Who it is of, for people.
    pub subject: String,
    /// The agent names in it; an agent's certificate has exactly one.
    pub agents: Vec<String>,
    /// Whether it may issue certificates.
    pub authority: bool,
    /// Valid from.
    pub not_before: SystemTime,
    /// Valid until.
    pub not_after: SystemTime,
    /// SHA-256 of the whole certificate.
    pub fingerprint: [u8; 32],
    /// The public key as it stands in the certificate.
    pub public_key: Vec<u8>,
}

impl Certificate {
    /// Reads a certificate's fields. Says nothing about who signed it.
    pub fn parse(der: &[u8]) -> Result<Self, String> {
        let (rest, cert) = X509Certificate::from_der(der).map_err(|e| e.to_string())?;
        if !rest.is_empty() {
            return Err("bytes follow it".into());
        }
        let names = cert.subject_alternative_name().map_err(|e| e.to_string())?;
        let names = names.iter().flat_map(|names| &names.value.general_names);
        let agents = names.filter_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(AGENT_URI).map(str::to_owned),
            _ => None,
        });
        let time = |t: ASN1Time| {
            let seconds = Duration::from_secs(t.timestamp().unsigned_abs());
            match t.timestamp() {
                0.. => UNIX_EPOCH.checked_add(seconds),
                _ => UNIX_EPOCH.checked_sub(seconds),
            }
            .ok_or("its times are impossible")
        };
        let mut fingerprint = [0; 32];
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der);
        fingerprint.copy_from_slice(digest.as_ref());
        Ok(Certificate {
            subject: cert.subject().to_string(),
            agents: agents.collect(),
            authority: cert.is_ca(),
            not_before: time(cert.validity().not_before)?,
            not_after: time(cert.validity().not_after)?,
            fingerprint,
            public_key: cert.public_key().raw.to_vec(),
        })
    }

    /// The agent it is of.
    pub fn agent(&self) -> Result<&str, PkiError> {
        match self.agents.as_slice() {
            [name] => Ok(name),
            names => Err(PkiError::Nameless { found: names.len() }),
        }
    }

    /// The fingerprint in hexadecimal digits.
    pub fn fingerprint_hex(&self) -> String {
        self.fingerprint.iter().fold(String::new(), |mut hex, b| {
            let _ = write!(hex, "{b:02x}");
            hex
        })
    }
}

/// A file of certificates.
#[derive(Debug)]
pub struct CertificateFile {
    /// The file.
    pub path: PathBuf,
    /// Its certificates as they are sent, at least one.
    pub der: Vec<CertificateDer<'static>>,
    /// What they say.
    pub parsed: Vec<Certificate>,
}

impl CertificateFile {
    /// Reads a PEM file with at least one certificate.
    pub fn read(path: &Path) -> Result<Self, PkiError> {
        use std::io::Read;
        let read = |source| PkiError::Read {
            path: path.to_owned(),
            source,
        };
        let bad = |why: String| PkiError::NotACertificate {
            path: path.to_owned(),
            why,
        };
        let mut text = Vec::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut text))
            .map_err(read)?;
        if text.len() as u64 > MAX_FILE {
            return Err(bad("it is too long".into()));
        }
        let (der, parsed) = Self::parse_pem(&text).map_err(bad)?;
        Ok(CertificateFile {
            path: path.to_owned(),
            der,
            parsed,
        })
    }

    /// Parses the content of such a file.
    pub fn parse_pem(
        text: &[u8],
    ) -> Result<(Vec<CertificateDer<'static>>, Vec<Certificate>), String> {
        let der = CertificateDer::pem_slice_iter(text)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| e.to_string())?;
        if der.is_empty() {
            return Err("there is none in it".into());
        }
        let parsed = der.iter().map(|der| Certificate::parse(der));
        let parsed = parsed.collect::<Result<Vec<_>, _>>()?;
        Ok((der, parsed))
    }

    /// What the first certificate says.
    pub fn first(&self) -> &Certificate {
        &self.parsed[0]
    }
}

/// A point in time for people: `2027-11-26 11:02 UTC`.
pub fn date(at: SystemTime) -> String {
    let at = ::time::OffsetDateTime::from(at);
    let (y, m, d) = (at.year(), u8::from(at.month()), at.day());
    format!("{y}-{m:02}-{d:02} {:02}:{:02} UTC", at.hour(), at.minute())
}
