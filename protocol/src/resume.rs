//! Streams by their ids: how an id is written, and what a request for one asks for.
//!
//! ```text
//! GET    /v1/streams/{id}          what follows the cursor, replayed and live
//! GET    /v1/streams/{id}/status   how it stands
//! DELETE /v1/streams/{id}          stop
//! ```
//! The cursor is the id of the last event that was seen: `Last-Event-ID`, `?last_event_id=` or `?after=`; none: from the start.

use crate::fault::{Culprit, Fault};
use crate::http::RequestHead;
use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

/// Where streams are found.
pub const STREAMS_PREFIX: &str = "/v1/streams";

/// Bytes of the part of an id that nobody can guess.
pub const TAG_BYTES: usize = 16;
/// Bytes of an id: node, shard, number, tag.
const ID_BYTES: usize = 2 + 2 + 6 + TAG_BYTES;
/// Numbers have 48 bits: at a million streams a second they last for nine years.
pub const NUMBER_MAX: u64 = (1 << 48) - 1;

/// Names a stream. The tag authenticates the rest, so that who holds the key knows of any id whether it was ever given.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct StreamId {
    /// Where it was made, of several processes; 0 while there is one.
    pub node: u16,
    /// The shard that has it.
    pub shard: u16,
    /// Counts the shard's streams.
    pub number: u64,
    /// Of the key's holder, over all of the above ([`StreamId::authenticated`]).
    pub tag: [u8; TAG_BYTES],
}

impl StreamId {
    /// What the tag authenticates.
    pub fn authenticated(node: u16, shard: u16, number: u64) -> [u8; ID_BYTES - TAG_BYTES] {
        let mut bytes = [0; ID_BYTES - TAG_BYTES];
        bytes[..2].copy_from_slice(&node.to_be_bytes());
        bytes[2..4].copy_from_slice(&shard.to_be_bytes());
        bytes[4..].copy_from_slice(&(number & NUMBER_MAX).to_be_bytes()[2..]);
        bytes
    }
}

/// The URL-safe alphabet of RFC 4648 section 5.
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

impl Display for StreamId {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut bytes = [0; ID_BYTES + 1];
        let head = Self::authenticated(self.node, self.shard, self.number);
        bytes[..head.len()].copy_from_slice(&head);
        bytes[head.len()..ID_BYTES].copy_from_slice(&self.tag);
        let mut text = [0; ID_BYTES.div_ceil(3) * 4];
        for (three, four) in bytes.chunks_exact(3).zip(text.chunks_exact_mut(4)) {
            let bits = u32::from_be_bytes([0, three[0], three[1], three[2]]);
            for (nth, letter) in four.iter_mut().enumerate() {
                *letter = ALPHABET[(bits >> (18 - 6 * nth)) as usize & 63];
            }
        }
        // The last letter stands for the byte that was added.
        f.write_str(std::str::from_utf8(&text[..text.len() - 1]).unwrap_or_default())
    }
}

/// Not an id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotAnId;

impl FromStr for StreamId {
    type Err = NotAnId;

    fn from_str(text: &str) -> Result<Self, NotAnId> {
        let mut bytes = [0; ID_BYTES + 1];
        if text.len() != bytes.len() / 3 * 4 - 1 {
            return Err(NotAnId);
        }
        for (four, three) in text.as_bytes().chunks(4).zip(bytes.chunks_exact_mut(3)) {
            let mut bits = 0;
            for nth in 0..4 {
                let letter = four.get(nth).copied().unwrap_or(b'A');
                let value = ALPHABET.iter().position(|&known| known == letter).ok_or(NotAnId)?;
                bits = bits << 6 | value as u32;
            }
            three.copy_from_slice(&bits.to_be_bytes()[1..]);
        }
        // One text for one id.
        if bytes[ID_BYTES] != 0 {
            return Err(NotAnId);
        }
        let two = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let number = bytes[4..10].iter().fold(0, |number, &byte| number << 8 | u64::from(byte));
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(&bytes[10..ID_BYTES]);
        Ok(StreamId { node: two(0), shard: two(2), number, tag })
    }
}

