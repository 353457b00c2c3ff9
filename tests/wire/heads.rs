//! Heads and connections: what is read however it is split, what reaches the backend, what is kept open.

use crate::backend::Backend;
use crate::message::{Message, answer, get, ok, post};
use crate::peer::{Closed, Peer};
use crate::server::Server;

/// Answers every request with its own request line.
fn echo(mut peer: Peer) {
    while let Ok(request) = peer.try_request() {
        let body = format!("{} {}", request.first_line, request.text());
        if peer.try_send(&ok(&body)).is_err() {
            break;
        }
    }
}

fn names(message: &Message) -> Vec<String> {
    message.fields.iter().map(|(name, _)| name.to_ascii_lowercase()).collect()
}

#[test]
fn a_head_split_at_any_byte_is_one_head() {
    let server = Server::start(&[Backend::listen().serve(echo)], &[]);
    let request = post("/split?q=1", "{}");
    let mut client = server.connect();
    for at in 1..request.len() {
        client.send_split(&request, at);
        assert_eq!(client.response().text(), "POST /split?q=1 HTTP/1.1 {}", "split at {at}");
    }
    client.send_bytewise(&request);
    assert_eq!(client.response().text(), "POST /split?q=1 HTTP/1.1 {}");
    server.expect_ends(&[("done", request.len() as u64)]);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send([get("/1"), post("/2", "two"), get("/3")].concat());
    let (mut upstream, first) = backend.request();
    assert_eq!(first.first_line, "GET /1 HTTP/1.1");
    backend.was_left_alone();
    upstream.send(ok("one"));
    let second = upstream.request();
    assert_eq!((second.first_line.as_str(), second.text().as_str()), ("POST /2 HTTP/1.1", "two"));
    // More of them arrive while the second is being answered.
    client.send([get("/4"), get("/5")].concat());
    upstream.send(ok("two"));
    for (path, body) in [("/3", "three"), ("/4", "four"), ("/5", "five")] {
        assert_eq!(upstream.request().first_line, format!("GET {path} HTTP/1.1"));
        upstream.send(ok(body));
    }
    for body in ["one", "two", "three", "four", "five"] {
        assert_eq!(client.response().text(), body);
    }
}

#[test]
fn many_pipelined_requests_do_not_outgrow_the_connection() {
    let server = Server::start(&[Backend::listen().serve(echo)], &[]);
    let mut client = server.connect();
    let mut writer = Peer::new(client.stream.try_clone().unwrap());
    let requests: Vec<u8> = (0..3000).flat_map(|nth| get(&format!("/{nth}"))).collect();
    let sender = std::thread::spawn(move || writer.send(requests));
    for nth in 0..3000 {
        assert_eq!(client.response().text(), format!("GET /{nth} HTTP/1.1 "));
    }
    sender.join().unwrap();
}

#[test]
fn a_request_pipelined_behind_a_refused_one_is_not_read() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send([b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".to_vec(), get("/smuggled")].concat());
    assert_eq!(client.response().status(), 400);
    client.closed();
    backend.was_left_alone();
}

#[test]
fn connections_are_kept_or_closed_as_their_version_and_options_say() {
    let server = Server::start(&[Backend::listen().serve(echo)], &[]);
    for (line, fields, kept) in [
        ("HTTP/1.1", "", true),
        ("HTTP/1.1", "Connection: keep-alive\r\n", true),
        ("HTTP/1.1", "Connection: close\r\n", false),
        ("HTTP/1.1", "connection: X, CLOSE\r\n", false),
        ("HTTP/1.0", "", false),
        ("HTTP/1.0", "Connection: keep-alive\r\n", true),
        ("HTTP/1.0", "Connection: Keep-Alive, close\r\n", false),
    ] {
        let request = format!("GET /k {line}\r\nHost: a\r\n{fields}\r\n");
        let mut client = server.connect();
        client.send(&request);
        let response = client.response();
        assert_eq!(response.status(), 200);
        let option = response.field("connection").unwrap_or_default();
        if kept {
            assert_ne!(option, "close", "{request}");
            assert!(line == "HTTP/1.1" || option.eq_ignore_ascii_case("keep-alive"), "{request}: {option}");
            client.send(get("/again"));
            assert_eq!(client.response().text(), "GET /again HTTP/1.1 ");
        } else {
            assert_eq!(option, "close", "{request}");
            assert_eq!(client.closed(), Closed::Fin);
        }
    }
}

#[test]
fn http_1_0_needs_no_host_and_gets_no_chunks() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send("GET /old HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    let (mut upstream, request) = backend.request();
    assert_eq!(request.first_line, "GET /old HTTP/1.1");
    assert_eq!(request.field("host"), Some(backend.address.to_string()));
    upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n");
    let response = client.response();
    assert_eq!((response.field("transfer-encoding"), response.text().as_str()), (None, "abcde"));
    assert_eq!(response.field("connection").as_deref(), Some("close"), "its end is the body's end");
}

#[test]
fn expect_100_continue_is_answered_before_the_body() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send("POST /up HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 4\r\n\r\n");
    assert_eq!(client.head().first_line, "HTTP/1.1 100 Continue");
    client.send("body");
    let (mut upstream, request) = backend.request();
    assert_eq!((request.field("expect"), request.text().as_str()), (None, "body"));
    upstream.send(ok("thanks"));
    assert_eq!(client.response().text(), "thanks");
    // One whose body is already here needs none; nor does one without a body.
    client.send("POST /up HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\nmore");
    assert_eq!(upstream.request().text(), "more");
    upstream.send(ok("again"));
    assert_eq!(client.response().text(), "again");
    client.send("GET /up HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n");
    upstream.request();
    upstream.send(ok("nothing to wait for"));
    assert_eq!(client.response().text(), "nothing to wait for");
}

