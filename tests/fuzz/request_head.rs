//! Request heads: one reading however they are split, the one of httparse, and of the backend that we write them to.

use super::heads::{Naive, is_content, is_token, prefix_lengths};
use protocol::http::{
    Framing, HeadLimits, HeaderSlots, METHOD_BYTES_MAX, Refusal, RequestHead, Version, header_slots,
    parse_request, write_upstream_request,
};
use protocol::limits::HEADERS_MAX;

/// A parser of request heads.
pub type Parse = for<'h, 'b> fn(
    &'b [u8],
    &'h mut HeaderSlots<'b>,
    &HeadLimits,
) -> Result<Option<RequestHead<'h, 'b>>, Refusal>;

/// Small enough that mutations reach them.
const SMALL: HeadLimits = HeadLimits { head_bytes: 96, headers: 4, target_bytes: 24 };

/// The target.
pub fn run(data: &[u8]) {
    run_on(parse_request, data);
}

/// The target, on another parser.
pub fn run_on(parse: Parse, data: &[u8]) {
    for limits in [HeadLimits::default(), SMALL] {
        let mut slots = header_slots();
        let outcome = parse(data, &mut slots, &limits);
        splits_do_not_matter(parse, data, &limits, &outcome);
        agrees_with_httparse(data, &outcome);
        match outcome {
            Ok(Some(head)) => {
                keeps_limits(&head, &limits);
                says_what_the_bytes_say(&head, data);
                is_written_as_read(parse, &head, data);
            }
            Ok(None) => assert!(data.len() < limits.head_bytes, "a head beyond its limit is waited for"),
            Err(refusal) => assert!((400..600).contains(&refusal.status())),
        }
    }
    if is_plain(data) {
        let mut slots = header_slots();
        let outcome = parse(data, &mut slots, &HeadLimits::default());
        assert!(matches!(outcome, Ok(Some(_))), "a plain request is refused: {outcome:?}");
    }
}

fn splits_do_not_matter(
    parse: Parse,
    data: &[u8],
    limits: &HeadLimits,
    whole: &Result<Option<RequestHead>, Refusal>,
) {
    let mut decided = false;
    for length in prefix_lengths(data) {
        let mut slots = header_slots();
        let prefix = parse(&data[..length], &mut slots, limits);
        match &prefix {
            Ok(None) => assert!(!decided, "undecided again at {length}"),
            _ => {
                assert_eq!(&prefix, whole, "at {length}");
                decided = true;
            }
        }
        if let Ok(Some(head)) = whole {
            assert_eq!(decided, length >= head.head_bytes, "at {length}");
        }
    }
    if whole != &Ok(None) {
        let mut slots = header_slots();
        let longer = [data, b"\r\n: GET / HTTP/1.1\r\n\r\n"].concat();
        assert_eq!(&parse(&longer, &mut slots, limits), whole, "with more behind it");
    }
}

/// It is more lenient, but what both take they must read alike, and neither waits where the other has seen the end.
fn agrees_with_httparse(data: &[u8], outcome: &Result<Option<RequestHead>, Refusal>) {
    let mut slots = [httparse::EMPTY_HEADER; 2 * HEADERS_MAX];
    let mut theirs = httparse::Request::new(&mut slots);
    match (theirs.parse(data), outcome) {
        (Ok(httparse::Status::Complete(head_bytes)), Ok(Some(ours))) => {
            assert_eq!(head_bytes, ours.head_bytes);
            assert_eq!(theirs.method, Some(ours.method));
            assert_eq!(theirs.version, Some(u8::from(ours.version == Version::Http11)));
            assert_eq!(theirs.headers, ours.headers);
            let path = theirs.path.unwrap_or_default();
            assert!(path.ends_with(ours.target) || ours.target == "/" || ours.target == "*", "{path}");
        }
        (theirs, Ok(Some(_))) => panic!("httparse has another opinion: {theirs:?}"),
        (Ok(httparse::Status::Complete(_)), Ok(None)) => panic!("a complete head is waited for"),
        _ => {}
    }
}

fn keeps_limits(head: &RequestHead, limits: &HeadLimits) {
    assert!(head.head_bytes <= limits.head_bytes && head.headers.len() <= limits.headers);
    assert!(head.target.len() <= limits.target_bytes.max(1) && head.method.len() <= METHOD_BYTES_MAX);
}

