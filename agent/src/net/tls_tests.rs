//! Who gets a connection, and what everybody else is told.

use super::preamble::Verdict;
use super::testing::{LONG, Pki, cluster_with, on_control};
use super::*;
use crate::lane::{
    BatchSink, BufferPool, DecodedBatch, LaneEvent, LaneReceiver, LaneSet, LaneSetConfig,
    LaneStream, Placement, ReceiveConfig, SinkError, Unpaced,
};
use crate::pki::{self, Authority, TlsFiles};
use crate::types::{GangId, VmIndex};
use std::cell::RefCell;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const AGENTS: [(&str, &str); 2] = [("a1", "A"), ("b1", "B")];
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Keeps the connections it gets.
#[derive(Default)]
struct Keep(RefCell<Vec<Incoming>>);

impl ConnectionHandler for Keep {
    fn admit(&self, _: &Hello) -> Result<(), String> {
        Ok(())
    }
    fn handle(&self, incoming: Incoming) {
        self.0.borrow_mut().push(incoming);
    }
}

impl Keep {
    async fn next(&self) -> Incoming {
        loop {
            if let Some(incoming) = self.0.borrow_mut().pop() {
                return incoming;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Listens as b1, protected by `theirs`, and calls it as a1, protected by
/// `mine`.
async fn call(
    mine: Security,
    theirs: Security,
    kind: Kind,
) -> (Result<Stream, ConnectError>, Rc<Keep>) {
    let mut both = [Some(mine), Some(theirs)].into_iter();
    let both = RefCell::new(&mut both);
    let [(a, _), (b, listener)] =
        cluster_with(AGENTS, |_| both.borrow_mut().next().flatten().unwrap());
    let keep = Rc::new(Keep::default());
    tokio::task::spawn_local(listener.run(b, keep.clone()));
    let limit = Duration::from_secs(5);
    let result = connect(&a, "b1", kind, GangId(1), 0, limit).await;
    (result, keep)
}

/// What a caller is told whose connection does not come about.
async fn told(mine: Security, theirs: Security) -> String {
    let (result, keep) = call(mine, theirs, Kind::Control).await;
    let error = result.expect_err("it should have been refused");
    assert!(keep.0.borrow().is_empty(), "the called agent took it");
    let text = format!("{error}: {}", error.source);
    assert!(
        text.starts_with("cannot connect to agent b1 at 127."),
        "{text}"
    );
    text
}

fn says(text: &str, wanted: &[&str]) {
    for wanted in wanted {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
}

/// The bundle of some agent, whoever then uses it.
fn borrowed(bundle: &Path, owner: &str) -> Security {
    Security::Tls(Box::new(
        TlsStore::open(&TlsFiles::in_dir(bundle), owner).unwrap(),
    ))
}

/// A bundle for `name` that is valid between two times.
fn dated(pki: &Pki, name: &str, from: SystemTime, until: SystemTime) -> Security {
    let read = |file: &str| std::fs::read_to_string(pki.dir().join(file)).unwrap();
    let ca = pki.dir().join(pki::CA_FILE);
    let (cert, key) = (read(pki::CA_FILE), read(pki::CA_KEY_FILE));
    let authority = Authority::from_pem(&ca, &cert, &key).unwrap();
    let issued = authority.issue_between(name, from, until).unwrap();
    let bundle = pki.bundle(name);
    std::fs::write(bundle.join(pki::CERT_FILE), issued.cert_pem).unwrap();
    std::fs::write(bundle.join(pki::KEY_FILE), issued.key_pem.as_bytes()).unwrap();
    borrowed(&bundle, name)
}

#[test]
fn members_talk_both_ways_however_much() {
    on_control(async {
        let pki = Pki::new();
        let (mine, theirs) = (pki.security("a1"), pki.security("b1"));
        let (stream, keep) = call(mine, theirs, Kind::Control).await;
        let mut mine = stream.unwrap();
        let mut theirs = keep.next().await.stream;
        let bytes: Vec<u8> = (0..3_000_000u32)
            .map(|i| (i.wrapping_mul(i) >> 7) as u8)
            .collect();
        let sent = bytes.clone();
        let echo = tokio::task::spawn_local(async move {
            let mut got = vec![0; 3_000_000];
            theirs.read_exact(&mut got).await.unwrap();
            theirs.write_all(&got).await.unwrap();
            theirs.shutdown().await.unwrap();
        });
        mine.write_all(&sent).await.unwrap();
        mine.flush().await.unwrap();
        let mut got = Vec::new();
        // To the end, and the end is authenticated, too.
        mine.read_to_end(&mut got).await.unwrap();
        assert!(got == bytes);
        echo.await.unwrap();
    });
}

#[test]
fn a_connection_goes_on_after_changing_threads() {
    on_control(async {
        let pki = Pki::new();
        let (mine, theirs) = (pki.security("a1"), pki.security("b1"));
        let (stream, keep) = call(mine, theirs, Kind::Rack).await;
        let mut mine = stream.unwrap();
        let moved = keep.next().await.stream.detach().unwrap();
        let other = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let mut stream = moved.attach().unwrap();
                let mut bytes = [0; 5];
                stream.read_exact(&mut bytes).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
                stream.flush().await.unwrap();
            });
        });
        mine.write_all(b"claim").await.unwrap();
        mine.flush().await.unwrap();
        let mut bytes = [0; 5];
        mine.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"claim");
        other.join().unwrap();
    });
}

