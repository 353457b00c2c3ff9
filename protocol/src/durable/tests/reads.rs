//! Dialogues of readers with a store: pages, long-polls, event streams.

use super::*;

#[test]
fn what_is_known_already_is_not_sent_again() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"one");
    let etag = with.ask("GET /v1/durable/a", "", b"").field("ETag").unwrap().to_owned();
    for known in [etag.clone(), format!("\"x\", W/{etag}"), "*".to_owned()] {
        let again = with.ask("GET /v1/durable/a", &format!("If-None-Match: {known}\n"), b"");
        assert_eq!((again.status, again.body.len(), again.field("ETag")), (304, 0, Some(etag.as_str())));
    }
    with.ask("POST /v1/durable/a", TEXT, b"two");
    assert_eq!(with.ask("GET /v1/durable/a", &format!("If-None-Match: {etag}\n"), b"").text(), "onetwo");
    assert_eq!(with.store.totals().readers, 0);
}

#[test]
fn a_long_poll_waits_for_what_comes_and_no_longer() {
    let mut with = dialogue();
    let tail = with.ask("PUT /v1/durable/a", TEXT, b"one").next_offset();
    assert_eq!(with.ask("GET /v1/durable/a?offset=-1&live=long-poll", "", b"").text(), "one");
    let mut poll = with.wait(&format!("/v1/durable/a?offset={tail}&live=long-poll"));
    let reader = with.reader();
    assert!(with.store.poll(&mut poll, false, with.now).is_none());
    with.ask("POST /v1/durable/a", TEXT, b"two");
    assert_eq!(with.woken(), [reader]);
    let reply = with.store.poll(&mut poll, false, with.now).unwrap();
    let heard = with.hear(reply);
    assert_eq!((heard.status, heard.text(), heard.field("Stream-Cursor").is_some()), (200, "two", true));
    // Nothing comes.
    let mut poll = with.wait("/v1/durable/a?offset=now&live=long-poll");
    let reply = with.store.poll(&mut poll, true, with.now).unwrap();
    let over = with.hear(reply);
    assert_eq!(
        (over.status, over.next_offset(), over.field("Stream-Up-To-Date")),
        (204, heard.next_offset(), Some("true"))
    );
    // It is closed meanwhile, or deleted.
    let mut poll = with.wait("/v1/durable/a?offset=now&live=long-poll");
    with.ask("POST /v1/durable/a", "Stream-Closed: true\n", b"");
    let reply = with.store.poll(&mut poll, false, with.now).unwrap();
    let closed = with.hear(reply);
    assert_eq!(
        (closed.status, closed.field("Stream-Closed"), closed.field("Stream-Cursor")),
        (204, Some("true"), None)
    );
    assert_eq!(with.ask("GET /v1/durable/a?offset=now&live=long-poll", "", b"").status, 204, "at once");
    with.ask("PUT /v1/durable/b", TEXT, b"");
    let mut poll = with.wait("/v1/durable/b?offset=now&live=long-poll");
    with.ask("DELETE /v1/durable/b", "", b"");
    assert_eq!(with.woken().len(), 1);
    let reply = with.store.poll(&mut poll, false, with.now).unwrap();
    assert_eq!(with.hear(reply).status, 404);
    let poll = {
        with.ask("PUT /v1/durable/c", TEXT, b"");
        with.wait("/v1/durable/c?offset=now&live=long-poll")
    };
    with.store.give_up(&poll, with.now);
    assert_eq!(with.store.totals().readers, 0);
}

#[test]
fn cursors_never_go_back() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"x");
    let cursor = |with: &mut Dialogue, echoed: u64| -> u64 {
        let heard = with.ask(&format!("GET /v1/durable/a?offset=-1&live=long-poll&cursor={echoed}"), "", b"");
        heard.field("Stream-Cursor").unwrap().parse().unwrap()
    };
    let first = cursor(&mut with, 0);
    let second = cursor(&mut with, first);
    assert!(second > first && second <= first + 180);
    with.wait_ms(3_700_000);
    assert!(cursor(&mut with, second) > second);
    assert_eq!(cursor(&mut with, u64::MAX), cursor(&mut with, 0), "what cannot be counted is ignored");
}