/// Against the bytes, cut naively: nothing that two readers could take differently has been let through.
fn says_what_the_bytes_say(head: &RequestHead, data: &[u8]) {
    let Some(naive) = Naive::of(data) else { panic!("no head ends here") };
    assert_eq!(naive.bytes, head.head_bytes);
    let parts: Vec<&[u8]> = naive.first_line.split(|byte| *byte == b' ').collect();
    let [method, target, version] = parts[..] else { panic!("a request line has three parts") };
    assert!(is_token(method) && method == head.method.as_bytes() && method != b"CONNECT");
    assert!(target.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'#'));
    assert_eq!(version == b"HTTP/1.1", head.version == Version::Http11);
    match head.target {
        "*" => assert_eq!(method, b"OPTIONS"),
        origin => assert!(origin.starts_with('/')),
    }
    let fields: Vec<(&[u8], &[u8])> =
        head.headers.iter().map(|header| (header.name.as_bytes(), header.value)).collect();
    assert_eq!(naive.fields, fields);
    assert!(fields.iter().all(|(name, value)| is_token(name) && is_content(value)));
    assert_eq!(naive.framing(), Some(head.framing), "the framing is not beyond doubt");
    assert_ne!(head.framing, Framing::UntilClose);
    let hosts = naive.all("host");
    assert!(
        hosts.len() == 1 || (hosts.is_empty() && head.version == Version::Http10),
        "{} hosts",
        hosts.len()
    );
    if !target.starts_with(b"/") && target != b"*" {
        let named = [b"://", head.authority.as_bytes()].concat();
        assert!(target.windows(named.len()).any(|part| part == named), "the target's authority wins");
    } else {
        assert_eq!(head.authority.as_bytes(), hosts.first().copied().unwrap_or_default());
    }
    assert!(!head.authority.contains([',', '@', '/']) && head.authority.is_ascii());
    assert!(head.framing != Framing::Chunked || head.version == Version::Http11);
    let options = naive.all("connection").join(&b","[..]).to_ascii_lowercase();
    let closes = options.split(|byte| *byte == b',').any(|option| super::heads::trimmed(option) == b"close");
    assert!(!(closes && head.keep_alive), "kept alive in spite of close");
    let waits = naive.all("expect").iter().any(|value| value.eq_ignore_ascii_case(b"100-continue"));
    assert!(!head.expect_continue || !naive.all("expect").is_empty());
    let body_follows = !matches!(head.framing, Framing::None | Framing::Length(0));
    assert!(!waits || head.expect_continue == (body_follows && head.version == Version::Http11));
    assert!(head.path().len() + head.query().map_or(0, |query| query.len() + 1) == head.target.len());
}

/// What a backend reads: the same request, with the hop-by-hop fields gone and the framing beyond doubt.
fn is_written_as_read(parse: Parse, head: &RequestHead, data: &[u8]) {
    let Some(received) = Naive::of(data) else { return };
    for (base, identity) in [("", false), ("/base/", true)] {
        let mut out = Vec::new();
        write_upstream_request(&mut out, head, "backend:8000", base, identity);
        let Some(written) = Naive::of(&out) else { panic!("no head was written") };
        assert_eq!(written.bytes, out.len(), "more than a head was written");
        let base = if head.target == "*" { "" } else { base.trim_end_matches('/') };
        let line = format!("{} {base}{} HTTP/1.1", head.method, head.target);
        assert_eq!(written.first_line, line.as_bytes());
        assert_eq!(written.framing(), Some(head.framing));
        assert_eq!(written.all("host"), [b"backend:8000"]);

        let mut expected = received.end_to_end(match identity {
            true => &["host", "expect", "tokenring-on-leave", "accept-encoding"],
            false => &["host", "expect", "tokenring-on-leave"],
        });
        if identity {
            expected.push((b"Accept-Encoding", b"identity"));
        }
        let version = if head.version == Version::Http11 { "1.1 tokenring" } else { "1.0 tokenring" };
        expected.push((b"Via", version.as_bytes()));
        let own: &[&str] = &["host", "expect"];
        let kept: Vec<_> = written.end_to_end(own);
        assert_eq!(kept, expected);

        let limits = HeadLimits { head_bytes: out.len(), headers: HEADERS_MAX, target_bytes: out.len() };
        if written.fields.len() > HEADERS_MAX {
            continue;
        }
        let mut slots = header_slots();
        match parse(&out, &mut slots, &limits) {
            Ok(Some(again)) => {
                assert_eq!((again.method, again.framing), (head.method, head.framing));
                assert_eq!(again.target, format!("{base}{}", head.target));
                assert_eq!(
                    again.accepts_event_stream,
                    head.accepts_event_stream && accept_is_kept(&received)
                );
                assert_eq!((again.authority, again.version), ("backend:8000", Version::Http11));
                // Written once more, nothing changes but the list of those it went through.
                let mut twice = Vec::new();
                write_upstream_request(&mut twice, &again, "backend:8000", "", identity);
                let Some(twice) = Naive::of(&twice) else { panic!("no head was written") };
                assert_eq!(twice.first_line, written.first_line);
                let without_via = |naive: &Naive| {
                    let via = |field: &&(&[u8], &[u8])| !field.0.eq_ignore_ascii_case(b"via");
                    let own = |field: &(&[u8], &[u8])| (field.0.to_vec(), field.1.to_vec());
                    let mut fields: Vec<_> = naive.fields.iter().filter(via).map(own).collect();
                    fields.sort();
                    fields
                };
                assert_eq!(without_via(&twice), without_via(&written));
            }
            other => panic!("what was written is not read: {other:?}"),
        }
    }
}

/// Unless Connection names it.
fn accept_is_kept(received: &Naive) -> bool {
    received.end_to_end(&[]).iter().any(|field| field.0.eq_ignore_ascii_case(b"accept"))
}

/// A request that nobody could find fault with, so that strictness does not refuse the world.
fn is_plain(data: &[u8]) -> bool {
    let Some(naive) = Naive::of(data) else { return false };
    let Ok(line) = std::str::from_utf8(naive.first_line) else { return false };
    let parts: Vec<&str> = line.split(' ').collect();
    let ["GET" | "POST" | "PUT" | "DELETE", target, "HTTP/1.1"] = parts[..] else { return false };
    let simple = |byte: u8| byte.is_ascii_alphanumeric() || b"/?&=-_.".contains(&byte);
    let special = ["connection", "content-length", "transfer-encoding", "expect", "accept"];
    data.starts_with(naive.first_line)
        && naive.bytes < 8000
        && naive.fields.len() < 50
        && target.starts_with('/')
        && target.bytes().all(simple)
        && naive.fields.iter().all(|(name, value)| is_token(name) && is_content(value))
        && special.iter().all(|name| naive.all(name).is_empty())
        && matches!(naive.all("host")[..], [host] if !host.is_empty() && host.iter().all(u8::is_ascii_alphanumeric))
}
