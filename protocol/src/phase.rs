//! The life of a stream: its phases, the deadline of each, and every reason for which it can end.
//!
//! ```text
//!  Head ─► Body ─► Connect ─► AwaitHead ─► AwaitFirstToken ─► Streaming ◄─► Paused
//!    │       └────────┴───────────┴──────────┐   │                │            │
//!    │   (a body still arriving while the    │   │                ▼            │
//!    │    backend already answers)           └───┴──────────► Finishing ◄──────┘
//!    ▼                                                            │
//!  Refused ───────────────────────────────────────────────────────┴──► KeptAlive | closed
//! ```
//!
//! Waiting for the user (head, body, keep-alive), for the model (connect, head, first token, between tokens, total) and for
//! the client's reading (write stall) are different deadlines. Heartbeats reset none of the model's.

use crate::fault::{Culprit, Fault};

macro_rules! closed_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $text:literal),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum $name { $($(#[$doc])* $variant),* }
        impl $name {
            /// Every value, in order of declaration.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();
            /// The name used in metrics, logs and `/status`.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $text),* }
            }
        }
    };
}

closed_enum! {
    /// Where a stream stands.
    Phase {
        /// A client's TLS handshake is under way, or awaited; there is no stream yet.
        Handshake = "handshake",
        /// The request's head is arriving.
        Head = "head",
        /// The request's body is arriving (and goes to the backend as it comes).
        Body = "body",
        /// A connection to a backend is being made.
        Connect = "connect",
        /// The request is out; the backend's response head is awaited.
        AwaitHead = "await_head",
        /// The backend has answered with an event stream; no token yet.
        AwaitFirstToken = "await_first_token",
        /// Tokens (or the bytes of an ordinary body) flow.
        Streaming = "streaming",
        /// As `Streaming`, with the producer's receive paused because the client lags.
        Paused = "paused",
        /// Everything owed is in the log; the rest is on its way to the client.
        Finishing = "finishing",
        /// Over; the client's connection waits for its next request.
        KeptAlive = "kept_alive",
    }
}

closed_enum! {
    /// What moves a stream on.
    Step {
        /// The request's head is complete.
        HeadDone = "head_done",
        /// The request's body is complete.
        BodyDone = "body_done",
        /// The backend's connection stands and the request is on its way.
        Connected = "connected",
        /// The connection died before the first response byte; another is made.
        Retry = "retry",
        /// The backend's final head says event stream.
        EventStream = "event_stream",
        /// The backend's final head says an ordinary body, or the demo model starts.
        PlainBody = "plain_body",
        /// The first token arrived.
        FirstToken = "first_token",
        /// Lag rose above the high mark.
        LagHigh = "lag_high",
        /// Lag fell below the low mark.
        LagLow = "lag_low",
        /// The producer has appended its last byte (or the in-band error).
        ProducerDone = "producer_done",
        /// The client's last byte was confirmed and its connection is kept.
        Delivered = "delivered",
    }
}

impl Phase {
    /// The whole transition table. `None`: the step cannot happen in this phase.
    pub fn after(self, step: Step) -> Option<Phase> {
        use {Phase as P, Step as S};
        Some(match (self, step) {
            (P::Head, S::HeadDone) => P::Body,
            (P::Body, S::BodyDone) => P::Connect,
            // A backend may be connected, and may answer, before the body is complete.
            (P::Body, S::Connected) => P::Body,
            (P::Connect, S::Connected) => P::AwaitHead,
            (P::AwaitHead, S::BodyDone) => P::AwaitHead,
            (P::Body | P::Connect | P::AwaitHead, S::Retry) => {
                if matches!(self, P::Body) {
                    P::Body
                } else {
                    P::Connect
                }
            }
            (P::Body | P::Connect | P::AwaitHead, S::EventStream) => P::AwaitFirstToken,
            (P::Body | P::Connect | P::AwaitHead, S::PlainBody) => P::Streaming,
            (P::AwaitFirstToken, S::FirstToken) => P::Streaming,
            (P::AwaitFirstToken, S::LagHigh) => P::AwaitFirstToken,
            (P::AwaitFirstToken | P::Streaming | P::Paused | P::Finishing, S::BodyDone) => self,
            (P::Streaming, S::FirstToken) => P::Streaming,
            (P::Streaming, S::LagHigh) => P::Paused,
            (P::Paused, S::LagLow) => P::Streaming,
            (P::Finishing, S::Delivered) => P::KeptAlive,
            (P::Handshake | P::KeptAlive, _) | (P::Finishing, S::ProducerDone) => return None,
            // Refusals, errors and ends may come at any time.
            (_, S::ProducerDone) => P::Finishing,
            _ => return None,
        })
    }
}

