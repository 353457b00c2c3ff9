//! Streams that outlive their connections, on a whole shard: clients leave and come back, share, lag and stop; backends fail as
//! they like. Each reader must see exactly the events behind its cursor, once and in order, or be told that it cannot.

use crate::backend::BackendHost;
use crate::client::{ClientPlan, Ended, How, Pace, When};
use crate::plan::{Answer, Fault, Request};
use crate::reader::{Message, read_events};
use crate::rng::Rng;
use crate::run::{Finished, Sim, settings};
use protocol::dialect::Dialect;
use protocol::limits::LISTED_PER_TURN_MAX;
use protocol::phase::End;
use shard::listing::{Inquiry, Place};
use shard::mesh::Command;
use shard::settings::{LeaveChoices, OnLeave, Resume, Settings, SlowReader};

pub(crate) const RESUME: Resume = Resume {
    window_bytes: 256 << 10,
    on_leave: OnLeave::Detach(30_000),
    window_ms: 0,
    reader_lag_ms: 0,
    leave_choices: LeaveChoices { cancel: true, detach_ms: 30_000, detach_ms_max: 60_000, finish: true },
    keep_ms: 60_000,
    slow_reader: SlowReader::Auto,
    durable: false,
};

pub(crate) fn sim_with(seed: u64, change: impl FnOnce(&mut Settings)) -> Sim {
    let mut settings = settings();
    settings.routes.iter_mut().for_each(|route| route.resume = Some(RESUME));
    change(&mut settings);
    let mut sim = Sim::new(seed, settings, vec![BackendHost::new(0)]);
    sim.lenience.outlives = true;
    sim
}

/// A request that closes its connection.
pub(crate) fn raw(line: &str, fields: &str) -> ClientPlan {
    let head = format!("{line} HTTP/1.1\r\nHost: sim\r\nConnection: close\r\n{fields}\r\n");
    ClientPlan { raw: Some(head.into_bytes()), ..ClientPlan::new(&[]) }
}

pub(crate) fn resume(id: &str, after: u64) -> ClientPlan {
    raw(&format!("GET /v1/streams/{id}"), &format!("Last-Event-ID: {after}\r\n"))
}

pub(crate) fn answer(sim: &Sim, client: usize) -> Option<Seen> {
    let world = sim.world();
    let message = world.clients[client].reader.messages.first()?;
    Some(Seen::of(message))
}

/// What a client has of an answer.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) status: u16,
    pub(crate) id: Option<String>,
    /// Cursor that the shard says it begins behind.
    after: Option<u64>,
    pub(crate) events: Vec<(u64, String)>,
    /// Events without an id that are no heartbeats: errors, gaps; and behind which event.
    pub(crate) told: Vec<(u64, String)>,
    /// Behind which event, to which.
    pub(crate) gaps: Vec<(u64, u64)>,
    pub(crate) complete: bool,
    pub(crate) body: String,
}

impl Seen {
    fn of(message: &Message) -> Seen {
        let read = read_events(&message.body).unwrap_or_default();
        let after = message.header("tokenring-last-event-id").and_then(|id| id.parse().ok());
        let mut seen = Seen {
            status: message.status(),
            id: message.header("tokenring-stream").map(str::to_owned),
            after,
            events: Vec::new(),
            told: Vec::new(),
            gaps: Vec::new(),
            complete: message.complete,
            body: String::from_utf8_lossy(&message.body).into_owned(),
        };
        if message.status() != 200 {
            return seen;
        }
        assert!(!(message.complete && read.partial), "a partial event at the end of a whole body");
        for event in read.events {
            match event.id {
                Some(id) => seen.events.push((id, event.data)),
                None if event.name == "ping" => {}
                None if event.name == "tokenring.gap" => {
                    let to = event.data.trim_start_matches("{\"last_event_id\":").trim_end_matches('}');
                    seen.gaps.push((seen.last(), to.parse().unwrap()));
                }
                None => seen.told.push((seen.last(), event.data)),
            }
        }
        seen
    }

    pub(crate) fn last(&self) -> u64 {
        self.events.last().map(|&(id, _)| id).or(self.after).unwrap_or(0)
    }

