//! The operator's directory of an authority and its agents' bundles.
//!
//! ```text
//! DIR/ca.pem  ca-key.pem  secret
//! DIR/agents/NAME/ca.pem  cert.pem  key.pem  secret      copied to the host
//! ```

use super::authority::{Authority, Issued, days};
use super::{CertificateFile, PkiError};
use crate::private_file::{self, PRIVATE, PUBLIC};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// The authority's certificate; in each bundle, too.
pub const CA_FILE: &str = "ca.pem";
/// The authority's key.
pub const CA_KEY_FILE: &str = "ca-key.pem";
/// An agent's certificate.
pub const CERT_FILE: &str = "cert.pem";
/// An agent's key.
pub const KEY_FILE: &str = "key.pem";
/// The cluster secret.
pub const SECRET_FILE: &str = "secret";
/// Where the bundles are.
pub const AGENTS_DIR: &str = "agents";

/// Longest key or secret file, bytes.
const MAX_PRIVATE: usize = 16 << 10;

/// Makes the authority of a new cluster. The cluster secret is the caller's to
/// put beside it.
pub fn init(dir: &Path, cluster: &str) -> Result<(), PkiError> {
    make_dir(dir)?;
    let (_, files) = Authority::generate(cluster)?;
    // The key first: where it exists, nothing is overwritten.
    private_file::create(&dir.join(CA_KEY_FILE), files.key_pem.as_bytes())?;
    private_file::replace(&dir.join(CA_FILE), files.cert_pem.as_bytes(), PUBLIC)?;
    Ok(())
}

/// Makes the bundle of a new agent, and returns where it is.
pub fn issue(dir: &Path, name: &str, lifetime_days: u32) -> Result<PathBuf, PkiError> {
    let bundle = dir.join(AGENTS_DIR).join(name);
    if bundle.join(CERT_FILE).exists() {
        return Err(PkiError::Issued {
            name: name.to_owned(),
            path: bundle,
        });
    }
    write_bundle(dir, &bundle, name, lifetime_days)?;
    Ok(bundle)
}

/// Gives an agent a new key and certificate, and returns where they are. The
/// old ones stay valid until they expire.
pub fn renew(dir: &Path, name: &str, lifetime_days: u32) -> Result<PathBuf, PkiError> {
    let bundle = dir.join(AGENTS_DIR).join(name);
    if !bundle.join(CERT_FILE).exists() {
        return Err(PkiError::NotIssued {
            name: name.to_owned(),
            path: bundle,
        });
    }
    write_bundle(dir, &bundle, name, lifetime_days)?;
    Ok(bundle)
}

/// The agents that have a bundle, by name.
pub fn issued(dir: &Path) -> Result<Vec<String>, PkiError> {
    let agents = dir.join(AGENTS_DIR);
    let entries = match std::fs::read_dir(&agents) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|source| PkiError::Read {
            path: agents.clone(),
            source,
        })?,
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| agents.join(name).join(CERT_FILE).is_file())
        .collect();
    names.sort_unstable();
    Ok(names)
}

fn write_bundle(dir: &Path, bundle: &Path, name: &str, lifetime: u32) -> Result<(), PkiError> {
    let ca = dir.join(CA_FILE);
    CertificateFile::read(&ca)?;
    let cert_pem = std::fs::read_to_string(&ca).map_err(|source| PkiError::Read {
        path: ca.clone(),
        source,
    })?;
    let key_pem = private_file::read(&dir.join(CA_KEY_FILE), MAX_PRIVATE)?;
    let key_pem = Zeroizing::new(String::from_utf8_lossy(&key_pem).into_owned());
    let authority = Authority::from_pem(&ca, &cert_pem, &key_pem)?;
    let secret = private_file::read(&dir.join(SECRET_FILE), MAX_PRIVATE)?;
    make_dir(&dir.join(AGENTS_DIR))?;
    make_dir(bundle)?;
    let Issued { cert_pem, key_pem } = authority.issue(name, days(lifetime))?;
    // The certificate last: a bundle with one is complete.
    private_file::replace(&bundle.join(SECRET_FILE), &secret, PRIVATE)?;
    private_file::replace(
        &bundle.join(CA_FILE),
        authority.cert_pem().as_bytes(),
        PUBLIC,
    )?;
    private_file::replace(&bundle.join(KEY_FILE), key_pem.as_bytes(), PRIVATE)?;
    private_file::replace(&bundle.join(CERT_FILE), cert_pem.as_bytes(), PUBLIC)?;
    Ok(())
}

/// Makes a directory nobody else can look into.
fn make_dir(path: &Path) -> Result<(), PkiError> {
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path);
    made.map_err(|source| PkiError::Directory {
        path: path.to_owned(),
        source,
    })
}
