//! What holds for whatever a source sends: the body of the fuzz target, and of
//! the property tests.

use super::error::Fault;
use super::requests::{Event, MAX_CONFIG, RequestParser};
use crate::types::PAGE_SIZE;

/// An event without its borrow; what comes in pieces is joined.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Start,
    MemoryFd(u32),
    Config(Vec<u8>),
    Table(u64),
    /// Gfn, content.
    Page(u32, Vec<u8>),
    TableEnd,
    State(Vec<u8>),
    Complete(bool),
    Abandon,
}

/// What was made of a stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) marks: Vec<Mark>,
    pub(super) used: usize,
    pub(super) failure: Option<Fault>,
    pub(super) may_end: bool,
}

/// Reads `bytes`, `step` more at a time.
pub(super) fn read(bytes: &[u8], step: usize) -> Read {
    let mut parser = RequestParser::default();
    let (mut marks, mut state) = (Vec::new(), Vec::new());
    let (mut used, mut end, mut failure) = (0, 0, None);
    loop {
        let input = &bytes[used..end];
        assert!(
            input.len() as u64 <= MAX_CONFIG + step as u64,
            "more is waited for than any command may have"
        );
        let read = match parser.step(input) {
            Ok(read) => read,
            Err(fault) => {
                failure = Some(fault);
                break;
            }
        };
        if read.needs_more() {
            if end == bytes.len() {
                break;
            }
            end = bytes.len().min(end + step);
            continue;
        }
        assert!(read.used <= input.len());
        used += read.used;
        let pages = parser.layout().pages();
        match read.event {
            None => {}
            Some(Event::Start) => marks.push(Mark::Start),
            Some(Event::MemoryFd { slot }) => marks.push(Mark::MemoryFd(slot)),
            Some(Event::Config(json)) => marks.push(Mark::Config(json.to_vec())),
            Some(Event::Table { pages }) => marks.push(Mark::Table(pages)),
            Some(Event::Pages { start, data }) => {
                let (whole, rest) = data.as_chunks::<PAGE_SIZE>();
                assert!(rest.is_empty() && !whole.is_empty());
                for (gfn, page) in (start.0..).zip(whole) {
                    assert!(gfn < pages, "a page beyond the VM's RAM");
                    marks.push(Mark::Page(gfn, page.to_vec()));
                }
            }
            Some(Event::TableEnd) => marks.push(Mark::TableEnd),
            Some(Event::State(piece)) => state.extend_from_slice(piece),
            Some(Event::StateEnd) => marks.push(Mark::State(std::mem::take(&mut state))),
            Some(Event::Complete { paused }) => marks.push(Mark::Complete(paused)),
            Some(Event::Abandon) => marks.push(Mark::Abandon),
        }
    }
    Read {
        marks,
        // How much of a table went well before the entry that did not depends
        // on how it was cut.
        used: if failure.is_none() { used } else { 0 },
        failure,
        may_end: parser.may_end(),
    }
}

/// Reads `bytes` whole and in pieces of `step`: the same must come of it.
/// Returns whether it is a whole migration.
pub fn fuzz_requests(bytes: &[u8], step: usize) -> bool {
    let whole = read(bytes, bytes.len().max(1));
    assert_eq!(whole, read(bytes, step.max(1)), "it matters how it is cut");
    whole.failure.is_none() && whole.may_end && whole.used == bytes.len() && !whole.marks.is_empty()
}