#[test]
fn the_answer_to_head_has_a_length_and_no_body() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send("HEAD /big HTTP/1.1\r\nHost: a\r\n\r\n");
    let (mut upstream, request) = backend.request();
    assert_eq!(request.first_line, "HEAD /big HTTP/1.1");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nX-Kept: yes\r\n\r\n");
    let response = client.try_response("HEAD").unwrap();
    assert_eq!(response.field("content-length").as_deref(), Some("1000"));
    assert_eq!(response.field("x-kept").as_deref(), Some("yes"));
    // Both connections are still good.
    client.send(get("/next"));
    assert_eq!(upstream.request().first_line, "GET /next HTTP/1.1");
    upstream.send("HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n\r\n");
    assert_eq!(client.response().status(), 304);
    client.send(get("/last"));
    upstream.request();
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
    assert_eq!(client.response().status(), 204);
    client.send("HEAD /gone HTTP/1.1\r\nHost: a\r\n\r\n");
    drop(upstream);
    let (upstream, _) = backend.request();
    upstream.reset();
    let response = client.try_response("HEAD").unwrap();
    assert_eq!(response.status(), 502);
    assert_ne!(response.field("content-length").as_deref(), Some("0"));
}

#[test]
fn an_absolute_form_target_reaches_the_backend_in_origin_form() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send("GET http://b.test:81/p/x?y=/z HTTP/1.1\r\nHost: other.test\r\n\r\n");
    let (mut upstream, request) = backend.request();
    assert_eq!(request.first_line, "GET /p/x?y=/z HTTP/1.1");
    assert_eq!(request.field("host"), Some(backend.address.to_string()));
    upstream.send(ok(""));
    assert_eq!(client.response().status(), 200);
    client.send("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(upstream.request().first_line, "OPTIONS * HTTP/1.1");
    upstream.send(answer("200 OK", "Allow: GET\r\n", ""));
    assert_eq!(client.response().field("allow").as_deref(), Some("GET"));
}

#[test]
fn the_base_path_of_an_upstream_precedes_every_target() {
    let backend = Backend::listen();
    let server = Server::start(&[], &["--upstream", &format!("http://{}/base", backend.address)]);
    let mut client = server.connect();
    client.send(get("/v1/models?x"));
    assert_eq!(backend.request().1.first_line, "GET /base/v1/models?x HTTP/1.1");
}

#[test]
fn hop_by_hop_fields_go_one_hop() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send(
        "POST /h HTTP/1.1\r\nHost: a\r\nConnection: X-Private, Keep-Alive\r\nX-Private: 1\r\nKeep-Alive: 5\r\n\
         Proxy-Connection: keep-alive\r\nTE: trailers\r\nTrailer: X-T\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\
         Proxy-Authorization: Basic eA==\r\nAuthorization: Bearer k\r\nX-Own: a\r\nX-Own: b\r\n\
         Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: t\r\n\r\n",
    );
    let (mut upstream, request) = backend.request();
    let names = names(&request);
    for gone in [
        "x-private",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "upgrade",
        "http2-settings",
        "proxy-authorization",
    ] {
        assert!(!names.contains(&gone.to_owned()), "{gone}: {request:?}");
    }
    assert_ne!(request.field("connection").as_deref(), Some("X-Private, Keep-Alive"));
    assert_eq!(request.field("authorization").as_deref(), Some("Bearer k"));
    assert_eq!(request.field("x-own").as_deref(), Some("a, b"));
    assert_eq!(request.text(), "abc");
    upstream.send(
        "HTTP/1.1 200 OK\r\nConnection: x-secret, close\r\nX-Secret: s\r\nKeep-Alive: timeout=5\r\nUpgrade: h2\r\n\
         Proxy-Authenticate: Basic\r\nX-Own: c\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
    );
    let response = client.response();
    for gone in ["x-secret", "keep-alive", "upgrade", "proxy-authenticate"] {
        assert_eq!(response.field(gone), None, "{response:?}");
    }
    assert_ne!(
        response.field("connection").as_deref(),
        Some("close"),
        "the backend's close is not the client's"
    );
    assert_eq!(response.field("x-own").as_deref(), Some("c"));
    assert_eq!(response.fields.iter().filter(|(name, _)| name == "Set-Cookie").count(), 2);
    client.send(get("/again"));
    backend.request().0.send(ok("kept"));
    assert_eq!(client.response().text(), "kept");
}

