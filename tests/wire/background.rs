//! OpenAI's responses in background, before backends that know nothing of it: what they are asked, and what clients find.

use crate::backend::Backend;
use crate::message::{Message, answer, chunk, get, post};
use crate::peer::Peer;
use crate::server::Server;
use crate::sse::{Event, LAST_CHUNK, STREAM, named};
use serde_json::{Value, json};
use std::time::Duration;

const PATH: &str = "/v1/responses";
const STREAMED: &str = r#"{"background":true,"input":"a","stream":true}"#;

/// Every request gets a connection of its own.
fn before(backend: &Backend, flags: &[&str]) -> Server {
    Server::before(backend, &[&["--pool-idle-max", "0"], flags].concat())
}

fn created(id: &str) -> String {
    named(
        "response.created",
        json!({"sequence_number": 0, "response": {"id": id, "object": "response", "status": "in_progress",
            "background": false, "model": "m", "output": []}}),
    )
}

fn delta(number: u64, text: &str) -> String {
    named("response.output_text.delta", json!({"sequence_number": number, "delta": text}))
}

fn completed(id: &str, number: u64) -> String {
    named(
        "response.completed",
        json!({"sequence_number": number, "response": {"id": id, "object": "response", "status": "completed",
            "background": false, "model": "m", "output": [{"text": "whole"}]}}),
    )
}

/// A client of a response in background, and the backend that has told it `id` and one delta.
fn begun(server: &Server, backend: &Backend, id: &str) -> (Peer, Peer) {
    let mut client = server.connect();
    client.send(post(PATH, STREAMED));
    let (mut upstream, _) = backend.request();
    upstream.send([STREAM, &chunk(created(id)), &chunk(delta(1, "a"))].concat());
    client.stream_head();
    assert_eq!([client.event(), client.event()].map(|event| event.id()), [Some(1), Some(2)]);
    (client, upstream)
}

fn object(server: &Server, id: &str) -> Value {
    let mut client = server.connect();
    client.send(get(&format!("{PATH}/{id}")));
    let answer = client.response();
    assert_eq!(answer.status(), 200, "{answer:?}");
    answer.json()
}

fn cancel(server: &Server, id: &str) -> Message {
    let mut client = server.connect();
    client.send(format!("POST {PATH}/{id}/cancel HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"));
    client.response()
}

/// A reader of what follows that sequence number.
fn read(server: &Server, id: &str, after: u64) -> Peer {
    let mut client = server.connect();
    client.send(get(&format!("{PATH}/{id}?stream=true&starting_after={after}")));
    client.stream_head();
    client
}

fn numbers(events: &[Event]) -> Vec<u64> {
    events.iter().map(|event| event.json()["sequence_number"].as_u64().unwrap()).collect()
}

/// Answers the next request of whatever connection comes, which is a plain one, and gives its first line.
fn relayed(backend: &Backend) -> String {
    let (mut upstream, request) = backend.request();
    upstream.send(answer("404 Not Found", "Connection: close\r\n", "not here"));
    request.first_line
}

