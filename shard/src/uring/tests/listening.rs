//! Listeners, and sockets that go from one ring to another.

use super::*;

#[test]
fn accepted_sockets_inherit_what_the_listener_was_given() {
    let mut bench = Bench::new();
    let (socket, _peer) = bench.pair();
    // SAFETY: the socket is open until the end of the test.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(socket.fd()) };
    let options = socket2::SockRef::from(&fd);
    assert_eq!(options.tcp_notsent_lowat().unwrap(), 16 * 1024);
    assert!(options.tcp_nodelay().unwrap());
    assert!(!options.nonblocking().unwrap(), "io_uring fails instead of waiting on O_NONBLOCK sockets");
    // SAFETY: F_GETFD takes no pointers.
    assert_eq!(unsafe { libc::fcntl(socket.fd(), libc::F_GETFD) }, libc::FD_CLOEXEC);
}

#[test]
fn a_multishot_accept_brings_all_that_is_queued_before_it_can_be_cancelled() {
    let mut bench = Bench::new();
    let peers: Vec<_> = (0..100).map(|_| TcpStream::connect(bench.address).unwrap()).collect();
    let op = bench.io.accept(0, true);
    bench.io.cancel(op);
    bench.turn(Wait::Not);
    let sockets: Vec<_> = (0..100).map(|_| bench.accepted()).collect();
    assert_eq!(bench.accept_ended(), Some(Errno::CANCELED));
    for socket in sockets {
        bench.io.close(socket, Close::Orderly);
    }
    bench.turn(Wait::Not);
    assert_eq!(bench.io.sockets(), 0);
    drop(peers);
}

#[test]
fn so_many_one_shot_accepts_bring_so_many_clients_and_the_others_stay_queued() {
    let mut bench = Bench::new();
    let ops: Vec<_> = (0..20).map(|_| bench.io.accept(0, false)).collect();
    bench.turn(Wait::Not);
    let peers: Vec<_> = (0..30).map(|_| TcpStream::connect(bench.address).unwrap()).collect();
    let mut sockets: Vec<_> = (0..20).map(|_| bench.accepted()).collect();
    bench.turn_ms(20);
    assert_eq!(bench.seen.iter().filter(|seen| matches!(seen, C::Accepted { .. })).count(), 0);
    assert!(ops.iter().all(|&op| !bench.io.ops.contains(op)));
    // More than there are clients: those left over can be cancelled.
    let more: Vec<_> = (0..20).map(|_| bench.io.accept(0, false)).collect();
    sockets.extend((0..10).map(|_| bench.accepted()));
    bench.seen.clear();
    for &op in &more {
        bench.io.cancel(op);
    }
    for _ in 0..10 {
        assert_eq!(bench.accept_ended(), Some(Errno::CANCELED));
    }
    assert!(more.iter().all(|&op| !bench.io.ops.contains(op)));
    for socket in sockets {
        bench.io.close(socket, Close::Orderly);
    }
    drop(peers);
}

#[test]
fn a_released_socket_is_served_by_the_ring_that_adopts_it_and_closed_by_nobody_else() {
    let mut giver = Bench::new();
    let (socket, mut peer) = giver.pair();
    let parcel = giver.io.release(socket);
    assert_eq!(giver.io.sockets(), 0);
    drop(giver);
    let mut taker = Bench::new();
    let socket = taker.io.adopt(parcel);
    assert_eq!(taker.io.sockets(), 1);
    peer.write_all(b"still there?").unwrap();
    taker.io.receive(conn(1), socket);
    assert_eq!(taker.received(conn(1)), b"still there?");
    drop(peer);
    assert_eq!(taker.receive_ended(conn(1)), ReceiveEnd::Fin);
    taker.io.close(socket, Close::Orderly);
    taker.turn(Wait::Not);
    assert_eq!(taker.io.sockets(), 0);
}

#[test]
fn a_parcel_that_nobody_adopts_closes_its_socket() {
    let mut bench = Bench::new();
    let (socket, mut peer) = bench.pair();
    drop(bench.io.release(socket));
    assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_stopped_listener_refuses() {
    let mut bench = Bench::new();
    let op = bench.io.accept(0, true);
    bench.turn(Wait::Not);
    bench.io.cancel(op);
    assert_eq!(bench.accept_ended(), Some(Errno::CANCELED));
    bench.io.stop_listening(0);
    assert!(TcpStream::connect(bench.address).is_err());
    assert_eq!(bench.io.listeners(), 1, "indexes stay");
}

#[test]
fn a_multishot_accept_takes_all_that_come() {
    let mut bench = Bench::new();
    bench.io.accept(0, true);
    let peers: Vec<_> = (0..20).map(|_| TcpStream::connect(bench.address).unwrap()).collect();
    let mut sockets: Vec<_> = (0..20).map(|_| bench.accepted()).collect();
    sockets.dedup();
    assert_eq!((sockets.len(), peers.len(), bench.io.sockets()), (20, 20, 20));
}
