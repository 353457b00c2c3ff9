//! What a request asks of the fake backend, written as `name=value&name=value`.
//!
//! The same text may stand in the query, in the header `x-fake`, or in the body as `"fake":"…"` (the form that passes every
//! gateway); the flags of the backend give the defaults.

use std::time::Duration;

/// How one stream is to be produced.
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// The number that each event carries (`stream`).
    pub stream: u64,
    /// Events with text (`events`).
    pub events: u64,
    /// Events per second (`rate`); 0: as fast as the socket takes them.
    pub rate: f64,
    /// Bytes per event on the wire, `data: ` and blank line included, chunk framing not (`payload`). Never below what the JSON needs.
    pub payload: usize,
    /// Of a stream that is not paced, how many events go into one write (`write`); 0: as many as fit.
    pub write: u64,
    /// Time from the request to the first event (`first_ms`).
    pub first: Duration,
    /// Time from the request to the response head (`head_ms`).
    pub head: Duration,
    /// Head, then silence for ever (`idle=1`).
    pub idle: bool,
    /// What goes wrong, and after how many events.
    pub fault: Option<(Fault, u64)>,
    /// Answer with this status and a JSON error instead (`status`).
    pub status: Option<u16>,
}

/// A way for a stream to go wrong. Each is a parameter with the number of events that precede it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `reset`: RST.
    Reset,
    /// `cut`: FIN without the last chunk.
    Cut,
    /// `half`: half an event, then FIN.
    Half,
    /// `stall`: nothing more, for ever.
    Stall,
    /// `garbage`: bytes that are no chunk, then FIN.
    Garbage,
    /// `nodone`: the body ends well-framed, without the dialect's end.
    NoDone,
    /// `error`: an error event in the dialect, then a well-framed end.
    Error,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            stream: 0,
            events: 100,
            rate: 50.0,
            payload: 180,
            write: 0,
            first: Duration::ZERO,
            head: Duration::ZERO,
            idle: false,
            fault: None,
            status: None,
        }
    }
}

/// The most events a request may ask for: what a stream of years needs, and far from where sums overflow.
pub const EVENTS_MAX: u64 = 1 << 40;
/// The largest event a request may ask for.
pub const PAYLOAD_MAX: usize = 1 << 20;

impl Params {
    /// Reads more parameters over the present ones. Unknown names are errors, except in a query (`strict` false), which
    /// a client may use for its own purposes.
    pub fn read(&mut self, text: &str, strict: bool) -> Result<(), String> {
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, "1"));
            let wrong = || format!("{name}={value}: the value is not valid");
            let number = || value.parse::<u64>().map_err(|_| wrong());
            let milliseconds = || number().map(|ms| Duration::from_millis(ms.min(1 << 40)));
            let fault = |fault| number().map(|after| Some((fault, after)));
            match name {
                "stream" => self.stream = number()?,
                "events" => self.events = number()?.min(EVENTS_MAX),
                "rate" => {
                    self.rate = value.parse().map_err(|_| wrong())?;
                    if !(self.rate.is_finite() && self.rate >= 0.0) {
                        return Err(wrong());
                    }
                }
                "burst" => self.rate = 0.0,
                "payload" => self.payload = usize::try_from(number()?).map_err(|_| wrong())?.min(PAYLOAD_MAX),
                "write" => self.write = number()?,
                "first_ms" => self.first = milliseconds()?,
                "head_ms" => self.head = milliseconds()?,
                "idle" => self.idle = number()? != 0,
                "status" => self.status = Some(value.parse().map_err(|_| wrong())?),
                "reset" => self.fault = fault(Fault::Reset)?,
                "cut" => self.fault = fault(Fault::Cut)?,
                "half" => self.fault = fault(Fault::Half)?,
                "stall" => self.fault = fault(Fault::Stall)?,
                "garbage" => self.fault = fault(Fault::Garbage)?,
                "nodone" => self.fault = fault(Fault::NoDone)?,
                "error" => self.fault = fault(Fault::Error)?,
                _ if strict => return Err(format!("{name}: no such parameter")),
                _ => {}
            }
        }
        Ok(())
    }

    /// The text inside `"fake":"…"` of a request body, or nothing.
    pub fn in_body(body: &[u8]) -> &str {
        let Some(at) = memchr::memmem::find(body, b"\"fake\":") else { return "" };
        let rest = body[at + 7..].trim_ascii_start();
        let Some(rest) = rest.strip_prefix(b"\"") else { return "" };
        let end = memchr::memchr(b'"', rest).unwrap_or(0);
        std::str::from_utf8(&rest[..end]).unwrap_or("")
    }

    /// Whether a request body asks for a stream.
    pub fn wants_stream(body: &[u8]) -> bool {
        memchr::memmem::find_iter(body, b"\"stream\":")
            .any(|at| body[at + 9..].trim_ascii_start().starts_with(b"true"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_over_the_defaults() {
        let mut params = Params::default();
        params.read("events=7&burst&reset=3&first_ms=20&payload=400", true).unwrap();
        assert_eq!((params.events, params.rate, params.payload), (7, 0.0, 400));
        assert_eq!(params.fault, Some((Fault::Reset, 3)));
        assert_eq!(params.first, Duration::from_millis(20));
        assert!(params.read("colour=red", true).is_err());
        assert!(params.read("colour=red", false).is_ok());
        assert!(params.read("rate=-1", true).is_err());
        assert!(params.read("rate=nan", true).is_err());
        assert!(params.read("events=x", true).is_err());
    }

    #[test]
    fn parameters_are_found_in_a_body() {
        let body = br#"{"model":"fake","stream": true,"metadata":{"fake": "events=3&rate=5"}}"#;
        assert_eq!(Params::in_body(body), "events=3&rate=5");
        assert!(Params::wants_stream(body));
        assert_eq!(Params::in_body(br#"{"model":"fake"}"#), "");
        assert!(!Params::wants_stream(br#"{"stream":false}"#));
    }
}
