//! One core's data plane: connections, streams and backends on one io_uring, hosted by a glommio executor.
//! `core` holds the state machines and knows neither kernel nor clock; `uring` is the only door to the kernel.
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod core;
mod disk;
pub mod host;
pub mod io;
pub mod listing;
pub mod memory;
pub mod mesh;
pub mod settings;
pub mod stats;
mod tls;
#[allow(
    unsafe_code,
    reason = "io_uring is a shared-memory interface; all unsafe code of the project lives here"
)]
pub mod uring;

pub use crate::core::KeptTotals;