#[test]
fn backends_are_asked_to_stream_whatever_the_split() {
    let backend = Backend::listen();
    let server = before(&backend, &[]);
    for (body, seen) in [
        (STREAMED, r#"{"background":null,"input":"a","stream":true}"#),
        (r#"{"background":true,"input":"a"}"#, r#"{"stream"    :true,"input":"a"}"#),
        (r#"{"background":true,"stream":false}"#, r#"{"background":null,"stream":true }"#),
        (r#"{"background":false,"input":"a"}"#, r#"{"background":false,"input":"a"}"#),
    ] {
        for chunked in [false, true] {
            for at in (0..=body.len()).step_by(3) {
                let request = match chunked {
                    false => post(PATH, body),
                    true => {
                        let head =
                            format!("POST {PATH} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
                        [head.as_bytes(), &chunk(body), LAST_CHUNK].concat()
                    }
                };
                let tail = if chunked { body.len() + LAST_CHUNK.len() + 2 } else { body.len() };
                let mut client = server.connect();
                client.send_split(&request, request.len() - tail + at);
                let (mut upstream, request) = backend.request();
                assert_eq!(request.text(), seen, "at {at}");
                upstream.send(answer("400 Bad Request", "Connection: close\r\n", "no"));
                assert_eq!(client.response().text(), "no");
            }
        }
    }
}

#[test]
fn other_paths_are_relayed_as_they_are() {
    let backend = Backend::listen();
    let server = before(&backend, &[]);
    for (path, flags) in [("/v1/chat/completions", &[][..]), (PATH, &["--resume-window", "0"])] {
        let own = before(&backend, flags);
        let server = if flags.is_empty() { &server } else { &own };
        let mut client = server.connect();
        client.send(post(path, STREAMED));
        let (mut upstream, request) = backend.request();
        assert_eq!(request.text(), STREAMED);
        upstream.send(answer("200 OK", "Connection: close\r\n", "fine"));
        assert_eq!(client.response().text(), "fine");
    }
}

#[test]
fn what_cannot_be_made_to_stream_is_refused_and_no_backend_is_given_a_whole_request() {
    let backend = Backend::listen();
    let server = before(&backend, &[]);
    for body in [
        r#"{"stream":false,"background":true}"#,
        r#"{"background":true,"stream":1}"#,
        r#"{"background":true,"stream":true,"stream":false}"#,
        r#"{"background":true,'stream':true}"#,
    ] {
        let mut client = server.connect();
        client.send(post(PATH, body));
        let answer = client.response();
        assert_eq!(
            (answer.status(), answer.error_code()),
            (400, "background_needs_stream".to_owned()),
            "{body}"
        );
        if let Some(mut upstream) = backend.try_accept(Duration::from_millis(50)) {
            assert!(upstream.try_request().is_err(), "{body}");
        }
    }
}

#[test]
fn a_client_leaves_and_comes_back_by_sequence_number() {
    let backend = Backend::listen();
    let server = before(&backend, &["--on-leave", "cancel"]);
    let (client, mut upstream) = begun(&server, &backend, "resp_1");
    drop(client);
    server.expect_count("tokenring_detaches_total", 1);
    upstream.send([chunk(delta(2, "b")), chunk(delta(3, "c"))].concat());
    let mut back = read(&server, "resp_1", 1);
    assert_eq!([back.event(), back.event()].map(|event| event.id()), [Some(3), Some(4)]);
    upstream.send([chunk(delta(4, "d")), chunk(completed("resp_1", 5)), LAST_CHUNK.to_vec()].concat());
    assert_eq!(numbers(&back.events()), [4, 5]);
    // Over: all of it, a part, nothing.
    for (after, left) in [(0, &[1, 2, 3, 4, 5][..]), (3, &[4, 5]), (5, &[])] {
        assert_eq!(numbers(&read(&server, "resp_1", after).events()), left, "after {after}");
    }
    let mut all = server.connect();
    all.send(get(&format!("{PATH}/resp_1?stream=true")));
    assert_eq!(all.stream_head().field("tokenring-last-event-id").as_deref(), Some("0"));
    assert_eq!(numbers(&all.events()), [0, 1, 2, 3, 4, 5]);
    for (query, status, code) in [
        ("stream=true&starting_after=6", 400, "cursor_ahead"),
        ("stream=true&starting_after=x", 400, "bad_starting_after"),
    ] {
        let mut client = server.connect();
        client.send(get(&format!("{PATH}/resp_1?{query}")));
        let answer = client.response();
        assert_eq!((answer.status(), answer.error_code()), (status, code.to_owned()));
    }
}

#[test]
fn numbers_with_holes_and_events_without_any_are_not_lost() {
    let backend = Backend::listen();
    let server = before(&backend, &[]);
    let (client, mut upstream) = begun(&server, &backend, "resp_1");
    drop(client);
    let ping = named("ping", json!({}));
    upstream.send(
        [chunk(delta(5, "b")), chunk(ping), chunk(delta(9, "c")), chunk(completed("resp_1", 10))].concat(),
    );
    upstream.send(LAST_CHUNK);
    let ids = |after| -> Vec<u64> {
        read(&server, "resp_1", after).events().iter().filter_map(Event::id).collect()
    };
    server.expect_ends(&[("done", 1)]);
    assert_eq!(
        [1, 4, 5, 8, 9].map(ids),
        [vec![3, 4, 5, 6], vec![3, 4, 5, 6], vec![4, 5, 6], vec![4, 5, 6], vec![6]]
    );
}

#[test]
fn of_a_backend_that_numbers_nothing_event_ids_count() {
    let backend = Backend::listen();
    let server = before(&backend, &[]);
    let mut client = server.connect();
    client.send(post(PATH, STREAMED));
    let (mut upstream, _) = backend.request();
    let response = json!({"response": {"id": "resp_1"}});
    let events = [
        named("response.created", response.clone()),
        named("response.output_text.delta", json!({"delta": "a"})),
        named("response.completed", response),
    ];
    upstream.send([STREAM, &chunk(events.concat()), LAST_CHUNK].concat());
    client.stream_head();
    assert_eq!(client.events().len(), 3);
    let ids: Vec<_> = read(&server, "resp_1", 1).events().iter().map(Event::id).collect();
    assert_eq!(ids, [Some(2), Some(3)]);
}

#[test]
fn it_goes_on_to_its_end_without_a_client_however_long_it_is() {
    let backend = Backend::listen();
    // As a response in background, and because its route says so.
    for (body, on_leave) in [(STREAMED, "cancel"), (r#"{"stream":true}"#, "finish")] {
        let flags = [
            ["--background-window", "100KiB"],
            ["--resume-window", "64KiB"],
            ["--lag-high", "64KiB"],
            ["--lag-low", "16KiB"],
            ["--on-leave", on_leave],
        ];
        let server = before(&backend, &flags.concat());
        let mut client = server.connect();
        client.send(post(PATH, body));
        let (mut upstream, _) = backend.request();
        upstream.send([STREAM, &chunk(created("resp_1")), &chunk(delta(1, "a"))].concat());
        let stream = client.stream_head().field("tokenring-stream").unwrap();
        client.event();
        drop(client);
        server.expect_count("tokenring_detaches_total", 1);
        // More than all buffers on the way and the window together hold.
        let text = "x".repeat(10_000);
        for number in 2..2000 {
            upstream.send(chunk(delta(number, &text)));
        }
        let log_bytes = server.count("tokenring_log_bytes");
        assert!(log_bytes < 2 << 20, "{log_bytes}");
        upstream.send([chunk(completed("resp_1", 2000)), LAST_CHUNK.to_vec()].concat());
        server.expect_ends(&[("done", 1)]);
        let mut back = server.connect();
        back.send(get(&format!("/v1/streams/{stream}?after=2")));
        assert_eq!(back.response().error_code(), "before_window");
        back.send(get(&format!("/v1/streams/{stream}?after=1999")));
        back.stream_head();
        assert_eq!(numbers(&back.events()), [1999, 2000]);
        if body == STREAMED {
            assert_eq!(numbers(&read(&server, "resp_1", 1998).events()), [1999, 2000]);
            assert_eq!(object(&server, "resp_1")["status"], "completed");
        }
    }
}

#[test]
fn the_response_object_tells_how_it_stands() {
    let backend = Backend::listen();
    let server = before(&backend, &[]);
    let (client, mut upstream) = begun(&server, &backend, "resp_1");
    let expected = |status: &str, output: Value| {
        json!({"id": "resp_1", "object": "response", "status": status, "background": true, "model": "m",
            "output": output})
    };
    assert_eq!(object(&server, "resp_1"), expected("in_progress", json!([])));
    drop(client);
    server.expect_count("tokenring_detaches_total", 1);
    assert_eq!(object(&server, "resp_1"), expected("in_progress", json!([])));
    upstream.send([chunk(completed("resp_1", 2)), LAST_CHUNK.to_vec()].concat());
    server.expect_ends(&[("done", 3)]);
    assert_eq!(object(&server, "resp_1"), expected("completed", json!([{"text": "whole"}])));
    // One that breaks off.
    let (mut client, upstream) = begun(&server, &backend, "resp_2");
    upstream.reset();
    assert_eq!(client.event().error_code(), "upstream_reset");
    client.stream_end();
    let broken = object(&server, "resp_2");
    assert_eq!((&broken["status"], &broken["error"]["code"]), (&"failed".into(), &"upstream_reset".into()));
}

#[test]
fn a_response_is_cancelled_once_and_stays_so() {
    let backend = Backend::listen();
    let server = before(&backend, &[]);
    let (mut client, mut upstream) = begun(&server, &backend, "resp_1");
    for _ in 0..3 {
        let answer = cancel(&server, "resp_1");
        assert_eq!((answer.status(), &answer.json()["status"]), (200, &"cancelled".into()));
        assert_eq!(answer.json()["id"], "resp_1");
    }
    upstream.closed_after();
    let told = client.event();
    assert_eq!((told.name(), told.error_code()), (Some("error"), "stream_stopped".to_owned()));
    assert_eq!(told.json()["sequence_number"], 2);
    client.stream_end();
    assert_eq!(object(&server, "resp_1")["status"], "cancelled");
    let mut late = server.connect();
    late.send(get(&format!("{PATH}/resp_1?stream=true")));
    assert_eq!(late.response().error_code(), "stream_stopped");
    // One that is complete is not cancelled any more.
    let (_client, mut upstream) = begun(&server, &backend, "resp_2");
    upstream.send([chunk(completed("resp_2", 2)), LAST_CHUNK.to_vec()].concat());
    server.expect_ends(&[("done", 6), ("stream_stopped", 1)]);
    assert_eq!(cancel(&server, "resp_2").json()["status"], "completed");
    assert_eq!(object(&server, "resp_2")["output"], json!([{"text": "whole"}]));
}

#[test]
fn a_response_is_deleted() {
    let backend = Backend::listen();
    let server = before(&backend, &[]);
    let (mut client, mut upstream) = begun(&server, &backend, "resp_1");
    let mut other = server.connect();
    other.send(format!("DELETE {PATH}/resp_1 HTTP/1.1\r\nHost: a\r\n\r\n"));
    assert_eq!(other.response().json(), json!({"id": "resp_1", "object": "response", "deleted": true}));
    upstream.closed_after();
    assert_eq!(client.event().error_code(), "stream_stopped");
    other.send(get(&format!("{PATH}/resp_1")));
    assert_eq!(relayed(&backend), format!("GET {PATH}/resp_1 HTTP/1.1"));
    assert_eq!(other.response().text(), "not here");
}

#[test]
fn a_client_that_does_not_stream_is_told_the_id_and_comes_for_the_rest() {
    let backend = Backend::listen();
    let server = before(&backend, &[]);
    let mut client = server.connect();
    client.send(format!(
        "POST {PATH} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 19\r\n\r\n"
    ));
    assert_eq!(client.head().status(), 100);
    client.send(r#"{"background":true}"#);
    let (mut upstream, request) = backend.request();
    assert_eq!(request.text(), r#"{"stream"    :true}"#);
    upstream.send(STREAM);
    client.silence(Duration::from_millis(50));
    upstream.send(chunk(created("resp_1")));
    let answer = client.response();
    assert_eq!((answer.status(), answer.field("content-type").as_deref()), (200, Some("application/json")));
    assert_eq!(answer.json()["id"], "resp_1");
    assert_eq!(
        (&answer.json()["status"], &answer.json()["background"]),
        (&"in_progress".into(), &true.into())
    );
    let stream = answer.field("tokenring-stream").unwrap();
    upstream.send(chunk(delta(1, "a")));
    let mut back = read(&server, "resp_1", 0);
    assert_eq!(back.event().id(), Some(2));
    drop(back);
    // The connection is good for more, and whoever leaves leaves nothing but a reader.
    client.send(get(&format!("/v1/streams/{stream}/status")));
    assert_eq!(client.response().json()["dialect"], "responses");
    upstream.send([chunk(completed("resp_1", 2)), LAST_CHUNK.to_vec()].concat());
    client.send(get(&format!("{PATH}/resp_1?stream=true&starting_after=1")));
    client.stream_head();
    assert_eq!(numbers(&client.events()), [2]);
    assert_eq!(object(&server, "resp_1")["status"], "completed");
}

#[test]
fn a_client_that_is_told_no_id_is_told_why() {
    let backend = Backend::listen();
    let server = before(&backend, &[]);
    let ask = || {
        let mut client = server.connect();
        client.send(post(PATH, r#"{"background":true,"input":"a"}"#));
        let (upstream, _) = backend.request();
        (client, upstream)
    };
    let (mut client, mut upstream) = ask();
    upstream.send(answer("429 Too Many Requests", "Connection: close\r\n", "later"));
    assert_eq!((client.head().status(), client.exactly(5)), (429, b"later".to_vec()));
    let (mut client, mut upstream) = ask();
    upstream.send(STREAM);
    upstream.reset();
    let told = client.response();
    assert_eq!((told.status(), told.error_code()), (502, "upstream_reset".to_owned()));
    let (mut client, mut upstream) = ask();
    upstream.send([STREAM, &chunk(named("response.completed", json!({}))), LAST_CHUNK].concat());
    let told = client.response();
    assert_eq!((told.status(), told.error_code()), (502, "response_without_id".to_owned()));
    // Who leaves before leaves nobody who could ask.
    let (client, mut upstream) = ask();
    upstream.send(STREAM);
    server.expect_count("tokenring_kept_live_streams", 1);
    client.reset();
    upstream.closed_after();
    let (client, mut upstream) = ask();
    client.reset();
    upstream.closed_after();
}

#[test]
fn no_more_go_on_alone_than_allowed() {
    let backend = Backend::listen();
    let server = before(&backend, &["--detached-max", "0"]);
    let mut client = server.connect();
    client.send(post(PATH, r#"{"background":true}"#));
    let (mut upstream, _) = backend.request();
    upstream.send(STREAM);
    let told = client.response();
    assert_eq!((told.status(), told.error_code()), (503, "overload".to_owned()));
    upstream.closed_after();
}

#[test]
fn what_is_not_ours_is_the_backends() {
    let backend = Backend::listen();
    let server = before(&backend, &["--background-keep-ms", "50", "--keep-ms", "50"]);
    let asked = |path: &str| {
        let mut client = server.connect();
        client.send(get(path));
        let line = relayed(&backend);
        assert_eq!(client.response().status(), 404);
        line
    };
    for path in
        ["/v1/responses/resp_1", "/v1/responses/resp_1/input_items", "/v1/responses/resp_1?stream=true"]
    {
        assert_eq!(asked(path), format!("GET {path} HTTP/1.1"));
    }
    // An ordinary answer's id is the backend's alone.
    let mut client = server.connect();
    client.send(post(PATH, r#"{"stream":true}"#));
    let (mut upstream, _) = backend.request();
    upstream.send([STREAM, &chunk(created("resp_1"))].concat());
    client.stream_head();
    client.event();
    asked("/v1/responses/resp_1");
    drop((client, upstream));
    // One that is not kept any more.
    let (mut client, mut upstream) = begun(&server, &backend, "resp_1");
    upstream.send([chunk(completed("resp_1", 2)), LAST_CHUNK.to_vec()].concat());
    assert_eq!(numbers(&client.events()), [2]);
    std::thread::sleep(Duration::from_millis(200));
    asked("/v1/responses/resp_1");
}

#[test]
fn the_newest_of_two_with_one_id_is_found() {
    let backend = Backend::listen();
    let server = before(&backend, &["--background-keep-ms", "300", "--keep-ms", "1"]);
    let (mut first, mut upstream) = begun(&server, &backend, "resp_1");
    upstream.send([chunk(completed("resp_1", 2)), LAST_CHUNK.to_vec()].concat());
    assert_eq!(numbers(&first.events()), [2]);
    let (_second, _upstream) = begun(&server, &backend, "resp_1");
    assert_eq!(object(&server, "resp_1")["status"], "in_progress");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(object(&server, "resp_1")["status"], "in_progress", "the first one's end is not the second's");
}

#[test]
fn a_response_is_found_from_every_shard() {
    let backend = Backend::listen();
    for shards in ["2", "3"] {
        let server = before(&backend, &["--shards", shards]);
        let mut clients: Vec<Peer> = (0..6).map(|_| server.connect()).collect();
        // On each of some connections one response, which all the others then ask for.
        let mut upstreams = Vec::new();
        for (nth, client) in clients.iter_mut().enumerate() {
            client.send(post(PATH, r#"{"background":true}"#));
            let (mut upstream, _) = backend.request();
            upstream.send([STREAM, &chunk(created(&format!("resp_{nth}"))), &chunk(delta(1, "a"))].concat());
            assert_eq!(client.response().json()["id"], format!("resp_{nth}"));
            upstreams.push(upstream);
        }
        for client in &mut clients {
            for nth in 0..6 {
                client.send(get(&format!("{PATH}/resp_{nth}")));
                assert_eq!(client.response().json()["id"], format!("resp_{nth}"));
            }
            // Nobody knows it: it goes once round, and to the backend.
            client.send(get(&format!("{PATH}/resp_other")));
            assert_eq!(relayed(&backend), format!("GET {PATH}/resp_other HTTP/1.1"));
            assert_eq!(client.response().text(), "not here");
        }
        assert!(server.count("tokenring_moves_total") > 0);
        for (nth, upstream) in upstreams.iter_mut().enumerate() {
            let id = format!("resp_{nth}");
            if nth % 2 == 0 {
                assert_eq!(cancel(&server, &id).json()["status"], "cancelled");
                upstream.closed_after();
            } else {
                upstream.send([chunk(completed(&id, 2)), LAST_CHUNK.to_vec()].concat());
                assert_eq!(numbers(&read(&server, &id, 0).events()), [1, 2]);
            }
        }
    }
}

#[test]
fn the_demo_model_answers_in_background() {
    for shards in ["1", "2"] {
        let server =
            Server::start(&[], &["--shards", shards, "--demo-tokens", "5", "--demo-first-token-ms", "1"]);
        let mut client = server.connect();
        client.send(post(PATH, r#"{"background":true,"stream":true}"#));
        client.stream_head();
        let events = client.events();
        let id = events[0].json()["response"]["id"].as_str().unwrap().to_owned();
        assert_eq!(numbers(&events), (0..events.len() as u64).collect::<Vec<_>>());
        assert_eq!(numbers(&read(&server, &id, 3).events()), (4..events.len() as u64).collect::<Vec<_>>());
        let whole = object(&server, &id);
        assert_eq!((&whole["status"], &whole["background"]), (&"completed".into(), &true.into()));
        client.send(post(PATH, r#"{"background":true}"#));
        let id = client.response().json()["id"].as_str().unwrap().to_owned();
        assert_eq!(numbers(&read(&server, &id, 0).events()).len(), events.len() - 1);
        assert_eq!(object(&server, &id)["status"], "completed");
        let mut stranger = server.connect();
        stranger.send(get(&format!("{PATH}/resp_other")));
        assert_eq!(stranger.response().status(), 404);
    }
}

#[test]
fn a_client_that_moved_for_one_thing_moves_on_for_another() {
    let server = Server::start(&[], &["--shards", "2", "--demo-tokens", "5", "--demo-first-token-ms", "1"]);
    let mut clients: Vec<Peer> = (0..6).map(|_| server.connect()).collect();
    let mut streams = Vec::new();
    for client in &mut clients {
        client.send(post("/v1/chat/completions", r#"{"stream":true}"#));
        streams.push(client.stream_head().field("tokenring-stream").unwrap());
        client.events();
    }
    // Each is moved to wherever its neighbour's stream lives, and publishes there.
    for (nth, client) in clients.iter_mut().enumerate() {
        client.send(get(&format!("/v1/streams/{}", streams[(nth + 1) % streams.len()])));
        client.stream_head();
        client.events();
        let path = format!("/v1/durable/s{nth}");
        client.send(format!(
            "PUT {path} HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nContent-Length: 1\r\n\r\nx"
        ));
        assert_eq!(client.response().status(), 201);
    }
    for nth in 0..clients.len() {
        let mut reader = server.connect();
        reader.send(get(&format!("/v1/durable/s{nth}?offset=-1")));
        assert_eq!(reader.response().text(), "x", "stream {nth}");
    }
}
