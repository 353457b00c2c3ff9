//! Several shards in one world, with the real mesh between them. Which of them runs next is drawn from the seed; time goes on
//! while all sleep.

use crate::disk::SimDisk;
use crate::io::SimIo;
use crate::run::Sim;
use protocol::durable::journal::Recovered;
use protocol::durable::{Rehoming, agree};
use shard::core::{JournalOf, Shard, Sleepy};
use shard::mesh::{Command, mailbox, neighbours_with};
use shard::stats::Counters;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

impl Sim {
    /// With so many shards of the same settings, and room for so many clients on their way from each to each other.
    pub(crate) fn of_shards(mut self, shards: usize, room: usize) -> Self {
        let upstreams = {
            let world = self.world();
            Arc::new(world.upstream_set(1, &(0..world.hosts.len()).collect::<Vec<_>>()))
        };
        for ring in 1..shards {
            self.world().add_ring();
            let io = SimIo(Rc::clone(&self.world), ring);
            let mut shard = Shard::new(io, ring, Arc::clone(&self.settings), Arc::clone(&upstreams));
            if let Some(tls) = &self.tls {
                shard.command(Command::Tls(Arc::clone(tls)));
            }
            self.others.push(shard);
        }
        self.ports = (0..shards).map(|_| mailbox().expect("there are descriptors").1).collect();
        for (ring, end) in neighbours_with(&self.ports, room).into_iter().enumerate() {
            self.shard_mut(ring).meet(end);
        }
        self
    }

    /// With durable streams on disks, one for each shard that there is or was, and what they hold.
    pub(crate) fn with_disks(mut self, mut disks: Vec<SimDisk>) -> Self {
        let shards = self.shards().count();
        while disks.len() < shards {
            disks.push(SimDisk::new(JournalOf::Durable, 100 + disks.len() as u64));
        }
        let read = |disks: &[SimDisk]| {
            let mut found = disks.iter().map(SimDisk::recover).enumerate().collect();
            agree(&mut found);
            found
        };
        let mut found: BTreeMap<usize, Recovered> = read(&disks);
        if let Some(mut rehoming) = Rehoming::begin(&mut found, shards, 5) {
            for leaving in [false, true] {
                if leaving {
                    rehoming.leave();
                }
                for (shard, disk) in disks.iter_mut().enumerate() {
                    while let Some(job) = rehoming.next_job(shard) {
                        disk.carry_out(&job);
                        rehoming.job_done(shard);
                    }
                }
            }
            disks.truncate(shards);
            found = read(&disks);
        }
        disks.truncate(shards);
        for (own, recovered) in found.into_iter().filter(|(own, _)| *own < shards) {
            let lost = recovered.findings.iter().find(|finding| finding.lost);
            assert!(lost.is_none(), "shard {own}: {lost:?}");
            let away: Vec<(Box<str>, usize)> =
                recovered.paths_away(shards, own).map(|(path, home)| (path.into(), home)).collect();
            self.shard_mut(own).open_journal(recovered, 7);
            for (path, home) in away {
                self.shard_mut(home).know_forks([(path, own)]);
            }
        }
        self.disks = disks;
        self
    }

    pub(crate) fn shards(&self) -> impl Iterator<Item = &Shard<SimIo>> {
        std::iter::once(&self.shard).chain(&self.others)
    }

    pub(crate) fn shard_mut(&mut self, ring: usize) -> &mut Shard<SimIo> {
        match ring {
            0 => &mut self.shard,
            _ => &mut self.others[ring - 1],
        }
    }

    /// Something that all shards count, together.
    pub(crate) fn total(&self, of: impl Fn(&Counters) -> u64) -> u64 {
        self.shards().map(|shard| of(&shard.stats().counters)).sum()
    }

    pub(crate) fn have_left(&self) -> bool {
        self.shards().all(Shard::has_left)
    }

    /// To all shards.
    pub(crate) fn command(&mut self, command: &Command) {
        for ring in 0..=self.others.len() {
            self.command_one(ring, command.clone());
        }
    }

    /// It hears of it when it is woken.
    pub(crate) fn command_one(&mut self, ring: usize, command: Command) {
        if self.others.is_empty() {
            return self.shard.command(command);
        }
        let mut world = self.world();
        world.rings[ring].commands.push(command);
        world.rung(ring);
    }

    /// One shard leaves, as soon as the others begin to as well.
    pub(crate) fn drain_one(&mut self, ring: usize, deadline_ms: u64) {
        let now = self.now_us();
        self.world().control.leaving_us.get_or_insert(now);
        self.command_one(ring, Command::Drain { deadline_ms });
    }

    /// A turn of the shard whose it is, or none by the time of `sleepy`.
    pub(crate) fn turn_of_one(&mut self, sleepy: Sleepy) {
        let limit_us = match sleepy {
            Sleepy::Yes => u64::MAX,
            Sleepy::No => self.now_us(),
            Sleepy::UntilUs(until_us) => until_us,
        };
        // A disk is the first shard's alone.
        let disk_us = self.disk.as_ref().and_then(SimDisk::due_us).unwrap_or(u64::MAX);
        let next = self.world().next_awake(limit_us.min(disk_us));
        if next.is_none() && disk_us <= self.now_us() {
            return self.turn_of(0, Sleepy::No);
        }
        if let Some(ring) = next {
            let sleepy = if self.world().rings[ring].left { Sleepy::No } else { Sleepy::Yes };
            self.turn_of(ring, sleepy);
        }
    }

    pub(crate) fn turn_of(&mut self, ring: usize, sleepy: Sleepy) {
        self.world().say(|| format!("-- shard {ring}"));
        let mut disk = if ring == 0 { self.disk.take() } else { None };
        let mut disks = std::mem::take(&mut self.disks);
        let now_us = self.now_us();
        if let Some(disk) = disks.get_mut(ring) {
            disk.tell(self.shard_mut(ring), now_us);
        }
        let shard = self.shard_mut(ring);
        if let Some(disk) = &mut disk {
            disk.tell(shard, now_us);
        }
        assert!(shard.turn(sleepy).is_ok(), "a simulated ring does not fail");
        let now_us = self.now_us();
        if let Some(mut disk) = disk {
            disk.ask(self.shard_mut(ring), now_us);
            self.disk = Some(disk);
        }
        if let Some(disk) = disks.get_mut(ring) {
            let busy = disk.due_us().is_some();
            disk.ask(self.shard_mut(ring), now_us);
            if let Some(due_us) = disk.due_us().filter(|_| !busy) {
                // What is done ends its sleep.
                self.world().rings_at(ring, due_us - now_us);
            }
        }
        self.disks = disks;
        self.check_step(ring);
        if self.shard_mut(ring).take_woken() {
            let commands = std::mem::take(&mut self.world().rings[ring].commands);
            for command in commands {
                self.shard_mut(ring).command(command);
            }
        }
        self.hear_bells();
        for (ring, shard) in self.shards().enumerate() {
            if let Some(what) = shard.overslept() {
                assert!(self.world().is_rung(ring), "shard {ring} waits for room that there is with {what}");
            }
        }
        let streams = self.shards().map(|shard| shard.population().2).sum();
        self.streams_max = self.streams_max.max(streams);
        while let Some(report) = self.shard_mut(ring).next_report() {
            self.report(ring, report);
        }
        if self.turns.is_multiple_of(128) {
            self.check_memory(ring);
        }
    }

    fn hear_bells(&mut self) {
        for ring in 0..self.ports.len() {
            if self.ports[ring].is_rung() {
                self.world().rung(ring);
            }
        }
    }
}