#[test]
fn events_come_with_their_offsets_and_end_with_the_stream() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", JSON, b"[1,{\"a\":\n2}]");
    let (first, mut reading) = with.events("/v1/durable/a?offset=-1&live=sse", "");
    let reader = with.reader();
    assert_eq!(first.field("Content-Type"), Some("text/event-stream"));
    let offset = with.ask("HEAD /v1/durable/a", "", b"").next_offset();
    let control = |offset: &str, rest: &str| {
        format!("event: control\ndata:{{\"streamNextOffset\":\"{offset}\"{rest}}}\nid:{offset}\n\n")
    };
    let cursor = ",\"streamCursor\":\"1767550\",\"upToDate\":true";
    assert_eq!(
        first.text(),
        format!("event: data\ndata:[1,{{\"a\":\ndata:2}}]\nid:{offset}\n\n{}", control(&offset, cursor))
    );
    let second = with.ask("POST /v1/durable/a", JSON, b"3").next_offset();
    assert_eq!(with.woken(), [reader]);
    let (body, progress) = with.read(&mut reading);
    assert_eq!(progress, Progress::Waiting);
    assert_eq!(
        String::from_utf8(body).unwrap(),
        format!("event: data\ndata:[3]\nid:{second}\n\n{}", control(&second, cursor))
    );
    with.ask("POST /v1/durable/a", "Stream-Closed: true\n", b"");
    let (body, progress) = with.read(&mut reading);
    let last = control(&second, ",\"upToDate\":true,\"streamClosed\":true");
    assert_eq!((String::from_utf8(body).unwrap(), progress), (last, Progress::Ended));
    assert_eq!(with.store.totals().readers, 0);
}

#[test]
fn an_append_that_closes_is_told_with_the_closing() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"");
    let (first, mut reading) = with.events("/v1/durable/a?offset=now&live=sse", "");
    assert!(first.text().starts_with("event: control\n") && first.text().contains("\"upToDate\":true"));
    with.ask("POST /v1/durable/a", "Content-Type: text/plain\nStream-Closed: true\n", b"last");
    let (body, progress) = with.read(&mut reading);
    let text = String::from_utf8(body).unwrap();
    assert!(text.starts_with("event: data\ndata:last\n") && text.contains("\"streamClosed\":true"), "{text}");
    assert_eq!((text.matches("event:").count(), progress), (2, Progress::Ended));
}

#[test]
fn text_stays_text_whatever_lines_it_has() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b" a\r\n\r\nevent: control\rdata: {}\n\n  b\r");
    let (heard, _) = with.events("/v1/durable/a?offset=-1&live=sse", "");
    let data = heard.text().split("id:").next().unwrap();
    assert_eq!(
        data,
        "event: data\ndata:  a\ndata:\ndata:event: control\ndata:data: {}\ndata:\ndata:   b\ndata:\n"
    );
}

#[test]
fn a_character_in_two_appends_is_told_in_one_event() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, b"10 \xe2\x82");
    let (first, mut reading) = with.events("/v1/durable/a?offset=-1&live=sse", "");
    assert!(first.text().starts_with("event: data\ndata:10 \nid:") && !first.text().contains("upToDate"));
    with.ask("POST /v1/durable/a", TEXT, b"\xac!");
    let (body, _) = with.read(&mut reading);
    assert!(String::from_utf8(body).unwrap().starts_with("event: data\ndata:\u{20ac}!\n"));
    with.ask("POST /v1/durable/a", TEXT, b"\xf0\x9f");
    assert_eq!(with.read(&mut reading).1, Progress::Waiting);
    // What stays broken is given as it is.
    with.ask("POST /v1/durable/a", "Stream-Closed: true\n", b"");
    let (body, progress) = with.read(&mut reading);
    assert!(body.starts_with(b"event: data\ndata:\xf0\x9f\n") && progress == Progress::Ended);
}

#[test]
fn binary_events_are_base64_each_by_itself() {
    let mut with = dialogue();
    let bytes: Vec<u8> = (0..=255).collect();
    with.ask("PUT /v1/durable/a", "", &bytes);
    with.ask("POST /v1/durable/a", "Content-Type: application/octet-stream\n", b"\x00");
    let (heard, mut reading) = with.events("/v1/durable/a?offset=-1&live=sse", "");
    assert_eq!(heard.field("Stream-SSE-Data-Encoding"), Some("base64"));
    let decode = |text: &str| {
        use base64::Engine;
        let data = text.strip_prefix("event: data\ndata:").unwrap().split('\n').next().unwrap();
        base64::engine::general_purpose::STANDARD.decode(data).unwrap()
    };
    assert_eq!(decode(heard.text()), [&bytes[..], b"\x00"].concat());
    with.ask("POST /v1/durable/a", "Content-Type: application/octet-stream\n", b"xy");
    let (body, _) = with.read(&mut reading);
    assert_eq!(decode(str::from_utf8(&body).unwrap()), b"xy");
}

