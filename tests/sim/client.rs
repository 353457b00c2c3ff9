//! Scripted clients: they write requests split anywhere, read at their own pace or not at all, and leave when they like.

use crate::plan::Method;
use crate::reader::Reader;
use crate::world::{Event, Peer, PeerRead, Unconnected, World};
use serde::{Deserialize, Serialize};

/// How a client reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Pace {
    Eager,
    Slow {
        bytes: usize,
        every_us: u64,
    },
    /// Reads so many bytes, then none for so long.
    Stuck {
        after_bytes: usize,
        for_us: u64,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum How {
    /// `close(2)`: FIN, or RST when something is unread.
    Close,
    Reset,
    /// FIN, and goes on reading.
    HalfClose,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum When {
    AtUs(u64),
    /// When so many bytes of answers were read.
    Bytes(usize),
    /// When its requests are written.
    Written,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ClientPlan {
    pub(crate) start_us: u64,
    #[serde(skip)]
    pub(crate) exchanges: Vec<usize>,
    pub(crate) pipelined: bool,
    pub(crate) write_bytes: usize,
    pub(crate) write_gap_us: u64,
    pub(crate) pace: Pace,
    pub(crate) leave: Option<(When, How)>,
    /// Waits for so long before each request but the first, if they are not pipelined.
    pub(crate) pause_us: u64,
    /// Stays connected for so long after the last answer.
    pub(crate) idle_us: u64,
    /// Writes these bytes as they are instead of requests.
    pub(crate) raw: Option<Vec<u8>>,
    /// Speaks no TLS where the others do.
    #[serde(skip)]
    pub(crate) bare: bool,
}

impl Default for ClientPlan {
    fn default() -> Self {
        ClientPlan::new(&[])
    }
}

impl ClientPlan {
    pub(crate) fn new(exchanges: &[usize]) -> Self {
        ClientPlan {
            start_us: 0,
            exchanges: exchanges.to_vec(),
            pipelined: false,
            write_bytes: 1 << 20,
            write_gap_us: 0,
            pace: Pace::Eager,
            leave: None,
            pause_us: 0,
            idle_us: 0,
            raw: None,
            bare: false,
        }
    }
}

/// How a client's connection ended for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    /// Nobody listened, or the listener's queue was lost.
    Refused,
    /// It had all answers, and closed.
    Satisfied,
    /// It left before.
    Left,
    /// The shard closed.
    Fin,
    /// The shard, or its kernel, reset.
    Reset,
}

#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) plan: ClientPlan,
    pub(crate) socket: Option<usize>,
    outgoing: Vec<u8>,
    sent: usize,
    /// Where in it each request ends.
    ends: Vec<usize>,
    /// Does not write beyond a byte before so many interim answers (or a final one) are here.
    holds: Vec<(usize, u32)>,
    begun: usize,
    pub(crate) reader: Reader,
    pub(crate) received: usize,
    pub(crate) ended: Option<Ended>,
    pub(crate) ended_us: u64,
    pub(crate) half_closed: bool,
    /// When it last heard something, or asked; and by how much the clock had jumped by then.
    heard: (u64, u64),
    /// By how much the clock jumped while it was connected.
    pub(crate) jumped_us: u64,
    stuck_until: Option<u64>,
    write_due: bool,
    read_due: bool,
    leaving: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ClientStep {
    Start,
    Ask,
    Write,
    Read,
    Leave,
    Satisfied,
}

impl Client {
    pub(crate) fn new(plan: ClientPlan) -> Self {
        Client {
            plan,
            socket: None,
            outgoing: Vec::new(),
            sent: 0,
            ends: Vec::new(),
            holds: Vec::new(),
            begun: 0,
            reader: Reader::new(true),
            received: 0,
            ended: None,
            ended_us: 0,
            half_closed: false,
            heard: (0, 0),
            jumped_us: 0,
            stuck_until: None,
            write_due: false,
            read_due: false,
            leaving: false,
        }
    }

    /// Whether all of one of its requests has left it.
    pub(crate) fn has_sent(&self, exchange: usize) -> bool {
        let nth = self.plan.exchanges.iter().position(|&id| id == exchange);
        nth.and_then(|nth| self.ends.get(nth)).is_some_and(|&end| self.sent >= end)
    }

    /// It has been left hanging for good: what it waits for must come, or it waits on purpose.
    pub(crate) fn waits(&self) -> bool {
        self.ended.is_none()
    }
}

impl World {
    pub(crate) fn add_client(&mut self, plan: ClientPlan) -> usize {
        let client = self.clients.len();
        let start = self.now + plan.start_us;
        self.clients.push(Client::new(plan));
        self.at(start, Event::Client(client, ClientStep::Start));
        client
    }

    pub(crate) fn client_step(&mut self, index: usize, step: ClientStep) {
        if self.clients[index].ended.is_some() {
            return;
        }
        match step {
            ClientStep::Start => self.client_starts(index),
            ClientStep::Ask => self.client_asks(index),
            ClientStep::Write => self.client_writes(index),
            ClientStep::Read => self.client_reads(index),
            ClientStep::Leave => self.client_leaves(index),
            ClientStep::Satisfied => {
                if let Some(socket) = self.clients[index].socket {
                    self.peer_close(socket);
                }
                self.client_ends(index, Ended::Satisfied);
            }
        }
    }

    fn client_ends(&mut self, index: usize, ended: Ended) {
        self.say(|| format!("c{index} ended: {ended:?}"));
        self.client_hears(index);
        let (now, jumped_us) = (self.now, self.jumped_us);
        let client = &mut self.clients[index];
        client.jumped_us = jumped_us - client.jumped_us;
        client.ended = Some(ended);
        client.ended_us = now;
    }

    fn client_starts(&mut self, index: usize) {
        let socket = match self.peer_connects(Peer::Client(index)) {
            Ok(socket) => socket,
            Err(Unconnected::Refused) => return self.client_ends(index, Ended::Refused),
            // The kernel drops the SYN and the client sends it again.
            Err(Unconnected::Full) => return self.after(200_000, Event::Client(index, ClientStep::Start)),
        };
        self.say(|| format!("c{index} connects as s{socket}"));
        let (now, jumped_us) = (self.now, self.jumped_us);
        let client = &mut self.clients[index];
        client.socket = Some(socket);
        client.jumped_us = jumped_us;
        if let Some((When::AtUs(delay), _)) = client.plan.leave {
            self.at(now + delay, Event::Client(index, ClientStep::Leave));
        }
        if let Some(raw) = self.clients[index].plan.raw.clone() {
            self.clients[index].outgoing = raw;
            self.client_writable(index);
        } else {
            self.client_asks(index);
        }
    }

    /// The next request, or all of them.
    fn client_asks(&mut self, index: usize) {
        while let Some(&id) = self.clients[index].plan.exchanges.get(self.clients[index].begun) {
            let request = self.exchanges[id].request.clone();
            let (wire, head_bytes) = request.wire(id, &mut self.rng);
            let client = &mut self.clients[index];
            if request.expect {
                let interim = client.holds.len() as u32 + 1;
                client.holds.push((client.outgoing.len() + head_bytes, interim));
            }
            client.outgoing.extend_from_slice(&wire);
            client.ends.push(client.outgoing.len());
            client.reader.head_only.push(request.method == Method::Head);
            client.begun += 1;
            if !client.plan.pipelined {
                break;
            }
        }
        self.client_writable(index);
    }

    pub(crate) fn client_writable(&mut self, index: usize) {
        let gap = self.clients[index].plan.write_gap_us;
        let delay = self.rng.skewed(gap);
        let client = &mut self.clients[index];
        if !client.write_due && client.ended.is_none() {
            client.write_due = true;
            self.after(delay, Event::Client(index, ClientStep::Write));
        }
    }

    fn client_writes(&mut self, index: usize) {
        let piece_max = self.clients[index].plan.write_bytes as u64;
        let piece = self.rng.skewed(piece_max) as usize + 1;
        let (now, jumped_us) = (self.now, self.jumped_before_us);
        let client = &mut self.clients[index];
        client.write_due = false;
        let Some(socket) = client.socket else { return };
        if client.half_closed {
            return;
        }
        let answers = client.reader.messages.len();
        let interim = client.reader.interim;
        let hold = client.holds.iter().find(|&&(_, wanted)| interim < wanted && answers == 0);
        let end = hold.map_or(client.outgoing.len(), |&(at, _)| at);
        if client.sent >= end {
            return;
        }
        let bytes = client.outgoing[client.sent..end.min(client.sent + piece)].to_vec();
        match self.peer_write(socket, &bytes) {
            Ok(0) => {}
            Ok(taken) => {
                let client = &mut self.clients[index];
                client.sent += taken;
                let all = client.sent == client.outgoing.len();
                if all {
                    client.heard = (now, jumped_us);
                }
                if all && matches!(client.plan.leave, Some((When::Written, _))) {
                    self.after(0, Event::Client(index, ClientStep::Leave));
                } else if !all {
                    self.client_writable(index);
                }
            }
            Err(_) => self.client_readable(index),
        }
    }

    pub(crate) fn client_readable(&mut self, index: usize) {
        let delay = match self.clients[index].plan.pace {
            Pace::Slow { every_us, .. } => every_us,
            _ => self.delay(),
        };
        let client = &mut self.clients[index];
        if !client.read_due && client.ended.is_none() {
            client.read_due = true;
            self.after(delay, Event::Client(index, ClientStep::Read));
        }
    }

    fn client_reads(&mut self, index: usize) {
        let now = self.now;
        let client = &mut self.clients[index];
        client.read_due = false;
        let Some(socket) = client.socket else { return };
        let mut most = usize::MAX;
        match client.plan.pace {
            Pace::Eager => {}
            Pace::Slow { bytes, .. } => most = bytes,
            Pace::Stuck { after_bytes, for_us } if client.received >= after_bytes => {
                let until = *client.stuck_until.get_or_insert(now.saturating_add(for_us));
                if until > now {
                    if until < u64::MAX {
                        client.read_due = true;
                        self.at(until, Event::Client(index, ClientStep::Read));
                    }
                    return;
                }
            }
            Pace::Stuck { after_bytes, .. } => most = after_bytes - client.received,
        }
        match self.peer_read(socket, most) {
            PeerRead::Nothing => {}
            PeerRead::Data(bytes) => {
                self.client_hears(index);
                let client = &mut self.clients[index];
                client.received += bytes.len();
                let before = client.reader.complete();
                client.reader.feed(&bytes);
                let complete = client.reader.complete();
                if !client.leaving
                    && let Some((When::Bytes(limit), _)) = client.plan.leave
                    && client.received >= limit
                {
                    client.leaving = true;
                    self.after(0, Event::Client(index, ClientStep::Leave));
                }
                let client = &self.clients[index];
                if complete > before && client.plan.raw.is_none() {
                    if complete >= client.plan.exchanges.len() {
                        let idle = client.plan.idle_us;
                        self.after(idle, Event::Client(index, ClientStep::Satisfied));
                    } else if !client.plan.pipelined && client.plan.pause_us > 0 {
                        self.after(client.plan.pause_us, Event::Client(index, ClientStep::Ask));
                    } else if !client.plan.pipelined {
                        self.client_asks(index);
                    }
                }
                self.client_writable(index);
                self.client_readable(index);
            }
            PeerRead::Fin => {
                // Before what it ends counts as heard.
                self.client_hears(index);
                self.clients[index].reader.fin();
                self.peer_close(socket);
                self.client_ends(index, Ended::Fin);
            }
            PeerRead::Reset => {
                self.peer_close(socket);
                self.client_ends(index, Ended::Reset);
            }
        }
    }

    /// A client that has asked and reads is not left in silence for longer than its route allows.
    fn client_hears(&mut self, index: usize) {
        let (now, jumped_us) = (self.now, self.jumped_us);
        let client = &mut self.clients[index];
        // Of a jump that is under way, all is still to be excused.
        let since = std::mem::replace(&mut client.heard, (now, self.jumped_before_us));
        let Some(socket) = client.socket else { return };
        let waiting = client.reader.complete() < client.begun && client.sent == client.outgoing.len();
        if !waiting || client.plan.pace != Pace::Eager || client.plan.raw.is_some() || client.half_closed {
            return;
        }
        let exchange = &self.exchanges[client.plan.exchanges[client.reader.complete()]];
        let message = client.reader.messages.get(client.reader.complete());
        let events = message
            .and_then(|message| message.header("content-type"))
            .is_some_and(|kind| kind.starts_with("text/event-stream"))
            && message.is_some_and(|message| message.status() == 200);
        let streams =
            message.is_none() && exchange.request.streaming && exchange.request.dialect.is_model_endpoint();
        let served_us = self.sockets[socket].served_us;
        if served_us == 0 {
            // It waits in the queue or for a slot, or was aborted there.
            return;
        }
        // The first of pipelined requests only: the others' time begins when they are looked at.
        let since_us = since.0.max(served_us);
        let silence_us = (now - since_us).saturating_sub(jumped_us - since.1);
        let bound_us = if events {
            self.silence.heartbeat_us
        } else if exchange.request.body_bytes > 3_000 {
            // The body may have been on its way for long.
            u64::MAX
        } else if streams {
            self.silence.commit_us
        } else {
            self.silence.total_us
        };
        // A shard that is given few completions per turn has a queue of them.
        let queued_us = if self.faults.turn_completions > 0 { 10_000_000 } else { 0 };
        let slack_us = 2_000_000 + queued_us + 20 * self.faults.delay_us + 100 * self.faults.overshoot_us;
        assert!(
            silence_us <= bound_us.saturating_add(slack_us),
            "c{index} heard nothing for {silence_us} us, {bound_us} are allowed: {:?}",
            client.plan
        );
    }

    /// A client leaves although it did not plan to.
    pub(crate) fn leave_now(&mut self, index: usize, how: How) {
        self.clients[index].plan.leave = Some((When::AtUs(self.now), how));
        self.after(0, Event::Client(index, ClientStep::Leave));
    }

    /// It leaves then.
    pub(crate) fn leave_at(&mut self, index: usize, at_us: u64, how: How) {
        self.clients[index].plan.leave = Some((When::AtUs(at_us), how));
        self.after(at_us.saturating_sub(self.now), Event::Client(index, ClientStep::Leave));
    }

    fn client_leaves(&mut self, index: usize) {
        let now = self.now;
        let client = &mut self.clients[index];
        let (Some(socket), Some((_, how))) = (client.socket, client.plan.leave) else { return };
        let written = client.sent == client.outgoing.len();
        let complete = client.reader.complete();
        self.say(|| format!("c{index} leaves: {how:?}"));
        let client = &self.clients[index];
        let asked: Vec<usize> =
            client.plan.exchanges[..client.begun].iter().skip(complete).copied().collect();
        for (nth, &id) in asked.iter().enumerate() {
            let exchange = &mut self.exchanges[id];
            exchange.client_left_us = Some(now);
            exchange.left_how = Some(how);
            exchange.left_socket = Some(socket);
            let streams = exchange.request.streaming && written;
            exchange.left_visibly = nth == 0 && (how == How::Reset || (streams && how == How::Close));
        }
        match how {
            How::Close => self.peer_close(socket),
            How::Reset => self.peer_reset(socket),
            How::HalfClose => self.peer_fin(socket),
        }
        // TLS has more to say at its end than there is room for.
        for id in asked {
            self.exchanges[id].left_unread = self.sockets[socket].inward.len();
        }
        if how == How::HalfClose {
            self.clients[index].half_closed = true;
        } else {
            self.client_ends(index, Ended::Left);
        }
    }
}
