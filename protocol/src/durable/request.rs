//! Requests of the protocol, taken apart and checked as far as their head allows (PROTOCOL.md section 5).

use super::{Offset, Settings, media_type, refusals, timestamp};
use crate::fault::Fault;
use crate::http::{RequestHead, is_dot_segment};
use crate::limits::DURABLE_FIELD_BYTES_MAX;

/// The greatest integer that JavaScript counts to exactly (section 5.2.1).
const INTEGER_MAX: u64 = (1 << 53) - 1;

/// What is asked of which stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// Of the target, prefix included, as it was sent: names the stream.
    pub path: Box<str>,
    /// The host that was asked, for the Location of what is created; empty where nothing is.
    pub(super) authority: Box<str>,
    /// It came over TLS; false until the caller knows better.
    pub secure: bool,
    /// What is to be done.
    pub operation: Operation,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Operation {
    /// PUT.
    Create(Box<Create>),
    /// POST.
    Append(Box<Append>),
    /// GET.
    Read(Box<Read>),
    /// HEAD.
    Metadata,
    /// DELETE.
    Delete,
    /// OPTIONS.
    Preflight,
}

impl Request {
    /// The path of the stream that one to be created is a fork of.
    pub fn source(&self) -> Option<&str> {
        match &self.operation {
            Operation::Create(create) => Some(&create.fork.as_ref()?.from),
            _ => None,
        }
    }

    /// Whether a stream is to be created.
    pub fn is_create(&self) -> bool {
        matches!(self.operation, Operation::Create(_))
    }
}

impl Operation {
    /// Whether it may change something.
    pub fn is_change(&self) -> bool {
        matches!(self, Operation::Create(_) | Operation::Append(_) | Operation::Delete)
    }
}

/// When a stream ends by itself.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(super) enum Expiry {
    #[default]
    Never,
    /// After so many seconds without a read or write.
    Ttl(u64),
    /// At that time since 1970, ms; and as it was written.
    At(u64, Box<str>),
}

/// What a new stream is to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Create {
    pub(super) content_type: Option<Box<str>>,
    pub(super) expiry: Expiry,
    pub(super) closed: bool,
    pub(super) fork: Option<Fork>,
}

/// Where a fork begins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Fork {
    /// Path of the source.
    pub(super) from: Box<str>,
    /// `None`: its end.
    pub(super) offset: Option<Offset>,
    /// Messages (JSON) or bytes behind the offset.
    pub(super) sub_offset: u64,
}

/// What is to be appended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Append {
    pub(super) content_type: Option<Box<str>>,
    pub(super) close: bool,
    pub(super) sequence: Option<Box<str>>,
    pub(super) producer: Option<ProducerTag>,
}

/// Which append of which producer it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct ProducerTag {
    pub(super) id: Box<str>,
    pub(super) epoch: u64,
    pub(super) sequence: u64,
}

/// What is to be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Read {
    pub(super) from: From,
    pub(super) live: Live,
    pub(super) cursor: Option<u64>,
    pub(super) if_none_match: Option<Box<str>>,
    /// An `EventSource` that has come back.
    pub(super) resumed: bool,
}

/// Where reading begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum From {
    Start,
    End,
    Offset(Offset),
}

/// How it goes on at the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Live {
    No,
    LongPoll,
    Events,
    /// As events without names and control events between them: what an `EventSource` takes without knowing the protocol.
    PlainEvents,
}

impl Request {
    /// Takes a request apart whose path [`Settings::covers`].
    ///
    /// # Errors
    /// What is wrong with it, whatever stream it names.
    pub fn parse(head: &RequestHead<'_, '_>, settings: &Settings) -> Result<Self, Fault> {
        let path = head.path();
        let prefix = settings.prefix.as_deref().unwrap_or_default();
        check_path(path, prefix)?;
        let operation = match head.method {
            "PUT" => Operation::Create(Box::new(Create::parse(head, prefix)?)),
            "POST" => Operation::Append(Box::new(Append::parse(head)?)),
            "GET" => Operation::Read(Box::new(Read::parse(head)?)),
            "HEAD" => Operation::Metadata,
            "DELETE" => Operation::Delete,
            "OPTIONS" => Operation::Preflight,
            _ => return Err(refusals::METHOD),
        };
        let authority = if head.method == "PUT" { head.authority } else { "" };
        Ok(Request { path: path.into(), authority: authority.into(), secure: false, operation })
    }
}

