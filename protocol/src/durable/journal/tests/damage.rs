//! Damage to journals is found, costs its own stream only, and never panics; nor do records that make no sense.

use super::*;

/// A journal of some streams, all of it synced, and what it holds.
fn journal(seed: u64) -> (BTreeMap<u64, Vec<u8>>, State) {
    let mut run = Run::new(seed, small(0));
    for _ in 0..60 {
        run.change();
        run.settle();
    }
    (run.disk.contents(), state_of(&run.with.store))
}

fn now() -> Now {
    Now { ms: 50_000, unix_ms: 1_763_790_000_000, random: 1 }
}

#[test]
fn a_flipped_byte_costs_one_stream_at_most_and_no_byte_is_wrong() {
    let (mut whole, mut hurt) = (0, 0);
    for seed in 0..6 {
        let (contents, state) = journal(seed);
        let originals = store_on(&contents, &small(0), 1, now());
        assert_eq!(state_of(&originals), state);
        // A stream and its forks share what was written before they parted.
        let families: BTreeMap<u64, u64> =
            originals.streams.iter().map(|(_, stream)| (stream.created, stream.generation)).collect();
        let originals: BTreeMap<u64, (u64, Messages)> = originals
            .streams
            .iter()
            .map(|(_, stream)| (stream.created, (stream.tail(), messages_of(stream).into_iter().collect())))
            .collect();
        for (number, bytes) in &contents {
            for at in (0..bytes.len()).step_by(if bytes.len() > 1_000 { 7 } else { 1 }) {
                let mut damaged = contents.clone();
                damaged.get_mut(number).unwrap()[at] ^= 1 << (at % 8);
                let recovered = recover(&damaged);
                let found = !recovered.findings.is_empty();
                let store = Store::with_journal(small(0), recovered, 9, now());
                let is = state_of(&store);
                let missing =
                    state.iter().filter(|(key, value)| is.get(*key) != Some(*value)).map(|(key, _)| key.1);
                let added = is.keys().filter(|key| !state.contains_key(*key)).map(|key| key.1);
                let differ: std::collections::BTreeSet<u64> =
                    missing.chain(added).map(|created| *families.get(&created).unwrap_or(&created)).collect();
                let differ = differ.len();
                let place = format!("seed {seed}, segment {number}, byte {at}");
                assert!(differ <= 1, "{place}: {differ} streams differ");
                assert!(differ == 0 || found, "{place}: not reported");
                for (_, stream) in store.streams.iter() {
                    // A deletion that was lost brings back what was deleted; all else is as it was.
                    let Some((tail, messages)) = originals.get(&stream.created) else { continue };
                    assert_eq!(stream.tail(), *tail, "{place}: an end that was given out is given out again");
                    for (end, message) in messages_of(stream) {
                        assert_eq!(messages.get(&end), Some(&message), "{place}: wrong bytes");
                    }
                }
                whole += usize::from(differ == 0);
                hurt += usize::from(differ == 1);
            }
        }
    }
    assert!(whole > 100 && hurt > 1000, "{whole} {hurt}");
}

#[test]
fn any_prefix_of_the_last_segment_is_what_the_store_once_was() {
    for seed in 10..14 {
        let mut run = Run::new(seed, Settings { segment_bytes: 1 << 20, ..small(0) });
        for _ in 0..40 {
            run.change();
            run.settle();
        }
        let contents = run.disk.contents();
        let (number, bytes) = contents.last_key_value().unwrap();
        for length in 0..bytes.len() {
            let mut shorter = contents.clone();
            shorter.insert(*number, bytes[..length].to_vec());
            let recovered = recover(&shorter);
            assert!(
                recovered.findings.iter().all(|finding| !finding.lost) || length < 64,
                "{:?}",
                recovered.findings
            );
            let last = recovered.last;
            let store = Store::with_journal(run.with.settings.clone(), recovered, 1, now());
            assert_eq!(Some(&state_of(&store)), run.states.get(&last), "seed {seed}, {length} bytes");
        }
    }
}

/// Whole stretches of a segment, over many records.
#[test]
fn where_much_is_destroyed_no_offset_comes_to_mean_something_else() {
    let mut random = Random::new(5);
    let mut renewed = 0;
    for seed in 20..26 {
        let (contents, _) = journal(seed);
        let originals = store_on(&contents, &small(0), 1, now());
        let originals: BTreeMap<u64, (u64, u64, Messages)> = originals
            .streams
            .iter()
            .map(|(_, stream)| {
                let messages = messages_of(stream).into_iter().collect();
                (stream.created, (stream.generation, stream.tail(), messages))
            })
            .collect();
        for _ in 0..300 {
            let mut damaged = contents.clone();
            let number = *damaged.keys().nth(random.below(contents.len())).unwrap();
            let bytes = damaged.get_mut(&number).unwrap();
            let from = random.below(bytes.len());
            let to = (from + random.below(2_000)).min(bytes.len());
            bytes[from..to].fill(0);
            let recovered = recover(&damaged);
            // An end that is torn off is a crash, as far as can be known.
            let torn = recovered.findings.iter().any(|finding| !finding.lost);
            let store = Store::with_journal(small(0), recovered, 9, now());
            for (_, stream) in store.streams.iter() {
                let Some((generation, tail, messages)) = originals.get(&stream.created) else { continue };
                if *generation != stream.generation {
                    renewed += 1;
                    continue;
                }
                assert!(torn || stream.tail() == *tail, "seed {seed}, segment {number}, {from}..{to}");
                for (end, message) in messages_of(stream) {
                    assert_eq!(messages.get(&end), Some(&message), "seed {seed}, {from}..{to}");
                }
            }
        }
    }
    assert!(renewed > 10, "{renewed}");
}