#[test]
fn field_names_are_read_in_any_case() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send("POST /c HTTP/1.1\r\nhOsT: a\r\ncONTENT-lENGTH: 2\r\nCONNECTION: Close\r\n\r\nhi");
    let (mut upstream, request) = backend.request();
    assert_eq!(request.text(), "hi");
    upstream.send("HTTP/1.1 200 OK\r\nTRANSFER-encoding: CHUNKED\r\n\r\n2\r\nyo\r\n0\r\n\r\n");
    assert_eq!(client.response().text(), "yo");
    client.closed();
}

#[test]
fn empty_lines_between_requests_are_forgiven() {
    let server = Server::start(&[Backend::listen().serve(echo)], &[]);
    let mut client = server.connect();
    for _ in 0..3 {
        client.send([b"\r\n".to_vec(), get("/e")].concat());
        assert_eq!(client.response().status(), 200);
    }
    // A lone CRLF is not yet a request, and does not keep an idle connection from being one.
    client.send("\r\n");
    client.send(get("/f"));
    assert_eq!(client.response().text(), "GET /f HTTP/1.1 ");
}

#[test]
fn informational_answers_of_the_backend_are_not_the_answer() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    let mut client = server.connect();
    client.send(get("/hints"));
    let (mut upstream, _) = backend.request();
    upstream.send("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n");
    upstream.send(ok("final"));
    assert_eq!(client.response().text(), "final");
    client.send(get("/switch"));
    upstream.request();
    upstream.send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n");
    assert_eq!(client.response().status(), 502);
    client.send(get("/endless"));
    let (mut upstream, _) = backend.request();
    upstream.send("HTTP/1.1 102 Processing\r\n\r\n".repeat(50));
    assert_eq!(client.response().status(), 502);
    server.expect_ends(&[("done", 1), ("upstream_malformed", 2)]);
}

#[test]
fn no_byte_of_a_backend_can_start_a_line_of_ours() {
    let backend = Backend::listen();
    let server = Server::before(&backend, &[]);
    for head in [
        "HTTP/1.1 200 OK\r\nX: a\rInjected: 1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: a\nInjected: 1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: a\r\n Injected: 1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\na",
        "HTTP/1.1 2000 OK\r\n\r\n",
        "ICY 200 OK\r\n\r\n",
        "220 mail.test ESMTP\r\n",
    ] {
        let mut client = server.connect();
        client.send(get("/"));
        let (mut upstream, _) = backend.request();
        upstream.send(head);
        let response = client.response();
        assert_eq!(
            (response.status(), response.error_code().as_str()),
            (502, "upstream_malformed"),
            "{head:?}"
        );
        upstream.closed();
    }
}

#[test]
fn the_demo_model_knows_its_paths_and_methods() {
    let server = Server::start(&[], &["--demo-tokens", "3", "--demo-first-token-ms", "1"]);
    let mut client = server.connect();
    client.send(get("/nowhere"));
    let response = client.response();
    assert_eq!((response.status(), response.error_code().as_str()), (404, "not_found"));
    client.send(get("/v1/chat/completions"));
    let response = client.response();
    assert_eq!((response.status(), response.error_code().as_str()), (405, "method_not_allowed"));
    assert!(response.field("allow").unwrap().contains("POST"));
    client.send(crate::server::chat());
    client.stream_head();
    let events = client.events();
    assert_eq!(events.last().unwrap().data(), "[DONE]");
    let ids: Vec<_> = events.iter().map(|event| event.id().unwrap()).collect();
    assert_eq!(ids, (1..=events.len() as u64).collect::<Vec<_>>());
}
