//! Where durable streams are. A stream lives on the shard of its path, a fork with its source, whose data and lifetime it shares;
//! then the shard of its path, its *registrar*, keeps an entry. Clients are moved; what creates a stream goes from shard to shard
//! as an errand, because only the registrar can say whether the path is free, and only the source's shard can make a fork.
//!
//! ```text
//!   a client's shard          registrar: path free? ─ reserved           source's registrar         source's shard
//!   PUT collected ─ Errand ──────► Asking ─ Forking ──────────────────────────► At ─ SourceHere ──────────► Store::handle
//!        ▲                          │  ▲                                                                     │
//!        └─────── Answered ─────────┘  └──────────────── Settled: there is one, or none ─ Answered ──────────┘
//!                                      ◄──────────────── Gone: there is none any more
//! ```
//! Letters from one shard to another keep their order, so that a registrar knows of a fork before its creator does. A path is given up
//! only when the disk cannot take that back: after a crash no two journals have a stream at the same path.

use super::durable::State;
use super::{Leaving, Shard};
use crate::io::Io;
use crate::mesh::{Errand, ErrandLetter, Neighbours, Stage};
use protocol::durable::{Answer, Reply, Request, UNCERTAIN, UNSETTLED, home_of};
use protocol::limits::{ERRAND_HOPS_MAX, ERRAND_LETTERS_PER_TURN_MAX, ERRANDS_WAITING_MAX};
use protocol::phase::End;
use protocol::planted::{Bug, is_planted};
use protocol::slots::Key;
use std::collections::{HashMap, VecDeque};

/// What a registrar knows of a path of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Entry {
    /// A fork is being made there.
    Reserved,
    /// A fork is there, on that shard.
    At(usize),
}

/// What a shard knows of streams on others, and does for them.
#[derive(Default)]
pub(super) struct Directory {
    entries: HashMap<Box<str>, Entry>,
    /// Errands whose path is reserved, or not given up on the disk.
    waiting: Vec<Errand>,
    /// Letters in their order, behind the first that found its queue full.
    unsent: VecDeque<(usize, ErrandLetter)>,
    /// Answers that wait for the journal, in the order of their records.
    held: VecDeque<HeldAnswer>,
    /// Letters may have come.
    pub(super) rung: bool,
}

struct HeldAnswer {
    record: u64,
    to: (usize, Key),
    /// The shard that it goes by.
    by: usize,
    answer: Box<Answer>,
}

impl Directory {
    /// Whether it has something to do that may only be done in time.
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.unsent.is_empty() && self.held.is_empty()
    }

    /// For simulations: whether there is room for the first letter that found none.
    pub(super) fn could_send<T>(&self, neighbours: &Neighbours<T>) -> bool {
        self.unsent.front().is_some_and(|&(to, _)| !neighbours.is_full_of_errands(to))
    }
}

impl<I: Io> Shard<I> {
    /// Forks that are on other shards although their paths belong to this one, each with its shard. Before the first turn.
    pub fn know_forks(&mut self, forks: impl IntoIterator<Item = (Box<str>, usize)>) {
        let entries = forks.into_iter().map(|(path, shard)| (path, Entry::At(shard)));
        self.directory.entries.extend(entries);
    }

    fn own(&self) -> usize {
        self.neighbours.as_ref().map_or(0, Neighbours::own)
    }

    fn registrar_of(&self, path: &str) -> usize {
        home_of(path, self.neighbours.as_ref().map_or(1, Neighbours::shards))
    }

    fn is_known_elsewhere(&self, path: &str) -> bool {
        !self.directory.entries.is_empty() && self.directory.entries.contains_key(path)
    }

