//! Several shards behind one address: how clients are shared between them, and that they are served wherever they are.

use crate::backend::Backend;
use crate::message::{get, ok};
use crate::peer::{Closed, Peer};
use crate::server::Server;

/// Client connections of each shard, once there are so many in all.
#[track_caller]
fn spread(server: &mut Server, clients: u64) -> Vec<u64> {
    server.wait_for("all clients to be taken", |server| server.count("tokenring_connections") == clients);
    let shards = (0..).map_while(|shard| {
        server.metric(&format!("tokenring_connections{{shard=\"{shard}\"}}")).map(|value| value as u64)
    });
    shards.collect()
}

fn is_even(loads: &[u64]) -> bool {
    let mean = loads.iter().sum::<u64>() as f64 / loads.len() as f64;
    loads.iter().all(|&load| (load as f64 - mean).abs() <= mean * 0.1)
}

#[track_caller]
fn assert_even(loads: &[u64]) {
    assert!(is_even(loads), "{loads:?}");
}

fn connect(server: &Server, clients: usize) -> Vec<Peer> {
    (0..clients).map(|_| server.connect()).collect()
}

#[test]
fn clients_are_spread_evenly_and_stay_so_when_many_of_one_shard_leave() {
    let backend = Backend::listen()
        .serve(|mut peer| while peer.try_request().is_ok() && peer.try_send(&ok("fine")).is_ok() {});
    for shards in [2, 4] {
        let mut server = Server::start(&[backend], &["--shards", &shards.to_string()]);
        let mut clients = connect(&server, 200);
        let loads = spread(&mut server, 200);
        assert_eq!(loads.len(), shards);
        assert_even(&loads);
        // Which shard a client is on shows where the counter of requests moves.
        let requests =
            |server: &Server| server.metric("tokenring_requests_total{shard=\"0\"}").unwrap_or_default();
        let mut on_first = Vec::new();
        let mut on_others = Vec::new();
        let mut before = requests(&server);
        for mut client in clients.drain(..) {
            client.send(get("/fine"));
            assert_eq!(client.response().text(), "fine");
            let after = requests(&server);
            if after > before {
                on_first.push(client)
            } else {
                on_others.push(client)
            }
            before = after;
        }
        assert_eq!(on_first.len() as u64, loads[0]);
        // Nearly all of the first shard's clients leave: some of the others, who are between two requests, go there.
        let leave = on_first.len() - 2;
        on_first.truncate(2);
        server.wait_for("the loads to be even again", |server| is_even(&spread(server, 200 - leave as u64)));
        let moved = server.count("tokenring_moves_for_load_total");
        assert!(moved > 0 && moved < on_others.len() as u64, "{moved} were moved");
        // As many others come.
        let mut new = connect(&server, leave);
        assert_even(&spread(&mut server, 200));
        for client in new.iter_mut().chain(&mut on_first).chain(&mut on_others) {
            client.send(get("/fine"));
            assert_eq!(client.response().text(), "fine");
        }
        assert!(server.count("tokenring_handed_away_total") > 0);
        assert_eq!(server.count("tokenring_handed_away_total"), server.count("tokenring_handed_in_total"));
        server.signal("TERM");
        for client in new.iter_mut().chain(&mut on_first).chain(&mut on_others) {
            assert_eq!(client.closed(), Closed::Fin);
        }
        assert_eq!(server.exit_code(), 0);
    }
}

#[test]
fn a_burst_on_few_slots_is_served_in_the_end_and_never_beyond_them() {
    let backend = Backend::listen()
        .serve(|mut peer| while peer.try_request().is_ok() && peer.try_send(&ok("fine")).is_ok() {});
    for shards in ["1", "2"] {
        let mut server = Server::start(&[backend], &["--shards", shards, "--conns-max", "8"]);
        let slots = 8 * shards.parse::<u64>().unwrap();
        let clients: Vec<_> = (0..300)
            .map(|_| {
                let mut client = server.connect();
                client.send(get("/fine"));
                client
            })
            .collect();
        server.wait_for("the slots to be taken", |server| server.count("tokenring_connections") == slots);
        // They keep their connections, so that the others wait.
        assert_eq!(server.count("tokenring_requests_total"), slots);
        assert!(server.descriptors() < 100, "{}", server.descriptors());
        std::thread::scope(|scope| {
            for mut client in clients {
                scope.spawn(move || assert_eq!(client.response().text(), "fine"));
            }
        });
        server.wait_for("all to be gone", |server| server.count("tokenring_connections") == 0);
        assert_eq!(server.count("tokenring_accepts_total"), 300);
        assert_eq!(server.count("tokenring_closes_total"), 300);
        // Several shards may also have waited for clients on their way, which is no pause.
        assert!(shards != "1" || server.count("tokenring_accept_pauses_total") > 0);
        server.signal("TERM");
        assert_eq!(server.exit_code(), 0);
    }
}
