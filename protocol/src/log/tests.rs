use super::*;
use crate::limits::LOG_SPARE_BYTES_MAX;

fn read(log: &Log, mut from: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(lent) = log.lend(from, u32::MAX) {
        from += lent.len() as u64;
        bytes.extend(lent.to_vec());
    }
    bytes
}

#[test]
fn an_append_is_contiguous_and_a_lent_range_survives_what_follows() {
    let mut log = Log::new();
    assert_eq!((log.memory_bytes(), log.lend(0, 10).is_none()), (0, true));
    log.append(&[b"5\r\n", b"hello", b"\r\n"]);
    let lent = log.lend(0, u32::MAX).unwrap();
    assert_eq!(lent.to_vec(), b"5\r\nhello\r\n");
    for _ in 0..10_000 {
        log.append(&[b"more"]);
    }
    log.release(log.end());
    log.append(&[b"and again"]);
    assert_eq!(lent.to_vec(), b"5\r\nhello\r\n", "the lender's memory is his until he drops it");
    assert_eq!(read(&log, log.end() - 9), b"and again");
}

#[test]
fn segments_grow_and_a_large_append_gets_its_own() {
    let mut log = Log::new();
    log.append(&[b"x"]);
    assert_eq!(log.memory_bytes(), LOG_SEGMENT_FIRST_BYTES, "the first segment is small");
    let large = vec![7; LOG_SEGMENT_BYTES_MAX * 3];
    log.append(&[&large]);
    assert_eq!(log.lend(1, u32::MAX).unwrap().len(), large.len());
    assert_eq!(log.lend(1, 100).unwrap().len(), 100);
}

#[test]
fn what_was_reserved_for_is_contiguous() {
    let mut log = Log::new();
    log.append(&[b"head"]);
    log.release(4);
    log.reserve(3000);
    for _ in 0..30 {
        log.append(&[&[7; 100]]);
    }
    assert_eq!(log.lend(4, u32::MAX).unwrap().len(), 3000);
    log.release(log.end());
    assert!(log.memory_bytes() <= LOG_SEGMENT_FIRST_BYTES * 2, "and it is not kept");
    log.reserve(usize::MAX);
    assert!(log.memory_bytes() <= LOG_SEGMENT_BYTES_MAX + 2 * LOG_SEGMENT_FIRST_BYTES, "within bounds");
}

#[test]
fn a_drained_log_owns_nothing_or_a_small_segment_that_is_lent() {
    let mut log = Log::new();
    for round in 0..1000_u32 {
        for _ in 0..round % 40 {
            log.append(&[&[1; 180]]);
        }
        let lent = (log.end() > log.start()).then(|| log.lend(log.end() - 1, 1));
        log.release(log.end());
        let held = log.memory_bytes();
        assert!(held <= LOG_SEGMENT_FIRST_BYTES * 2, "round {round}: {held}");
        drop(lent);
        log.release(log.end());
        assert_eq!((log.memory_bytes(), log.start()), (0, log.end()), "round {round}");
    }
}

#[test]
fn memory_is_used_again_but_never_under_somebody_who_holds_it() {
    let mut first = Log::new();
    first.append(&[b"first"]);
    let lent = first.lend(0, u32::MAX).unwrap();
    let address = lent.cells().as_ptr();
    drop(first);
    let mut second = Log::new();
    second.append(&[b"other"]);
    assert_eq!(lent.to_vec(), b"first", "still lent when its log was done with it");
    drop(lent);

    let address_of = |log: &Log| log.lend(log.start(), u32::MAX).map(|lent| lent.cells().as_ptr());
    let taken = address_of(&second);
    assert_ne!(taken, Some(address));
    second.release(second.end());
    let mut third = Log::new();
    third.append(&[b"third"]);
    assert_eq!(address_of(&third), taken, "the memory of the second");
    assert_eq!(read(&third, 0), b"third");
}