    /// The shard that a client's request for a durable stream is to go to, and whether the stream is there or nowhere; `None`: it is
    /// served here.
    pub(super) fn durable_elsewhere(&self, key: Key, path: &str) -> Option<(usize, bool)> {
        let neighbours = self.neighbours.as_ref()?;
        let home = home_of(path, neighbours.shards());
        if home == neighbours.own() && self.directory.entries.is_empty() {
            return None;
        }
        let sent = self.conns.get(key).is_some_and(|conn| conn.is_sent());
        if sent || self.durable.store.holds(path) {
            return None;
        }
        if home != neighbours.own() {
            return Some((home, false));
        }
        match self.directory.entries.get(path) {
            Some(&Entry::At(shard)) => Some((shard, true)),
            // Nobody has been told yet that there is one.
            Some(Entry::Reserved) | None => None,
        }
    }

    // ---- creations

    /// If other shards must be asked for what a client's request wants to create, they are; gives the request back if not.
    pub(super) fn run_errand_for(
        &mut self,
        key: Key,
        request: Request,
        body: Vec<u8>,
    ) -> Result<(), (Request, Vec<u8>)> {
        if self.neighbours.is_none() || !request.is_create() || self.decides_alone(&request) {
            return Err((request, body));
        }
        if self.leaving != Leaving::No {
            // The others may be gone before they can answer.
            self.end_stream(key, End::Drain);
            return Ok(());
        }
        if let Some(durable) = self.streams.get_mut(key).and_then(|stream| stream.durable.as_mut()) {
            durable.state = State::Away(body.capacity());
        }
        self.stats.counters.durable_errands += 1;
        let of = (self.own(), key);
        self.run_errand(Box::new(Errand { request, body, of, stage: Stage::Asking, hops: 0 }));
        self.follow_stream_timer(key);
        Ok(())
    }

    /// Whether all that a creation hangs on is here.
    fn decides_alone(&mut self, request: &Request) -> bool {
        let (own, now) = (self.own(), self.durable_now());
        if self.durable.store.has(&request.path, now) {
            return true;
        }
        let is_ours =
            |shard: &Self, path: &str| shard.registrar_of(path) == own && !shard.is_known_elsewhere(path);
        is_ours(self, &request.path)
            && request.source().is_none_or(|source| self.durable.store.holds(source) || is_ours(self, source))
    }

    /// Takes an errand as far as it gets on this shard.
    fn run_errand(&mut self, mut errand: Box<Errand>) {
        let (own, now) = (self.own(), self.durable_now());
        if errand.hops > ERRAND_HOPS_MAX {
            return self.give_up_errand(&errand);
        }
        let path = &errand.request.path;
        let source = errand.request.source().unwrap_or_default();
        match errand.stage {
            Stage::Asking | Stage::Here if self.durable.store.has(path, now) => self.carry_out(errand),
            // It was here, and its registrar has not been told.
            Stage::Asking | Stage::Here if self.durable.store.is_going(path) => self.wait_with(errand),
            Stage::Asking | Stage::Here if self.registrar_of(path) != own => {
                let registrar = self.registrar_of(path);
                errand.stage = Stage::Asking;
                self.send_errand(registrar, errand);
            }
            Stage::Asking | Stage::Here => match self.directory.entries.get(path) {
                Some(Entry::Reserved) => self.wait_with(errand),
                Some(&Entry::At(shard)) => {
                    errand.stage = Stage::Here;
                    self.send_errand(shard, errand);
                }
                None if source.is_empty() || self.durable.store.has(source, now) => self.carry_out(errand),
                None if self.durable.store.is_vacated(path) => self.wait_with(errand),
                None => {
                    self.directory.entries.insert(path.clone(), Entry::Reserved);
                    errand.stage = Stage::Forking;
                    self.run_errand(errand);
                }
            },
            Stage::Forking | Stage::SourceHere if self.durable.store.has(source, now) => {
                self.carry_out(errand);
            }
            // What is being made has not been answered: there is none.
            Stage::SourceHere => self.carry_out(errand),
            Stage::Forking if self.registrar_of(source) != own => {
                let registrar = self.registrar_of(source);
                self.send_errand(registrar, errand);
            }
            Stage::Forking => match self.directory.entries.get(source) {
                Some(&Entry::At(shard)) => {
                    errand.stage = Stage::SourceHere;
                    self.send_errand(shard, errand);
                }
                Some(Entry::Reserved) | None => self.carry_out(errand),
            },
        }
    }

