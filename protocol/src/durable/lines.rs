//! Header lines of answers.

use std::fmt::{Display, Write};

/// On every answer (PROTOCOL.md section 12.7).
const NO_SNIFFING: &str = "X-Content-Type-Options: nosniff\r\n";
/// With pages of any origin allowed. They ask without credentials, so the asterisk names every field.
const ANY_ORIGIN: &str = "Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: *\r\n\
    Cross-Origin-Resource-Policy: cross-origin\r\n";
const SAME_ORIGIN: &str = "Cross-Origin-Resource-Policy: same-origin\r\n";
/// What a preflight is told (Fetch standard, section 3.2.3).
pub(super) const PREFLIGHT: &str = "Access-Control-Allow-Methods: GET, HEAD, POST, PUT, DELETE, OPTIONS\r\n\
    Access-Control-Allow-Headers: Authorization, Content-Type, If-None-Match, Last-Event-ID, Stream-Seq, Stream-TTL, \
    Stream-Expires-At, Stream-Closed, Producer-Id, Producer-Epoch, Producer-Seq, Stream-Forked-From, Stream-Fork-Offset, \
    Stream-Fork-Sub-Offset\r\n\
    Access-Control-Max-Age: 7200\r\n";

/// Complete field lines, each with its CRLF.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Lines(pub(super) String);

impl Lines {
    /// Those that every answer has.
    pub(super) fn new(cors: bool) -> Self {
        let mut lines = String::with_capacity(512);
        lines.push_str(NO_SNIFFING);
        lines.push_str(if cors { ANY_ORIGIN } else { SAME_ORIGIN });
        Lines(lines)
    }

    /// Values are ours, or were checked when they came.
    pub(super) fn add(&mut self, name: &str, value: impl Display) -> &mut Self {
        debug_assert!(!name.contains(['\r', '\n', ':']), "a name of ours");
        self.0.push_str(name);
        self.0.push_str(": ");
        // Writing to a String does not fail.
        write!(self.0, "{value}").ok();
        self.0.push_str("\r\n");
        self
    }

    pub(super) fn add_if(&mut self, condition: bool, name: &str, value: impl Display) -> &mut Self {
        if condition { self.add(name, value) } else { self }
    }
}