/// A path below the prefix, without dots that a browser would have resolved, and not of the control interface.
fn check_path(path: &str, prefix: &str) -> Result<(), Fault> {
    let name = path.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('/')).unwrap_or_default();
    if name.is_empty() {
        return Err(refusals::NOT_FOUND);
    }
    // Section 6: reserved.
    if name.split('/').next() == Some("__ds") {
        return Err(refusals::RESERVED);
    }
    if name.split('/').any(is_dot_segment) { Err(refusals::BAD_PATH) } else { Ok(()) }
}

impl Create {
    fn parse(head: &RequestHead<'_, '_>, prefix: &str) -> Result<Self, Fault> {
        let from = field(head, "stream-forked-from")?;
        let offset = field(head, "stream-fork-offset")?;
        let sub_offset = field(head, "stream-fork-sub-offset")?;
        let fork = match from {
            None if offset.is_some() || sub_offset.is_some() => return Err(refusals::BAD_FORK),
            None => None,
            Some(from) if !from.starts_with('/') => return Err(refusals::BAD_FORK),
            Some(from) => {
                check_path(from, prefix).map_err(|_| refusals::SOURCE_NOT_FOUND)?;
                let offset = offset.map(|text| Offset::parse(text).ok_or(refusals::BAD_FORK)).transpose()?;
                let sub_offset = sub_offset.map_or(Some(0), strict_integer).ok_or(refusals::BAD_FORK)?;
                Some(Fork { from: from.into(), offset, sub_offset })
            }
        };
        let expiry = match (field(head, "stream-ttl")?, field(head, "stream-expires-at")?) {
            (Some(_), Some(_)) => return Err(refusals::TTL_AND_EXPIRY),
            (Some(ttl), None) => Expiry::Ttl(strict_integer(ttl).ok_or(refusals::BAD_TTL)?),
            (None, Some(at)) => Expiry::At(timestamp::parse(at).ok_or(refusals::BAD_EXPIRY)?, at.into()),
            (None, None) => Expiry::Never,
        };
        Ok(Create { content_type: content_type(head)?, expiry, closed: is_closed(head), fork })
    }
}

impl Append {
    fn parse(head: &RequestHead<'_, '_>) -> Result<Self, Fault> {
        let tag = [field(head, "producer-id")?, field(head, "producer-epoch")?, field(head, "producer-seq")?];
        let producer = match tag {
            [None, None, None] => None,
            [Some(id), Some(epoch), Some(sequence)] if !id.is_empty() => Some(ProducerTag {
                id: id.into(),
                epoch: integer(epoch).ok_or(refusals::BAD_PRODUCER)?,
                sequence: integer(sequence).ok_or(refusals::BAD_PRODUCER)?,
            }),
            _ => return Err(refusals::BAD_PRODUCER),
        };
        Ok(Append {
            content_type: content_type(head)?,
            close: is_closed(head),
            sequence: field(head, "stream-seq")?.map(Into::into),
            producer,
        })
    }
}

impl Read {
    fn parse(head: &RequestHead<'_, '_>) -> Result<Self, Fault> {
        let (mut offset, mut live, mut cursor) = (None, None, None);
        for pair in head.query().unwrap_or_default().split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let slot = match name {
                "offset" => &mut offset,
                "live" => &mut live,
                "cursor" => &mut cursor,
                _ => continue,
            };
            if slot.replace(unescape(value).ok_or(refusals::BAD_QUERY)?).is_some() && name != "cursor" {
                return Err(refusals::BAD_QUERY);
            }
        }
        // What an EventSource says when it comes back outweighs the offset that its address still has.
        let resumed = field(head, "last-event-id")?.filter(|id| !id.is_empty());
        let live = match live.as_deref() {
            Some("long-poll") => Live::LongPoll,
            Some("sse") => Live::Events,
            Some(_) => return Err(refusals::BAD_QUERY),
            None if head.accepts_event_stream => Live::PlainEvents,
            None => Live::No,
        };
        let events = matches!(live, Live::Events | Live::PlainEvents);
        let from = match offset.as_deref() {
            _ if events && resumed.is_some() => {
                let id = resumed.and_then(Offset::parse).ok_or(refusals::BAD_OFFSET)?;
                From::Offset(id)
            }
            None if matches!(live, Live::LongPoll | Live::Events) => return Err(refusals::OFFSET_REQUIRED),
            None | Some("-1") => From::Start,
            Some("now") => From::End,
            Some("") => return Err(refusals::BAD_QUERY),
            Some(text) => From::Offset(Offset::parse(text).ok_or(refusals::BAD_OFFSET)?),
        };
        Ok(Read {
            from,
            live,
            cursor: cursor.as_deref().and_then(integer),
            if_none_match: field(head, "if-none-match")?.map(Into::into),
            resumed: events && resumed.is_some(),
        })
    }
}