    /// For messages: how it ends.
    pub(crate) fn end(&self) -> String {
        let from = self.body.len().saturating_sub(200);
        let ids: Vec<u64> = self.events.iter().map(|&(id, _)| id).collect();
        format!(
            "complete {} {:?}..{:?} told {:?} {:?}",
            self.complete,
            ids.first(),
            ids.last(),
            self.told,
            self.body.get(from..)
        )
    }

    pub(crate) fn told(&self) -> bool {
        !self.told.is_empty()
    }

    pub(crate) fn code(&self) -> &str {
        let text = self.told.last().map_or(self.body.as_str(), |(_, data)| data.as_str());
        text.rsplit_once("\"code\":\"").and_then(|(_, rest)| rest.split('"').next()).unwrap_or("")
    }
}

/// A stream, the client that asked for it, and those who came by its id.
pub(crate) struct Tale {
    pub(crate) exchange: usize,
    pub(crate) client: usize,
    pub(crate) id: Option<String>,
    /// Client, cursor.
    pub(crate) readers: Vec<(usize, u64)>,
    pub(crate) stopped: bool,
}

impl Tale {
    /// Reads what there is; true when the stream's id is known.
    pub(crate) fn learn(&mut self, sim: &Sim) -> bool {
        if self.id.is_none() {
            self.id = answer(sim, self.client).and_then(|seen| seen.id);
        }
        self.id.is_some()
    }
}

/// What a reader saw is what the backend meant, from its cursor on. Gives whether it was all of it.
pub(crate) fn check_reader(finished: &Finished, tale: &Tale, client: usize, cursor: Option<u64>) -> bool {
    let Some(seen) = answer(&finished.sim, client) else { return false };
    let world = finished.sim.world();
    let (exchange, reader) = (&world.exchanges[tale.exchange], &world.clients[client]);
    let who = format!(
        "c{client} {:?} of exchange {} behind {cursor:?}: {:?}",
        reader.ended, tale.exchange, exchange.answer
    );
    let owed = &exchange.wire.events;
    let demo = exchange.request.demo;
    if seen.status != 200 && (cursor.is_none() || !seen.complete) {
        // What it may be told instead of a stream is judged elsewhere.
        return false;
    }
    if seen.status != 200 {
        match seen.status {
            204 if demo => {}
            204 => assert_eq!(cursor, Some(owed.len() as u64), "{who}: had not all"),
            400 => assert_eq!(seen.code(), "cursor_ahead", "{who}"),
            410 => assert!(
                ["stream_expired", "stream_stopped", "before_window"].contains(&seen.code()),
                "{who}: {}",
                seen.body
            ),
            408 | 503 | 505 => {}
            _ => panic!("{who} got {} {}", seen.status, seen.body),
        }
        return false;
    }
    if let Some(cursor) = cursor {
        assert_eq!((seen.after, seen.id.as_ref()), (Some(cursor), tale.id.as_ref()), "{who}: another place");
    }
    let mut expected = cursor.unwrap_or(0);
    for (id, data) in &seen.events {
        // A gap that is told is none; before the newest event was sent, it may have become a wider one.
        let behind = expected;
        expected = seen.gaps.iter().filter(|gap| gap.0 == behind).map(|gap| gap.1).fold(expected, u64::max);
        expected += 1;
        assert_eq!(*id, expected, "{who}: {:?}", seen.events.iter().map(|(id, _)| id).collect::<Vec<_>>());
        if !demo {
            assert_eq!(Some(data), owed.get(*id as usize - 1).map(|owed| &owed.data), "{who}: event {id}");
        }
    }
    if !demo {
        assert!(
            seen.last() as usize <= exchange.events_written().max(cursor.unwrap_or(0) as usize),
            "{who}: nobody wrote that"
        );
    }
    let whole = seen.complete
        && seen.told.is_empty()
        && seen.gaps.is_empty()
        && (demo || seen.last() as usize == owed.len());
    let told = seen.told.iter().any(|(_, data)| data.contains("\"error\"") || data.contains("error"));
    let by_backend = exchange.answer.fault == Fault::InBandError;
    if seen.complete && !whole {
        let excused = told || !seen.gaps.is_empty() || by_backend || reader.ended == Some(Ended::Left);
        // An answer that only its connection's end ends may be cut by that.
        let open_ended = exchange.request.http10;
        assert!(excused || open_ended, "{who}: unfinished and not told: {:.300}", seen.end());
    }
    if whole && !demo {
        assert!(exchange.wire.whole || exchange.wire.may_look_whole || by_backend, "{who}: it looks whole");
    }
    let broken = reader.socket.is_some_and(|socket| world.sockets[socket].broken);
    let stays = reader.ended == Some(Ended::Fin);
    if stays && !broken && !seen.complete {
        let forced = finished.sim.forced.is_some_and(|forced| forced > 0);
        let lagged = finished.sim.total(|counters| counters.readers_dropped) > 0;
        assert!(
            forced || lagged || exchange.request.http10,
            "{who}: cut without a word: {:.300}",
            seen.end()
        );
    }
    whole
}

