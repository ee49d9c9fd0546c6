//! Lanes seal and open with one library, everybody else with another: what
//! either seals, the other opens, and both as the standard says.

use super::open::Opener;
use super::record::*;
use super::seal::Sealer;
use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use std::io::{Read, Write};
use std::sync::Arc;

const KEY: [u8; 16] = *b"a key of a lane.";
const IV: [u8; 12] = *b"lane's nonce";

/// Contents of every length around the blocks and strides of either library,
/// and around the longest record.
fn contents() -> impl Iterator<Item = Vec<u8>> {
    let lens = (0..300).chain([511, 512, 513, 4095, 4096, 4097, MAX_PLAIN - 1, MAX_PLAIN]);
    lens.map(|len| (0..len).map(|at| (at * 7 + len) as u8).collect())
}

/// The nonce of record `number`.
fn nonce(number: u64) -> Nonce {
    let mut nonce = IV;
    for (byte, count) in nonce[4..].iter_mut().zip(number.to_be_bytes()) {
        *byte ^= count;
    }
    Nonce::assume_unique_for_key(nonce)
}

fn opened(opener: &mut Opener, wire: &[u8]) -> Vec<u8> {
    let mut got = Vec::new();
    opener
        .push(&mut wire.to_vec(), |plain| {
            got.extend_from_slice(plain);
            Ok::<(), RecordError>(())
        })
        .unwrap();
    got
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

#[test]
fn the_records_of_rfc_8448_come_out_as_they_are_printed_there() {
    // Section 3: the client's application data, 50 bytes, its first record.
    let key = unhex("17 42 2d da 59 6e d5 d9 ac d8 90 e3 c6 3f 50 51");
    let iv = unhex("5b 78 92 3d ee 08 57 90 33 e5 23 d9");
    let content: Vec<u8> = (0..50).collect();
    let printed = unhex(
        "17 03 03 00 43 a2 3f 70 54 b6 2c 94 d0 af fa fe 82 28 ba 55 cb ef ac ea 42 f9 14 aa 66 \
         bc ab 3f 2b 98 19 a8 a5 b4 6b 39 5b d5 4a 9a 20 44 1e 2b 62 97 4e 1f 5a 62 92 a2 97 70 \
         14 bd 1e 3d ea e6 3a ee bb 21 69 49 15 e4",
    );
    let mut sealer = Sealer::new(RecordKey::new(&key, &iv, 0).unwrap());
    assert_eq!(sealer.small(&content).unwrap(), printed);
    let mut opener = Opener::new(RecordKey::new(&key, &iv, 0).unwrap());
    assert_eq!(opened(&mut opener, &printed), content);
}

#[test]
fn aws_lc_opens_what_lanes_seal_and_the_other_way_round() {
    let theirs = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &KEY).unwrap());
    let mut sealer = Sealer::new(RecordKey::new(&KEY, &IV, 0).unwrap());
    let mut opener = Opener::new(RecordKey::new(&KEY, &IV, 0).unwrap());
    for (number, content) in (0..).zip(contents().filter(|content| !content.is_empty())) {
        let sealed = sealer.small(&content).unwrap();
        let (header, body) = sealed.split_first_chunk::<HEADER>().unwrap();
        let mut body = body.to_vec();
        let inner = theirs.open_in_place(nonce(number), Aad::from(header), &mut body);
        let (kind, plain) = inner.unwrap().split_last().unwrap();
        assert_eq!((*kind, plain), (Content::Data as u8, &*content));

        let mut inner = [&content[..], &[Content::Data as u8]].concat();
        theirs
            .seal_in_place_append_tag(nonce(number), Aad::from(header), &mut inner)
            .unwrap();
        let wire = [&header[..], &inner].concat();
        assert_eq!(wire, sealed, "{} bytes", content.len());
        assert_eq!(opened(&mut opener, &wire), content);
    }
}

/// A connection of rustls's past its handshake, as agents make it.
fn handshake() -> (ClientConnection, ServerConnection) {
    let made = rcgen::generate_simple_self_signed(["lane".to_owned()]).unwrap();
    let provider = Arc::new(rustls::crypto::CryptoProvider {
        cipher_suites: vec![rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256],
        ..rustls::crypto::aws_lc_rs::default_provider()
    });
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    server.send_tls13_tickets = 0;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.enable_secret_extraction = true;
    let name = ServerName::try_from("lane").unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets().unwrap();
        }
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets().unwrap();
        }
    }
    (client, server)
}

#[test]
fn a_peer_that_stays_with_rustls_reads_and_writes_what_a_lane_does() {
    let (client, mut server) = handshake();
    let secrets = client.dangerous_extract_secrets().unwrap();
    let mut sealer = Sealer::new(RecordKey::from_tls(secrets.tx).unwrap());
    let mut opener = Opener::new(RecordKey::from_tls(secrets.rx).unwrap());
    // More than one record, too.
    let long = vec![0x5a; 3 * MAX_PLAIN + 11];
    for content in contents().chain([long]) {
        let wire = sealer.small(&content).unwrap();
        let (mut rest, mut got) = (&wire[..], Vec::new());
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            let state = server.process_new_packets().unwrap();
            let mut plain = vec![0; state.plaintext_bytes_to_read()];
            server.reader().read_exact(&mut plain).unwrap();
            got.extend(plain);
        }
        assert_eq!(got, content);

        server.writer().write_all(&content).unwrap();
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        assert_eq!(opened(&mut opener, &wire), content);
    }
}