/// What a request wants of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Want {
    /// What follows the event with this id; 0: all of it.
    Events {
        /// Id of the last event that was seen.
        after: u64,
    },
    /// How it stands.
    Status,
    /// Its end.
    Stop,
}

/// A request for a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ask {
    /// Which.
    pub id: StreamId,
    /// What for.
    pub want: Want,
}

impl Ask {
    /// Whether a path is one of ours.
    pub fn covers(path: &str) -> bool {
        path.strip_prefix(STREAMS_PREFIX).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// The stream that a path names.
    pub fn id_of(path: &str) -> Option<StreamId> {
        let rest = path.strip_prefix(STREAMS_PREFIX)?.strip_prefix('/')?;
        rest.split('/').next()?.parse().ok()
    }

    /// Reads a request's head.
    ///
    /// # Errors
    /// [`NOT_FOUND`] for any other path than those of streams, [`NO_SUCH_METHOD`], [`BAD_CURSOR`].
    pub fn parse(head: &RequestHead<'_, '_>) -> Result<Ask, Fault> {
        let id = Self::id_of(head.path()).ok_or(NOT_FOUND)?;
        let rest = head.path().strip_prefix(STREAMS_PREFIX).and_then(|rest| rest.strip_prefix('/'));
        let status = match rest.and_then(|rest| rest.split_once('/')) {
            None | Some((_, "")) => false,
            Some((_, "status")) => true,
            Some(_) => return Err(NOT_FOUND),
        };
        let want = match (head.method, status) {
            ("GET", false) => Want::Events { after: cursor(head)? },
            ("GET", true) => Want::Status,
            ("DELETE", false) => Want::Stop,
            _ => return Err(NO_SUCH_METHOD),
        };
        Ok(Ask { id, want })
    }
}

/// The header outweighs the address, because an `EventSource` that reconnects sends both.
fn cursor(head: &RequestHead<'_, '_>) -> Result<u64, Fault> {
    let of_query = |name: &str| {
        let pairs = head.query().unwrap_or_default().split('&');
        pairs
            .filter_map(|pair| pair.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.as_bytes())
    };
    let text = head
        .header("last-event-id")
        .or_else(|| of_query("last_event_id"))
        .or_else(|| of_query("after"))
        .unwrap_or_default();
    number(text).ok_or(BAD_CURSOR)
}

/// Digits; nothing at all is 0.
fn number(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text.trim_ascii()).ok()?;
    match text {
        "" => Some(0),
        text if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    }
}

/// The field by which a request says what is to become of its stream when the last client has left.
pub const ON_LEAVE_FIELD: &str = "tokenring-on-leave";

/// What it says: `cancel`, `detach`, `detach;ttl=SECONDS` or `finish`, an Item of RFC 9651 section 3.3.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leave {
    /// It ends at once.
    Cancel,
    /// It goes on for a while.
    Detach {
        /// For how long, s, > 0; `None`: as long as streams of its route do.
        ttl_s: Option<u32>,
    },
    /// It goes on to its end.
    Finish,
}

/// Neither of these.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotALeave;

impl Leave {
    /// What a request's head says of it, if anything.
    ///
    /// # Errors
    /// [`NotALeave`] for any other value, and for more than one.
    pub fn of(head: &RequestHead<'_, '_>) -> Result<Option<Leave>, NotALeave> {
        let mut fields = head.headers.iter().filter(|field| field.name.eq_ignore_ascii_case(ON_LEAVE_FIELD));
        let Some(field) = fields.next() else { return Ok(None) };
        if fields.next().is_some() {
            return Err(NotALeave);
        }
        str::from_utf8(field.value).map_err(|_| NotALeave)?.parse().map(Some)
    }
}

impl FromStr for Leave {
    type Err = NotALeave;