closed_enum! {
    /// Why a stream ended. Exactly one per stream.
    End {
        /// The whole answer was delivered.
        Done = "done",
        /// The client closed or reset its connection.
        ClientLeft = "client_left",
        /// The client stopped reading for longer than the write stall deadline.
        WriteStall = "write_stall",
        /// The request's head did not arrive in time.
        HeadTimeout = "head_timeout",
        /// The request's body did not arrive in time.
        BodyTimeout = "body_timeout",
        /// The request broke a rule of HTTP or a limit.
        Refused = "refused",
        /// No upstream is configured or resolved for this route.
        NoUpstream = "no_upstream",
        /// No backend accepted a connection.
        UpstreamRefused = "upstream_refused",
        /// TLS with the backend failed: its certificate is not to be trusted, or it speaks none that we do.
        UpstreamTls = "upstream_tls",
        /// No backend accepted a connection in time.
        ConnectTimeout = "connect_timeout",
        /// The backend did not take the request in time.
        UpstreamStalled = "upstream_stalled",
        /// The backend's response head did not arrive in time.
        UpstreamHeadTimeout = "upstream_head_timeout",
        /// No token arrived in time.
        FirstTokenTimeout = "first_token_timeout",
        /// The gap between two tokens was too long.
        BetweenTokensTimeout = "between_tokens_timeout",
        /// The stream as a whole took too long.
        TotalTimeout = "total_timeout",
        /// The backend reset its connection.
        UpstreamReset = "upstream_reset",
        /// The backend's stream ended without its end mark, or its body short of its length.
        UpstreamTruncated = "upstream_truncated",
        /// The backend broke a rule of HTTP or SSE.
        UpstreamMalformed = "upstream_malformed",
        /// The backend reported a failure within its stream, and the client was given it.
        UpstreamError = "upstream_error",
        /// After an early commit, the backend answered with an error status.
        UpstreamStatus = "upstream_status",
        /// The durable stream that was being read was deleted, expired, or has dropped what was to be read next.
        Gone = "gone",
        /// A reader of a shared stream fell behind what is kept of it.
        Lagged = "lagged",
        /// Somebody stopped the stream by its id.
        StreamStopped = "stream_stopped",
        /// Its last client had left, and none came back in time.
        Abandoned = "abandoned",
        /// The server ended before the stream did, and what was stored of it is all there is.
        Interrupted = "interrupted",
        /// Slots or descriptors ran out.
        Overload = "overload",
        /// The drain deadline passed.
        Drain = "drain",
        /// The process was told to stop at once.
        Stopped = "stopped",
    }
}

impl End {
    /// What the client is told, where it can still be told something.
    pub fn fault(self) -> Fault {
        use Culprit::{Client, Gateway, Operator, Upstream};
        let (status, culprit, retry_helps, message) = match self {
            End::Done => (200, Gateway, false, "The stream is complete."),
            End::ClientLeft => (499, Client, false, "The client closed its connection."),
            End::WriteStall => (408, Client, true, "The client did not read the response in time."),
            End::HeadTimeout => (408, Client, true, "The request head did not arrive in time."),
            End::BodyTimeout => (408, Client, true, "The request body did not arrive in time."),
            End::Refused => (400, Client, false, "The request is not valid HTTP."),
            End::NoUpstream => (503, Operator, true, "No model backend is available for this path."),
            End::UpstreamRefused => (502, Upstream, true, "The model backend could not be reached."),
            End::UpstreamTls => {
                (502, Upstream, false, "No secure connection to the model backend could be made.")
            }
            End::ConnectTimeout => {
                (504, Upstream, true, "The model backend did not accept a connection in time.")
            }
            End::UpstreamStalled => {
                (504, Upstream, true, "The model backend did not take the request in time.")
            }
            End::UpstreamHeadTimeout => (504, Upstream, true, "The model backend did not answer in time."),
            End::FirstTokenTimeout => (504, Upstream, true, "The model backend produced no token in time."),
            End::BetweenTokensTimeout => (504, Upstream, true, "The model backend stopped producing tokens."),
            End::TotalTimeout => (504, Gateway, false, "The stream exceeded the time allowed for it."),
            End::UpstreamReset => (502, Upstream, true, "The model backend reset the connection."),
            End::UpstreamTruncated => {
                (502, Upstream, true, "The model backend ended the stream before it was complete.")
            }
            End::UpstreamMalformed => (502, Upstream, false, "The model backend sent an invalid response."),
            End::UpstreamError => (502, Upstream, true, "The model backend reported an error."),
            End::UpstreamStatus => (502, Upstream, true, "The model backend answered with an error."),
            End::Gone => (410, Client, false, "The stream was deleted or dropped while it was read."),
            End::Lagged => {
                (410, Client, true, "The client fell too far behind; it may go on from its last event id.")
            }
            End::StreamStopped => (410, Client, false, "The stream was stopped."),
            End::Abandoned => (410, Client, false, "The last client left, and none came back in time."),
            End::Interrupted => {
                (503, Operator, true, "The server was restarted before the stream was complete.")
            }
            End::Overload => (503, Gateway, true, "The server is at capacity."),
            End::Drain => (503, Operator, true, "The server is shutting down."),
            End::Stopped => (503, Operator, true, "The server was stopped."),
        };
        Fault { status, code: self.name(), message, culprit, retry_helps }
    }
}

