//! Durable Streams: append-only streams with a URL each, published to and read over plain HTTP. The protocol is open
//! (PROTOCOL.md of github.com/durable-streams/durable-streams); its sections are cited where they are fulfilled.
//!
//! ```text
//!   head ─► Request::parse ─► Store::handle ─┬─► Reply::Answer   whole, in memory
//!                      body ─────┘           ├─► Reply::Body     a head, and bytes that Store::read gives bit by bit
//!                                            ├─► Reply::Events   the same without an end, while the stream goes on
//!                                            └─► Reply::Wait ─► Store::poll, when woken or over ─► one of the others
//! ```
//!
//! A [`Store`] holds the streams of one shard. It does no I/O and knows no clock; whom an append concerns it tells by
//! [`Store::take_woken`].

mod home;
pub mod journal;
mod json;
mod lines;
mod listing;
mod offset;
mod persist;
mod reading;
mod reads;
mod rehome;
pub mod relayed;
mod request;
mod retention;
mod room;
mod store;
mod stream;
mod timestamp;
mod writes;

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod rehome_tests;
#[cfg(test)]
mod relayed_tests;
#[cfg(test)]
mod tests;

pub use home::home_of;
pub use listing::StreamLine;
pub use offset::Offset;
pub use reading::{Progress, Reading, Shared};
pub use rehome::{Rehoming, agree};
pub use request::{Operation, Request};
pub use store::{Answer, Counters, Poll, Reply, Store, Totals};

use crate::fault::{Culprit, Fault};
use crate::limits;

/// The refusal of a body that is longer than it may be.
pub const TOO_LARGE: Fault = refusals::TOO_LARGE;

/// The answer to a change that the disk did not take in time.
pub const UNCERTAIN: Fault = refusals::UNCERTAIN;

/// The answer to a creation of which other shards did not say in time what became of it.
pub const UNSETTLED: Fault = refusals::UNSETTLED;

/// What the operator decides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Where the streams are: `/v1/durable`, without a final slash. `None`: nowhere, nothing is served.
    pub prefix: Option<String>,
    /// Bytes of one request's body.
    pub body_bytes_max: u64,
    /// Bytes of one stream; beyond, its oldest messages are dropped.
    pub stream_bytes_max: u64,
    /// How long a message is held, ms; 0: as long as there is room.
    pub retention_ms: u64,
    /// Memory of the streams of one shard, bytes.
    pub store_bytes_max: u64,
    /// How long a long-poll waits for data, ms, > 0.
    pub long_poll_ms: u32,
    /// After how long an event stream is ended, so that its reader comes again, ms; 0 is never.
    pub events_ms: u32,
    /// Whether pages of any origin may use the streams.
    pub cors: bool,
    /// Whether they are written to disk.
    pub on_disk: bool,
    /// The longest time between a write to disk and its sync, ms; 0: nothing is acknowledged before it is synced.
    pub fsync_interval_ms: u32,
    /// Bytes of a segment file.
    pub segment_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            prefix: Some("/v1/durable".to_owned()),
            body_bytes_max: limits::DURABLE_BODY_BYTES_MAX,
            stream_bytes_max: limits::DURABLE_STREAM_BYTES_MAX,
            retention_ms: 0,
            store_bytes_max: limits::DURABLE_STORE_BYTES_MAX,
            long_poll_ms: limits::DURABLE_LONG_POLL_MS,
            events_ms: limits::DURABLE_EVENTS_MS,
            cors: true,
            on_disk: false,
            fsync_interval_ms: 0,
            segment_bytes: limits::DURABLE_SEGMENT_BYTES,
        }
    }
}

impl Settings {
    /// Whether a request path names a stream, or the root of all streams.
    pub fn covers(&self, path: &str) -> bool {
        let below = |prefix: &String| {
            path.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.prefix.as_ref().is_some_and(below)
    }
}

/// The time of a request, and something random.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Of a clock that never goes back, ms.
    pub ms: u64,
    /// Since 1970, ms.
    pub unix_ms: u64,
    /// Any number; it need not be secret.
    pub random: u64,
}