pub(crate) fn check(finished: &Finished, tale: &Tale) -> usize {
    let first = usize::from(check_reader(finished, tale, tale.client, None));
    first
        + tale
            .readers
            .iter()
            .filter(|&&(client, cursor)| check_reader(finished, tale, client, Some(cursor)))
            .count()
}

/// A chat of so many events, one every so often.
pub(crate) fn chat(
    sim: &mut Sim,
    events: u32,
    gap_us: u64,
    plan: impl FnOnce(ClientPlan) -> ClientPlan,
) -> Tale {
    let answer = Answer { piece_bytes: 90, gap_us, ..Answer::events(events) };
    let exchange = sim.exchange(Request::new(Dialect::Chat, true), answer);
    let client = sim.client(plan(ClientPlan::new(&[exchange])));
    Tale { exchange, client, id: None, readers: Vec::new(), stopped: false }
}

pub(crate) fn come_back(sim: &mut Sim, tale: &mut Tale, after: u64) -> usize {
    assert!(tale.learn(sim), "the stream has an id");
    let client = sim.client(resume(tale.id.as_deref().unwrap(), after));
    tale.readers.push((client, after));
    client
}

pub(crate) fn leaves(at_us: u64, how: How) -> impl Fn(ClientPlan) -> ClientPlan {
    move |plan| ClientPlan { leave: Some((When::AtUs(at_us), how)), ..plan }
}

pub(crate) fn pace(rng: &mut Rng) -> Pace {
    match rng.below(5) {
        0 => Pace::Slow { bytes: rng.range(500, 20_000) as usize, every_us: rng.skewed(20_000) + 1 },
        1 => Pace::Stuck { after_bytes: rng.skewed(20_000) as usize, for_us: rng.pick(&[10_000, 5_000_000]) },
        _ => Pace::Eager,
    }
}

/// Behind which event a stream begins; `None`: at its start.
fn earliest_of(sim: &mut Sim, tale: &mut Tale) -> Option<u64> {
    let client = come_back(sim, tale, 0);
    sim.run_ms(20);
    let world = sim.world();
    let message = world.clients[client].reader.messages.first().unwrap();
    (message.status() == 410).then(|| message.header("tokenring-earliest-event-id").unwrap().parse().unwrap())
}

#[test]
fn a_client_that_leaves_comes_back_to_any_place() {
    for how in [How::Close, How::Reset] {
        let mut sim = sim_with(1, |_| {});
        let mut tale = chat(&mut sim, 90, 20_000, leaves(400_000, how));
        sim.run_ms(450);
        let seen = answer(&sim, tale.client).unwrap().last();
        assert!((3..85).contains(&seen), "{seen}");
        assert_eq!(sim.shard.snapshot().kept.detached, 1);
        for after in 0..=seen {
            come_back(&mut sim, &mut tale, after);
        }
        let finished = sim.finish();
        assert_eq!(check(&finished, &tale), seen as usize + 1);
        assert_eq!(finished.sim.shard.stats().counters.detaches, 1);
    }
}