    fn wait_with(&mut self, errand: Box<Errand>) {
        // What waits for a disk that takes nothing would wait for long.
        if self.directory.waiting.len() >= ERRANDS_WAITING_MAX || self.durable.store.refuses_changes() {
            return self.give_up_errand(&errand);
        }
        self.directory.waiting.push(*errand);
    }

    fn send_errand(&mut self, to: usize, mut errand: Box<Errand>) {
        errand.hops += 1;
        self.write_errand(to, ErrandLetter::Errand(errand));
    }

    /// What a creation wants is decided here.
    fn carry_out(&mut self, errand: Box<Errand>) {
        let now = self.durable_now();
        let refuses = self.durable.store.refuses_changes();
        let reply = self.durable.store.handle(&errand.request, &errand.body, errand.of.1, now);
        // Nothing else is said to what creates.
        let Reply::Answer(answer) = reply else { return };
        let record = self.durable.store.must_wait().filter(|_| !refuses);
        let late = is_planted(Bug::ForkToldLate);
        if !late {
            self.settle_errand(&errand);
        }
        let by = self.way_of(&errand);
        let (to, answer) = (errand.of, Box::new(answer));
        match record {
            Some(record) => self.directory.held.push_back(HeldAnswer { record, to, by, answer }),
            None => self.answer_errand(to, by, answer),
        }
        if late {
            self.settle_errand(&errand);
        }
        self.wake_durable();
        self.follow_durable_timer();
    }

    /// It goes no further.
    fn give_up_errand(&mut self, errand: &Errand) {
        self.stats.counters.durable_errands_refused += 1;
        let refusal = self.durable.store.change_refusal();
        let answer = refusal.unwrap_or_else(|| self.durable.store.refuse(&UNSETTLED));
        self.settle_errand(errand);
        self.answer_errand(errand.of, self.way_of(errand), Box::new(answer));
    }

    /// If the path was reserved for it, the registrar is told what became of it.
    fn settle_errand(&mut self, errand: &Errand) {
        if !matches!(errand.stage, Stage::Forking | Stage::SourceHere) {
            return;
        }
        let path = errand.request.path.clone();
        let registrar = self.registrar_of(&path);
        let made = self.durable.store.holds(&path);
        if registrar == self.own() {
            self.settled(registrar, &path, made);
        } else {
            self.write_errand(registrar, ErrandLetter::Settled { path, made });
        }
    }

    /// The shard that the answer to an errand goes by: nobody is to know of a fork before its registrar does.
    fn way_of(&self, errand: &Errand) -> usize {
        match errand.stage {
            Stage::Forking | Stage::SourceHere => self.registrar_of(&errand.request.path),
            Stage::Asking | Stage::Here => errand.of.0,
        }
    }

    fn answer_errand(&mut self, to: (usize, Key), by: usize, answer: Box<Answer>) {
        let own = self.own();
        let next = if by == own { to.0 } else { by };
        if next != own {
            return self.write_errand(next, ErrandLetter::Answered { to, answer });
        }
        let durable = self.streams.get_mut(to.1).and_then(|stream| stream.durable.as_mut());
        if let Some(durable) = durable
            && matches!(durable.state, State::Away(_))
        {
            durable.state = State::Answered;
            self.follow_overdraft(to.1);
            self.durable_reply(to.1, Reply::Answer(*answer));
        }
    }

    // ---- what is told

    /// A fork was made on that shard at a path of this one, or was not.
    fn settled(&mut self, by: usize, path: &str, made: bool) {
        if made && by != self.own() {
            if let Some(entry) = self.directory.entries.get_mut(path) {
                *entry = Entry::At(by);
            }
        } else if !is_planted(Bug::ReservedForEver) {
            self.directory.entries.remove(path);
        }
    }

