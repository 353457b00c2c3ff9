//! Sends that are confirmed by silence.

use super::*;

#[test]
fn a_deferred_send_that_the_socket_takes_does_not_end_the_sleep_and_is_told_with_what_does() {
    let mut bench = Bench::new();
    let (socket, mut peer) = bench.pair();
    bench.io.receive(conn(1), socket);
    let started = Instant::now();
    bench.io.send(conn(1), socket, lent(b"token"), Confirm::Deferred);
    bench.turn_ms(50);
    assert!(started.elapsed() >= Duration::from_millis(49), "it slept through");
    assert!(matches!(bench.seen[..], [C::Sent { result: Ok(5), .. }]), "{:?}", bench.seen);
    bench.seen.clear();
    let mut token = [0; 5];
    peer.read_exact(&mut token).unwrap();
    assert_eq!(&token, b"token");

    // Told before what ended the sleep, whose handling may need the memory.
    bench.io.send(conn(1), socket, lent(b"token"), Confirm::Deferred);
    peer.write_all(b"more").unwrap();
    bench.turn(Wait::Forever);
    assert!(
        matches!(bench.seen[..], [C::Sent { result: Ok(5), .. }, C::Received { .. }]),
        "{:?}",
        bench.seen
    );
    assert_eq!((bench.io.lent_bytes(), bench.io.operations()), (0, 2));
}

#[test]
fn a_deferred_send_that_falls_short_goes_on_until_the_reader_has_read() {
    let mut bench = Bench::new();
    let (socket, mut peer) = bench.pair();
    let bytes = 8 << 20;
    bench.io.send(conn(1), socket, lent(&vec![9; bytes]), Confirm::Deferred);
    bench.turn_ms(30);
    assert!(bench.seen.is_empty(), "{:?}", bench.seen);
    assert_eq!((bench.io.lent_bytes(), bench.io.operations()), (bytes as u64, 2));
    let reader = std::thread::spawn(move || {
        let mut read = vec![0; bytes];
        peer.read_exact(&mut read).unwrap();
        read.iter().all(|&byte| byte == 9)
    });
    // A sleep without end: the rest is told as soon as it is known.
    bench.turn(Wait::Forever);
    assert_eq!(bench.sent(conn(1)), Ok(bytes as u32));
    assert!(reader.join().unwrap());
    assert_eq!((bench.io.lent_bytes(), bench.io.operations()), (0, 1));
}

#[test]
fn a_deferred_send_can_be_cancelled_before_and_after_it_fell_short() {
    for turns in [0, 1, 2] {
        let mut bench = Bench::new();
        let (socket, _peer) = bench.pair();
        let bytes = 8 << 20;
        let op = bench.io.send(conn(1), socket, lent(&vec![9; bytes]), Confirm::Deferred);
        for _ in 0..turns {
            bench.turn_ms(5);
        }
        bench.io.cancel(op);
        let sent = bench.sent(conn(1)).unwrap_or(0) as usize;
        assert!(sent < bytes, "{turns} turns: some of it cannot have gone");
        assert_eq!((bench.io.lent_bytes(), bench.io.operations()), (0, 1));
    }
    // Nothing of it has gone.
    let mut bench = Bench::new();
    let (socket, _peer) = bench.pair();
    let (parked, _) = park_a_send(&mut bench, socket);
    let op = bench.io.send(conn(2), socket, lent(b"never"), Confirm::Deferred);
    bench.io.cancel(op);
    assert_eq!(bench.sent(conn(2)), Err(Errno::CANCELED));
    bench.io.cancel(parked);
    bench.sent(conn(1)).ok();
    assert_eq!(bench.io.lent_bytes(), 0);
}

#[test]
fn a_deferred_send_to_a_peer_that_has_reset_fails_at_once() {
    let mut bench = Bench::new();
    let (socket, peer) = bench.pair();
    SockRefOf(&peer).linger_zero();
    drop(peer);
    bench.io.send(conn(1), socket, lent(b"to nobody"), Confirm::Deferred);
    bench.turn(Wait::Forever);
    assert!(matches!(bench.sent(conn(1)), Err(Errno(libc::ECONNRESET | libc::EPIPE))));
}

#[test]
fn more_deferred_sends_than_a_turn_may_tell_are_told_by_the_next_which_does_not_sleep() {
    let mut bench = Bench::with(&Settings { ring_depth: 64, ..settings() });
    let pairs: Vec<_> = (0..10).map(|_| bench.pair()).collect();
    let sends = COMPLETIONS_PER_TURN_MAX as u32 * 2 + 7;
    for slot in 0..sends {
        bench.io.send(conn(slot), pairs[slot as usize % 10].0, lent(b"x"), Confirm::Deferred);
    }
    let started = Instant::now();
    bench.turn(Wait::Not);
    assert_eq!(bench.seen.len(), COMPLETIONS_PER_TURN_MAX);
    bench.turn(Wait::Forever);
    bench.turn(Wait::Forever);
    assert!(started.elapsed() < Duration::from_secs(1));
    let mut told: Vec<u32> = bench
        .seen
        .iter()
        .map(|completion| match completion {
            C::Sent { conn, result: Ok(1) } => conn.slot,
            other => panic!("{other:?}"),
        })
        .collect();
    told.sort_unstable();
    assert_eq!(told, (0..sends).collect::<Vec<_>>(), "each once");
}

#[test]
fn a_ring_is_dropped_with_deferred_sends_in_every_state() {
    let mut bench = Bench::new();
    let pairs: Vec<_> = (0..3).map(|_| bench.pair()).collect();
    bench.io.send(conn(1), pairs[0].0, lent(&vec![1; 8 << 20]), Confirm::Deferred);
    bench.io.send(conn(2), pairs[1].0, lent(b"taken"), Confirm::Deferred);
    bench.turn(Wait::Not);
    bench.io.send(conn(3), pairs[2].0, lent(b"not submitted"), Confirm::Deferred);
    let started = Instant::now();
    drop(bench);
    assert!(started.elapsed() < Duration::from_millis(REAP_MS_MAX / 2));
}