/// The kernel has not yet told what became of the first send, of which the client has read all.
#[test]
fn a_client_that_leaves_within_the_first_send_comes_back() {
    for seed in 0..20 {
        for how in [How::Close, How::Reset] {
            let mut sim = sim_with(seed, |_| {});
            sim.world().faults.send_late = 1_000;
            let leaves = |plan| ClientPlan { leave: Some((When::Bytes(1), how)), ..plan };
            let mut tale = chat(&mut sim, 60, 20_000, leaves);
            sim.run_ms(200);
            come_back(&mut sim, &mut tale, 0);
            let finished = sim.finish();
            assert_eq!(finished.ends(End::ClientLeft), 0, "{seed} {how:?}");
            assert_eq!(check(&finished, &tale), 1);
        }
    }
}

#[test]
fn what_is_over_is_read_again_until_its_time_is_over() {
    let mut sim = sim_with(2, |_| {});
    let mut tale = chat(&mut sim, 10, 0, |plan| plan);
    sim.run_ms(2_000);
    for after in 0..=10 {
        come_back(&mut sim, &mut tale, after);
    }
    sim.run_ms(1_000);
    let all = come_back(&mut sim, &mut tale, 11);
    let ahead = come_back(&mut sim, &mut tale, 12);
    sim.run_ms(62_000);
    let late = come_back(&mut sim, &mut tale, 3);
    sim.run_ms(1_000);
    assert_eq!(sim.shard.snapshot().kept, shard::KeptTotals::default());
    let status = |client| answer(&sim, client).map(|seen| (seen.status, seen.code().to_owned()));
    assert_eq!(status(all), Some((204, String::new())));
    assert_eq!(status(ahead), Some((400, "cursor_ahead".to_owned())));
    assert_eq!(status(late), Some((410, "stream_expired".to_owned())));
    let finished = sim.finish();
    assert_eq!(check(&finished, &tale), 12);
}

#[test]
fn nobody_comes_back_in_time_and_the_backend_is_let_go() {
    let mut sim = sim_with(3, |_| {});
    let mut tale = chat(&mut sim, 4_000, 20_000, leaves(200_000, How::Close));
    sim.run_ms(29_000);
    assert_eq!((sim.shard.snapshot().kept.detached, sim.shard.population().1), (1, 1));
    sim.run_ms(2_000);
    assert_eq!((sim.shard.snapshot().kept, sim.shard.population().1), (shard::KeptTotals::default(), 0));
    let late = come_back(&mut sim, &mut tale, 2);
    sim.run_ms(1_000);
    assert_eq!(answer(&sim, late).unwrap().code(), "stream_expired");
    assert_eq!(sim.finish().ends(End::Abandoned), 1);
}

#[test]
fn routes_say_what_becomes_of_streams_without_clients() {
    for on_leave in [OnLeave::Cancel, OnLeave::Finish] {
        let mut sim = sim_with(4, |settings| {
            settings.routes[1].resume = Some(Resume { on_leave, window_bytes: 1 << 20, ..RESUME });
            settings.resume_bytes_max = 4 << 20;
        });
        let mut tale = chat(&mut sim, 3_000, 20_000, leaves(200_000, How::Close));
        sim.run_ms(40_000);
        let finishes = on_leave == OnLeave::Finish;
        assert_eq!(sim.shard.population().1, usize::from(finishes), "the backend's connection");
        if finishes {
            sim.run_ms(40_000);
        }
        let reader = come_back(&mut sim, &mut tale, 0);
        sim.run_ms(1_000);
        assert_eq!(answer(&sim, reader).unwrap().status, if finishes { 200 } else { 410 });
        let finished = sim.finish();
        check(&finished, &tale);
    }
}

