//! Records, without sockets.

use super::open::Opener;
use super::record::*;
use super::seal::Sealer;
use proptest::prelude::*;

fn ends() -> (Sealer, Opener) {
    let (here, there) = LaneKeys::pair().unwrap();
    (Sealer::new(here.seal), Opener::new(there.open))
}

fn open(opener: &mut Opener, bytes: &[u8]) -> Result<Vec<u8>, RecordError> {
    let mut got = Vec::new();
    opener.push(&mut bytes.to_vec(), |plain| {
        got.extend_from_slice(plain);
        Ok::<(), RecordError>(())
    })?;
    Ok(got)
}

/// A record of any kind, with padding, from a peer that has the keys.
fn record(key: &mut RecordKey, kind: u8, content: &[u8], padding: usize) -> Vec<u8> {
    let mut inner = content.to_vec();
    inner.push(kind);
    inner.resize(inner.len() + padding, 0);
    let last = inner.pop().unwrap();
    let mut bytes = vec![0; inner.len() + OVERHEAD];
    key.seal(last, &inner, &mut bytes).unwrap();
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_sealed_comes_out_however_it_is_cut(
        pieces in prop::collection::vec(0usize..40_000, 1..6),
        cuts in prop::collection::vec(1usize..20_000, 1..8),
    ) {
        let (mut sealer, mut opener) = ends();
        let (mut sent, mut wire) = (Vec::new(), Vec::new());
        for (n, &len) in pieces.iter().enumerate() {
            let piece: Vec<u8> = (0..len).map(|i| (i * 7 + n) as u8).collect();
            let sealed = sealer.small(&piece).unwrap();
            prop_assert_eq!(sealed.len(), sealed_len(len));
            sent.extend(piece);
            wire.extend(sealed);
        }
        let mut got = Vec::new();
        let (mut at, mut n) = (0, 0);
        while at < wire.len() {
            let end = (at + cuts[n % cuts.len()]).min(wire.len());
            got.extend(open(&mut opener, &wire[at..end]).unwrap());
            (at, n) = (end, n + 1);
        }
        prop_assert_eq!(got, sent);
    }

    #[test]
    fn any_changed_bit_is_noticed(at in 0usize..2000, bit in 0u8..8) {
        let (mut sealer, mut opener) = ends();
        let mut wire = sealer.small(&[7; 1900]).unwrap();
        let at = at % wire.len();
        wire[at] ^= 1 << bit;
        // A length that grew waits for more; it never yields anything.
        match open(&mut opener, &wire) {
            Ok(got) => prop_assert!(got.is_empty()),
            Err(error) => prop_assert!(
                matches!(error, RecordError::Forged(0) | RecordError::Malformed(_)),
                "{}", error
            ),
        }
    }

    #[test]
    fn room_and_length_agree(room in 0usize..2_000_000, plain in 0usize..2_000_000) {
        prop_assert!(sealed_len(plain_room(room)) <= room);
        prop_assert!(plain_room(sealed_len(plain)) >= plain);
    }

    #[test]
    fn bytes_from_outside_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = super::open::fuzz_records(&bytes);
    }
}

#[test]
fn records_cannot_be_left_out_repeated_or_swapped() {
    for order in [&[0, 2][..], &[0, 0], &[1, 0]] {
        let (mut sealer, mut opener) = ends();
        let records: Vec<Vec<u8>> = (0..3).map(|n| sealer.small(&[n; 50]).unwrap()).collect();
        let wire: Vec<u8> = order.iter().flat_map(|&n| records[n].clone()).collect();
        let error = open(&mut opener, &wire).unwrap_err();
        assert!(
            matches!(error, RecordError::Forged(_)),
            "{order:?}: {error}"
        );
    }
}

#[test]
fn records_of_another_connection_or_direction_are_not_opened() {
    let (mut sealer, _) = ends();
    let (here, there) = LaneKeys::pair().unwrap();
    let wire = sealer.small(b"frame").unwrap();
    assert_eq!(
        open(&mut Opener::new(here.open), &wire),
        Err(RecordError::Forged(0))
    );
    let wire = Sealer::new(here.seal).small(b"frame").unwrap();
    let mine = Sealer::new(there.seal).small(b"frame").unwrap();
    let mut opener = Opener::new(there.open);
    assert_eq!(open(&mut opener, &wire).unwrap(), b"frame");
    // What this end sent itself, thrown back at it.
    assert!(matches!(
        open(&mut opener, &mine),
        Err(RecordError::Forged(_))
    ));
}

#[test]
fn alerts_handshake_messages_padding_and_empty_records_are_dealt_with() {
    let ends = || {
        let (here, there) = LaneKeys::pair().unwrap();
        (here.seal, Opener::new(there.open))
    };
    let (mut key, mut opener) = ends();
    let padded = record(&mut key, 23, b"frame", 100);
    assert_eq!(open(&mut opener, &padded).unwrap(), b"frame");
    let close = record(&mut key, 21, &[1, 0], 0);
    assert_eq!(open(&mut opener, &close).unwrap(), b"");
    let after = record(&mut key, 23, b"more", 0);
    assert_eq!(open(&mut opener, &after), Err(RecordError::AfterEnd));

    for (kind, content, error) in [
        (21, &[2, 20][..], RecordError::Alert(20)),
        (
            21,
            &[1],
            RecordError::Malformed("an alert of a strange length"),
        ),
        // A key update, a session ticket.
        (22, &[24, 0, 0, 1, 0], RecordError::Handshake),
        (22, &[4, 0, 0, 0], RecordError::Handshake),
        (20, &[1], RecordError::Malformed("unknown content")),
    ] {
        let (mut key, mut opener) = ends();
        let wire = record(&mut key, kind, content, 0);
        assert_eq!(open(&mut opener, &wire), Err(error));
    }

    let (mut key, mut opener) = ends();
    let mut wire = vec![0; OVERHEAD];
    key.seal(0, &[], &mut wire).unwrap();
    assert_eq!(
        open(&mut opener, &wire),
        Err(RecordError::Malformed("no content type"))
    );

    let (mut key, mut opener) = ends();
    let empty = |key: &mut RecordKey| record(key, 23, &[], 0);
    for _ in 0..32 {
        assert_eq!(open(&mut opener, &empty(&mut key)).unwrap(), b"");
    }
    let wire = empty(&mut key);
    assert_eq!(open(&mut opener, &wire), Err(RecordError::Empty));
}

#[test]
fn headers_are_checked_before_anything_is_awaited() {
    for (header, ok) in [
        ([23, 3, 3, 0, 100], true),
        ([23, 3, 3, 0x41, 0], true),
        ([23, 3, 3, 0x41, 1], false),
        ([23, 3, 3, 0xff, 0xff], false),
        ([23, 3, 3, 0, 16], false),
        ([22, 3, 3, 0, 100], false),
        ([23, 3, 1, 0, 100], false),
        (*b"DRVL\x01", false),
    ] {
        assert_eq!(body_len(&header).is_ok(), ok, "{header:?}");
        let (_, mut opener) = ends();
        assert_eq!(open(&mut opener, &header).is_ok(), ok, "{header:?}");
    }
}