    fn from_str(text: &str) -> Result<Self, NotALeave> {
        let (word, parameter) = match text.split_once(';') {
            Some((word, parameter)) => (word, Some(parameter.trim_start_matches(' '))),
            None => (text, None),
        };
        match (word, parameter) {
            ("cancel", None) => Ok(Leave::Cancel),
            ("detach", None) => Ok(Leave::Detach { ttl_s: None }),
            ("detach", Some(parameter)) => {
                let seconds = parameter.strip_prefix("ttl=").ok_or(NotALeave)?;
                // As many digits as an Integer has.
                if seconds.len() > 15 || !seconds.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(NotALeave);
                }
                let seconds: u64 = seconds.parse().map_err(|_| NotALeave)?;
                match u32::try_from(seconds).unwrap_or(u32::MAX) {
                    0 => Err(NotALeave),
                    seconds => Ok(Leave::Detach { ttl_s: Some(seconds) }),
                }
            }
            ("finish", None) => Ok(Leave::Finish),
            _ => Err(NotALeave),
        }
    }
}

const fn fault(status: u16, code: &'static str, message: &'static str) -> Fault {
    Fault { status, code, message, culprit: Culprit::Client, retry_helps: false }
}

/// It was never there.
pub const NOT_FOUND: Fault = fault(404, "stream_not_found", "There is no stream with this id.");
/// It was, and its time is over.
pub const EXPIRED: Fault = fault(410, "stream_expired", "This stream is over, and is not kept any more.");
/// Somebody stopped it.
pub const STOPPED: Fault = fault(410, "stream_stopped", "This stream was stopped, and does not go on.");
/// It is there, but not from the cursor on.
pub const BEFORE_WINDOW: Fault = fault(
    410,
    "before_window",
    "Events behind this id are not kept any more; Tokenring-Earliest-Event-ID names the earliest one to go on from.",
);
/// What the cursor names has not happened.
pub const AHEAD: Fault = fault(400, "cursor_ahead", "This stream has no event with this id yet.");
/// What the cursor names was not on the disk when the server ended.
pub const LOST: Fault = fault(
    410,
    "events_lost",
    "The server was restarted, and this event and those before it were not stored.",
);
/// The cursor is none.
pub const BAD_CURSOR: Fault =
    fault(400, "bad_cursor", "An event id is a number: the last one that was seen.");
