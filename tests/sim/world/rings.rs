//! The rings of several shards in one world, and which of them runs next: those that have something to do take turns in an
//! order drawn from the seed, and when all sleep the clock goes on to whatever comes first.

use super::operations::Submission;
use super::sockets::{Ending, Listener};
use super::{Counts, Done, Event, Lane, World};
use shard::io::Wait;
use shard::mesh::Command;
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// How often, per mille of its turns, a shard is held up where shards are.
const STALLS: u32 = 20;

/// What one shard has asked of the kernel, and what it will be told.
#[derive(Default)]
pub(crate) struct Ring {
    /// The socket of every connection there ever was: a key names one, for ever.
    pub(super) owners: BTreeMap<(u32, u32), usize>,
    pub(crate) counts: Counts,
    pub(super) submissions: Vec<Submission>,
    pub(super) endings: Vec<Ending>,
    pub(super) ready: VecDeque<(Lane, Done)>,
    /// Sends that have ended, and whose end is told by the next turn that returns for another reason.
    pub(super) deferred: Vec<u64>,
    pub(super) buffers_used: Rc<Cell<usize>>,
    /// Turns since something got further.
    pub(super) turns_barren: u32,
    /// It sleeps until then, unless something comes; beside others only.
    asleep_until: Option<u64>,
    /// Its CPU is busy with something else until then.
    stalled_until: u64,
    /// What its shard is told when it hears its bell.
    pub(crate) commands: Vec<Command>,
    /// Its shard has left: what it still turns for is what the kernel holds.
    pub(crate) left: bool,
}

impl Ring {
    fn has_work(&self) -> bool {
        !self.ready.is_empty() || !self.submissions.is_empty() || !self.endings.is_empty()
    }

    /// When it would run, if nothing else happened.
    fn due_us(&self) -> u64 {
        let due_us = match self.asleep_until {
            _ if self.has_work() => 0,
            _ if self.left => u64::MAX,
            Some(until_us) => until_us,
            None => 0,
        };
        due_us.max(self.stalled_until)
    }
}

impl World {
    /// One more shard's, with as many listeners as the others have.
    pub(crate) fn add_ring(&mut self) {
        let (ring, listeners) = (self.rings.len(), self.listeners_each());
        self.rings.push(Ring::default());
        self.listeners.extend((0..listeners).map(|_| Listener { ring, ..Listener::default() }));
    }

    pub(crate) fn listeners_each(&self) -> usize {
        self.listeners.len() / self.rings.len()
    }

    /// A shard beside others goes to sleep, if it may: its turn returns at once, and the next one is not before it is woken.
    pub(super) fn lie_down(&mut self, ring: usize, wait: Wait) -> bool {
        let until_us = match wait {
            Wait::Not => 0,
            Wait::Until(until_us) => until_us,
            Wait::Forever => u64::MAX,
        };
        let awake = !self.rings[ring].ready.is_empty() || until_us <= self.now;
        let ring = &mut self.rings[ring];
        ring.asleep_until = (!awake).then_some(until_us);
        if !awake {
            ring.turns_barren = 0;
        }
        awake
    }

    /// Lets time pass until some shard has something to do, and says which; none: nothing does before `limit_us`, or ever.
    pub(crate) fn next_awake(&mut self, limit_us: u64) -> Option<usize> {
        self.stuck = false;
        let hour_later = self.now + 3_600_000_000;
        loop {
            let mut awake = self.awake();
            if awake.is_empty() {
                self.match_accepts();
                awake = self.awake();
            }
            if !awake.is_empty() {
                let ring = self.rng.pick(&awake);
                if self.faults.stall_us > 0 && self.rng.chance(STALLS) {
                    self.rings[ring].stalled_until = self.now + self.rng.skewed(self.faults.stall_us);
                    continue;
                }
                self.note(11, ring as u64);
                return Some(ring);
            }
            let deadline = self.rings.iter().map(Ring::due_us).min().unwrap_or(u64::MAX);
            let event = self.events.keys().next().map_or(u64::MAX, |&(time, _)| time);
            let next = deadline.min(event);
            if limit_us <= next && limit_us < u64::MAX {
                self.now = self.now.max(limit_us);
                self.happen_until(self.now);
                return None;
            }
            if next == u64::MAX || deadline == u64::MAX && self.now > hour_later {
                self.stuck = true;
                return None;
            }
            let late = if deadline < event { self.rng.skewed(self.faults.overshoot_us) } else { 0 };
            self.now = self.now.max(next + late);
            self.happen_until(self.now);
        }
    }

    fn awake(&self) -> Vec<usize> {
        (0..self.rings.len()).filter(|&ring| self.rings[ring].due_us() <= self.now).collect()
    }

    /// A shard's CPU has something else to do for so long.
    pub(crate) fn hold_up(&mut self, ring: usize, us: u64) {
        self.rings[ring].stalled_until = self.now + us;
    }

    /// The shard that has a client's connection.
    pub(crate) fn shard_of(&self, client: usize) -> Option<usize> {
        let client = &self.clients[client];
        let socket = &self.sockets[client.socket?];
        (client.ended.is_none() && !socket.closed).then_some(socket.ring)
    }

    /// A shard's bell will ring.
    pub(crate) fn rings_at(&mut self, ring: usize, after_us: u64) {
        self.after(after_us, Event::Bell(ring));
    }

    /// Whether a shard will have a turn for its bell, or has something to do as it is.
    pub(crate) fn is_rung(&self, ring: usize) -> bool {
        let bell = |event: &Event| matches!(event, Event::Bell(of) if *of == ring);
        self.rings[ring].has_work()
            || self.rings[ring].asleep_until.is_none()
            || self.events.values().any(bell)
    }

    /// Somebody has rung a shard's bell, which is heard some time later.
    pub(crate) fn rung(&mut self, ring: usize) {
        let delay = self.delay();
        self.after(delay, Event::Bell(ring));
    }
}
