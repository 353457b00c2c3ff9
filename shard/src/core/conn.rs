//! A connection: a slab entry and a state machine. What the kernel holds of it, what it wants, and how it ends.
//!
//! ```text
//!   Open ──(last byte confirmed, FIN owed)──► Lingering ──(peer's FIN, or time)──► Joining ──(no op left)──► closed, freed
//!     └────────────────────────(error, cancel, peer gone)────────────────────────────┘
//! ```
//! `Open ──(a request that belongs to another shard)──► Moving ──(no op left)──► handed over, freed`.
//! `Joining` is the second of three steps: shut down, wait until every operation has completed, close and free.

use crate::io::{Close, OpId};
use crate::tls::Tls;
use protocol::http::BodyDecoder;
use protocol::ledger::Ledger;
use protocol::slots::Key;
use protocol::wheel::TimerId;

/// How far a connection has come towards its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum State {
    /// In use, or idle.
    Open,
    /// Everything was sent and FIN too; what still arrives is read and dropped, so that no RST destroys what was sent.
    Lingering,
    /// On its way to another shard, as soon as the kernel holds nothing of it.
    Moving(u16),
    /// Shut; its operations are ending.
    Joining(Close),
}

/// Which operations the kernel holds.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Ops {
    pub(crate) receive: Option<OpId>,
    pub(crate) send: Option<OpId>,
    pub(crate) connect: Option<OpId>,
    pub(crate) hangup: Option<OpId>,
}

impl Ops {
    pub(crate) fn none(&self) -> bool {
        self.receive.is_none() && self.send.is_none() && self.connect.is_none() && self.hangup.is_none()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = OpId> {
        [self.receive, self.send, self.connect, self.hangup].into_iter().flatten()
    }
}

/// A client's connection or a backend's.
/// What each receive and send needs comes first and lies together, as in a stream.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Conn<S> {
    pub(crate) socket: S,
    pub(crate) state: State,
    /// Whether bytes are wanted; the receive is armed and cancelled to follow it.
    pub(crate) receive_wanted: bool,
    /// The receive was cancelled and its final completion is awaited.
    pub(crate) receive_cancelled: bool,
    /// The peer sent FIN.
    pub(crate) peer_fin: bool,
    /// The confirmation of the send in flight is deferred ([`Confirm::Deferred`](crate::io::Confirm)).
    pub(crate) deferred: bool,
    /// Listed to be pumped at the end of the turn.
    pub(crate) dirty: bool,
    /// The stream it serves; none while idle.
    pub(crate) stream: Option<Key>,
    /// Completions of its receive that wait for a later turn.
    pub(crate) waiting: u32,
    /// `0 <= held_from <= held.len()`; less than the latter unless both are 0.
    pub(crate) held_from: u32,
    /// Cursor into the stream's response (client) or request (backend).
    pub(crate) ledger: Ledger,
    /// When something was last received, ms.
    pub(crate) heard_ms: u64,
    /// When to look whether its peer has reset it, ms; `u64::MAX`: nothing came since the last look.
    pub(crate) look_ms: u64,
    /// Excess pieces, of the turn with that number (its lower bits).
    pub(crate) excess: (u32, u32),
    /// It speaks TLS; none before a client's hello.
    pub(crate) tls: Option<Box<Tls>>,
    pub(crate) role: Role,
    /// The request body (client) or response body (backend) under way; none before its head.
    pub(crate) body: Option<BodyDecoder>,
    /// From `held_from` on: a partial head, or the start of pipelined requests.
    pub(crate) held: Vec<u8>,
    pub(crate) ops: Ops,
    /// The armed timer and when it fires.
    pub(crate) timer: Option<(TimerId, u64)>,
    /// When the connection's own waiting (head, keep-alive, connect, linger, pool) is over, ms; `u64::MAX` never.
    pub(crate) due_ms: u64,
    /// When it is looked at next, ms.
    pub(crate) stall_check_ms: u64,
    /// When the send in flight was started, or was last seen to have made progress, ms.
    pub(crate) progress_ms: u64,
    /// What the peer had acknowledged at the last look; none before the first.
    pub(crate) acknowledged: Maybe,
    /// Memory of it beyond the connection's share, bytes.
    pub(crate) drawn: u64,
}

/// What a connection is for.
#[derive(Debug)]
pub(crate) enum Role {
    Client(Client),
    Backend(Backend),
}

/// Where a client's TLS handshake stands.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) enum Handshake {
    /// Complete, or there is none.
    #[default]
    None,
    /// Its hello is to come, on a listener with that configuration.
    Awaited(u16),
    /// Its hello waits until there is room for one more handshake.
    Waiting(u16),
    /// Under way.
    Active,
}