/// A field that is visible ASCII and no longer than it may be.
fn field<'b>(head: &RequestHead<'_, 'b>, name: &str) -> Result<Option<&'b str>, Fault> {
    let Some(value) = head.header(name) else { return Ok(None) };
    let visible = value.iter().all(|byte| matches!(byte, b' '..=b'~'));
    match str::from_utf8(value) {
        Ok(text) if visible && text.len() <= DURABLE_FIELD_BYTES_MAX => Ok(Some(text)),
        _ => Err(refusals::BAD_FIELD),
    }
}

fn content_type(head: &RequestHead<'_, '_>) -> Result<Option<Box<str>>, Fault> {
    let Some(text) = field(head, "content-type")?.filter(|text| !text.is_empty()) else { return Ok(None) };
    let token = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|byte| byte.is_ascii_graphic() && !b"/,;=\"()<>@:?[]{}\\".contains(&byte))
    };
    let fits = media_type(text).split_once('/').is_some_and(|(kind, of)| token(kind) && token(of));
    if fits { Ok(Some(text.into())) } else { Err(refusals::BAD_CONTENT_TYPE) }
}

/// Section 4.1: any other value is as none.
fn is_closed(head: &RequestHead<'_, '_>) -> bool {
    head.header("stream-closed").is_some_and(|value| value.eq_ignore_ascii_case(b"true"))
}

/// Decimal digits that JavaScript can count.
fn integer(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|&number| digits && number <= INTEGER_MAX)
}

/// The same without leading zeros.
fn strict_integer(text: &str) -> Option<u64> {
    integer(text).filter(|_| text == "0" || !text.starts_with('0'))
}

