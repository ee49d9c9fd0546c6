//! What comes on all other connections between agents.

use super::{KEY, NONCE};
use drover::config::is_name;
use drover::gang::message::{GangRequest, GangResponse};
use drover::net::Hello;
use drover::net::frame::frame_len;
use drover::net::preamble::{ANSWER_FIXED, Answer, HELLO_FIXED, MAX_REASON, Verdict};
use drover::net::rack::{MAX_CLAIM, MAX_FETCH, MAX_REPORT, wire};
use drover::net::rpc::{Envelope, RpcLimits};
use drover::pace::report::{LoadReport, Patience, RackLoad};
use drover::pki::{AGENT_URI, Certificate, CertificateFile};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Certificates: of a peer, which TLS has checked already, and PEM files.
pub fn certificates(bytes: &[u8]) -> bool {
    let parsed = Certificate::parse(bytes);
    if let Ok(certificate) = &parsed {
        let named = certificate.agent();
        assert_eq!(named.is_ok(), certificate.agents.len() == 1);
        assert!(named.is_err() || !certificate.agents[0].starts_with(AGENT_URI));
        assert_eq!(certificate.fingerprint_hex().len(), 64);
    }
    let file = CertificateFile::parse_pem(bytes);
    if let Ok((der, parsed)) = &file {
        assert!(!der.is_empty() && der.len() == parsed.len());
    }
    parsed.is_ok() || file.is_ok()
}

/// The first message of the caller, and the answer to it.
pub fn preamble(bytes: &[u8]) -> bool {
    let hello = Hello::decode_unproven(bytes);
    if let Ok(hello) = &hello {
        assert!(is_name(&hello.from) && is_name(&hello.to));
        assert_eq!(
            Hello::names_len(bytes).map(|names| HELLO_FIXED + names),
            Ok(bytes.len())
        );
        // All but the proof is as it came.
        let again = hello.encode(&KEY);
        assert_eq!(again[..40], bytes[..40]);
        assert_eq!(again[56..], bytes[56..]);
        assert_eq!(Hello::decode(&again, &KEY).as_ref(), Ok(hello));
        // Only one proof is the right one.
        assert_eq!(Hello::decode(bytes, &KEY).is_ok(), again == bytes);
    }
    let answer = Answer::decode(bytes, &KEY, &NONCE);
    if let Ok(answer) = &answer {
        assert_eq!(
            Answer::reason_len(bytes).map(|reason| ANSWER_FIXED + reason),
            Ok(bytes.len())
        );
        assert!(!answer.reason.contains(char::is_control));
        let again = answer.encode(&KEY, &NONCE);
        if answer.verdict == Verdict::Accepted {
            assert_eq!(again, bytes, "an acceptance cannot be forged");
        }
        // Bytes that are no UTF-8 become longer ones.
        if answer.reason.len() <= MAX_REASON {
            assert_eq!(Answer::decode(&again, &KEY, &NONCE).as_ref(), Ok(answer));
        }
    }
    hello.is_ok() || answer.is_ok()
}

/// A control connection: frames, envelopes in them, messages in those.
pub fn rpc(mut bytes: &[u8]) -> bool {
    let max = RpcLimits::default().max_frame;
    let mut messages = false;
    while let Ok(Some(whole)) = frame_len(bytes, max) {
        assert!((4..=4 + max).contains(&whole));
        let Some((frame, rest)) = bytes.split_at_checked(whole) else {
            break;
        };
        bytes = rest;
        let Ok(envelope) = Envelope::decode(&frame[4..]) else {
            return false;
        };
        let mut again = Vec::new();
        envelope.encode(&mut again);
        assert_eq!(again, frame[4..]);
        messages |= match envelope {
            Envelope::Request { body, .. } | Envelope::Notice { body } => {
                postcard_roundtrips::<GangRequest>(body)
            }
            Envelope::Response { body, .. } => postcard_roundtrips::<GangResponse>(body),
            Envelope::Fault { .. } | Envelope::Ping | Envelope::Pong => true,
        };
    }
    messages
}

/// What was accepted encodes to bytes that mean the same. Compared as bytes:
/// messages may hold numbers that are none.
fn postcard_roundtrips<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> bool {
    let Ok((message, rest)) = postcard::take_from_bytes::<T>(bytes) else {
        return false;
    };
    let once = postcard::to_stdvec(&message).expect("a decoded message encodes");
    assert!(once.len() <= bytes.len() - rest.len());
    let again: T = postcard::from_bytes(&once).expect("an encoded message decodes");
    let twice = postcard::to_stdvec(&again).expect("a decoded message encodes");
    assert_eq!(once, twice);
    rest.is_empty()
}

/// Claims, fetches and pages; a load report goes on to what adds them up.
pub fn rack(bytes: &[u8]) -> bool {
    let Ok(message) = wire::decode(bytes) else {
        return false;
    };
    let mut again = Vec::new();
    message.encode(&mut again);
    assert_eq!(again, bytes);
    match &message {
        wire::Message::Claim { op, .. } => assert!(op.fps().len() <= MAX_CLAIM),
        wire::Message::ClaimReply { .. } => {}
        wire::Message::Fetch { wanted, .. } => assert!(wanted.len() <= MAX_FETCH),
        wire::Message::Pages { pages, .. } => assert!(pages.len() <= MAX_FETCH),
        wire::Message::Report(report) => {
            assert!(report.len() <= MAX_REPORT);
            return load_reports(report);
        }
    }
    true
}

/// A series of load reports: no number in them makes a sum leave its bounds.
fn load_reports(mut bytes: &[u8]) -> bool {
    const CAPACITY: f64 = 50e6;
    let patience = Patience::for_interval(Duration::from_millis(50));
    let mut rack = RackLoad::default();
    let mut taken = 0;
    while let Ok((report, rest)) = postcard::take_from_bytes::<LoadReport>(bytes) {
        assert!(rest.len() < bytes.len());
        assert!(postcard_roundtrips::<LoadReport>(
            &bytes[..bytes.len() - rest.len()]
        ));
        bytes = rest;
        taken += 1;
        let now = Duration::from_millis(taken * 20);
        let named = [&report.host, &report.rack].map(|name| (1..=255).contains(&name.len()));
        assert_eq!(rack.receive(report, now).is_ok(), named == [true, true]);
        let sum = rack.sum(now, patience, CAPACITY);
        let most = sum.agents as f64 * CAPACITY;
        for flow in [sum.egress, sum.ingress] {
            assert!((0.0..=most).contains(&flow.migration));
            assert!((0.0..=taken as f64 * CAPACITY).contains(&flow.tenant));
        }
        assert!(
            sum.wanted
                .iter()
                .all(|want| (0.0..=CAPACITY).contains(want))
        );
        assert!(sum.stop_copy <= sum.agents && sum.agents as u64 <= taken);
    }
    taken > 0
}