/// The deadlines of one route, in milliseconds; 0 is off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Deadlines {
    /// From a connection's (or a kept-alive request's) first byte to its complete head.
    pub head_ms: u32,
    /// For each 64 KiB of a request body, so that a trickle does not extend it.
    pub body_ms: u32,
    /// From the first attempt to a standing backend connection, over all addresses.
    pub connect_ms: u32,
    /// From the complete request to the backend's final head.
    pub upstream_head_ms: u32,
    /// From the complete request to the first token of an event stream.
    pub first_token_ms: u32,
    /// Between two events of an event stream, or two receives of an ordinary body.
    pub between_tokens_ms: u32,
    /// From the complete head to the last byte produced.
    pub total_ms: u32,
    /// While a send is in flight and its peer acknowledges nothing.
    pub write_stall_ms: u32,
    /// Between two requests on a client connection, and before its first byte.
    pub keep_alive_ms: u32,
    /// From the dialect's end mark to the end of the backend's body.
    pub finish_ms: u32,
}

impl Default for Deadlines {
    fn default() -> Self {
        Deadlines {
            head_ms: 10_000,
            body_ms: 30_000,
            connect_ms: 5_000,
            // Long prefills are answered by a head only when the first token is there (vLLM, llama.cpp).
            upstream_head_ms: 300_000,
            first_token_ms: 300_000,
            between_tokens_ms: 60_000,
            total_ms: 0,
            write_stall_ms: 60_000,
            keep_alive_ms: 75_000,
            finish_ms: 1_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table as it stands; a change of behaviour changes this text, knowingly.
    #[test]
    fn transition_table() {
        let mut table = String::new();
        for &phase in Phase::ALL {
            table.push_str(phase.name());
            table.push(':');
            for &step in Step::ALL {
                if let Some(next) = phase.after(step) {
                    table.push_str(&format!(" {}>{}", step.name(), next.name()));
                }
            }
            table.push('\n');
        }
        let expected = "\
handshake:
head: head_done>body producer_done>finishing
body: body_done>connect connected>body retry>body event_stream>await_first_token plain_body>streaming producer_done>finishing
connect: connected>await_head retry>connect event_stream>await_first_token plain_body>streaming producer_done>finishing
await_head: body_done>await_head retry>connect event_stream>await_first_token plain_body>streaming producer_done>finishing
await_first_token: body_done>await_first_token first_token>streaming lag_high>await_first_token producer_done>finishing
streaming: body_done>streaming first_token>streaming lag_high>paused producer_done>finishing
paused: body_done>paused lag_low>streaming producer_done>finishing
finishing: body_done>finishing delivered>kept_alive
kept_alive:
";
        assert_eq!(table, expected);
    }

    #[test]
    fn every_end_has_a_name_of_its_own_and_a_message() {
        let mut names: Vec<_> = End::ALL.iter().map(|end| end.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), End::COUNT);
        assert!(End::ALL.iter().all(|end| end.fault().message.ends_with('.')));
    }
}