/// What the bytes of a stream are (PROTOCOL.md section 9).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Form {
    /// Messages of `application/json`.
    Json,
    /// Of `text/*`.
    Text,
    /// Any others.
    Binary,
}

impl Form {
    fn of(content_type: &str) -> Self {
        let media = media_type(content_type);
        if media.eq_ignore_ascii_case("application/json") {
            Form::Json
        } else if media.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("text/")) {
            Form::Text
        } else {
            Form::Binary
        }
    }
}

/// A content type without its parameters.
fn media_type(content_type: &str) -> &str {
    content_type.split(';').next().unwrap_or_default().trim()
}

const fn fault(status: u16, code: &'static str, message: &'static str) -> Fault {
    Fault { status, code, message, culprit: Culprit::Client, retry_helps: false }
}

/// Every refusal of the protocol's own, by its stable code.
mod refusals {
    use super::{Culprit, Fault, fault};

    pub(super) const NOT_FOUND: Fault = fault(404, "stream_not_found", "There is no stream at this path.");
    pub(super) const DELETED: Fault =
        fault(410, "stream_deleted", "The stream was deleted; its forks still hold its data.");
    pub(super) const METHOD: Fault =
        fault(405, "method_not_allowed", "A stream knows GET, HEAD, POST, PUT, DELETE and OPTIONS.");
    pub(super) const RESERVED: Fault =
        fault(501, "subscriptions_unsupported", "Subscriptions (__ds) are not implemented.");
    pub(super) const BAD_PATH: Fault =
        fault(400, "bad_path", "A stream's path must not have `.` or `..` segments.");
    pub(super) const BAD_FIELD: Fault =
        fault(400, "bad_field", "A field of the protocol must be visible ASCII of at most 1024 bytes.");
    pub(super) const BAD_QUERY: Fault = fault(
        400,
        "bad_query",
        "`offset` may be given once and must not be empty; `live` is long-poll or sse; escapes must be whole.",
    );
    pub(super) const BAD_OFFSET: Fault = fault(
        400,
        "bad_offset",
        "An offset must be -1, now, or one that this server gave out for this stream.",
    );
    pub(super) const OFFSET_REQUIRED: Fault =
        fault(400, "offset_required", "A live read needs an offset: -1, now, or one given out before.");
    pub(super) const OFFSET_BEYOND: Fault =
        fault(400, "offset_beyond_end", "The offset is behind the end of the stream.");
    pub(super) const OFFSET_GONE: Fault =
        fault(410, "offset_gone", "Data from this offset on is no longer held.");
    pub(super) const OTHER_STREAM: Fault = fault(
        410,
        "offset_of_another_stream",
        "The offset belongs to a stream that was at this path before, and is gone.",
    );
    pub(super) const BAD_CONTENT_TYPE: Fault =
        fault(400, "bad_content_type", "The Content-Type must be type/subtype, with parameters or without.");
    pub(super) const CONTENT_TYPE_REQUIRED: Fault =
        fault(400, "content_type_required", "An append must name the Content-Type of its stream.");
    pub(super) const CONTENT_TYPE_DIFFERS: Fault =
        fault(409, "content_type_differs", "The Content-Type is not that of the stream.");
    pub(super) const TTL_AND_EXPIRY: Fault =
        fault(400, "ttl_and_expiry", "Only one of Stream-TTL and Stream-Expires-At may be given.");
    pub(super) const BAD_TTL: Fault =
        fault(400, "bad_ttl", "Stream-TTL must be seconds in decimal digits without leading zeros.");
    pub(super) const BAD_EXPIRY: Fault =
        fault(400, "bad_expiry", "Stream-Expires-At must be a time as RFC 3339 has it.");
    pub(super) const EXISTS: Fault =
        fault(409, "stream_exists", "There is a stream at this path, with another configuration.");
    pub(super) const PATH_HELD: Fault =
        fault(409, "path_held", "A deleted stream holds this path until its forks are deleted too.");
    pub(super) const EMPTY_BODY: Fault =
        fault(400, "empty_body", "An append needs a body, unless it closes the stream.");
    pub(super) const BAD_JSON: Fault = fault(400, "bad_json", "The body is not valid JSON.");
    pub(super) const EMPTY_ARRAY: Fault =
        fault(400, "empty_array", "An empty array holds no message to append.");
    pub(super) const TOO_MANY_MESSAGES: Fault =
        fault(413, "too_many_messages", "One append may hold 65536 messages.");
    pub(super) const TOO_LARGE: Fault =
        fault(413, "body_too_large", "The body is longer than an append may be.");
    pub(super) const CLOSED: Fault = fault(409, "stream_closed", "The stream is closed.");
    pub(super) const SEQUENCE: Fault =
        fault(409, "sequence_regression", "Stream-Seq must be greater than that of the append before.");
    pub(super) const BAD_PRODUCER: Fault = fault(
        400,
        "bad_producer",
        "Producer-Id (not empty), Producer-Epoch and Producer-Seq (integers below 2^53) must be given together.",
    );
    pub(super) const EPOCH_START: Fault =
        fault(400, "epoch_start", "A new epoch of a producer must start with sequence 0.");
    pub(super) const STALE_EPOCH: Fault = fault(403, "stale_epoch", "The producer has begun a later epoch.");
    pub(super) const SEQUENCE_GAP: Fault =
        fault(409, "sequence_gap", "Appends of the producer before this one are missing.");
    pub(super) const TOO_MANY_PRODUCERS: Fault =
        fault(429, "too_many_producers", "The stream knows as many producers as it can.");
    pub(super) const BAD_FORK: Fault = fault(
        400,
        "bad_fork",
        "Stream-Fork-Offset must be an offset and Stream-Fork-Sub-Offset a number; both need Stream-Forked-From, a path.",
    );
    pub(super) const SOURCE_NOT_FOUND: Fault =
        fault(404, "source_not_found", "There is no stream at the path to fork from.");
    pub(super) const SOURCE_DELETED: Fault =
        fault(409, "source_deleted", "The stream to fork from was deleted.");
    pub(super) const FORK_BEYOND: Fault =
        fault(400, "fork_beyond_end", "The stream to fork from does not reach as far.");
    pub(super) const FORK_GONE: Fault = fault(
        410,
        "fork_offset_gone",
        "The stream to fork from no longer holds what lies before the offset.",
    );
    pub(super) const FORK_DEPTH: Fault =
        fault(409, "fork_depth", "A fork of a fork of a fork may go 32 levels deep.");
    pub(super) const JOURNAL_FAILED: Fault = Fault {
        status: 503,
        code: "disk_failed",
        message: "The disk does not take what is written at present; nothing was changed.",
        culprit: Culprit::Gateway,
        retry_helps: true,
    };
    pub(super) const JOURNAL_BEHIND: Fault = Fault {
        status: 503,
        code: "disk_behind",
        message: "Too much waits for the disk; nothing was changed.",
        culprit: Culprit::Gateway,
        retry_helps: true,
    };
    pub(super) const UNSETTLED: Fault = Fault {
        status: 503,
        code: "not_settled",
        message: "Where the stream belongs is not settled in time. It may yet be created; the same request once more is safe.",
        culprit: Culprit::Gateway,
        retry_helps: true,
    };
    pub(super) const UNCERTAIN: Fault = Fault {
        status: 503,
        code: "not_durable",
        message: "The disk did not take it. It is tried again, and may yet be done: a repetition with producer headers is safe.",
        culprit: Culprit::Gateway,
        retry_helps: true,
    };
    pub(super) const FULL: Fault = Fault {
        status: 503,
        code: "store_full",
        message: "There is no memory left for streams, and none that could be given up.",
        culprit: Culprit::Gateway,
        retry_helps: true,
    };
}
