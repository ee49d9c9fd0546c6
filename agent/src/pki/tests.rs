use super::*;
use crate::private_file::PrivateFileError;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

fn cluster(dir: &Path) {
    init(dir, "test").unwrap();
    crate::private_file::create(&dir.join(SECRET_FILE), b"00\n").unwrap();
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o7777
}

#[test]
fn two_calls_make_bundles_that_agents_can_use() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("pki");
    cluster(&dir);
    assert!(matches!(
        init(&dir, "again"),
        Err(PkiError::Private(PrivateFileError::Exists(_)))
    ));
    for name in ["a1", "Rack_2.host-7"] {
        let bundle = issue(&dir, name, AGENT_DAYS).unwrap();
        let credentials = Credentials::load(&TlsFiles::in_dir(&bundle), name).unwrap();
        let certificate = credentials.certificate();
        assert_eq!(certificate.agent().unwrap(), name);
        assert!(!certificate.authority);
        assert_eq!(credentials.validity(SystemTime::now()), Validity::Good);
        // An hour's difference of clocks hurts nobody.
        let early = SystemTime::now() - Duration::from_secs(3600);
        assert_eq!(credentials.validity(early), Validity::Good);
        for file in [KEY_FILE, SECRET_FILE] {
            assert_eq!(mode(&bundle.join(file)), 0o600, "{file}");
        }
        assert_eq!(mode(&bundle), 0o700);
    }
    assert_eq!(mode(&dir.join(CA_KEY_FILE)), 0o600);
    assert!(matches!(issue(&dir, "a1", 1), Err(PkiError::Issued { .. })));
    assert_eq!(issued(&dir).unwrap(), ["Rack_2.host-7", "a1"]);
}

#[test]
fn renewal_makes_another_certificate_and_key_of_the_same_agent() {
    let dir = tempfile::tempdir().unwrap();
    cluster(dir.path());
    assert!(matches!(
        renew(dir.path(), "a1", 1),
        Err(PkiError::NotIssued { .. })
    ));
    let bundle = issue(dir.path(), "a1", 10).unwrap();
    let files = TlsFiles::in_dir(&bundle);
    let before = Credentials::load(&files, "a1").unwrap();
    renew(dir.path(), "a1", 10).unwrap();
    let after = Credentials::load(&files, "a1").unwrap();
    assert_ne!(
        before.certificate().public_key,
        after.certificate().public_key
    );
    assert_eq!(after.certificate().agent().unwrap(), "a1");
}

/// Every wrong bundle, and what its error must tell.
#[test]
fn a_wrong_bundle_is_refused_by_name_and_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    cluster(dir.path());
    let other = tempfile::tempdir().unwrap();
    cluster(other.path());
    let a1 = issue(dir.path(), "a1", 10).unwrap();
    let b1 = issue(dir.path(), "b1", 10).unwrap();
    let foreign = issue(other.path(), "a1", 10).unwrap();
    let load = |change: &dyn Fn(&mut TlsFiles)| {
        let mut files = TlsFiles::in_dir(&a1);
        change(&mut files);
        Credentials::load(&files, "a1").unwrap_err().to_string()
    };
    let says = |error: String, wanted: &[&str]| {
        for wanted in wanted {
            assert!(error.contains(wanted), "{wanted}: {error}");
        }
    };
    says(
        load(&|f| f.cert = b1.join(CERT_FILE)),
        &["certificate of agent b1", "this is agent a1"],
    );
    says(
        load(&|f| f.key = b1.join(KEY_FILE)),
        &["key.pem is not the key of", "same bundle"],
    );
    says(
        load(&|f| f.ca = foreign.join(CA_FILE)),
        &["was not issued by the authority", "same bundle"],
    );
    says(load(&|f| f.ca = b1.join(CERT_FILE)), &["not an authority"]);
    says(load(&|f| f.cert = a1.join(KEY_FILE)), &["no PEM file"]);
    says(load(&|f| f.key = a1.join(SECRET_FILE)), &["private key"]);
    says(load(&|f| f.cert = a1.join("gone")), &["gone", "pki issue"]);
    let key = a1.join(KEY_FILE);
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o640)).unwrap();
    says(load(&|_| ()), &["key.pem has mode 0640", "chmod 0600"]);
}

#[test]
fn expiry_is_told_before_and_after_but_does_not_keep_the_agent_from_loading() {
    let dir = tempfile::tempdir().unwrap();
    cluster(dir.path());
    let bundle = issue(dir.path(), "a1", 365).unwrap();
    let files = TlsFiles::in_dir(&bundle);
    let credentials = Credentials::load(&files, "a1").unwrap();
    let now = SystemTime::now();
    let day = Duration::from_secs(24 * 3600);
    let cases = [
        (now, None),
        (now - 2 * day, Some("clock")),
        (now + 340 * day, Some("expires on")),
        (now + 366 * day, Some("expired on")),
    ];
    for (at, wanted) in cases {
        let warning = credentials.warning(at);
        match wanted {
            None => assert_eq!(warning, None),
            Some(text) => {
                let warning = warning.unwrap();
                assert!(
                    warning.contains(text) && warning.contains("cert.pem"),
                    "{warning}"
                );
            }
        }
    }
    let (authority, _) = Authority::generate("x").unwrap();
    let gone = authority
        .issue_between("a1", now - 3 * day, now - day)
        .unwrap();
    std::fs::write(&files.ca, authority.cert_pem()).unwrap();
    std::fs::write(&files.cert, &gone.cert_pem).unwrap();
    std::fs::write(&files.key, gone.key_pem.as_bytes()).unwrap();
    assert!(Credentials::load(&files, "a1").is_ok());
}

#[test]
fn a_certificate_lives_no_longer_than_its_authority() {
    let (authority, files) = Authority::generate("x").unwrap();
    let issued = authority
        .issue("a1", Duration::from_secs(100 * 365 * 24 * 3600))
        .unwrap();
    let not_after = |pem: &str| CertificateFile::parse_pem(pem.as_bytes()).unwrap().1[0].not_after;
    assert_eq!(not_after(&issued.cert_pem), not_after(&files.cert_pem));
}

proptest::proptest! {
    #[test]
    fn a_damaged_certificate_is_an_error_and_no_panic(at in 0usize..400, byte: u8) {
        use rustls::pki_types::{CertificateDer, pem::PemObject};
        let (authority, _) = Authority::generate("x").unwrap();
        let mut der = CertificateDer::from_pem_slice(authority.cert_pem().as_bytes()).unwrap().to_vec();
        let at = at % der.len();
        der[at] = byte;
        let _ = Certificate::parse(&der);
        let _ = Certificate::parse(&der[..at]);
    }
}
