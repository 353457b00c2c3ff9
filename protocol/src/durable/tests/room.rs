//! What a store drops, and what not: beyond a stream's window, when it is too old, for want of memory.

use super::*;

#[test]
fn a_stream_keeps_its_newest_messages_and_says_what_is_gone() {
    let settings = Settings { stream_bytes_max: 10_000, ..Settings::default() };
    let mut with = Dialogue::new(settings);
    let start = with.ask("PUT /v1/durable/a", TEXT, b"").next_offset();
    let (_, mut slow) = with.events("/v1/durable/a?offset=-1&live=sse", "");
    let mut ends = vec![start.clone()];
    for number in 0..30 {
        ends.push(with.ask("POST /v1/durable/a", TEXT, &[number; 1000]).next_offset());
    }
    assert_eq!(with.store.counters().trimmed_bytes, 20_000);
    for from in [start.as_str(), "-1", &ends[19]] {
        let gone = with.ask(&format!("GET /v1/durable/a?offset={from}"), "", b"");
        assert_eq!(
            (gone.status, gone.field("Stream-Earliest-Offset")),
            (410, Some(ends[20].as_str())),
            "{from}"
        );
    }
    let rest = with.ask(&format!("GET /v1/durable/a?offset={}", ends[20]), "", b"");
    assert_eq!((rest.body.len(), rest.body[0]), (10_000, 20));
    // Who was left behind learns it by coming again.
    assert_eq!(with.read(&mut slow), (Vec::new(), Progress::Gone));
}

/// Every second for so long, what the passing of time does.
fn pass(with: &mut Dialogue, ms: u64) {
    for _ in 0..ms / 1_000 {
        with.wait_ms(1_000);
        if with.store.next_due_ms().is_some_and(|due_ms| due_ms <= with.now.ms) {
            with.store.expire(with.now);
        }
    }
}

#[test]
fn messages_that_are_too_old_are_dropped_and_none_that_are_not() {
    let mut with = Dialogue::new(Settings { retention_ms: 40_000, ..Settings::default() });
    let start = with.ask("PUT /v1/durable/a", TEXT, b"").next_offset();
    let mut ends = vec![start];
    // One every 5 s, of which the last has its number.
    for number in 0..60 {
        ends.push(with.ask("POST /v1/durable/a", TEXT, &[number; 1000]).next_offset());
        pass(&mut with, 5_000);
        let held = with.store.line_of("/v1/durable/a", with.now.ms).unwrap();
        // 40 s old at least, and 10 s more, and what a timer is late.
        assert!(held.messages >= 8.min(u64::from(number) + 1), "{number}: {}", held.messages);
        assert!(held.messages <= 11, "{number}: {}", held.messages);
    }
    let held = with.store.line_of("/v1/durable/a", with.now.ms).unwrap().messages as usize;
    assert_eq!(with.store.counters().trimmed_bytes as usize, (60 - held) * 1_000);
    for from in ["-1", &ends[60 - held - 1]] {
        let gone = with.ask(&format!("GET /v1/durable/a?offset={from}"), "", b"");
        assert_eq!((gone.status, gone.code()), (410, "offset_gone".to_owned()));
        assert_eq!(gone.field("Stream-Earliest-Offset"), Some(ends[60 - held].as_str()));
    }
    let rest = with.ask(&format!("GET /v1/durable/a?offset={}", ends[60 - held]), "", b"");
    assert_eq!((rest.body.len(), rest.body[0] as usize), (held * 1_000, 60 - held));
    // In silence it comes to nothing, and then there is nothing to do.
    pass(&mut with, 60_000);
    let line = with.store.line_of("/v1/durable/a", with.now.ms).unwrap();
    assert_eq!((line.messages, with.store.next_due_ms()), (0, None));
    assert_eq!(with.ask(&format!("GET /v1/durable/a?offset={}", ends[60]), "", b"").status, 200);
    // What comes later has its own time.
    pass(&mut with, 100_000);
    with.ask("POST /v1/durable/a", TEXT, b"later");
    pass(&mut with, 39_000);
    assert_eq!(with.store.line_of("/v1/durable/a", with.now.ms).unwrap().messages, 1);
    pass(&mut with, 14_000);
    assert_eq!(with.store.line_of("/v1/durable/a", with.now.ms).unwrap().messages, 0);
    // And nothing is left of those that are gone.
    with.ask("POST /v1/durable/a", TEXT, b"more");
    with.ask("DELETE /v1/durable/a", "", b"");
    assert_eq!(with.store.next_due_ms(), None);
}

#[test]
fn what_forks_share_grows_old_for_all_of_them_and_their_own_by_itself() {
    let mut with = Dialogue::new(Settings { retention_ms: 40_000, ..Settings::default() });
    with.ask("PUT /v1/durable/a", JSON, b"[1,2,3]");
    pass(&mut with, 30_000);
    let shared = with.ask("PUT /v1/durable/b", "Stream-Forked-From: /v1/durable/a\n", b"").next_offset();
    with.ask("POST /v1/durable/b", JSON, b"[4]");
    with.ask("POST /v1/durable/a", JSON, b"[5]");
    assert_eq!(with.ask("GET /v1/durable/b", "", b"").text(), "[1,2,3,4]");
    pass(&mut with, 25_000);
    for (path, own) in [("a", "[5]"), ("b", "[4]")] {
        let gone = with.ask(&format!("GET /v1/durable/{path}"), "", b"");
        assert_eq!(
            (gone.status, gone.field("Stream-Earliest-Offset")),
            (410, Some(shared.as_str())),
            "{path}"
        );
        assert_eq!(with.ask(&format!("GET /v1/durable/{path}?offset={shared}"), "", b"").text(), own);
    }
    // Also where the source is kept for its fork alone.
    with.ask("DELETE /v1/durable/a", "", b"");
    pass(&mut with, 40_000);
    assert_eq!(with.store.line_of("/v1/durable/b", with.now.ms).unwrap().messages, 0);
    assert_eq!(with.store.next_due_ms(), None);
    with.ask("POST /v1/durable/b", JSON, b"[6]");
    let line = with.store.line_of("/v1/durable/b", with.now.ms).unwrap();
    let read = with.ask(&format!("GET /v1/durable/b?offset={}", line.earliest), "", b"");
    assert_eq!(read.text(), "[6]");
}

