//! Response heads: one reading however they are split, the one of httparse, and of the client that we write them to.

use super::heads::{Naive, is_content, is_token, prefix_lengths};
use protocol::http::{
    ClientHead, Framing, HeadLimits, Refusal, ResponseHead, Version, header_slots, parse_response,
    write_client_response,
};
use protocol::limits::HEADERS_MAX;

/// Small enough that mutations reach them.
const SMALL: HeadLimits = HeadLimits { head_bytes: 96, headers: 4, target_bytes: 0 };

/// The target.
pub fn run(data: &[u8]) {
    for (limits, method) in
        [(HeadLimits::default(), "GET"), (HeadLimits::default(), "HEAD"), (SMALL, "CONNECT")]
    {
        let mut slots = header_slots();
        let outcome = parse_response(data, &mut slots, &limits, method);
        splits_do_not_matter(data, &limits, method, &outcome);
        agrees_with_httparse(data, &outcome);
        match outcome {
            Ok(Some(head)) => {
                assert!(head.head_bytes <= limits.head_bytes && head.headers.len() <= limits.headers);
                says_what_the_bytes_say(&head, data, method);
                is_written_as_read(&head, data, method);
            }
            Ok(None) => assert!(data.len() < limits.head_bytes, "a head beyond its limit is waited for"),
            Err(refusal) => assert!((400..600).contains(&refusal.status())),
        }
    }
}

fn splits_do_not_matter(
    data: &[u8],
    limits: &HeadLimits,
    method: &str,
    whole: &Result<Option<ResponseHead>, Refusal>,
) {
    let mut decided = false;
    for length in prefix_lengths(data) {
        let mut slots = header_slots();
        let prefix = parse_response(&data[..length], &mut slots, limits, method);
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
}

fn agrees_with_httparse(data: &[u8], outcome: &Result<Option<ResponseHead>, Refusal>) {
    let mut slots = [httparse::EMPTY_HEADER; 2 * HEADERS_MAX];
    let mut theirs = httparse::Response::new(&mut slots);
    match (theirs.parse(data), outcome) {
        (Ok(httparse::Status::Complete(head_bytes)), Ok(Some(ours))) => {
            assert_eq!(head_bytes, ours.head_bytes);
            assert_eq!(theirs.code, Some(ours.status));
            assert_eq!(theirs.version, Some(u8::from(ours.version == Version::Http11)));
            assert_eq!(theirs.headers, ours.headers);
        }
        (theirs, Ok(Some(_))) => panic!("httparse has another opinion: {theirs:?}"),
        (Ok(httparse::Status::Complete(_)), Ok(None)) => panic!("a complete head is waited for"),
        _ => {}
    }
}

fn says_what_the_bytes_say(head: &ResponseHead, data: &[u8], method: &str) {
    let Some(naive) = Naive::of(data) else { panic!("no head ends here") };
    assert_eq!(naive.bytes, head.head_bytes);
    let line = String::from_utf8_lossy(naive.first_line);
    let status = format!("{:03}", head.status);
    assert!(
        line.starts_with(&format!("HTTP/1.{} {status}", u8::from(head.version == Version::Http11))),
        "{line}"
    );
    assert!((100..1000).contains(&head.status) && line.ends_with(head.reason));
    let fields: Vec<(&[u8], &[u8])> =
        head.headers.iter().map(|header| (header.name.as_bytes(), header.value)).collect();
    assert_eq!(naive.fields, fields);
    assert!(fields.iter().all(|(name, value)| is_token(name) && is_content(value)));

    let accepted_tunnel = method == "CONNECT" && (200..300).contains(&head.status);
    let ignores_fields = head.status < 200 || head.status == 204 || accepted_tunnel;
    let expected = match naive.framing() {
        _ if ignores_fields => Framing::None,
        None => panic!("the framing is not beyond doubt"),
        _ if method == "HEAD" || head.status == 304 => Framing::None,
        Some(Framing::None) => Framing::UntilClose,
        Some(framing) => framing,
    };
    assert_eq!(head.framing, expected);
    assert!(!(head.keep_alive && head.framing == Framing::UntilClose));
    if head.event_stream {
        let [kind] = naive.all("content-type")[..] else { panic!("one content type") };
        assert!(kind.to_ascii_lowercase().starts_with(b"text/event-stream"));
    }
}

/// What a client reads: the same answer, with the hop-by-hop fields gone and the framing of our choice.
fn is_written_as_read(head: &ResponseHead, data: &[u8], method: &str) {
    let Some(received) = Naive::of(data) else { return };
    let bodiless = head.status < 200 || matches!(head.status, 204 | 304) || head.framing == Framing::None;
    let framings = if bodiless {
        [Framing::None; 3]
    } else {
        [Framing::Chunked, Framing::Length(7), Framing::UntilClose]
    };
    for (index, framing) in framings.into_iter().enumerate() {
        let event_stream = index == 0 && head.event_stream;
        let extra =
            if event_stream { "Content-Type: text/event-stream\r\nX-Accel-Buffering: no\r\n" } else { "" };
        let how = ClientHead {
            client_version: Version::Http11,
            keep_alive: index != 1,
            framing,
            event_stream,
            own_cors: false,
            extra,
        };
        let mut out = Vec::new();
        write_client_response(&mut out, head, &how);
        let Some(written) = Naive::of(&out) else { panic!("no head was written") };
        assert_eq!(written.bytes, out.len(), "more than a head was written");
        let without: &[&str] =
            if event_stream { &["content-type", "cache-control", "x-accel-buffering"] } else { &[] };
        let mut expected = received.end_to_end(without);
        if event_stream {
            expected
                .extend([(&b"Content-Type"[..], &b"text/event-stream"[..]), (b"X-Accel-Buffering", b"no")]);
        }
        assert_eq!(written.end_to_end(&[]), expected);

        if written.fields.len() > HEADERS_MAX {
            continue;
        }
        let limits = HeadLimits { head_bytes: out.len(), headers: HEADERS_MAX, target_bytes: 0 };
        let mut slots = header_slots();
        let again = match parse_response(&out, &mut slots, &limits, method) {
            Ok(Some(again)) => again,
            other => panic!("what was written is not read: {other:?}"),
        };
        assert_eq!((again.status, again.framing), (head.status, framing));
        assert_eq!(
            again.keep_alive || head.status < 200,
            (index != 1 && framing != Framing::UntilClose) || head.status < 200
        );
        if !head.reason.is_empty() {
            assert_eq!(again.reason, head.reason);
        }
        // A length that only describes is passed on as it came, and only where no body can follow.
        // (The fields of an answer to CONNECT are not read, and it is never relayed.)
        if let [length] = written.all("content-length")[..]
            && method != "CONNECT"
        {
            let describes = bodiless && received.all("content-length") == [length];
            assert!(describes || framing == Framing::Length(7));
        }
    }
}