#[test]
fn history_takes_about_what_there_is_of_it() {
    let mut log = Log::new();
    log.append(&[&[1; 300]]);
    log.keep(1 << 20);
    log.release(log.end());
    assert_eq!((log.memory_bytes(), log.start()), (0, 300), "a head is not history");
    assert_eq!(log.behind(0, false), Place::At(300));
    for _ in 0..2_000 {
        log.append(&[&[2; 100]]);
        log.release(log.end());
        let held = (log.end() - log.start()) as usize;
        assert!(
            log.memory_bytes() <= 2 * held + 4 * LOG_SEGMENT_FIRST_BYTES,
            "{} for {held}",
            log.memory_bytes()
        );
    }
    assert_eq!((log.start(), log.behind(0, false)), (300, Place::At(300)));
    let large = vec![3; 3_000];
    log.append(&[&large]);
    log.release(log.end());
    assert_eq!(log.lend(log.end() - 3_000, u32::MAX).map(|lent| lent.to_vec()), Some(large));
}

#[test]
fn what_is_delivered_next_is_copied_to_where_was_foretold() {
    let mut log = Log::new();
    assert_eq!((log.apart(), log.settles_at(100).count()), (None, 0), "a log that is not kept");
    log.keep(1 << 20);
    assert!(log.apart().is_some() && log.history_apart().is_none() && log.settles_at(100).count() == 0);
    log.append(&[&[7; 100]]);
    log.release(100);
    log.append(&[&[8; 150]]);
    let foretold: Vec<_> = log.settles_at(150).collect();
    let held: *const u8 = log.history_apart().unwrap();
    log.release(250);
    let copied = log.lend(100, 150).unwrap();
    let start: *const u8 = copied.cells().as_ptr().cast();
    assert_eq!(foretold, [0, 64, 128].map(|line| start.wrapping_add(line)));
    assert_eq!(held, log.lend(0, 1).unwrap().cells().as_ptr().cast());
    // No further than the memory goes.
    assert_eq!(log.settles_at(1 << 20).count(), (LOG_SEGMENT_FIRST_BYTES - 250).div_ceil(64));
}

#[test]
fn what_is_kept_for_later_is_bounded() {
    let mut logs: Vec<Log> = (0..5_000).map(|_| Log::new()).collect();
    for (index, log) in logs.iter_mut().enumerate() {
        log.append(&[&vec![1; 1 << (index % 18)]]);
    }
    logs.clear();
    assert_eq!(spare::bytes(), 8 * LOG_SPARE_BYTES_MAX, "eight sizes, each full");
}

/// The wire bytes of an event of ours, made to have about so many bytes of data.
fn event(id: u64, bytes: usize, chunked: bool) -> Vec<u8> {
    let data = String::from_utf8(vec![b'a' + (id % 26) as u8; bytes]).unwrap();
    let block = match id % 4 {
        // One that has an id of its own, that is another's.
        0 => format!("event: x\r\nid: {}\r\ndata: {data}\r\nid: {id}\n\r\n", id + 1),
        1 => format!("id: {id}\nretry: 5\ndata: id: {}\ndata: {data}\n\n", id + 1),
        _ => format!("id: {id}\ndata: {data}\n\n"),
    };
    match chunked {
        true => format!("{:x}\r\n{block}\r\n", block.len()).into_bytes(),
        false => block.into_bytes(),
    }
}

fn beat(chunked: bool) -> &'static [u8] {
    if chunked { b"3\r\n:\n\n\r\n" } else { b":\n\n" }
}

/// A log of `events` events and one heartbeat behind every third; gives where each ends.
fn kept(events: u64, bytes: usize, window_bytes: u64, chunked: bool) -> (Log, Vec<u64>) {
    let mut log = Log::new();
    log.append(&[b"HTTP/1.1 200 OK\r\n\r\n"]);
    log.keep(window_bytes);
    let mut ends = vec![log.end()];
    for id in 1..=events {
        assert_eq!(log.next_event_id(), id);
        log.append(&[&event(id, bytes, chunked)]);
        log.event_ends();
        ends.push(log.end());
        if id % 3 == 0 {
            log.append(&[beat(chunked)]);
        }
        log.release(log.end());
    }
    (log, ends)
}

