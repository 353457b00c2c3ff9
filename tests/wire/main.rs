//! Scripted peers against the real binary, for what well-behaved programs do not do. Every test is a dialogue: a client
//! and a backend on raw sockets, spoken from one thread, with `tokenring serve` in between.
//!
//! The binary is `TOKENRING_BIN`, else the newest build in the target folder. Each test has a server and a loopback
//! address of its own, so tests run side by side: `cargo test -p tokenring-tests --test wire -- --test-threads 8`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::disallowed_methods, reason = "the clock of the outside world is what is tested here")]

mod backend;
mod message;
mod peer;
mod server;
mod shards;
mod sse;

mod abuse;
mod background;
mod bodies;
mod deadlines;
mod drain;
mod ends;
mod events;
mod heads;
mod heartbeats;
mod leaving;
mod many;
mod pool;
mod pressure;
mod refusals;
