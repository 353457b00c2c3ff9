//! Turns: what one takes, how it sleeps and what wakes it.

use super::*;

#[test]
fn more_operations_than_the_ring_has_entries_are_submitted_all_the_same() {
    let mut bench = Bench::with(&Settings { ring_depth: 4, ..settings() });
    let pairs: Vec<_> = (0..100).map(|_| bench.pair()).collect();
    for (slot, (socket, _)) in pairs.iter().enumerate() {
        bench.io.receive(conn(slot as u32), *socket);
        bench.io.send(conn(slot as u32), *socket, lent(format!("hello {slot}").as_bytes()), Confirm::Prompt);
    }
    for slot in 0..100 {
        assert_eq!(bench.sent(conn(slot)), Ok(format!("hello {slot}").len() as u32));
    }
    for (slot, (_, peer)) in pairs.iter().enumerate() {
        let mut text = vec![0; format!("hello {slot}").len()];
        (&*peer).read_exact(&mut text).unwrap();
        assert_eq!(text, format!("hello {slot}").as_bytes());
    }
    // All peers speak at once: 100 completions for a queue of 16.
    for (_, peer) in &pairs {
        (&*peer).write_all(b"and back").unwrap();
    }
    for slot in 0..100 {
        assert_eq!(bench.received(conn(slot)), b"and back");
    }
    // And leave at once.
    let sockets: Vec<_> = pairs.iter().map(|(socket, _)| *socket).collect();
    drop(pairs);
    for slot in 0..100 {
        let why = bench.receive_ended(conn(slot));
        if why == ReceiveEnd::Rearm {
            // The full queue ended the multishot with the data.
            bench.io.receive(conn(slot), sockets[slot as usize]);
            assert_eq!(bench.receive_ended(conn(slot)), ReceiveEnd::Fin);
        }
    }
    for socket in sockets {
        bench.io.close(socket, Close::Orderly);
    }
    bench.turn(Wait::Not);
    assert_eq!((bench.io.sockets(), bench.io.operations(), bench.io.lent_bytes()), (0, 1, 0));
}

#[test]
fn a_full_batch_leaves_the_rest_in_the_ring_and_the_next_turn_does_not_sleep() {
    let mut bench = Bench::with(&Settings { ring_depth: 2048, ..settings() });
    let pairs: Vec<_> = (0..10).map(|_| bench.pair()).collect();
    // The last ones are pairs of completions, which straddle the end of the batch.
    for slot in 0..COMPLETIONS_PER_TURN_MAX as u32 - 1 {
        bench.io.send(conn(slot), pairs[slot as usize % 10].0, lent(b"x"), Confirm::Prompt);
    }
    let mut connecting: Vec<_> = (0..3).map(|_| TcpStream::connect(bench.address).unwrap()).collect();
    for _ in 0..3 {
        bench.io.accept(0, false);
    }
    let started = Instant::now();
    bench.turn(Wait::Forever);
    assert_eq!(bench.seen.len(), COMPLETIONS_PER_TURN_MAX);
    assert!(matches!(bench.seen.last(), Some(C::Accepted { .. })), "{:?}", bench.seen.last());
    bench.seen.clear();
    bench.turn(Wait::Forever);
    assert!(matches!(
        bench.seen[..],
        [
            C::AcceptEnded { error: None, .. },
            C::Accepted { .. },
            C::AcceptEnded { error: None, .. },
            C::Accepted { .. },
            C::AcceptEnded { error: None, .. }
        ]
    ));
    assert!(started.elapsed() < Duration::from_secs(1));
    connecting.clear();
}

#[test]
fn a_turn_sleeps_until_the_time_it_was_told() {
    let mut bench = Bench::new();
    for wait_ms in [1, 20] {
        let (started, before) = (Instant::now(), bench.io.now_us());
        bench.turn(Wait::Until(before + wait_ms * 1000));
        let slept = started.elapsed();
        assert!(slept >= Duration::from_millis(wait_ms), "{slept:?}");
        assert!(slept < Duration::from_millis(wait_ms + 100), "{slept:?}");
        assert!(bench.io.now_us() >= before + wait_ms * 1000);
    }
    let started = Instant::now();
    bench.turn(Wait::Until(0));
    bench.turn(Wait::Not);
    assert!(started.elapsed() < Duration::from_millis(20), "a time that has passed is no sleep");
}

