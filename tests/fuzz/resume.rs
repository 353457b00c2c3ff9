//! What a request asks of a stream, ids and cursors, against a naive reading: no id but the text it has, no cursor but the one
//! that outweighs the others, and everything else refused.

use protocol::fault::Fault;
use protocol::http::{HeadLimits, RequestHead, header_slots, parse_request};
use protocol::resume::{Ask, BAD_CURSOR, NO_SUCH_METHOD, NOT_FOUND, StreamId, Want};

/// The dictionary.
pub const WORDS: &[&str] = &[
    "GET",
    "DELETE",
    "POST",
    "/v1/streams",
    "/v1/streams/",
    "/v1/streams/AAAAAQAAAAAABQAfQGGCo8TlBidIaYqrzO0",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "-_-_-_-_-_-_-_-_-_-_-_-_-_-_-_-_-_8",
    "/status",
    "?after=7",
    "?last_event_id=8",
    "&after=",
    "&last_event_id=",
    "=",
    "?",
    "&",
    "Last-Event-ID: 9\r\n",
    "last-event-id:\r\n",
    " HTTP/1.1\r\nHost: h\r\n",
    "\r\n",
    "18446744073709551615",
    "18446744073709551616",
    "007",
    "-1",
    "%31",
    "1 ",
];

/// Reads what a head asks for.
pub type Parse = fn(&RequestHead<'_, '_>) -> Result<Ask, Fault>;

/// The target: a request's head.
pub fn run(data: &[u8]) {
    run_on(Ask::parse, data);
}

/// The target, on another reading.
pub fn run_on(parse: Parse, data: &[u8]) {
    // Any text at all is an id or none, and has no other text than its own.
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(id) = text.parse::<StreamId>()
    {
        assert_eq!(id.to_string(), text);
    }
    let mut slots = header_slots();
    let Ok(Some(head)) = parse_request(data, &mut slots, &HeadLimits::default()) else { return };
    let path = head.path();
    assert_eq!(Ask::covers(path), path == "/v1/streams" || path.starts_with("/v1/streams/"));
    let asked = parse(&head);
    match (&asked, naive(&head)) {
        (Ok(ask), Ok((text, want))) => {
            assert_eq!(ask.id.to_string(), text, "another stream");
            assert_eq!(ask.want, want);
            assert_eq!(Ask::id_of(path), Some(ask.id));
            assert!(Ask::covers(path));
        }
        (Err(fault), Err(expected)) => assert_eq!(*fault, expected),
        (asked, expected) => panic!("{asked:?} instead of {expected:?}"),
    }
}

/// What is asked for by the letter of `docs/streams.md`: which stream, and what of it.
fn naive(head: &RequestHead<'_, '_>) -> Result<(String, Want), Fault> {
    let parts: Vec<&str> = head.path().split('/').collect();
    let (text, rest) = match parts[..] {
        ["", "v1", "streams", text, ref rest @ ..] => (text, rest),
        _ => return Err(NOT_FOUND),
    };
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let values: Vec<usize> =
        text.bytes().filter_map(|byte| letters.iter().position(|&letter| letter == byte)).collect();
    // 26 bytes are 35 letters, of whose last the last two bits are nothing.
    if text.len() != 35 || values.len() != 35 || !values[34].is_multiple_of(4) {
        return Err(NOT_FOUND);
    }
    let status = match rest {
        [] | [""] => false,
        ["status"] => true,
        _ => return Err(NOT_FOUND),
    };
    let want = match head.method {
        "GET" if status => Want::Status,
        "GET" => Want::Events { after: naive_cursor(head)? },
        "DELETE" if !status => Want::Stop,
        _ => return Err(NO_SUCH_METHOD),
    };
    Ok((text.to_owned(), want))
}

fn naive_cursor(head: &RequestHead<'_, '_>) -> Result<u64, Fault> {
    let query = format!("&{}&", head.query().unwrap_or(""));
    let of_query = |name: &str| {
        let (_, behind) = query.split_once(&format!("&{name}="))?;
        Some(behind.split('&').next().unwrap_or("").as_bytes().to_vec())
    };
    let header = head.header("last-event-id").map(<[u8]>::to_vec);
    let said = header.or_else(|| of_query("last_event_id")).or_else(|| of_query("after")).unwrap_or_default();
    let mut cursor = 0_u128;
    for byte in said.trim_ascii() {
        if !byte.is_ascii_digit() {
            return Err(BAD_CURSOR);
        }
        cursor = (cursor * 10 + u128::from(byte - b'0')).min(u128::from(u64::MAX) + 1);
    }
    u64::try_from(cursor).map_err(|_| BAD_CURSOR)
}
