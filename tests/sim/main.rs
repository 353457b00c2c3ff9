//! Whole shards on a simulated machine with a virtual clock: scripted clients and backends, faults drawn from a seed, and an
//! oracle that knows what everyone is owed. `SIM_SEED=n` replays one run, `SIM_LOG=1` tells what happened in it.
#![cfg(test)]

mod backend;
mod background;
mod balance;
mod canary;
mod client;
mod control;
mod directed;
mod disk;
mod durable;
mod forks;
mod handover;
mod io;
mod lagging;
mod minimise;
mod mirrors;
mod oracle;
mod plan;
mod random;
mod reader;
mod resume;
mod returning;
mod rng;
mod run;
mod script;
mod seats;
mod shards;
mod stored;
mod tls;
mod together;
mod world;