#[test]
fn a_log_that_is_kept_is_read_again_from_behind_any_event() {
    for chunked in [true, false] {
        let (log, ends) = kept(50, 100, 1 << 20, chunked);
        for (id, &end) in ends.iter().enumerate() {
            // A heartbeat lies in front of the event or behind the one before it, as segments have it.
            let Place::At(at) = log.behind(id as u64, chunked) else { panic!("{id}") };
            assert!(at == end || at == end + beat(chunked).len() as u64, "{id} ends at {end}, found at {at}");
        }
        assert_eq!(log.behind(51, chunked), Place::Ahead);
        let Place::At(at) = log.behind(47, chunked) else { panic!() };
        let expected =
            [&event(48, 100, chunked), beat(chunked), &event(49, 100, chunked), &event(50, 100, chunked)];
        assert_eq!(read(&log, at), expected.concat());
        assert_eq!(log.history_bytes(), log.end() - ends[0], "all but the head");
    }
}

#[test]
fn history_is_bounded_by_the_window_and_says_where_it_begins() {
    let window_bytes = 100_000;
    let (log, ends) = kept(5_000, 200, window_bytes, true);
    let held = log.end() - log.start();
    assert!((window_bytes..window_bytes + LOG_SEGMENT_BYTES_MAX as u64).contains(&held), "{held}");
    assert!(log.memory_bytes() < held as usize + LOG_SEGMENT_BYTES_MAX);
    let Place::Gone(first) = log.behind(0, true) else { panic!("the start is still held") };
    assert!(ends[first as usize] <= log.start() && ends[first as usize + 1] > log.start());
    for id in 0..=5_000 {
        let end = ends[id as usize];
        match log.behind(id, true) {
            Place::Gone(from) => assert!(from == first && id < first, "{id}"),
            Place::At(at) => assert!(id >= first && (end..end + 9).contains(&at), "{id}: {at} for {end}"),
            Place::Ahead => panic!("{id}"),
        }
    }
}