/// The method is none that streams know.
pub const NO_SUCH_METHOD: Fault = fault(
    405,
    "method_not_allowed",
    "A stream is read by GET and stopped by DELETE; its status is read by GET.",
);
/// The reader speaks a version in which this answer cannot be sent.
pub const NEEDS_HTTP_1_1: Fault =
    fault(505, "needs_http_1_1", "This stream was asked for in HTTP/1.1, and is read in it.");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{HeadLimits, header_slots, parse_request};

    fn some(number: u64) -> StreamId {
        let mut tag = [0; TAG_BYTES];
        tag.iter_mut()
            .enumerate()
            .for_each(|(nth, byte)| *byte = (number as u8).wrapping_mul(31).wrapping_add(nth as u8 * 17));
        StreamId { node: number as u16, shard: !number as u16, number: number & NUMBER_MAX, tag }
    }

    fn ask(request: &str) -> Result<Ask, Fault> {
        let bytes = format!("{request}Host: h\r\n\r\n");
        let mut slots = header_slots();
        let head = parse_request(bytes.as_bytes(), &mut slots, &HeadLimits::default()).unwrap().unwrap();
        Ask::parse(&head)
    }

    #[test]
    fn an_id_is_read_back_and_has_one_text() {
        for number in [0, 1, 77, 65_535, 1 << 40, NUMBER_MAX] {
            let text = some(number).to_string();
            assert_eq!(text.len(), 35);
            assert_eq!(text.parse(), Ok(some(number)));
            for at in 0..text.len() {
                let mut other = text.clone().into_bytes();
                other[at] = if other[at] == b'x' { b'y' } else { b'x' };
                let other = String::from_utf8(other).unwrap();
                assert_ne!(other.parse(), Ok(some(number)), "{other}");
            }
        }
        for none in ["", "a", &"A".repeat(34), &"A".repeat(36), &"+".repeat(35), &"é".repeat(18)] {
            assert_eq!(none.parse::<StreamId>(), Err(NotAnId), "{none}");
        }
    }

    #[test]
    fn what_is_asked_for() {
        let id = some(5);
        let events = |after| Ok(Ask { id, want: Want::Events { after } });
        assert_eq!(ask(&format!("GET /v1/streams/{id} HTTP/1.1\r\n")), events(0));
        assert_eq!(ask(&format!("GET /v1/streams/{id}?after=7 HTTP/1.1\r\n")), events(7));
        assert_eq!(ask(&format!("GET /v1/streams/{id}?x=1&last_event_id=8&after=7 HTTP/1.1\r\n")), events(8));
        assert_eq!(ask(&format!("GET /v1/streams/{id}?after=7 HTTP/1.1\r\nLast-Event-ID: 9\r\n")), events(9));
        assert_eq!(ask(&format!("GET /v1/streams/{id}/ HTTP/1.1\r\nLast-Event-ID:\r\n")), events(0));
        assert_eq!(
            ask(&format!("GET /v1/streams/{id}/status HTTP/1.1\r\n")),
            Ok(Ask { id, want: Want::Status })
        );
        assert_eq!(ask(&format!("DELETE /v1/streams/{id} HTTP/1.1\r\n")), Ok(Ask { id, want: Want::Stop }));
    }

    #[test]
    fn what_a_request_says_of_its_clients_leave() {
        let leave = |fields: &str| {
            let bytes = format!("POST /v1/messages HTTP/1.1\r\nHost: h\r\n{fields}\r\n");
            let mut slots = header_slots();
            let head = parse_request(bytes.as_bytes(), &mut slots, &HeadLimits::default()).unwrap().unwrap();
            Leave::of(&head)
        };
        assert_eq!(leave(""), Ok(None));
        let said = |value: &str| leave(&format!("Tokenring-On-Leave: {value}\r\n"));
        let detach = |ttl_s| Ok(Some(Leave::Detach { ttl_s }));
        assert_eq!(said("cancel"), Ok(Some(Leave::Cancel)));
        assert_eq!(said("finish"), Ok(Some(Leave::Finish)));
        assert_eq!(said("detach"), detach(None));
        assert_eq!(said("detach;ttl=60"), detach(Some(60)));
        assert_eq!(said("detach;  ttl=007 "), detach(Some(7)));
        assert_eq!(said("detach;ttl=999999999999999"), detach(Some(u32::MAX)));
        for bad in [
            "",
            "Cancel",
            "stop",
            "cancel;ttl=1",
            "finish;",
            "detach;",
            "detach;ttl",
            "detach;ttl=",
            "detach;ttl=0",
            "detach;ttl=-1",
            "detach;ttl=+1",
            "detach;ttl=1.5",
            "detach;ttl=1000000000000000",
            "detach;ttl=1;ttl=2",
            "detach ;ttl=1",
            "detach;TTL=1",
            "detach;for=1",
            "cancel, detach",
            "\"cancel\"",
            "\u{e9}",
        ] {
            assert_eq!(said(bad), Err(NotALeave), "{bad}");
        }
        assert_eq!(leave("Tokenring-On-Leave: cancel\r\ntokenring-on-leave: cancel\r\n"), Err(NotALeave));
    }

    #[test]
    fn what_cannot_be_asked_for() {
        let id = some(5);
        for bad in ["-1", "1x", "0x5", "18446744073709551616", "%31"] {
            assert_eq!(ask(&format!("GET /v1/streams/{id}?after={bad} HTTP/1.1\r\n")), Err(BAD_CURSOR));
        }
        assert_eq!(ask(&format!("POST /v1/streams/{id} HTTP/1.1\r\n")), Err(NO_SUCH_METHOD));
        assert_eq!(ask(&format!("DELETE /v1/streams/{id}/status HTTP/1.1\r\n")), Err(NO_SUCH_METHOD));
        for path in ["", "/", "/abc", &format!("/{id}/other"), &format!("/{id}x")] {
            assert_eq!(ask(&format!("GET /v1/streams{path} HTTP/1.1\r\n")), Err(NOT_FOUND), "{path}");
        }
        assert!(Ask::covers("/v1/streams") && Ask::covers("/v1/streams/x") && !Ask::covers("/v1/streamsx"));
    }
}