    /// In every turn: what other shards say, and what can go on now.
    pub(super) fn follow_directory(&mut self) {
        if self.neighbours.is_none() {
            return;
        }
        if std::mem::take(&mut self.directory.rung) {
            self.read_errands();
        }
        while let Some(path) = self.durable.store.take_gone() {
            let registrar = self.registrar_of(&path);
            if !is_planted(Bug::GoneUntold) {
                self.write_errand(registrar, ErrandLetter::Gone { path });
            }
        }
        if self.directory.is_idle() {
            return;
        }
        let (acknowledged, failing) = (self.durable.store.acknowledged(), self.durable.store.is_failing());
        while let Some(held) = self.directory.held.front()
            && (held.record <= acknowledged || failing)
            && let Some(mut held) = self.directory.held.pop_front()
        {
            if held.record > acknowledged {
                *held.answer = self.durable.store.refuse(&UNCERTAIN);
            }
            self.answer_errand(held.to, held.by, held.answer);
        }
        for errand in std::mem::take(&mut self.directory.waiting) {
            self.run_errand(Box::new(errand));
        }
        self.send_unsent();
    }

    fn read_errands(&mut self) {
        for _ in 0..ERRAND_LETTERS_PER_TURN_MAX {
            let Some((from, letter)) = self.neighbours.as_mut().and_then(Neighbours::read_errand) else {
                return;
            };
            match letter {
                ErrandLetter::Errand(errand) => self.run_errand(errand),
                ErrandLetter::Settled { path, made } => self.settled(from, &path, made),
                ErrandLetter::Answered { to, answer } => self.answer_errand(to, self.own(), answer),
                ErrandLetter::Gone { path } => {
                    if self.directory.entries.get(&path) == Some(&Entry::At(from)) {
                        self.directory.entries.remove(&path);
                    }
                }
            }
        }
        // The others wait for the next turn, which does not sleep.
        self.directory.rung = true;
    }

    fn write_errand(&mut self, to: usize, letter: ErrandLetter) {
        self.directory.unsent.push_back((to, letter));
        self.send_unsent();
    }

    /// Sends what there is room for. All wait behind the first that does not fit: their order counts, and its shard rings when there is
    /// room.
    pub(super) fn send_unsent(&mut self) {
        while let Some((to, letter)) = self.directory.unsent.pop_front() {
            let Some(neighbours) = &mut self.neighbours else { return };
            if neighbours.is_gone(to) {
                self.return_letter(letter);
                continue;
            }
            if let Err(letter) = neighbours.write_errand(to, letter) {
                self.directory.unsent.push_front((to, letter));
                break;
            }
        }
    }

    /// Its shard has left. Whoever waits for an answer is told.
    fn return_letter(&mut self, letter: ErrandLetter) {
        if let ErrandLetter::Errand(errand) = letter {
            self.give_up_errand(&errand);
        }
    }

    /// Whether other shards have all that they wait for; called when they send nothing new any more.
    pub(super) fn errands_done(&self) -> bool {
        self.directory.is_idle() && self.neighbours.as_ref().is_none_or(Neighbours::errands_read)
    }
}

/// For simulations: what shards know of each other's streams.
impl<I: Io> Shard<I> {
    /// Paths of this shard, each with the shard where its fork is; `None` while it is reserved.
    pub fn forks_known(&self) -> Vec<(String, Option<usize>)> {
        let entries = self.directory.entries.iter();
        entries
            .map(|(path, entry)| match entry {
                Entry::Reserved => (path.to_string(), None),
                Entry::At(shard) => (path.to_string(), Some(*shard)),
            })
            .collect()
    }

    /// Paths of other shards whose forks are here.
    pub fn forks_here(&self) -> Vec<String> {
        self.durable.store.paths_away().map(str::to_owned).collect()
    }

    pub(super) fn audit_directory(&self) -> Result<(), String> {
        if let (Some(&(to, _)), Some(neighbours)) = (self.directory.unsent.front(), &self.neighbours)
            && !self.left
            && !neighbours.awaited(to).errands
        {
            return Err("letters wait for room, and nothing will look".to_owned());
        }
        Ok(())
    }
}