#[test]
fn anything_can_be_read_without_a_panic() {
    let (contents, _) = journal(30);
    let mut random = Random::new(1);
    for _ in 0..300 {
        let mut damaged = contents.clone();
        for bytes in damaged.values_mut() {
            for _ in 0..random.below(20) {
                let at = random.below(bytes.len());
                match random.below(4) {
                    0 => bytes[at] = random.below(256) as u8,
                    1 => _ = bytes.drain(..at / 8),
                    2 => bytes.truncate(at.max(bytes.len() - at)),
                    _ => bytes.splice(at..at, [0xff; 9]).for_each(drop),
                }
                if bytes.is_empty() {
                    bytes.push(0);
                }
            }
        }
        let store = Store::with_journal(small(0), recover(&damaged), 9, now());
        state_of(&store);
    }
}

/// Records whose checksums are right and that nobody has ever written.
#[test]
fn records_that_make_no_sense_are_read_without_a_panic() {
    use record::{Deed, Kind, SegmentHead};
    let kinds = [
        Kind::Create,
        Kind::Append,
        Kind::Delete,
        Kind::Trim,
        Kind::Snapshot,
        Kind::Data,
        Kind::Whole,
        Kind::Seal,
    ];
    let mut held = 0;
    for seed in 0..3_000 {
        let mut random = Random::new(seed);
        let mut segment = Vec::new();
        SegmentHead { number: 1, follows: 0, salt: 3 }.write(&mut segment);
        let mut number = 0;
        for _ in 0..12 {
            let odd = |random: &mut Random| {
                [0, 1, 2, 5, 9, 1 << 40, u64::MAX - 1, u64::MAX]
                    [random.below(if seed % 2 == 0 { 5 } else { 8 })]
            };
            let kind = kinds[random.below(kinds.len())];
            number += u64::from(kind.counts());
            let deed = |random: &mut Random, kind| Deed {
                kind,
                flags: random.below(4) as u8,
                stream: 1 + random.below(4) as u64,
                end: odd(random),
            };
            let (is, before) = (deed(&mut random, kind), deed(&mut random, Kind::Append));
            record::write(&mut segment, 3, is, (number, odd(&mut random).min(number)), before, |out| {
                let facts = record::Facts {
                    path: format!("/v1/durable/{}", is.stream).into(),
                    content_type: ["application/json", "text/plain"][random.below(2)].into(),
                    generation: odd(&mut random),
                    base: odd(&mut random),
                    earliest: odd(&mut random),
                    source: random.below(5) as u64,
                    ..record::Facts::default()
                };
                let message = vec![b'x'; random.below(4)];
                let count = random.below(3);
                match kind {
                    _ if random.one_in(8) => out.extend_from_slice(&vec![0xff; random.below(60)]),
                    Kind::Create | Kind::Snapshot => record::put_facts(out, &facts),
                    Kind::Append => record::put_appended(out, odd(&mut random), None, None),
                    Kind::Trim => {
                        let marks: Vec<_> =
                            (0..random.below(3)).map(|_| (odd(&mut random), odd(&mut random))).collect();
                        record::put_trimmed(out, odd(&mut random), marks.into_iter());
                    }
                    Kind::Seal => record::put_seal(out, vec![(odd(&mut random), is); count].into_iter()),
                    _ => {}
                }
                if matches!(kind, Kind::Create | Kind::Append | Kind::Data) {
                    let lengths = vec![message.len(); count].into_iter();
                    record::put_messages(
                        out,
                        odd(&mut random),
                        lengths,
                        std::iter::repeat_n(&message[..], count),
                    );
                }
            });
        }
        let mut with = Dialogue::new(small(0));
        with.store = store_on(&BTreeMap::from([(1, segment)]), &small(0), 1, now());
        held += state_of(&with.store).len();
        for path in 0..6 {
            with.ask(&format!("GET /v1/durable/{path}"), "", b"");
            with.ask(&format!("POST /v1/durable/{path}"), "Content-Type: text/plain\n", b"more");
            with.ask(&format!("DELETE /v1/durable/{path}"), "", b"");
        }
    }
    assert!(held > 100, "{held}");
}
