//! TLS between agents: mutual, version 1.3 only, one cipher suite, no
//! resumption. Who the peer is comes from its certificate (see [`crate::pki`]).

use crate::config::TlsConfig;
use crate::pki::{Certificate, Credentials, PkiError, TlsFiles};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme,
};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// How connections between agents are protected.
#[derive(Debug)]
pub enum Security {
    /// Not at all, because the operator said so.
    Plaintext,
    /// Mutual TLS.
    Tls(Box<TlsStore>),
}

impl Security {
    /// What a configuration asks for; `name` is this agent's.
    pub fn open(config: &TlsConfig, name: &str) -> Result<Security, PkiError> {
        match config {
            TlsConfig::Plaintext => Ok(Security::Plaintext),
            TlsConfig::Files(files) => Ok(Security::Tls(Box::new(TlsStore::open(files, name)?))),
        }
    }

    /// What every status must warn of, if anything.
    pub fn warnings(&self, now: SystemTime) -> Vec<String> {
        match self {
            Security::Plaintext => vec![PLAINTEXT_WARNING.to_owned()],
            Security::Tls(store) => {
                let state = store.state();
                let expiry = state.tls.credentials.warning(now);
                expiry.into_iter().chain(state.fault.clone()).collect()
            }
        }
    }
}

/// Said by every status of an agent that does not use TLS.
pub const PLAINTEXT_WARNING: &str = "connections between agents are NOT encrypted ([tls] \
     plaintext = true): who can see the network can read guests' memory; use `drover pki`";

/// One version of an agent's credentials, ready for connections.
#[derive(Debug)]
pub struct Tls {
    credentials: Credentials,
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
}

impl Tls {
    /// Configurations for both directions.
    pub fn new(credentials: Credentials) -> Result<Tls, PkiError> {
        let provider = Arc::new(provider());
        let resolver = Arc::new(SingleCertAndKey::from(Arc::unwrap_or_clone(
            credentials.key().clone(),
        )));
        let roots = credentials.roots().clone();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| Error::General(e.to_string()))?;
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(resolver.clone());
        // Each connection proves itself anew: a certificate that was replaced
        // is out of use at once, and lanes can take the keys over.
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.enable_secret_extraction = true;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ByAuthority {
                roots,
                algorithms: aws_lc_rs::default_provider().signature_verification_algorithms,
            }))
            .with_client_cert_resolver(resolver);
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        client.enable_secret_extraction = true;
        Ok(Tls {
            credentials,
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    /// What they were made from.
    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }
}

/// The one suite that is spoken: every agent has it, and what lanes cost is
/// what it costs.
fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256],
        ..aws_lc_rs::default_provider()
    }
}

/// The agent a verified certificate names.
pub(super) fn agent_of(chain: Option<&[CertificateDer<'_>]>) -> Result<String, String> {
    let der = chain.and_then(|chain| chain.first());
    let der = der.ok_or("it presented no certificate")?;
    let certificate = Certificate::parse(der)?;
    let name = certificate.agent().map_err(|e| e.to_string())?;
    Ok(name.to_owned())
}

/// Checks that a called agent's certificate comes from the cluster's
/// authority. Its name, a URI, is compared with the roster by
/// [`super::stream`], before anything is said to the peer.
#[derive(Debug)]
struct ByAuthority {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ByAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The credentials in use, kept current while their files change.
#[derive(Debug)]
pub struct TlsStore {
    name: String,
    files: TlsFiles,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    tls: Arc<Tls>,
    /// Why the files, as they are now, are not in use.
    fault: Option<String>,
    /// The files as they were when last loaded,
    seen: Stamps,
    /// and as the last look found them, if otherwise.
    changing: Option<Stamps>,
}

/// What tells one version of the three files from another: when content or
/// mode last changed, length, inode.
type Stamps = [Option<(i64, i64, u64, u64)>; 3];

impl TlsStore {
    /// Loads the credentials of agent `name` for the first time.
    pub fn open(files: &TlsFiles, name: &str) -> Result<TlsStore, PkiError> {
        // Stamped before they are read: a change in between is seen next time.
        let seen = stamps(files);
        let tls = Tls::new(Credentials::load(files, name)?)?;
        Ok(TlsStore {
            name: name.to_owned(),
            files: files.clone(),
            state: Mutex::new(State {
                tls: Arc::new(tls),
                fault: None,
                seen,
                changing: None,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change to the state is complete before its lock is released.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What new connections use.
    pub fn current(&self) -> Arc<Tls> {
        self.state().tls.clone()
    }

    /// Looks at the files again, cheaply: call it about once a second. Returns
    /// the new credentials if the files changed and are good. They are taken
    /// when two looks in a row found them the same, since a bundle is copied
    /// file by file.
    ///
    /// # Errors
    /// The files changed and are not good. What was in use stays so, and
    /// [`Security::warnings`] tells until it is mended.
    pub fn poll(&self) -> Result<Option<Arc<Tls>>, PkiError> {
        let now = stamps(&self.files);
        {
            let mut state = self.state();
            if now == state.seen {
                state.changing = None;
                return Ok(None);
            }
            if state.changing != Some(now) {
                state.changing = Some(now);
                return Ok(None);
            }
        }
        let loaded = Credentials::load(&self.files, &self.name).and_then(Tls::new);
        let mut state = self.state();
        state.seen = now;
        state.changing = None;
        match loaded {
            Ok(tls) => {
                state.tls = Arc::new(tls);
                state.fault = None;
                Ok(Some(state.tls.clone()))
            }
            Err(error) => {
                state.fault = Some(format!(
                    "the TLS files changed and cannot be used, the ones before stay in use: {error}"
                ));
                Err(error)
            }
        }
    }
}

fn stamps(files: &TlsFiles) -> Stamps {
    [&files.ca, &files.cert, &files.key].map(|path| {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.ctime(), meta.ctime_nsec(), meta.len(), meta.ino()))
    })
}
