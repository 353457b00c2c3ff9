//! What bytes and policies mean: HTTP/1.1, Server-Sent Events, model dialects, a stream's event log, completion
//! accounting, phases and deadlines, timers. No I/O, no clock, no threads, no async.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod ages;
pub mod background;
pub mod cors;
pub mod demo;
pub mod dialect;
pub mod durable;
pub mod facts;
pub mod fault;
pub mod http;
pub mod ledger;
pub mod limits;
pub mod log;
pub mod mirror;
pub mod phase;
pub mod planted;
pub mod resume;
pub mod slots;
pub mod sse;
pub mod wheel;