/// The client's side of a connection.
#[derive(Debug, Default)]
pub(crate) struct Client {
    /// Body bytes until the body deadline is renewed.
    pub(crate) body_progress: u32,
    /// Requests begun.
    pub(crate) requests: u32,
    /// Requests refused.
    pub(crate) refused: u32,
    /// A partial head is held, and its deadline runs.
    pub(crate) in_head: bool,
    pub(crate) handshake: Handshake,
    /// What it asks for is here or nowhere: it was sent by the shard that must know, or is to be sent.
    pub(crate) sent: bool,
    /// Shards that its request was moved on from, or that were passed over, in their order.
    pub(crate) hops: u16,
    /// The shard that it was moved here from.
    pub(crate) moved_from: Option<u16>,
    /// It was moved here for what it asked for, and is likely to ask for it again: it is not moved away for the sake of load.
    pub(crate) settled: bool,
    /// Bytes dropped while lingering.
    pub(crate) dropped: u32,
}

/// The backend's side of a connection.
#[derive(Debug)]
pub(crate) struct Backend {
    /// Index in the upstream set.
    pub(crate) upstream: u32,
    /// Which of its addresses.
    pub(crate) address: u16,
    /// Requests sent before the one under way.
    pub(crate) served: u32,
    pub(crate) opened_ms: u64,
    /// Bytes of the response under way were received.
    pub(crate) answered: bool,
    /// Interim responses seen.
    pub(crate) interim: u8,
    /// The backend allows another request.
    pub(crate) keep_alive: bool,
    /// Its own promise of how long it waits for one, s; `u32::MAX`: none.
    pub(crate) keep_alive_s: u32,
    /// In the pool.
    pub(crate) idle: bool,
}

const _: () = assert!(size_of::<Conn<u32>>() <= 256, "every stream has two, and every reader one");

/// A number, or none, in the room of a number. `u64::MAX` counts as one less.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Maybe(u64);

impl Maybe {
    pub(crate) const NONE: Maybe = Maybe(u64::MAX);

    pub(crate) fn some(number: u64) -> Self {
        Maybe(number.min(u64::MAX - 1))
    }

    pub(crate) fn get(self) -> Option<u64> {
        (self != Maybe::NONE).then_some(self.0)
    }

    pub(crate) fn take(&mut self) -> Option<u64> {
        std::mem::replace(self, Maybe::NONE).get()
    }
}

impl From<Option<u64>> for Maybe {
    fn from(number: Option<u64>) -> Self {
        number.map_or(Maybe::NONE, Maybe::some)
    }
}

impl<S> Conn<S> {
    pub(crate) fn new(socket: S, role: Role) -> Self {
        Conn {
            socket,
            state: State::Open,
            tls: None,
            role,
            body: None,
            stream: None,
            ledger: Ledger::default(),
            ops: Ops::default(),
            receive_wanted: false,
            receive_cancelled: false,
            peer_fin: false,
            deferred: false,
            dirty: false,
            held: Vec::new(),
            held_from: 0,
            drawn: 0,
            heard_ms: 0,
            look_ms: u64::MAX,
            waiting: 0,
            excess: (0, 0),
            timer: None,
            due_ms: u64::MAX,
            progress_ms: 0,
            stall_check_ms: u64::MAX,
            acknowledged: Maybe::NONE,
        }
    }

    /// What was received and not yet looked at.
    pub(crate) fn held(&self) -> &[u8] {
        &self.held[self.held_from as usize..]
    }

    /// Takes it out, from its start.
    pub(crate) fn take_held(&mut self) -> Vec<u8> {
        let mut held = std::mem::take(&mut self.held);
        held.drain(..std::mem::take(&mut self.held_from) as usize);
        held
    }

    /// Throws it away.
    pub(crate) fn drop_held(&mut self) {
        (self.held, self.held_from) = (Vec::new(), 0);
    }

    /// Shards that a client's request has gone by.
    pub(crate) fn hops(&self) -> u16 {
        match &self.role {
            Role::Client(client) => client.hops,
            Role::Backend(_) => 0,
        }
    }

    /// Whether what a client asks for is here or nowhere.
    pub(crate) fn is_sent(&self) -> bool {
        matches!(&self.role, Role::Client(client) if client.sent)
    }

    pub(crate) fn is_client(&self) -> bool {
        matches!(self.role, Role::Client(_))
    }

    pub(crate) fn as_client(&self) -> Option<&Client> {
        match &self.role {
            Role::Client(client) => Some(client),
            Role::Backend(_) => None,
        }
    }

    pub(crate) fn client(&mut self) -> Option<&mut Client> {
        match &mut self.role {
            Role::Client(client) => Some(client),
            Role::Backend(_) => None,
        }
    }

    pub(crate) fn backend(&mut self) -> Option<&mut Backend> {
        match &mut self.role {
            Role::Backend(backend) => Some(backend),
            Role::Client(_) => None,
        }
    }
}
