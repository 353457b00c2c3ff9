//! What the load generator, the fake backend and the bare relay share.
//!
//! Nothing here is part of the server, and nothing of the server is used here: the tools that judge it must not share its bugs.
#![forbid(unsafe_code)]

pub mod clock;
pub mod dialect;
pub mod http;
pub mod mark;
pub mod net;
pub mod params;
pub mod report;
pub mod sequence;
pub mod sse;
pub mod tls;
