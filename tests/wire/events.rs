//! Events: each forwarded once, complete, unmodified, numbered densely, the instant its last byte is here.

use crate::backend::Backend;
use crate::message::{chunk, get};
use crate::peer::Peer;
use crate::server::{Server, chat, stream_request};
use crate::sse::{DONE, LAST_CHUNK, STREAM, STREAM_UNTIL_CLOSE, dialects, named, token};
use serde_json::json;
use std::time::{Duration, Instant};

/// A client, and a backend that has begun to stream to it.
pub(crate) fn streaming(server: &Server, backend: &Backend, request: &[u8]) -> (Peer, Peer) {
    let mut client = server.connect();
    client.send(request);
    let (mut upstream, _) = backend.request();
    upstream.send(STREAM);
    client.stream_head();
    (client, upstream)
}

#[test]
fn each_event_arrives_as_soon_as_its_last_byte_does() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for dialect in dialects() {
        let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(dialect.path));
        // The first token too: the backend says nothing more until the client has it.
        for nth in 1..=5 {
            upstream.send(chunk(&dialect.token));
            let event = client.event();
            assert_eq!((event.id(), event.payload()), (Some(nth), dialect.token.clone().into_bytes()));
        }
        if let Some(done) = &dialect.done {
            upstream.send(chunk(done));
            assert_eq!(client.event().payload(), done.as_bytes());
        }
        upstream.send(LAST_CHUNK);
        client.stream_end();
    }
    server.expect_ends(&[("done", 5)]);
}

#[test]
fn the_head_of_a_stream_arrives_before_its_first_event() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send(chat());
    let (mut upstream, _) = backend.request();
    upstream.send(
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Request-Id: r1\r\nCache-Control: max-age=9\r\n\
         Transfer-Encoding: chunked\r\n\r\n",
    );
    let head = client.stream_head();
    assert_eq!(head.field("content-type").as_deref(), Some("text/event-stream; charset=utf-8"));
    assert_eq!(head.field("cache-control").as_deref(), Some("no-cache, no-transform"));
    assert_eq!(head.field("x-accel-buffering").as_deref(), Some("no"));
    assert_eq!(head.field("x-request-id").as_deref(), Some("r1"));
    assert_eq!(head.field("transfer-encoding").as_deref(), Some("chunked"));
}

#[test]
fn events_split_at_any_byte_are_forwarded_whole() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let text = token("é → 🦀 \u{2028}");
    let other = ": comment\nevent: x\ndata: two\ndata: lines é\nretry: 5\n\n";
    let payload = format!("{text}{other}{DONE}");
    let payload = payload.as_bytes();
    let mut client = server.connect();
    let mut upstream = None;
    for at in 1..payload.len() {
        client.send(chat());
        let mut peer = match upstream.take() {
            Some(peer) => peer,
            None => backend.accept(),
        };
        let _ = peer.request();
        peer.send([STREAM, &chunk(&payload[..at])].concat());
        std::thread::sleep(Duration::from_millis(1));
        peer.send([chunk(&payload[at..]), LAST_CHUNK.to_vec()].concat());
        client.stream_head();
        let events = client.events();
        assert_eq!(events.len(), 3, "split at {at}: {events:?}");
        assert_eq!(events.iter().map(|event| event.id().unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
        let forwarded: Vec<u8> = events.iter().flat_map(|event| event.payload()).collect();
        assert!(forwarded == payload, "split at {at}: {events:?}");
        upstream = Some(peer);
    }
}

#[test]
fn a_stream_that_comes_byte_by_byte_is_forwarded_event_by_event() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    let crab = token("\u{1F980}\u{1F980}");
    for nth in 1..=4 {
        for byte in crab.as_bytes() {
            upstream.send_bytewise(&chunk([*byte]));
        }
        let event = client.event();
        assert_eq!((event.id(), event.payload()), (Some(nth), crab.clone().into_bytes()));
    }
    // Half a character, then nothing: nothing is forwarded.
    let half = crab.find('\u{1F980}').unwrap() + 2;
    upstream.send(chunk(&crab.as_bytes()[..half]));
    client.silence(Duration::from_millis(100));
    upstream.send(chunk(&crab.as_bytes()[half..]));
    assert_eq!(client.event().payload(), crab.as_bytes());
}

#[test]
fn crlf_events_and_a_byte_order_mark_are_understood() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    upstream.send(chunk(b"\xEF\xBB\xBFdata: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\n\r\n"));
    assert_eq!(client.event().payload(), b"data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\n\r\n");
    upstream.send([chunk("data: [DONE]\r\n\r\n"), LAST_CHUNK.to_vec()].concat());
    assert_eq!(client.event().data(), "[DONE]");
    client.stream_end();
    server.expect_ends(&[("done", 1)]);
}

