//! Planted bugs: each is a mistake that such code is known to make, and the driver must find it from the same corpus, with
//! the same mutations and within the same budget as the real code gets.

use crate::corpus;
use protocol::dialect::{Dialect, Meaning};
use protocol::fault::Fault;
use protocol::http::{
    BodyDecoder, Framing, HeadLimits, HeaderSlots, Piece, Refusal, RequestHead, parse_request,
};
use protocol::log::{Lent, Log};
use protocol::resume::{Ask, Want};
use protocol::sse::Block;
use protocol::wheel::{TimerId, Wheel};
use tests::fuzz::mutate::search;
use tests::fuzz::{Target, body, dialect, log, request_head, resume, slots, sse, target, wheel};

/// How many inputs it took.
fn found(name: &'static str, run: fn(&[u8]), message: &str) {
    let corpus = corpus(name);
    let words = target(name).expect("one of the targets").words;
    std::panic::set_hook(Box::new(|_| {}));
    let found = search(&Target { name, run, words }, &corpus, 100_000, 1);
    drop(std::panic::take_hook());
    let found = found.unwrap_or_else(|| panic!("a planted bug in {name} is not found"));
    assert!(found.message.contains(message), "found, but as: {}", found.message);
    println!("{name}: input {} of {}: {}", found.tried, corpus.len(), found.input.escape_ascii());
}

/// A CR that is the last byte received is refused instead of waited upon.
fn impatient<'h, 'b>(
    input: &'b [u8],
    slots: &'h mut HeaderSlots<'b>,
    limits: &HeadLimits,
) -> Result<Option<RequestHead<'h, 'b>>, Refusal> {
    if input.ends_with(b"\r") && !input.ends_with(b"\n\r") {
        return Err(Refusal::BareCr);
    }
    parse_request(input, slots, limits)
}

#[test]
fn a_parser_that_does_not_wait_for_the_line_feed_is_found() {
    found("request_head", |data| request_head::run_on(impatient, data), "at ");
}

/// An address outweighs the header.
fn stale(head: &RequestHead<'_, '_>) -> Result<Ask, Fault> {
    let asked = Ask::parse(head)?;
    let said = head.query().and_then(|query| query.strip_prefix("after=")?.parse().ok());
    Ok(match (asked.want, said) {
        (Want::Events { .. }, Some(after)) => Ask { want: Want::Events { after }, ..asked },
        _ => asked,
    })
}

#[test]
fn a_cursor_in_an_address_that_outweighs_the_header_is_found() {
    found("resume", |data| resume::run_on(stale, data), "left == right");
}

/// Takes what follows an Upgrade field for another protocol's, whatever length is declared.
fn upgrading<'h, 'b>(
    input: &'b [u8],
    slots: &'h mut HeaderSlots<'b>,
    limits: &HeadLimits,
) -> Result<Option<RequestHead<'h, 'b>>, Refusal> {
    let outcome = parse_request(input, slots, limits)?;
    Ok(outcome.map(|head| match head.header("upgrade") {
        Some(_) => RequestHead { framing: Framing::None, ..head },
        None => head,
    }))
}

#[test]
fn a_body_forgotten_for_an_upgrade_is_found() {
    found("request_head", |data| request_head::run_on(upgrading, data), "the framing is not beyond doubt");
}

/// Takes one byte of the next message when a body is complete.
#[derive(Clone)]
struct Greedy(BodyDecoder);

impl body::Decode for Greedy {
    fn new(framing: Framing, body_bytes_max: u64) -> Self {
        Greedy(BodyDecoder::new(framing, body_bytes_max))
    }

    fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Piece<'a>, Refusal> {
        let piece = self.0.next(input)?;
        if let (Piece::End, [_, rest @ ..]) = (piece, *input) {
            *input = rest;
        }
        Ok(piece)
    }

    fn is_done(&self) -> bool {
        self.0.is_done()
    }

    fn eof_is_end(&self) -> bool {
        self.0.eof_is_end()
    }
}