/// A value of a query: percent-encoded, `+` for a space. `None`: an escape that is none, or not UTF-8.
fn unescape(value: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let [byte, tail @ ..] = rest {
        rest = tail;
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |at: usize| tail.get(at).and_then(|&digit| char::from(digit).to_digit(16));
                let (high, low) = (digit(0)?, digit(1)?);
                rest = &tail[2..];
                u8::try_from(high * 16 + low).ok()?
            }
            byte => *byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{HeadLimits, header_slots, parse_request};

    fn parse(text: &str) -> Result<Request, Fault> {
        let text = text.replace('\n', "\r\n") + "Host: a.b:1\r\n\r\n";
        let mut slots = header_slots();
        let head = parse_request(text.as_bytes(), &mut slots, &HeadLimits::default()).unwrap().unwrap();
        Request::parse(&head, &Settings::default())
    }

    fn read(target: &str) -> Result<Read, Fault> {
        parse(&format!("GET {target} HTTP/1.1\n")).map(|request| match request.operation {
            Operation::Read(read) => *read,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn methods_and_paths() {
        for (method, is) in
            [("HEAD", Operation::Metadata), ("DELETE", Operation::Delete), ("OPTIONS", Operation::Preflight)]
        {
            let request = parse(&format!("{method} /v1/durable/a/b%20c HTTP/1.1\n")).unwrap();
            assert_eq!(&*request.path, "/v1/durable/a/b%20c");
            assert_eq!(request.operation, is);
        }
        let create = parse("PUT /v1/durable/a/b%20c HTTP/1.1\n").unwrap();
        assert_eq!((&*create.path, &*create.authority), ("/v1/durable/a/b%20c", "a.b:1"));
        for (line, refusal) in [
            ("PATCH /v1/durable/a", refusals::METHOD),
            ("GET /v1/durable", refusals::NOT_FOUND),
            ("GET /v1/durable/", refusals::NOT_FOUND),
            ("GET /v1/durable/__ds", refusals::RESERVED),
            ("PUT /v1/durable/__ds/subscriptions/a", refusals::RESERVED),
            ("PUT /v1/durable/a/../b", refusals::BAD_PATH),
            ("PUT /v1/durable/a/.%2e/b", refusals::BAD_PATH),
            ("PUT /v1/durable/%2E", refusals::BAD_PATH),
        ] {
            assert_eq!(parse(&format!("{line} HTTP/1.1\n")), Err(refusal), "{line}");
        }
        let settings = Settings::default();
        assert!(settings.covers("/v1/durable") && settings.covers("/v1/durable/a"));
        assert!(!settings.covers("/v1/durables") && !settings.covers("/v1/models"));
        assert!(!Settings { prefix: None, ..settings }.covers("/v1/durable/a"));
    }

    #[test]
    fn reads() {
        let from = |target| read(target).map(|read| (read.from, read.live));
        let offset = "0000000000000007_0000000000000009";
        let parsed = From::Offset(Offset { generation: 7, position: 9 });
        for (target, expected) in [
            ("/v1/durable/a", Ok((From::Start, Live::No))),
            ("/v1/durable/a?offset=-1&x=%zz", Ok((From::Start, Live::No))),
            ("/v1/durable/a?offset=now&live=sse", Ok((From::End, Live::Events))),
            (&format!("/v1/durable/a?live=long-poll&offset={offset}"), Ok((parsed, Live::LongPoll))),
            (&format!("/v1/durable/a?offset={}", offset.replace('_', "%5F")), Ok((parsed, Live::No))),
            ("/v1/durable/a?live=sse", Err(refusals::OFFSET_REQUIRED)),
            ("/v1/durable/a?live=long-poll", Err(refusals::OFFSET_REQUIRED)),
            ("/v1/durable/a?live=ever&offset=-1", Err(refusals::BAD_QUERY)),
            ("/v1/durable/a?offset=", Err(refusals::BAD_QUERY)),
            ("/v1/durable/a?offset=-1&offset=-1", Err(refusals::BAD_QUERY)),
            ("/v1/durable/a?offset=%2", Err(refusals::BAD_QUERY)),
            ("/v1/durable/a?offset=%ff", Err(refusals::BAD_QUERY)),
            ("/v1/durable/a?offset=0,1", Err(refusals::BAD_OFFSET)),
            ("/v1/durable/a?offset=..%2f-1", Err(refusals::BAD_OFFSET)),
            ("/v1/durable/a?offset=-1+", Err(refusals::BAD_OFFSET)),
        ] {
            assert_eq!(from(target), expected, "{target}");
        }
        assert_eq!(read("/v1/durable/a?cursor=12&offset=-1&live=sse").unwrap().cursor, Some(12));
        assert_eq!(read("/v1/durable/a?cursor=x").unwrap().cursor, None);
    }

    #[test]
    fn an_event_source_needs_no_more_than_the_address() {
        let of = |fields: &str| match parse(&format!("GET /v1/durable/a?offset=-1 HTTP/1.1\n{fields}"))
            .unwrap()
            .operation
        {
            Operation::Read(read) => (read.from, read.live, read.resumed),
            other => panic!("{other:?}"),
        };
        assert_eq!(of("Accept: text/event-stream\n"), (From::Start, Live::PlainEvents, false));
        let back = of("Accept: text/event-stream\nLast-Event-ID: 0000000000000007_0000000000000009\n");
        assert_eq!(back, (From::Offset(Offset { generation: 7, position: 9 }), Live::PlainEvents, true));
        // A page read has no events to continue.
        assert_eq!(of("Last-Event-ID: 0000000000000007_0000000000000009\n"), (From::Start, Live::No, false));
        assert_eq!(
            parse("GET /v1/durable/a HTTP/1.1\nAccept: text/event-stream\nLast-Event-ID: 9\n"),
            Err(refusals::BAD_OFFSET)
        );
    }

    #[test]
    fn streams_to_be() {
        let create = |fields: &str| {
            parse(&format!("PUT /v1/durable/a HTTP/1.1\n{fields}")).map(|request| match request.operation {
                Operation::Create(create) => *create,
                other => panic!("{other:?}"),
            })
        };
        let plain = Create { content_type: None, expiry: Expiry::Never, closed: false, fork: None };
        assert_eq!(create(""), Ok(plain.clone()));
        assert_eq!(create("Stream-Closed: TRUE\n"), Ok(Create { closed: true, ..plain.clone() }));
        assert_eq!(create("Stream-Closed: yes\n"), Ok(plain.clone()));
        assert_eq!(create("Stream-TTL: 3600\n").unwrap().expiry, Expiry::Ttl(3600));
        assert_eq!(
            create("Stream-Expires-At: 1970-01-01T00:00:01Z\n").unwrap().expiry,
            Expiry::At(1000, "1970-01-01T00:00:01Z".into())
        );
        for ttl in ["+3600", "03600", "3600.0", "3.6e3", "-1", "", "99999999999999999999"] {
            assert_eq!(create(&format!("Stream-TTL: {ttl}\n")), Err(refusals::BAD_TTL), "{ttl}");
        }
        assert_eq!(create("Stream-Expires-At: soon\n"), Err(refusals::BAD_EXPIRY));
        assert_eq!(
            create("Stream-TTL: 1\nStream-Expires-At: 1970-01-01T00:00:01Z\n"),
            Err(refusals::TTL_AND_EXPIRY)
        );
        assert_eq!(create("Content-Type: nonsense\n"), Err(refusals::BAD_CONTENT_TYPE));
        assert_eq!(create("Content-Type: a/b c\n"), Err(refusals::BAD_CONTENT_TYPE));
        let json = create("Content-Type: application/json; charset=utf-8\n").unwrap();
        assert_eq!(json.content_type.as_deref(), Some("application/json; charset=utf-8"));
        let long = format!("Content-Type: a/{}\n", "b".repeat(DURABLE_FIELD_BYTES_MAX));
        assert_eq!(create(&long), Err(refusals::BAD_FIELD));
        let fork = create("Stream-Forked-From: /v1/durable/b\nStream-Fork-Sub-Offset: 3\n").unwrap().fork;
        assert_eq!(fork, Some(Fork { from: "/v1/durable/b".into(), offset: None, sub_offset: 3 }));
        for fields in [
            "Stream-Fork-Sub-Offset: 0\n",
            "Stream-Fork-Offset: 0000000000000000_0000000000000000\n",
            "Stream-Forked-From: v1/durable/b\n",
            "Stream-Forked-From: /v1/durable/b\nStream-Fork-Offset: -1\n",
            "Stream-Forked-From: /v1/durable/b\nStream-Fork-Sub-Offset: 05\n",
            "Stream-Forked-From: /v1/durable/b\nStream-Fork-Sub-Offset: \n",
        ] {
            assert_eq!(create(fields), Err(refusals::BAD_FORK), "{fields}");
        }
        assert_eq!(create("Stream-Forked-From: /elsewhere/b\n"), Err(refusals::SOURCE_NOT_FOUND));
    }

    #[test]
    fn producers_are_named_whole_or_not_at_all() {
        let append = |fields: &str| {
            parse(&format!("POST /v1/durable/a HTTP/1.1\n{fields}")).map(|request| match request.operation {
                Operation::Append(append) => append.producer,
                other => panic!("{other:?}"),
            })
        };
        assert_eq!(append(""), Ok(None));
        let all = append("Producer-Id: a b\nProducer-Epoch: 0\nProducer-Seq: 9007199254740991\n").unwrap();
        assert_eq!(all, Some(ProducerTag { id: "a b".into(), epoch: 0, sequence: INTEGER_MAX }));
        for fields in [
            "Producer-Id: a\n",
            "Producer-Epoch: 0\n",
            "Producer-Id: a\nProducer-Seq: 0\n",
            "Producer-Id: \nProducer-Epoch: 0\nProducer-Seq: 0\n",
            "Producer-Id: a\nProducer-Epoch: 1e3\nProducer-Seq: 0\n",
            "Producer-Id: a\nProducer-Epoch: 0\nProducer-Seq: 1abc\n",
            "Producer-Id: a\nProducer-Epoch: -1\nProducer-Seq: 0\n",
            "Producer-Id: a\nProducer-Epoch: 0\nProducer-Seq: 9007199254740992\n",
        ] {
            assert_eq!(append(fields), Err(refusals::BAD_PRODUCER), "{fields}");
        }
    }
}