#[test]
fn the_bell_wakes_a_sleeping_turn_and_is_heard_again_afterwards() {
    let mut bench = Bench::new();
    for _ in 0..50 {
        let wake = Arc::clone(&bench.wake);
        let ringer = std::thread::spawn(move || {
            wake.ring();
            wake.ring();
        });
        bench.until(|completion| matches!(completion, C::Woken).then_some(()));
        ringer.join().unwrap();
    }
    // Rung before the turn, while nobody listened.
    bench.turn_ms(1);
    bench.seen.clear();
    bench.wake.ring();
    bench.turn(Wait::Forever);
    assert!(matches!(bench.seen[..], [C::Woken]), "{:?}", bench.seen);
}

/// shutdown through the ring would cost a kernel worker thread each time; so would O_NONBLOCK or regular-file habits.
#[test]
fn an_echo_server_needs_no_kernel_worker_thread() {
    let mut bench = Bench::new();
    let before = kernel_workers();
    for _ in 0..50 {
        let (socket, mut peer) = bench.pair();
        bench.io.receive(conn(1), socket);
        let watch = bench.io.watch_hangup(conn(1), socket);
        bench.turn(Wait::Not);
        peer.write_all(b"echo").unwrap();
        let heard = bench.received(conn(1));
        bench.io.send(conn(1), socket, lent(&heard), Confirm::Prompt);
        assert_eq!(bench.sent(conn(1)), Ok(4));
        bench.io.shutdown(socket, Half::Both);
        assert_eq!(bench.receive_ended(conn(1)), ReceiveEnd::Fin);
        bench.hung_up(conn(1)).unwrap();
        bench.io.cancel(watch);
        while bench.hung_up(conn(1)) != Err(Errno::CANCELED) {}
        bench.io.close(socket, Close::Orderly);
        bench.turn(Wait::Not);
        assert_eq!(kernel_workers(), before);
    }
}

#[test]
fn a_turn_that_sleeps_elsewhere_owes_its_sleep_and_the_event_ends_it() {
    let mut bench = Bench::new();
    let (socket, mut peer) = bench.pair();
    bench.io.receive(conn(1), socket);
    let event = bench.io.completion_event().unwrap();
    bench.turn(Wait::Not);
    bench.io.sleep_elsewhere(true);
    let later = bench.io.now_us() + 60_000_000;
    bench.turn(Wait::Until(later));
    assert_eq!(bench.io.sleep_owed(), Some(Wait::Until(later)));

    let writer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        peer.write_all(b"x").unwrap();
        peer
    });
    assert!(event.clear(), "blocks until the completion is ready");
    bench.turn(Wait::Forever);
    assert_eq!(bench.io.sleep_owed(), None, "there was something");
    assert!(matches!(bench.seen[..], [C::Received { .. }]), "{:?}", bench.seen);
    bench.seen.clear();

    // At home again, nobody rings.
    bench.io.sleep_elsewhere(false);
    let mut peer = writer.join().unwrap();
    peer.write_all(b"y").unwrap();
    bench.turn(Wait::Forever);
    assert!(matches!(bench.seen[..], [C::Received { .. }]), "{:?}", bench.seen);
    assert!(!event.wait(0), "neither for this nor for what the earlier turn took");
}

#[test]
fn spinning_finds_completions_and_ends_in_sleep() {
    let mut bench = Bench::with(&Settings { spin_us: 2_000, ..settings() });
    let (socket, mut peer) = bench.pair();
    bench.io.receive(conn(1), socket);
    for _ in 0..20 {
        peer.write_all(b"x").unwrap();
        assert_eq!(bench.received(conn(1)), b"x");
    }
    let before = bench.io.now_us();
    bench.turn(Wait::Until(before + 30_000));
    assert!(bench.io.now_us() >= before + 30_000);
}