#[derive(Default)]
struct Pages(Mutex<Vec<u8>>);

impl BatchSink for Pages {
    fn ram_pages(&self, _: GangId, _: VmIndex) -> Option<u32> {
        Some(1 << 20)
    }
    fn batch(&self, batch: &DecodedBatch<'_>) -> Result<Placement, SinkError> {
        let mut pages = self.0.lock().unwrap();
        pages.extend(batch.pages().map(|(_, page)| page[0]));
        Ok(Placement::Placed)
    }
}

#[test]
fn a_lane_goes_on_with_the_keys_of_its_handshake() {
    on_control(async {
        let pki = Pki::new();
        let (mine, theirs) = (pki.security("a1"), pki.security("b1"));
        let (stream, keep) = call(mine, theirs, Kind::Lane).await;
        let lane = |stream: Stream| {
            let lane = stream.into_lane().unwrap();
            assert!(lane.secrets.is_some());
            LaneStream::new(lane.tcp, lane.secrets).unwrap()
        };
        let sink = Arc::new(Pages::default());
        let target = lane(keep.next().await.stream);
        let receiver = LaneReceiver::start(target, ReceiveConfig::new("a1"), sink.clone()).unwrap();
        let source = Mutex::new(Some(lane(stream.unwrap())));
        let pool = BufferPool::new(2).unwrap();
        let mut config = LaneSetConfig::new("b1");
        config.lanes = 1;
        let connector = move || {
            source
                .lock()
                .unwrap()
                .take()
                .ok_or(std::io::ErrorKind::Other.into())
        };
        let set = LaneSet::start(config, &pool, Arc::new(Unpaced), Arc::new(connector)).unwrap();
        let mut buf = pool.take(LONG).unwrap();
        buf.page_mut(0).fill(0x5a);
        let batch = crate::lane::StagedBatch {
            gang: GangId(1),
            vm: VmIndex(0),
            batch: crate::lane::BatchId(1),
            round: crate::types::Round(1),
            class: crate::types::Class::Precopy,
            domain: 0,
            entries: crate::lane::Entries {
                pages: vec![crate::types::Gfn(7)],
                ..Default::default()
            },
            content: Some(buf),
        };
        set.submit(batch, LONG).unwrap();
        loop {
            match set.events().recv_timeout(LONG).unwrap() {
                LaneEvent::Placed { .. } => break,
                LaneEvent::LaneUp { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(*sink.0.lock().unwrap(), [0x5a]);
        assert!(set.close(LONG));
        receiver.wait(LONG);
    });
}

#[test]
fn an_agent_of_another_authority_is_refused_by_both_sides() {
    on_control(async {
        let (pki, other) = (Pki::new(), Pki::new());
        let text = told(pki.security("a1"), other.security("b1")).await;
        says(&text, &["not of this cluster's authority", "drover pki"]);
        // A caller that trusts both, as after a change of authority: the called
        // agent decides.
        let bundle = other.bundle("a1");
        let both = [pki.dir(), other.dir()]
            .map(|dir| std::fs::read_to_string(dir.join(pki::CA_FILE)).unwrap());
        std::fs::write(bundle.join(pki::CA_FILE), both.concat()).unwrap();
        let text = told(borrowed(&bundle, "a1"), pki.security("b1")).await;
        says(
            &text,
            &[
                "refuses this agent's certificate",
                "authority",
                "drover pki",
            ],
        );
    });
}

#[test]
fn a_valid_certificate_of_another_agent_is_refused_by_both_sides() {
    on_control(async {
        let pki = Pki::new();
        let text = told(pki.security("a1"), borrowed(&pki.bundle("b2"), "b2")).await;
        says(
            &text,
            &[
                "certificate is of agent b2, not of agent b1",
                "its own bundle",
            ],
        );
        let (result, _) = call(
            borrowed(&pki.bundle("a2"), "a2"),
            pki.security("b1"),
            Kind::Control,
        )
        .await;
        match result.unwrap_err().source {
            ConnectFailure::Refused { verdict, reason } => {
                assert_eq!(verdict, Verdict::Certificate);
                says(&reason, &["a1 calls with the certificate of agent a2"]);
            }
            other => panic!("{other}"),
        }
    });
}

#[test]
fn expired_certificates_and_wrong_clocks_are_named() {
    on_control(async {
        let pki = Pki::new();
        let now = SystemTime::now();
        let good = || pki.security("a1");
        let text = told(good(), dated(&pki, "b1", now - 9 * DAY, now - DAY)).await;
        says(
            &text,
            &["its certificate expired on 20", "drover pki renew"],
        );
        let text = told(good(), dated(&pki, "b1", now + DAY, now + 9 * DAY)).await;
        says(&text, &["valid only from 20", "clocks"]);
        let text = told(
            dated(&pki, "a1", now - 9 * DAY, now - DAY),
            dated(&pki, "b1", now - DAY, now + 9 * DAY),
        )
        .await;
        says(
            &text,
            &[
                "refuses this agent's certificate",
                "expired",
                "drover pki renew",
            ],
        );
    });
}

#[test]
fn plaintext_against_tls_is_told_apart_both_ways() {
    on_control(async {
        let pki = Pki::new();
        let text = told(Security::Plaintext, pki.security("b1")).await;
        says(&text, &["agent b1 speaks only TLS", "drover pki issue"]);
        let text = told(pki.security("a1"), Security::Plaintext).await;
        says(&text, &["does not speak TLS", "plaintext = true"]);
    });
}

#[test]
fn a_caller_without_a_certificate_gets_nowhere() {
    on_control(async {
        let pki = Pki::new();
        let [(_, _), (b, listener)] = cluster_with(AGENTS, |name| pki.security(name));
        let address = listener.address().unwrap();
        let keep = Rc::new(Keep::default());
        tokio::task::spawn_local(listener.run(b, keep.clone()));
        let ca = pki::CertificateFile::read(&pki.dir().join(pki::CA_FILE)).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca.der[0].clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let credentials =
            pki::Credentials::load(&TlsFiles::in_dir(&pki.bundle("a1")), "a1").unwrap();
        // As the agent's, but nameless.
        let mut config = (*tls::Tls::new(credentials).unwrap().client).clone();
        let bare = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.client_auth_cert_resolver = bare.client_auth_cert_resolver.clone();
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = rustls::pki_types::ServerName::from(address.ip());
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let mut stream = connector.connect(name, tcp).await.unwrap();
        let read = stream.read(&mut [0; 10]).await;
        let error = read.expect_err("it was answered").to_string();
        assert!(error.contains("CertificateRequired"), "{error}");
        assert!(keep.0.borrow().is_empty());
    });
}

#[test]
fn renewed_files_are_taken_over_and_broken_ones_are_not() {
    let pki = Pki::new();
    let bundle = pki.bundle("a1");
    let files = TlsFiles::in_dir(&bundle);
    let security = Security::Tls(Box::new(TlsStore::open(&files, "a1").unwrap()));
    let Security::Tls(store) = &security else {
        unreachable!()
    };
    let now = SystemTime::now();
    let fingerprint = || store.current().credentials().certificate().fingerprint;
    let first = fingerprint();
    assert!(store.poll().unwrap().is_none());
    assert!(security.warnings(now).is_empty());

    pki::renew(pki.dir(), "a1", 30).unwrap();
    // A bundle is copied file by file: one look more.
    assert!(store.poll().unwrap().is_none());
    assert!(store.poll().unwrap().is_some());
    let second = fingerprint();
    assert_ne!(first, second);

    let key = std::fs::read(&files.key).unwrap();
    let broken: [(&str, &dyn Fn()); 3] = [
        ("no PEM file", &|| std::fs::write(&files.key, "x").unwrap()),
        ("chmod 0600", &|| {
            std::fs::write(&files.key, &key).unwrap();
            std::fs::set_permissions(&files.key, PermissionsExt::from_mode(0o644)).unwrap();
        }),
        ("does not exist", &|| {
            std::fs::remove_file(&files.key).unwrap()
        }),
    ];
    for (wanted, break_it) in broken {
        break_it();
        assert!(store.poll().unwrap().is_none());
        let error = store.poll().expect_err(wanted).to_string();
        says(&error, &[wanted, "key.pem"]);
        assert_eq!(fingerprint(), second, "what was in use stays so");
        assert!(store.poll().unwrap().is_none(), "said once");
        let warnings = security.warnings(now);
        says(&warnings.concat(), &[wanted, "stay in use"]);
    }
    pki::renew(pki.dir(), "a1", 30).unwrap();
    assert!(store.poll().unwrap().is_none());
    assert!(store.poll().unwrap().is_some());
    assert!(security.warnings(now).is_empty());
    let soon = now + 28 * DAY;
    says(&security.warnings(soon).concat(), &["expires on"]);
    says(
        &Security::Plaintext.warnings(now).concat(),
        &["NOT encrypted"],
    );
}