/// Small enough that a few streams fill it.
fn small() -> Settings {
    Settings {
        body_bytes_max: 8 << 10,
        stream_bytes_max: 64 << 10,
        store_bytes_max: 64 << 10,
        ..Settings::default()
    }
}

#[test]
fn closed_streams_make_room_least_recently_used_first() {
    let mut with = Dialogue::new(small());
    for name in 0..7 {
        with.ask(
            &format!("PUT /v1/durable/{name}"),
            "Content-Type: text/plain\nStream-Closed: true\n",
            &[b'x'; 7_000],
        );
    }
    with.ask("GET /v1/durable/0", "", b"");
    let (_, mut reading) = with.events("/v1/durable/1?offset=-1&live=sse", "");
    let Reply::Body(_, _, mut page) = with.reply("GET /v1/durable/2", "", b"") else { panic!("a page") };
    assert_eq!(with.store.counters().evictions, 0);
    with.ask("PUT /v1/durable/new", TEXT, &[b'x'; 8_000]);
    with.ask("POST /v1/durable/new", TEXT, &[b'x'; 7_000]);
    let left: Vec<u16> =
        (0..7).map(|name| with.ask(&format!("HEAD /v1/durable/{name}"), "", b"").status).collect();
    assert_eq!(left, [200, 200, 200, 404, 404, 404, 200], "neither the one used last nor those being read");
    assert_eq!(with.store.counters().evictions, 3);
    assert!(with.store.totals().bytes <= 64 << 10);
    assert_eq!(with.read(&mut page).0.len(), 7_000);
    with.store.leave(&mut reading, with.now);
}

#[test]
fn open_streams_lose_their_oldest_messages_and_then_themselves() {
    let mut with = Dialogue::new(small());
    let mut ends = Vec::new();
    for name in 0..5 {
        with.ask(&format!("PUT /v1/durable/{name}"), TEXT, b"");
        for _ in 0..10 {
            ends.push(with.ask(&format!("POST /v1/durable/{name}"), TEXT, &[b'x'; 1_000]).next_offset());
        }
    }
    let counters = with.store.counters();
    assert!(counters.trimmed_bytes > 0 && counters.evictions == 0 && counters.full == 0, "{counters:?}");
    let status =
        |with: &mut Dialogue, name: usize| with.ask(&format!("GET /v1/durable/{name}"), "", b"").status;
    assert_eq!((status(&mut with, 0), status(&mut with, 4)), (410, 200));
    // Whoever reads, is spared.
    let (_, mut reading) = with.events("/v1/durable/4?offset=-1&live=sse", "");
    for name in 5..60 {
        let created = with.ask(&format!("PUT /v1/durable/{name}"), TEXT, &[b'y'; 500]);
        assert_eq!(created.status, 201, "{name}");
        assert!(with.store.totals().bytes <= 64 << 10);
    }
    assert_eq!(status(&mut with, 4), 200);
    assert!(with.store.counters().evictions > 0);
    with.store.leave(&mut reading, with.now);
}

#[test]
fn with_readers_everywhere_nothing_is_taken_from_them() {
    let mut with = Dialogue::new(small());
    let mut readings = Vec::new();
    for name in 0..7 {
        with.ask(&format!("PUT /v1/durable/{name}"), TEXT, &[b'x'; 7_000]);
        readings.push(with.events(&format!("/v1/durable/{name}?offset=now&live=sse"), "").1);
    }
    let full = with.ask("PUT /v1/durable/new", TEXT, &[b'x'; 8_000]);
    assert_eq!(
        (full.status, full.code().as_str(), full.field("Retry-After")),
        (503, "store_full", Some("1"))
    );
    let full = with.ask("POST /v1/durable/0", TEXT, &[b'x'; 8_000]);
    assert_eq!((full.status, with.store.counters().full), (503, 2));
    assert_eq!(with.ask("GET /v1/durable/0", "", b"").body.len(), 7_000);
    with.store.leave(&mut readings[3], with.now);
    assert_eq!(with.ask("PUT /v1/durable/new", TEXT, &[b'x'; 8_000]).status, 201);
    for mut reading in readings {
        with.store.leave(&mut reading, with.now);
    }
}

#[test]
fn a_source_is_not_given_up_while_it_has_forks() {
    let mut with = Dialogue::new(small());
    with.ask("PUT /v1/durable/a", "Content-Type: text/plain\nStream-Closed: true\n", &[b'a'; 7_000]);
    with.ask("PUT /v1/durable/b", "Stream-Forked-From: /v1/durable/a\n", b"b");
    let (_, mut reading) = with.events("/v1/durable/b?offset=now&live=sse", "");
    for name in 0..20 {
        with.ask(
            &format!("PUT /v1/durable/{name}"),
            "Content-Type: text/plain\nStream-Closed: true\n",
            &[b'x'; 8_000],
        );
    }
    assert_eq!(with.ask("GET /v1/durable/b", "", b"").body.len(), 7_001);
    with.store.leave(&mut reading, with.now);
}