#[test]
fn a_request_says_what_becomes_of_its_stream_as_far_as_its_route_allows() {
    // Its own policy, what the request says, and until when the backend is there, ms.
    for (on_leave, said, until_ms) in [
        (OnLeave::Detach(30_000), "", 30_000),
        (OnLeave::Detach(30_000), "cancel", 0),
        (OnLeave::Detach(30_000), "detach;ttl=5", 5_000),
        (OnLeave::Cancel, "detach", 30_000),
        (OnLeave::Cancel, "detach;ttl=3600", 60_000),
        (OnLeave::Cancel, "finish", 200_000),
        (OnLeave::Finish, "detach;ttl=5", 5_000),
    ] {
        let mut sim = sim_with(4, |settings| {
            settings.routes[1].resume = Some(Resume { on_leave, window_bytes: 4 << 20, ..RESUME });
            settings.resume_bytes_max = 16 << 20;
        });
        let answer = Answer { piece_bytes: 90, gap_us: 20_000, ..Answer::events(12_000) };
        let exchange = sim.exchange(Request { on_leave: said, ..Request::new(Dialect::Chat, true) }, answer);
        let client = sim.client(leaves(200_000, How::Close)(ClientPlan::new(&[exchange])));
        let mut tale = Tale { exchange, client, id: None, readers: Vec::new(), stopped: false };
        sim.run_ms(250);
        for _ in 0..95 {
            let goes_on = sim.shard.snapshot().kept.live == 1;
            // The client left at 0.2 s.
            let at_ms = sim.world().now / 1000 - 200;
            assert!(
                goes_on == (at_ms < until_ms) || at_ms.abs_diff(until_ms) < 1_100,
                "{on_leave:?}, {said:?}: goes on is {goes_on} after {at_ms} ms"
            );
            sim.run_ms(1_000);
        }
        assert!(tale.learn(&sim));
        check(&sim.finish(), &tale);
    }
}

#[test]
fn a_stream_without_a_client_fills_its_window_and_waits() {
    let mut sim = sim_with(5, |settings| {
        let resume = Resume { window_bytes: 200_000, on_leave: OnLeave::Detach(600_000), ..RESUME };
        settings.routes[1].resume = Some(resume);
        settings.routes[1].deadlines.between_tokens_ms = 20_000;
    });
    let answer_plan = Answer { bytes: 5_000, gap_us: 10_000, piece_bytes: 5_000, ..Answer::events(200) };
    let exchange = sim.exchange(Request::new(Dialect::Chat, true), answer_plan);
    let client = sim.client(leaves(100_000, How::Close)(ClientPlan::new(&[exchange])));
    let mut tale = Tale { exchange, client, id: None, readers: Vec::new(), stopped: false };
    sim.run_ms(60_000);
    let snapshot = sim.shard.snapshot();
    assert_eq!(
        (snapshot.kept.detached, snapshot.stats.counters.pauses),
        (1, 1),
        "it waits, and is not given up"
    );
    assert!(snapshot.log_bytes < 400_000, "{}", snapshot.log_bytes);
    let seen = answer(&sim, client).unwrap().last();
    come_back(&mut sim, &mut tale, seen);
    let finished = sim.finish();
    assert_eq!(check(&finished, &tale), 1);
}

#[test]
fn a_stopped_stream_ends_for_all_and_never_goes_on() {
    let mut sim = sim_with(6, |_| {});
    let mut tale = chat(&mut sim, 1_000, 20_000, |plan| plan);
    sim.run_ms(300);
    let reader = come_back(&mut sim, &mut tale, 1);
    sim.run_ms(300);
    let line = format!("DELETE /v1/streams/{}", tale.id.clone().unwrap());
    let stops = [sim.client(raw(&line, "")), sim.client(raw(&line, ""))];
    sim.run_ms(300);
    assert_eq!(sim.shard.population().1, 0, "the backend is let go");
    let late = come_back(&mut sim, &mut tale, 1);
    sim.run_ms(300);
    for stop in stops {
        assert_eq!(answer(&sim, stop).unwrap().status, 204);
    }
    for told in [tale.client, reader] {
        let seen = answer(&sim, told).unwrap();
        assert_eq!((seen.code(), seen.complete), ("stream_stopped", true), "{:.300}", seen.end());
    }
    assert_eq!(
        (answer(&sim, late).unwrap().status, answer(&sim, late).unwrap().code()),
        (410, "stream_stopped")
    );
    let finished = sim.finish();
    check(&finished, &tale);
}