#[test]
fn a_body_that_eats_into_the_next_message_is_found() {
    found("body", body::run_on::<Greedy>, "Complete");
}

/// Takes a line feed for the end of a chunk-size line.
#[derive(Clone)]
struct BareLineFeeds(BodyDecoder);

impl body::Decode for BareLineFeeds {
    fn new(framing: Framing, body_bytes_max: u64) -> Self {
        BareLineFeeds(BodyDecoder::new(framing, body_bytes_max))
    }

    fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Piece<'a>, Refusal> {
        let before = self.0.clone();
        match self.0.next(input) {
            Err(Refusal::BareLf) => {
                self.0 = before;
                let mut with_cr = &b"\r\n"[..];
                self.0.next(&mut with_cr)
            }
            other => other,
        }
    }

    fn is_done(&self) -> bool {
        self.0.is_done()
    }

    fn eof_is_end(&self) -> bool {
        self.0.eof_is_end()
    }
}

#[test]
fn a_bare_line_feed_in_a_chunk_size_is_found() {
    found("body", body::run_on::<BareLineFeeds>, "");
}

/// Takes a line feed at the start of a receive for the second half of a CRLF.
fn forgetful(pieces: &[&[u8]], event_bytes_max: usize) -> Option<Vec<sse::Cutout>> {
    let without: Vec<&[u8]> = pieces
        .iter()
        .enumerate()
        .map(|(index, piece)| if index > 0 { piece.strip_prefix(b"\n").unwrap_or(piece) } else { piece })
        .collect();
    sse::cut(&without, event_bytes_max)
}

#[test]
fn a_blank_line_lost_at_a_split_is_found() {
    found("sse", |data| sse::run_on(forgetful, data), "");
}

/// Knows no errors once the first token is there.
fn hopeful(dialect: Dialect, block: &Block<'_>) -> Meaning {
    match dialect {
        Dialect::Chat if block.raw.starts_with(b"data: {") => Meaning::Token,
        _ => dialect.meaning_after_first_token(block),
    }
}

#[test]
fn an_error_taken_for_a_token_is_found() {
    found("dialect", |data| dialect::run_on(hopeful, data), "Chat");
}

/// A timer in the first slot of the next round comes one round late.
struct WrongEdge(Wheel<u32>, u64);

impl wheel::Timers for WrongEdge {
    fn new(now_ms: u64) -> Self {
        WrongEdge(Wheel::new(now_ms), now_ms)
    }

    fn insert(&mut self, due_ms: u64, key: u32) -> TimerId {
        self.0.insert(if due_ms == self.1 + 64 { due_ms + 64 } else { due_ms }, key)
    }

    fn remove(&mut self, timer: TimerId) -> u32 {
        self.0.remove(timer)
    }

    fn next_ms(&self) -> Option<u64> {
        self.0.next_ms()
    }

    fn advance(&mut self, now_ms: u64, fire: &mut dyn FnMut(u32)) {
        self.1 = self.1.max(now_ms);
        self.0.advance(now_ms, fire);
    }

    fn count(&self) -> usize {
        self.0.len()
    }
}

#[test]
fn a_timer_that_comes_a_round_late_is_found() {
    found("wheel", wheel::run_on::<WrongEdge>, "");
}

#[test]
fn a_key_without_its_generation_is_found() {
    let by_slot: fn(&[u8]) = |data| {
        let get = |slots: &protocol::slots::Slots<u32>, key: protocol::slots::Key| {
            slots.iter().find(|(found, _)| found.slot == key.slot).map(|(_, value)| *value)
        };
        slots::run_on(get, data);
    };
    found("slots", by_slot, "Key");
}

/// Lends one byte more than may be lent.
struct OneMore;

impl log::Lending for OneMore {
    fn lend(log: &Log, from: u64, bytes_max: u32) -> Option<Lent> {
        log.lend(from, bytes_max.saturating_add(1))
    }
}

#[test]
fn a_send_beyond_its_window_is_found() {
    found("log", log::run_on::<OneMore>, "lent.len()");
}