#[test]
fn a_burst_is_forwarded_in_order_without_loss() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    let sender = std::thread::spawn(move || {
        let events: Vec<u8> = (0..20_000).flat_map(|nth| chunk(token(&format!("t{nth}")))).collect();
        // Segments that respect neither chunks nor events.
        for piece in events.chunks(1777) {
            upstream.send(piece);
        }
        upstream.send([chunk(DONE), LAST_CHUNK.to_vec()].concat());
        upstream
    });
    for nth in 0..20_000 {
        let event = client.event();
        assert_eq!(event.id(), Some(nth + 1));
        assert_eq!(event.payload(), token(&format!("t{nth}")).into_bytes());
    }
    assert_eq!(client.event().data(), "[DONE]");
    client.stream_end();
    drop(sender.join().unwrap());
    server.expect_ends(&[("done", 1)]);
}

#[test]
fn ids_can_be_off_and_payloads_are_then_exactly_the_backends() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--event-ids", "off"]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    let said = [": hi\n\n", &token("a"), "id: own\ndata: x\n\n", DONE];
    upstream.send([chunk(said.concat()), LAST_CHUNK.to_vec()].concat());
    let heard: Vec<u8> = client.events().into_iter().flat_map(|event| event.raw).collect();
    assert_eq!(String::from_utf8(heard).unwrap(), said.concat());
}

#[test]
fn our_id_wins_over_the_backends_own() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &stream_request("/events"));
    upstream.send(chunk("id: 77\ndata: x\n\n"));
    assert_eq!(client.event().id(), Some(1));
}

#[test]
fn a_block_without_data_neither_names_nor_numbers_the_next_event() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &stream_request("/events"));
    upstream.send(chunk("event: unnamed\nid: 77\n: note\n\ndata: x\n\n"));
    let event = client.event();
    assert_eq!((event.name(), event.text()), (None, ": note\nid: 1\ndata: x\n\n"));
}

#[test]
fn an_end_mark_inside_content_is_no_end() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for (path, content) in [
        ("/v1/chat/completions", token("data: [DONE]\n\n")),
        ("/v1/chat/completions", token("[DONE]")),
        ("/v1/chat/completions", "data: [DONE] \n\n".to_owned()),
        ("/v1/chat/completions", "data: [DONE]\ndata: more\n\n".to_owned()),
        ("/v1/responses", named("response.output_text.delta", json!({"delta": "response.completed"}))),
        ("/v1/messages", named("content_block_delta", json!({"delta": {"text": "event: message_stop"}}))),
    ] {
        let (mut client, mut upstream) = streaming(&server, &backend, &stream_request(path));
        upstream.send(chunk(&content));
        assert_eq!(client.event().payload(), content.as_bytes());
        // Were it an end, this would be surplus, and the cut below a clean one.
        upstream.send(chunk(&content));
        assert_eq!(client.event().payload(), content.as_bytes());
        drop(upstream);
        assert_eq!(client.event().error_code(), "upstream_truncated");
        client.stream_end();
    }
    server.expect_ends(&[("upstream_truncated", 6)]);
}

#[test]
fn events_after_the_end_mark_are_dropped() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    upstream.send([chunk([&token("a"), DONE, &token("late"), DONE].concat()), LAST_CHUNK.to_vec()].concat());
    let events = client.events();
    assert_eq!(events.len(), 2, "{events:?}");
    server.expect_ends(&[("done", 1)]);
    server.expect_count("tokenring_upstream_surplus_total", 2);
}

#[test]
fn usage_between_the_last_token_and_the_end_mark_is_forwarded() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    let usage = "data: {\"choices\":[],\"usage\":{\"total_tokens\":9}}\n\n";
    let unknown = "event: brand_new\ndata: {\"anything\":1}\n\n";
    upstream.send([chunk([&token("a"), unknown, usage, DONE].concat()), LAST_CHUNK.to_vec()].concat());
    let payloads: Vec<_> = client.events().iter().map(|event| event.payload()).collect();
    assert_eq!(payloads, [token("a").as_bytes(), unknown.as_bytes(), usage.as_bytes(), DONE.as_bytes()]);
}

#[test]
fn a_kept_connection_streams_again_with_ids_from_one() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    for round in 0..3 {
        upstream.send([chunk(token("a")), chunk(DONE), LAST_CHUNK.to_vec()].concat());
        let ids: Vec<_> = client.events().iter().map(|event| event.id().unwrap()).collect();
        assert_eq!(ids, [1, 2], "round {round}");
        client.send(chat());
        upstream.request();
        upstream.send(STREAM);
        client.stream_head();
    }
    server.expect_count("tokenring_upstream_reuses_total", 3);
}