#[test]
fn all_streams_are_listed_some_in_a_turn() {
    let mut sim = sim_with(34, |settings| settings.resume_bytes_max = 16 << 20);
    let at = |nth: u64| move |plan| ClientPlan { start_us: nth * 1_000, ..plan };
    let mut tales: Vec<Tale> = (0..600).map(|nth| chat(&mut sim, 3, 0, at(nth))).collect();
    tales.push(chat(&mut sim, 4_000, 20_000, at(600)));
    sim.run_ms(3_000);
    let mut known: Vec<String> = Vec::new();
    for tale in &mut tales {
        assert!(tale.learn(&sim));
        known.extend(tale.id.clone());
    }
    let (mut listed, mut place, mut ticket) = (Vec::new(), Some(Place::default()), 0);
    while let Some(from) = place {
        ticket += 1;
        sim.shard.command(Command::Streams { ticket, inquiry: Inquiry::From(from) });
        sim.run_ms(1);
        let (answered, page) = sim.pages.pop().unwrap();
        assert_eq!((answered, sim.pages.len()), (ticket, 0));
        assert!(page.kept.len() <= LISTED_PER_TURN_MAX && page.durable.is_empty());
        listed.extend(page.kept);
        place = page.next;
    }
    assert!(ticket > 3, "some at a time");
    let mut ids: Vec<String> = listed.iter().map(|stream| stream.id.clone()).collect();
    ids.sort();
    known.sort();
    assert_eq!(ids, known);
    let over = listed.iter().filter(|stream| stream.end == Some(End::Done) && stream.phase == "over").count();
    assert_eq!((over, listed.iter().filter(|stream| stream.readers == 1).count()), (600, 1));
    // One alone, with what its readers are behind by; and one that there is not.
    let ask = |sim: &mut Sim, id: &str| {
        sim.shard.command(Command::Streams { ticket: 0, inquiry: Inquiry::Id(id.parse().unwrap()) });
        sim.run_ms(1);
        sim.pages.pop().unwrap().1.kept
    };
    let live = tales.last().unwrap().id.clone().unwrap();
    let one = ask(&mut sim, &live);
    assert_eq!((one.len(), one[0].pending_bytes.len(), one[0].phase), (1, 1, "streaming"));
    let other = live.replace(&live[20..21], if &live[20..21] == "A" { "B" } else { "A" });
    assert!(ask(&mut sim, &other).is_empty());
    sim.finish();
}

#[test]
fn what_is_older_than_the_window_is_let_go_and_nothing_younger() {
    let mut sim = sim_with(31, |settings| {
        settings.routes[1].resume = Some(Resume { window_ms: 4_000, window_bytes: 1 << 20, ..RESUME });
    });
    // Some 16 events of 1 KiB a second, for 25 s.
    let plan = Answer { bytes: 1_000, piece_bytes: 1_050, gap_us: 100_000, ..Answer::events(400) };
    let exchange = sim.exchange(Request::new(Dialect::Chat, true), plan);
    let client = sim.client(ClientPlan::new(&[exchange]));
    let mut tale = Tale { exchange, client, id: None, readers: Vec::new(), stopped: false };
    let mut earliest = 0;
    for _ in 0..4 {
        sim.run_ms(4_000);
        let last = answer(&sim, tale.client).unwrap().last();
        let Some(first) = earliest_of(&mut sim, &mut tale) else {
            assert!(last < 100, "{last}");
            continue;
        };
        // What is 4 s old and younger is there: 60 events, a quarter more, and what lies in one segment with them.
        assert!((60..150).contains(&(last - first)), "{first}..{last}");
        assert!(first > earliest);
        earliest = first;
    }
    assert!(sim.shard.stats().counters.kept_aged_bytes > 50_000);
    assert_eq!(sim.shard.stats().counters.kept_forgotten_bytes, 0);
    // When it is over, what is there stays for keep-ms.
    sim.run_ms(20_000);
    let held = earliest_of(&mut sim, &mut tale).unwrap();
    sim.run_ms(20_000);
    assert_eq!((sim.shard.snapshot().kept.over, earliest_of(&mut sim, &mut tale)), (1, Some(held)));
    check(&sim.finish(), &tale);
}
