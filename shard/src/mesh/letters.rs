//! What goes from shard to shard: clients, with what is known of them; streams to be created; what homes of streams and their mirrors
//! tell each other.

use crate::core::Description;
use crate::settings::OnLeave;
use crate::tls::TlsAtRest;
use protocol::dialect::Dialect;
use protocol::durable::{Answer, Request, Shared};
use protocol::mirror::{News, Told};
use protocol::phase::Phase;
use protocol::slots::Key;

/// A client that is moved to another shard, between two of its requests or in the middle of an answer that is read there.
#[derive(Debug)]
pub struct Moved {
    /// What it has sent and nobody looked at: the request that belongs there, whatever follows.
    pub(crate) held: Vec<u8>,
    pub(crate) tls: Option<TlsAtRest>,
    /// It has sent its FIN.
    pub(crate) peer_fin: bool,
    pub(crate) requests: u32,
    pub(crate) refused: u32,
    /// Shards that its request has gone by, in their order.
    pub(crate) hops: u16,
    /// The shard that it comes from.
    pub(crate) from: usize,
    /// The stream that it asks for is there, or nowhere: the shard that its path belongs to says so.
    pub(crate) sent: bool,
    /// It asks for nothing, and was moved for the sake of load: when it will have been idle for too long, ms.
    pub(crate) idle_due_ms: Option<u64>,
    /// What it is being answered.
    pub(crate) answer: Option<Box<Answering>>,
}

/// A stream to be created for a client of one shard, on its way to the shard that can tell, or do it.
#[derive(Debug)]
pub(crate) struct Errand {
    pub(crate) request: Request,
    pub(crate) body: Vec<u8>,
    /// The shard of the client, and its stream there.
    pub(crate) of: (usize, Key),
    pub(crate) stage: Stage,
    /// Shards it was sent to.
    pub(crate) hops: u8,
}

/// What is known of an errand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// Nothing yet.
    Asking,
    /// The path's shard says that there is such a stream here.
    Here,
    /// There is none, the path's shard has reserved the path, and the source of the fork is looked for.
    Forking,
    /// The shard of the source's path says that the source is here.
    SourceHere,
}

/// What shards tell each other of durable streams.
#[derive(Debug)]
pub(crate) enum ErrandLetter {
    /// This is yours.
    Errand(Box<Errand>),
    /// To the path's shard, which had reserved it: whether there is a stream here now.
    Settled { path: Box<str>, made: bool },
    /// The answer to a client of that shard. Of a fork it goes by the path's shard, which has heard of the fork by then.
    Answered { to: (usize, Key), answer: Box<Answer> },
    /// To the path's shard: there is no stream here any more.
    Gone { path: Box<str> },
}

/// Where somebody is who shares what live readers of a durable stream share.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SharedPlace {
    /// The shard that has the stream, and the tail's number there.
    pub(crate) home: usize,
    pub(crate) tail: u64,
    pub(crate) shared: Shared,
    /// Next byte of the tail's log to be sent, which is an event's first.
    pub(crate) at: u64,
    /// The position in the durable stream there.
    pub(crate) behind: u64,
}

/// The answer of a live reader of a durable stream, between two events.
#[derive(Debug)]
pub(crate) struct Answering {
    pub(crate) place: SharedPlace,
    pub(crate) route: usize,
    pub(crate) dialect: Dialect,
    pub(crate) phase: Phase,
    pub(crate) close: bool,
    /// When it is to come again, ms.
    pub(crate) due_ms: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) events_sent: u64,
    pub(crate) started_us: u64,
    pub(crate) asked_us: u64,
    pub(crate) first_token_us: Option<u64>,
    pub(crate) description: Option<Box<Description>>,
}

/// What a mirror is one of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Subject {
    /// A stream, by its number at its home.
    Stream(u64),
    /// What live readers of a durable stream share, by a number that its home gave it.
    Tail(u64),
}

/// What a stream's home and a mirror of it tell each other.
#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) subject: Subject,
    /// Which mirror: of all that the stream ever had, no other has this number.
    pub(crate) opening: u64,
    pub(crate) says: Says,
}

/// Who says it is clear from what it is.
#[derive(Debug)]
pub(crate) enum Says {
    /// The home to the mirror. Of a tail: where in the bytes events end, and the positions in the durable stream there.
    News(News<About>, Box<[(u64, u64)]>),
    /// The mirror to its home.
    Told(Told),
    /// The same: it is no mirror any more, and nobody reads it.
    Left,
}

/// What a mirror must know of its stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct About {
    pub(crate) route: usize,
    pub(crate) dialect: Dialect,
    pub(crate) chunked: bool,
    pub(crate) background: bool,
    /// What its request chose.
    pub(crate) on_leave: Option<OnLeave>,
    pub(crate) began_ms: u64,
    /// It is a tail, of these readers.
    pub(crate) shared: Option<Shared>,
}

/// Something that is handed from shard to shard.
#[derive(Debug)]
pub struct Handed<T> {
    /// What it is.
    pub what: T,
    /// Index of the listener it came from.
    pub listener: usize,
    /// How often it was handed on.
    pub times: u8,
    /// What its shard knew of it, if it was served there before.
    pub moved: Option<Box<Moved>>,
}