#[test]
fn an_http_1_0_client_gets_a_stream_that_ends_with_its_connection() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    let body = r#"{"stream":true}"#;
    client
        .send(format!("POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
    let (mut upstream, _) = backend.request();
    upstream.send(STREAM);
    let head = client.stream_head();
    assert_eq!(head.field("transfer-encoding"), None);
    upstream.send(chunk(token("a")));
    assert_eq!(client.event().payload(), token("a").as_bytes());
    upstream.send([chunk(DONE), LAST_CHUNK.to_vec()].concat());
    assert_eq!(client.event().data(), "[DONE]");
    client.stream_end();
}

#[test]
fn streams_in_every_framing_of_the_backend_are_understood() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let events = [token("a"), DONE.to_owned()].concat();
    for head in [
        String::from_utf8(STREAM_UNTIL_CLOSE.to_vec()).unwrap(),
        format!(
            "HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; charset=UTF-8\r\nContent-Length: {}\r\n\r\n",
            events.len()
        ),
        "HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n".to_owned(),
    ] {
        let mut client = server.connect();
        client.send(chat());
        let (mut upstream, _) = backend.request();
        upstream.send([head.as_str(), &events].concat());
        drop(upstream);
        client.stream_head();
        assert_eq!(client.events().len(), 2, "{head}");
    }
    server.expect_ends(&[("done", 3)]);
}

#[test]
fn a_get_for_events_is_relayed_like_any_stream() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let (mut client, mut upstream) = streaming(&server, &backend, &get("/events"));
    upstream.send(chunk("data: 1\n\n: note\n\ndata: [DONE]\n\n"));
    assert_eq!(client.event().id(), Some(1));
    assert_eq!(client.event().data(), "[DONE]", "a comment is no event, and opens the next");
    upstream.send(LAST_CHUNK);
    client.stream_end();
}

#[test]
fn an_event_beyond_the_limit_ends_the_stream() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--event-bytes-max", "4096"]);
    let (mut client, mut upstream) = streaming(&server, &backend, &chat());
    upstream.send(chunk(token("fits")));
    client.event();
    upstream.send(chunk(token(&"x".repeat(5000))));
    assert_eq!(client.event().error_code(), "upstream_malformed");
    client.stream_end();
    server.expect_ends(&[("upstream_malformed", 1)]);
}

#[test]
fn one_stream_does_not_wait_for_another() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut pairs: Vec<_> = (0..20).map(|_| streaming(&server, &backend, &chat())).collect();
    // An event half-sent on all the others.
    for (_, upstream) in &mut pairs[1..] {
        upstream.send(chunk("data: {\"cho"));
    }
    let (client, upstream) = &mut pairs[0];
    let mut worst = Duration::ZERO;
    for _ in 0..50 {
        let start = Instant::now();
        upstream.send(chunk(token("a")));
        client.event();
        worst = worst.max(start.elapsed());
    }
    assert!(worst < Duration::from_millis(500), "{worst:?}");
}

#[test]
fn a_compressed_stream_is_passed_on_as_it_is() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send(
        "GET /events HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\nAccept-Encoding: gzip\r\n\r\n",
    );
    let (mut upstream, _) = backend.request();
    upstream.send(
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n",
    );
    // These are no lines: nothing may be put between them, and nothing held back.
    let payload = chunk(b"\x1F\x8B\x08\x00data: \n\n\x00zip\n\n\x01tail");
    upstream.send(&payload);
    let head = client.head();
    assert_eq!(head.field("content-encoding").as_deref(), Some("gzip"));
    assert_eq!(client.exactly(payload.len()), payload);
    upstream.send(LAST_CHUNK);
    server.expect_ends(&[("done", 1)]);
}

#[test]
fn the_answer_to_head_of_a_stream_is_a_head() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send("HEAD /events HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n");
    let (mut upstream, _) = backend.request();
    upstream.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    assert_eq!(client.try_response("HEAD").unwrap().status(), 200);
    client.send(get("/next"));
    upstream.request();
    upstream.send(crate::message::ok("next"));
    assert_eq!(client.response().text(), "next");
}

#[test]
fn a_stream_short_of_its_length_is_judged_by_its_end_mark() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for finished in [true, false] {
        let mut client = server.connect();
        client.send(chat());
        let (mut upstream, _) = backend.request();
        upstream.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9999\r\n\r\n");
        upstream.send(token("a"));
        client.stream_head();
        client.event();
        if finished {
            upstream.send(DONE);
            assert_eq!(client.event().data(), "[DONE]");
        }
        drop(upstream);
        if !finished {
            assert_eq!(client.event().error_code(), "upstream_truncated");
        }
        client.stream_end();
    }
    server.expect_ends(&[("done", 1), ("upstream_truncated", 1)]);
}

#[test]
fn cr_alone_ends_lines_too() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &["--event-ids", "off"]);
    let (mut client, mut upstream) = streaming(&server, &backend, &get("/events"));
    upstream.send(chunk("data: a\r\rdata: b\r\r"));
    // In these tests' own reader lines end in LF; here the bytes are looked at.
    upstream.send(chunk("data: c\n\n"));
    let heard = client.event();
    assert_eq!(heard.text(), "data: a\r\rdata: b\r\rdata: c\n\n");
}
