//! The streams of a shard that outlive their connections, as the control thread is told of them: some at a time.

use crate::settings::OnLeave;
use protocol::durable::StreamLine;
use protocol::phase::End;
use protocol::resume::StreamId;

/// Where a listing goes on.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Place {
    /// Among the durable streams, which come last.
    pub durable: bool,
    /// The next slot.
    pub slot: u32,
}

/// Which streams are asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Inquiry {
    /// Those from this place on.
    From(Place),
    /// The one with this id, and how far its readers are behind.
    Id(StreamId),
    /// The durable one at this path.
    Path(String),
}

/// Some streams of a shard.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Page {
    /// In no particular order.
    pub kept: Vec<KeptStream>,
    /// The same.
    pub durable: Vec<StreamLine>,
    /// Where the others are; a stream that begins or ends meanwhile may be among them or not.
    pub next: Option<Place>,
}

/// What is told of a stream that can be read by its id.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeptStream {
    /// Its id.
    pub id: String,
    /// Index of its route.
    pub route: usize,
    /// A phase's name, `detached` or `over`.
    pub phase: &'static str,
    /// How it ended, if it is over.
    pub end: Option<End>,
    /// Its dialect's name.
    pub dialect: &'static str,
    /// The model that was asked for, while the stream is under way.
    pub model: Option<String>,
    /// What becomes of it when its last client leaves.
    pub on_leave: OnLeave,
    /// A response in background.
    pub background: bool,
    /// Id of the first event that is held, or would be.
    pub earliest_event_id: u64,
    /// Id of its newest event, 0: none.
    pub last_event_id: u64,
    /// Bytes of its answer so far, as it goes over the wire.
    pub bytes: u64,
    /// Those of them that are held.
    pub held_bytes: u64,
    /// Milliseconds since it began.
    pub age_ms: u64,
    /// Milliseconds since its model last said something, or since its end.
    pub quiet_ms: u64,
    /// Clients that read it, the one that asked for it included.
    pub readers: usize,
    /// Bytes that the ten slowest of them are behind; of a single stream only.
    pub pending_bytes: Vec<u64>,
}