/// Random operations on a kept log, beside a list of all that was ever appended.
#[test]
fn a_kept_log_agrees_with_a_model_of_it() {
    for seed in 0..300_u64 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut below = |bound: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % bound
        };
        let chunked = below(2) == 0;
        let window_bytes = [1, 5_000, 100_000, 1 << 30][below(4) as usize];
        let mut log = Log::new();
        let mut bytes = b"head".to_vec();
        log.append(&[&bytes]);
        log.keep(window_bytes);
        let mut ends = vec![bytes.len() as u64];
        for _ in 0..below(400) {
            match below(10) {
                0..=5 => {
                    let data_bytes = [10, 300, 5_000, 70_000][(below(100) as usize / 30).min(3)];
                    let event = event(log.next_event_id(), data_bytes, chunked);
                    if below(3) == 0 {
                        log.reserve(event.len());
                    }
                    log.append(&[&event]);
                    log.event_ends();
                    bytes.extend(event);
                    ends.push(log.end());
                }
                6 => {
                    log.append(&[beat(chunked)]);
                    bytes.extend(beat(chunked));
                }
                7 | 8 => log.release(log.floor() + below(log.end() - log.floor() + 1)),
                _ => log.forget(below(50_000)),
            }
            assert_eq!(log.end(), bytes.len() as u64);
            assert!(log.start() <= log.floor(), "what is owed is held");
            assert_eq!(log.history_bytes(), log.floor() - log.start());
            let held: usize = log.segments().map(|segment| segment.memory.len()).sum();
            assert_eq!(log.memory_bytes(), held);
            let id = below(ends.len() as u64 + 1);
            match log.behind(id, chunked) {
                Place::Ahead => assert_eq!(id, ends.len() as u64),
                Place::Gone(first) => {
                    assert!(
                        id < first && matches!(log.behind(first, chunked), Place::At(_)),
                        "{seed}: {id} {first}"
                    );
                }
                Place::At(at) => {
                    let rest = read(&log, at);
                    assert!(rest == bytes[at as usize..], "{seed}: other bytes");
                    // Between that event's end and the next one's beginning lie heartbeats at most.
                    let between = &bytes[ends[id as usize] as usize..at as usize];
                    assert!(
                        between.chunks(beat(chunked).len()).all(|one| one == beat(chunked)),
                        "{seed}: {id}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_is_owed_is_held_whatever_the_window_is() {
    let mut log = Log::new();
    log.keep(0);
    for id in 1..=1_000 {
        assert_eq!(log.next_event_id(), id);
        log.append(&[&event(id, 300, false)]);
        log.event_ends();
    }
    log.forget(0);
    assert_eq!((log.start(), log.behind(0, false)), (0, Place::At(0)));
    log.release(150_000);
    assert!(log.start() <= 150_000 && log.start() > 150_000 - LOG_SEGMENT_BYTES_MAX as u64);
    log.release(100);
    assert_eq!(log.floor(), 150_000, "it does not go back");
}

#[test]
fn a_range_that_was_lent_is_given_piece_by_piece() {
    let mut log = Log::new();
    log.append(&[b"hello"]);
    let lent = log.lend(0, u32::MAX).unwrap();
    let rest = lent.skip(2).unwrap();
    assert_eq!(rest.to_vec(), b"llo");
    assert_eq!((rest.first(2).to_vec(), rest.first(9).to_vec()), (b"ll".to_vec(), b"llo".to_vec()));
    assert!(rest.skip(3).is_none());
}

#[test]
fn reserving_more_than_is_appended_costs_no_more_than_twice_what_is_held() {
    let mut log = Log::new();
    for _ in 0..2000 {
        log.reserve(LOG_SEGMENT_BYTES_MAX);
        log.append(&[&[1; 30]]);
    }
    let bound = 2 * log.end() as usize + 3 * LOG_SEGMENT_BYTES_MAX;
    assert!(log.memory_bytes() <= bound, "{} for {}", log.memory_bytes(), log.end());
}

#[test]
fn a_trimmed_log_owns_nothing_and_goes_on() {
    let mut log = Log::new();
    log.append(&[b"request"]);
    log.trim(3);
    assert_eq!(log.lend(3, 9).unwrap().to_vec(), b"uest", "what is still owed stays");
    log.trim(7);
    assert_eq!((log.memory_bytes(), log.start(), log.end()), (0, 7, 7));
    log.append(&[b"more"]);
    assert_eq!(read(&log, 7), b"more");
}

/// Random appends, sends, partial completions and releases against a plain vector.
#[test]
fn behaves_like_a_plain_byte_vector() {
    let mut seed = 42_u64;
    let mut random = move |bound: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % bound
    };
    for _ in 0..200 {
        let (mut log, mut model, mut sent) = (Log::new(), Vec::new(), 0_u64);
        let mut held: Vec<(u64, Lent)> = Vec::new();
        for step in 0..400_u64 {
            match random(5) {
                4 => log.reserve(random(5000) as usize),
                0 | 1 => {
                    let exponent = random(12);
                    let piece: Vec<u8> = (0..random(1 << exponent)).map(|i| (i + step) as u8).collect();
                    assert_eq!(
                        log.append(&[&piece[..piece.len() / 2], &piece[piece.len() / 2..]]),
                        model.len() as u64
                    );
                    model.extend(piece);
                }
                2 => {
                    if let Some(lent) = log.lend(sent, random(70_000) as u32 + 1) {
                        let taken = random(lent.len() as u64 + 1);
                        held.push((sent, lent));
                        sent += taken;
                        log.release(sent);
                    }
                }
                _ => held.truncate(random(3) as usize),
            }
            for (from, lent) in &held {
                assert_eq!(lent.to_vec(), model[*from as usize..*from as usize + lent.len()]);
            }
            assert!(log.start() <= sent && log.end() == model.len() as u64);
        }
        assert_eq!(read(&log, sent), model[sent as usize..]);
    }
}