#[test]
fn an_event_source_sees_messages_and_comes_back_where_it_was() {
    let mut with = dialogue();
    let one = with.ask("PUT /v1/durable/a", JSON, b"{\"n\":1}").next_offset();
    let two = with.ask("POST /v1/durable/a", JSON, b"2").next_offset();
    let accept = "Accept: text/event-stream\n";
    let (heard, mut reading) = with.events("/v1/durable/a", accept);
    assert_eq!(heard.text(), format!("retry:507\ndata:{{\"n\":1}}\nid:{one}\n\ndata:2\nid:{two}\n\n"));
    let mut beat = Vec::new();
    reading.write_heartbeat(&with.store, with.now, &mut beat);
    assert_eq!(beat, b":\n\n");
    with.store.leave(&mut reading, with.now);
    let (heard, mut reading) = with.events("/v1/durable/a", &format!("{accept}Last-Event-ID: {one}\n"));
    assert_eq!(heard.text(), format!("retry:507\ndata:2\nid:{two}\n\n"));
    with.store.leave(&mut reading, with.now);
    // Before the first event it knows where it began.
    let (heard, mut reading) = with.events("/v1/durable/a?offset=now", accept);
    assert_eq!(heard.text(), format!("retry:507\nid:{two}\n\n"));
    with.ask("POST /v1/durable/a", "Stream-Closed: true\n", b"");
    assert_eq!(with.read(&mut reading).1, Progress::Ended);
    // 204 is what it does not come back from.
    for target in ["/v1/durable/a", "/v1/durable/a?offset=-1&live=sse"] {
        let end = with.ask(&format!("GET {target}"), &format!("{accept}Last-Event-ID: {two}\n"), b"");
        assert_eq!((end.status, end.field("Stream-Closed")), (204, Some("true")));
    }
    assert_eq!(with.store.totals().readers, 0);
}

#[test]
fn an_event_stream_ends_between_two_events() {
    let mut with = dialogue();
    with.ask("PUT /v1/durable/a", TEXT, &[b'x'; 40_000]);
    let Reply::Events(_, mut reading) = with.reply("GET /v1/durable/a?offset=-1&live=sse", "", b"") else {
        panic!("events");
    };
    let mut body = Vec::new();
    assert_eq!(with.store.read(&mut reading, with.now, &mut body, 100), Progress::More);
    assert!(reading.is_within());
    reading.finish();
    assert_eq!(with.read(&mut reading).1, Progress::Ended);
    assert!(!reading.is_within());
}

#[test]
fn a_page_holds_whole_messages_and_of_bytes_no_more_than_its_size() {
    let settings = Settings { body_bytes_max: 8 << 20, ..Settings::default() };
    let mut with = Dialogue::new(settings);
    let page = usize::try_from(limits::DURABLE_PAGE_BYTES_MAX).unwrap();
    with.ask("PUT /v1/durable/a", "", &vec![7; 2 * page + 1]);
    let mut offset = "-1".to_owned();
    let mut sizes = Vec::new();
    loop {
        let heard = with.ask(&format!("GET /v1/durable/a?offset={offset}"), "", b"");
        sizes.push(heard.body.len());
        offset = heard.next_offset();
        if heard.field("Stream-Up-To-Date").is_some() {
            break;
        }
    }
    assert_eq!(sizes, [page, page, 1]);
    let long = [b"\"", vec![b'x'; page].as_slice(), b"\""].concat();
    with.ask("PUT /v1/durable/b", JSON, &[b"[1,", long.as_slice(), b",2]"].concat());
    let first = with.ask("GET /v1/durable/b", "", b"");
    assert_eq!((first.text(), first.field("Stream-Up-To-Date")), ("[1]", None));
    let second = with.ask(&format!("GET /v1/durable/b?offset={}", first.next_offset()), "", b"");
    assert_eq!(second.body.len(), long.len() + 2, "one message is never split");
    let third = with.ask(&format!("GET /v1/durable/b?offset={}", second.next_offset()), "", b"");
    assert_eq!((third.text(), third.field("Stream-Up-To-Date")), ("[2]", Some("true")));
}
