//! What an agent and a VMM that embeds `drover-vmm` say to each other.

use drover_vmm::wire::{Answer, HEADER, Header, MAX_CHUNK, MAX_REGIONS, MAX_TEXT, Request};

/// Frames one after the other, each as a request and as an answer: what was
/// accepted means the same again, and keeps to its caps.
pub fn vmm_link(mut bytes: &[u8]) -> bool {
    let mut accepted = 0;
    while let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() {
        let Ok(header) = Header::decode(*header) else {
            return false;
        };
        let Some((body, rest)) = rest.split_at_checked(header.len) else {
            return false;
        };
        bytes = rest;
        let mut again = Vec::new();
        if let Ok(request) = Request::decode(header.kind, body) {
            accepted += 1;
            request.encode(&mut again);
            assert_eq!(&again[HEADER..], body, "{request:?}");
        }
        again.clear();
        if let Ok(answer) = Answer::decode(header.kind, body) {
            accepted += 1;
            check(&answer);
            answer.encode(&mut again);
            let kind = u16::from_le_bytes([again[4], again[5]]);
            assert_eq!(kind, header.kind);
            let told = Answer::decode(kind, &again[HEADER..]).expect("our own encoding");
            assert_eq!(told, answer);
        }
    }
    accepted > 0 && bytes.is_empty()
}

fn check(answer: &Answer<'_>) {
    match answer {
        Answer::Welcome { regions, fds, .. } => {
            assert!((1..=MAX_REGIONS).contains(&regions.len()));
            let pages: u64 = regions.iter().map(|r| r.pages()).sum();
            assert!(pages <= u64::from(u32::MAX));
            assert!(regions.iter().all(|r| r.fd < *fds && r.pages() > 0));
        }
        Answer::Bits(bits) => {
            assert!(bits.span() <= MAX_CHUNK as u64 * 8);
            let words = bits.words().collect::<Vec<_>>();
            assert_eq!(words.len() as u64 * 64, bits.span());
            assert_eq!(words[0].0, u64::from(bits.first));
        }
        Answer::Refused { text, .. } => {
            assert!(text.len() <= MAX_TEXT && !text.contains(char::is_control));
        }
        _ => {}
    }
}
